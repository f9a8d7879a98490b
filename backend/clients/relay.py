"""NatRelay: a NAT between one client and a server, which can change its mind about everything.

Any client can be moved with it: to another port, another address, another server, or from IPv6 to IPv4 and back,
as behind a NAT64. It knows nothing of QUIC.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from backend.clients.source import source_towards
from lb.address import Address

# Ours.
SOCKET_BUFFER = 1 << 20  # octets


@dataclass(slots=True)
class RelayCounters:
    """Datagrams relayed upwards (to the server) and downwards, and what was dropped of them."""

    up: int = 0
    down: int = 0
    muted: int = 0
    deaf: int = 0
    moves: int = 0


class NatRelay:
    """Clients send to `address`; servers see `outside`. While `is_muted` nothing goes up, while `is_deaf` down."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.counters = RelayCounters()
        self.is_muted = False
        self.is_deaf = False
        self._client: tuple[Any, ...] | None = None
        self._inside: asyncio.DatagramTransport | None = None
        self._outside: asyncio.DatagramTransport | None = None
        self._came_down = asyncio.Event()
        self._old: set[asyncio.DatagramTransport] = set()

    @classmethod
    async def open(cls, target: Address, *, inside: str = "127.0.0.1", outside: str | None = None) -> Self:
        """Relay what comes to an unused port of `inside` to `target`, from the address `outside`."""
        relay = cls(target)
        relay._inside = await _endpoint(inside, relay._up)
        try:
            await relay._move(outside, keep_old=False)
        except OSError:
            relay.close()
            raise
        return relay

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def rebind(self, outside: str | None = None, *, keep_old: bool = False) -> None:
        """Take another port towards the server, or another address too.

        With `keep_old`, datagrams to the old port still arrive, as when a route changes in one direction only.
        """
        self.counters.moves += 1
        await self._move(outside or self.outside.host, keep_old=keep_old)

    async def retarget(self, target: Address, outside: str | None = None, *, keep_old: bool = False) -> None:
        """Send to another server, of any family, from another port."""
        self.counters.moves += 1
        self.target = target
        await self._move(outside, keep_old=keep_old)

    async def relayed_down(self, datagrams: int) -> None:
        """Wait until the server has sent that many more."""
        enough = self.counters.down + datagrams
        while self.counters.down < enough:
            self._came_down.clear()
            await self._came_down.wait()

    @property
    def address(self) -> Address:
        """Where clients send to."""
        return _name(self._inside)

    @property
    def outside(self) -> Address:
        """Where the server sees datagrams come from."""
        return _name(self._outside)

    def close(self) -> None:
        for transport in (self._inside, self._outside, *self._old):
            if transport is not None:
                transport.close()

    async def _move(self, outside: str | None, *, keep_old: bool) -> None:
        transport = await _endpoint(outside or source_towards(self.target), self._down)
        self._outside, old = transport, self._outside
        if old is not None:
            if keep_old:
                self._old.add(old)
            else:
                old.close()

    def _up(self, data: bytes, source: tuple[Any, ...]) -> None:
        self._client = source
        if self.is_muted:
            self.counters.muted += 1
        elif self._outside is not None:
            self.counters.up += 1
            self._outside.sendto(data, self.target)

    def _down(self, data: bytes, _: tuple[Any, ...]) -> None:
        if self.is_deaf:
            self.counters.deaf += 1
        elif self._client is not None and self._inside is not None:
            self.counters.down += 1
            self._came_down.set()
            self._inside.sendto(data, self._client)


class _Receiver(asyncio.DatagramProtocol):
    def __init__(self, receive: Callable[[bytes, tuple[Any, ...]], None]) -> None:
        self._receive = receive

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._receive(data, addr)


async def _endpoint(host: str, receive: Callable[[bytes, tuple[Any, ...]], None]) -> asyncio.DatagramTransport:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        sock.bind((host, 0))
    except OSError:
        sock.close()
        raise
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Receiver(receive), sock=sock)
    return transport


def _name(transport: asyncio.DatagramTransport | None) -> Address:
    if transport is None:
        raise RuntimeError("not open")
    host, port, *_ = transport.get_extra_info("sockname")
    return Address(host, port)
