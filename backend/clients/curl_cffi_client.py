"""libcurl with ngtcp2 and BoringSSL, as curl_cffi has it, which makes it look like a browser."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from curl_cffi import AsyncCurl, Curl, CurlError, CurlHttpVersion, CurlInfo, CurlOpt

from backend.clients.transfer import ConnectionEndedError, Transfer
from backend.clients.visitor import Wishes
from lb.address import Address

# Ours.
SERVER_NAME = "localhost"
CONNECT_TIMEOUT = 5.0  # seconds


class CurlCffiVisitor:
    """Each session begins with nothing."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes

    async def open(self, server: Address, *paths: str) -> CurlCffiSession:
        return await CurlCffiSession(server, paths).start()

    async def close(self) -> None:
        """There is nothing to close."""


class CurlCffiSession:
    """One connection, and one path after the other."""

    can_speak = False
    reset_at: float | None = None  # it does not say why a connection ended
    early: bool | None = None

    def __init__(self, server: Address, paths: Sequence[str]) -> None:
        self.transfers = [Transfer(path) for path in paths]
        self._server = server
        self._curl = Curl()
        self._multi = AsyncCurl()
        self._asking: asyncio.Task[None] | None = None
        host = f"[{server.host}]" if server.is_ipv6 else server.host
        self._curl.setopt(CurlOpt.RESOLVE, [f"{SERVER_NAME}:{server.port}:{host}"])
        self._curl.setopt(CurlOpt.HTTP_VERSION, CurlHttpVersion.V3ONLY)
        self._curl.setopt(CurlOpt.SSL_VERIFYPEER, 0)
        self._curl.setopt(CurlOpt.SSL_VERIFYHOST, 0)
        self._curl.setopt(CurlOpt.CONNECTTIMEOUT_MS, round(CONNECT_TIMEOUT * 1000))

    async def start(self) -> CurlCffiSession:
        """Connect. Raises ConnectionEndedError or TimeoutError."""
        self._asking = asyncio.create_task(self._ask())
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self.transfers[0].reached(1)
        except BaseException:
            await self.close()
            raise
        return self

    def speak(self) -> None:
        """It cannot be told to."""

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._asking
        await self._multi.close()  # type: ignore[no-untyped-call]
        self._curl.close()

    async def _ask(self) -> None:
        for transfer in self.transfers:
            self._curl.setopt(CurlOpt.URL, f"https://{SERVER_NAME}:{self._server.port}{transfer.path}".encode())
            self._curl.setopt(CurlOpt.WRITEFUNCTION, transfer.feed)
            try:
                await self._multi.add_handle(self._curl)
            except CurlError as error:
                for unanswered in self.transfers:
                    if not unanswered.is_over:
                        unanswered.fail(ConnectionEndedError(str(error)))
                return
            transfer.status = int(self._curl.getinfo(CurlInfo.RESPONSE_CODE))  # type: ignore[arg-type]
            transfer.feed(b"", is_last=True)
