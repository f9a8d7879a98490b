"""An ASGI application with the resources that all servers here have: /whoami, /bytes/N, /slow/SECONDS, /status/CODE."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from backend.routable import Identity
from lb.address import Address

Message = dict[str, Any]

# Ours.
CHUNK = bytes(range(256)) * 64
TICK = 0.05  # seconds between the lines of /slow
MAX_SECONDS = 3600.0


class Application:
    """Answers requests with what it knows of its server."""

    def __init__(self, name: str, identity: Identity) -> None:
        self._name = name
        self._identity = identity

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        first, _, argument = scope["path"].removeprefix("/").partition("/")
        try:
            status, body = self._answer(first, argument, scope.get("client"))
        except ValueError:
            status, body = 400, _once(b"expected a number\n")
        await send({"type": "http.response.start", "status": status, "headers": []})
        async for chunk in body:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _answer(self, first: str, argument: str, client: tuple[str, int] | None) -> tuple[int, AsyncIterator[bytes]]:
        if first == "whoami":
            server_id = self._identity.server_id
            answer = {
                "name": self._name,
                "server_id": server_id.hex() if server_id else None,
                "client": str(Address(*client[:2])) if client else None,
            }
            return 200, _once(json.dumps(answer).encode() + b"\n")
        if first == "bytes":
            return 200, _bytes(int(argument))
        if first == "slow":
            return 200, _slow(min(float(argument), MAX_SECONDS))
        if first == "status":
            return int(argument), _once(b"")
        return 404, _once(b"no such resource\n")


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _bytes(count: int) -> AsyncIterator[bytes]:
    for _ in range(count // len(CHUNK)):
        yield CHUNK
    yield CHUNK[: count % len(CHUNK)]


async def _slow(seconds: float) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    start = loop.time()
    for tick in range(round(seconds / TICK)):
        yield b"%d\n" % tick
        await asyncio.sleep(start + (tick + 1) * TICK - loop.time())
    yield b"end\n"


async def _lifespan(receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
