"""Clients that come back: with what an earlier connection has given them, to any server of a fleet."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.clients.aioquic_client import AioquicClient
from backend.clients.http3 import CONNECT_TIMEOUT, SERVER_NAME, Http3Client, _sockaddr
from backend.clients.process import DIES_WITH_US
from backend.clients.qh3_client import Qh3Client
from backend.clients.transfer import Transfer
from lb.address import Address

LIBRARIES: Mapping[str, type[Http3Client]] = {"aioquic": AioquicClient, "qh3": Qh3Client}
GTLSCLIENT = shutil.which("gtlsclient")


@dataclass
class Kept:
    """What a client has been given: tickets and tokens, the newest last."""

    tickets: list[Any] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)


@dataclass
class Visit:
    """One connection of a client: the requests it began at once, and what it was given."""

    client: Http3Client
    transfers: list[Transfer]
    kept: Kept

    async def answers(self) -> list[Any]:
        return [json.loads(await transfer.complete()) for transfer in self.transfers]

    async def given_ticket(self) -> Any:
        while not self.kept.tickets:  # noqa: ASYNC110 - another library's
            await asyncio.sleep(0.005)
        return self.kept.tickets[-1]

    async def given_token(self, count: int = 1) -> list[bytes]:
        while len(self.kept.tokens) < count:  # noqa: ASYNC110 - another library's
            await asyncio.sleep(0.005)
        return self.kept.tokens


@asynccontextmanager
async def visit(
    library: str,
    server: Address,
    *requests: str | tuple[str, bytes],
    ticket: Any = None,
    token: bytes = b"",
    **options: Any,
) -> AsyncIterator[Visit]:
    """Connect, and send requests before there is an answer: paths to GET, or paths and bodies to POST.

    With a ticket that allows it they are early data. `options` are the QUIC configuration's.
    """
    kept = Kept()
    client = LIBRARIES[library](server)
    stack = client.stack
    more: dict[str, Any] = {"session_ticket_handler": kept.tickets.append}
    if library == "aioquic":
        more["token_handler"] = kept.tokens.append
        options["token"] = token
    elif token:
        raise ValueError(f"{library} has no use for a token")
    configuration = stack.configuration(
        is_client=True,
        alpn_protocols=["h3"],
        server_name=SERVER_NAME,
        verify_mode=ssl.CERT_NONE,
        session_ticket=ticket,
        **options,
    )
    client._quic = stack.connection(configuration=configuration, **more)
    await client._open(None)
    client._quic.connect(_sockaddr(server), now=client._now())
    client._http = stack.http3(client._quic)  # with what the ticket says that the server allows
    try:
        transfers = [
            client.begin(request) if isinstance(request, str) else client.begin(*request) for request in requests
        ]
        client._transmit()
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await client._connected
        yield Visit(client, transfers, kept)
    finally:
        client.close()


async def gtls_visit(server: Address, path: str, directory: Path, *options: str) -> tuple[Any, str]:
    """gtlsclient, with its session, transport parameters and token kept in a directory. What came, and its log."""
    if GTLSCLIENT is None:
        raise RuntimeError("gtlsclient is not installed")
    downloads = directory / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir()
    process = await asyncio.create_subprocess_exec(
        *DIES_WITH_US,
        GTLSCLIENT,
        "--no-quic-dump",
        "--no-http-dump",
        "--exit-on-all-streams-close",
        f"--download={downloads}",
        f"--session-file={directory / 'session'}",
        f"--tp-file={directory / 'tp'}",
        f"--token-file={directory / 'token'}",
        *options,
        server.host,
        str(server.port),
        f"https://localhost:{server.port}{path}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(CONNECT_TIMEOUT):
        _, log = await process.communicate()
    file = downloads / path.rpartition("/")[2]
    return (json.loads(file.read_bytes()) if file.exists() else None), log.decode("utf-8", "replace")
