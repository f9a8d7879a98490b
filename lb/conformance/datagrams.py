"""A UDP socket that is connected to the server: what it has sent, what came, and what the kernel says about it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from lb.address import Address

# Ours.
RECEIVE_BUFFER = 1 << 20  # octets, as far as net.core.rmem_max lets us


class Datagrams(asyncio.DatagramProtocol):
    """One socket, from a port that the kernel chooses."""

    def __init__(self, on_datagram: Callable[[bytes], None], on_error: Callable[[], None] | None = None) -> None:
        self.error: Exception | None = None
        """What the kernel said last: that nobody listens there, for one."""
        self._on_datagram = on_datagram
        self._on_error = on_error
        self._transport: asyncio.DatagramTransport | None = None

    @classmethod
    async def open(
        cls, server: Address, on_datagram: Callable[[bytes], None], on_error: Callable[[], None] | None = None
    ) -> Datagrams:
        """A socket whose datagrams are handed on as they come. Raises OSError."""
        sock = socket.socket(socket.AF_INET6 if server.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            sock.connect(server)
        except OSError:
            sock.close()
            raise
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_datagram_endpoint(lambda: cls(on_datagram, on_error), sock=sock)
        return protocol

    def send(self, datagram: bytes) -> None:
        if self._transport is not None:
            self._transport.sendto(datagram)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: object) -> None:
        if self._transport is not None:
            self._on_datagram(data)

    def error_received(self, exc: Exception) -> None:
        self.error = exc
        if self._on_error is not None:
            self._on_error()


class Asker:
    """A socket for one question.

    To be opened before there are connections: a port that one of them had would get what a server sends after it.
    """

    def __init__(self) -> None:
        self._answers: list[bytes] = []
        self._heard = asyncio.Event()
        self._sock: Datagrams | None = None

    @classmethod
    async def open(cls, server: Address) -> Asker:
        """Raises OSError."""
        asker = cls()
        asker._sock = await Datagrams.open(server, asker._hear)
        return asker

    async def ask(self, datagram: bytes, within: float, linger: float) -> tuple[bytes, ...]:
        """All that comes back: up to `linger` seconds after the first answer, none after `within` seconds."""
        assert self._sock is not None  # noqa: S101 - it was opened
        self._sock.send(datagram)
        try:
            async with asyncio.timeout(within):
                await self._heard.wait()
        except TimeoutError:
            return ()
        await asyncio.sleep(linger)
        return tuple(self._answers)

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()

    def _hear(self, datagram: bytes) -> None:
        self._answers.append(datagram)
        self._heard.set()
