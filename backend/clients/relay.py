"""NatRelay: a NAT between clients and a server, which can change its mind about everything.

Any client can be moved with it: to another port, another address, another server, or from IPv6 to IPv4 and back,
as behind a NAT64. It can be the narrow part of a way, too. It knows nothing of QUIC.
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
MAX_DATAGRAM = 65_536
AT_ONCE = 64  # datagrams of one socket before the others are looked at
QUEUE = 0.1  # seconds of what a narrow way lets through; what comes beyond that is dropped

_Source = tuple[Any, ...]
# What went up (True) to the server or down, and from or to which client socket.
Tap = Callable[[bool, bytes, _Source], None]


@dataclass(slots=True)
class RelayCounters:
    """Datagrams relayed upwards (to the server) and downwards, and what was dropped of them."""

    up: int = 0
    down: int = 0
    muted: int = 0
    deaf: int = 0
    cut: int = 0
    queue_full: int = 0
    moves: int = 0


class NatRelay:
    """Clients send to `address`; servers see `outside`. While `is_muted` nothing goes up, while `is_deaf` down.

    Each client socket has a socket of its own outside.
    """

    def __init__(self, target: Address, *, rate: float | None = None, tap: Tap | None = None) -> None:
        self.target = target
        self.counters = RelayCounters()
        self.is_muted = False
        self.is_deaf = False
        self._rate = rate
        self._tap = tap
        self._free_at = 0.0  # when the narrow way has let everything through that is queued
        self._inside: socket.socket | None = None
        self._outside: socket.socket | None = None  # of the client that was heard last
        self._ways: dict[_Source, socket.socket] = {}
        self._client: _Source | None = None
        self._cut: set[_Source] = set()
        self._old: set[socket.socket] = set()
        self._came_down = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(
        cls,
        target: Address,
        *,
        inside: str = "127.0.0.1",
        outside: str | None = None,
        rate: float | None = None,
        tap: Tap | None = None,
    ) -> Self:
        """Relay what comes to an unused port of `inside` to `target`, from the address `outside`.

        With `rate`, only so many octets per second go down. `tap` sees what is relayed.
        """
        relay = cls(target, rate=rate, tap=tap)
        relay._inside = relay._socket(inside, relay._up)
        try:
            relay._outside = relay._socket_outside(outside)
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
        self._move(outside or self.outside.host, keep_old=keep_old)

    async def retarget(self, target: Address, outside: str | None = None, *, keep_old: bool = False) -> None:
        """Send to another server, of any family, from another port."""
        self.counters.moves += 1
        self.target = target
        self._move(outside, keep_old=keep_old)

    async def relayed_down(self, datagrams: int) -> None:
        """Wait until the server has sent that many more."""
        enough = self.counters.down + datagrams
        while self.counters.down < enough:
            self._came_down.clear()
            await self._came_down.wait()

    def cut_off(self) -> None:
        """Relay nothing more for the client sockets that have been heard so far, in either direction."""
        self._cut |= set(self._ways)

    @property
    def address(self) -> Address:
        """Where clients send to."""
        return _name(self._inside)

    @property
    def outside(self) -> Address:
        """Where the server sees datagrams come from."""
        return _name(self._outside)

    def close(self) -> None:
        for sock in {self._inside, self._outside, *self._ways.values(), *self._old}:
            if sock is not None:
                self._close(sock)
        self._inside = self._outside = None
        self._ways.clear()

    def _move(self, outside: str | None, *, keep_old: bool) -> None:
        new = self._socket_outside(outside)
        old = {self._outside, *self._ways.values()}
        self._outside = new
        # Whoever is not the client that was heard last gets a new socket when it speaks.
        self._ways = {} if self._client is None else {self._client: new}
        for sock in old:
            if sock is not None and keep_old:
                self._old.add(sock)
            elif sock is not None:
                self._close(sock)

    def _way(self, client: _Source) -> socket.socket | None:
        way = self._ways.get(client)
        if way is None and self._outside is not None:
            is_first = self._outside not in self._ways.values()
            way = self._outside if is_first else self._socket_outside(self.outside.host)
            self._ways[client] = way
        self._client, self._outside = client, way
        return way

    def _up(self, _: socket.socket, data: bytes, client: _Source) -> None:
        if client in self._cut:
            self.counters.cut += 1
            return
        way = self._way(client)
        if self.is_muted:
            self.counters.muted += 1
        elif way is not None:
            self.counters.up += 1
            if self._tap is not None:
                self._tap(True, data, client)
            _send(way, data, self.target)

    def _down(self, way: socket.socket, data: bytes, _: _Source) -> None:
        client = next((client for client, each in self._ways.items() if each is way), self._client)
        if client is None or self._inside is None:
            return
        if client in self._cut:
            self.counters.cut += 1
        elif self.is_deaf:
            self.counters.deaf += 1
        elif self._rate is None:
            self._deliver(data, client)
        else:
            now = self._loop.time()
            self._free_at = max(self._free_at, now) + len(data) / self._rate
            if self._free_at - now > QUEUE:
                self._free_at -= len(data) / self._rate
                self.counters.queue_full += 1
            else:
                self._loop.call_at(self._free_at, self._deliver, data, client)

    def _deliver(self, data: bytes, client: _Source) -> None:
        if self._inside is None or client in self._cut:
            return
        self.counters.down += 1
        if self._tap is not None:
            self._tap(False, data, client)
        self._came_down.set()
        _send(self._inside, data, client)

    def _socket_outside(self, host: str | None) -> socket.socket:
        return self._socket(host or source_towards(self.target), self._down)

    def _socket(self, host: str, receive: Callable[[socket.socket, bytes, _Source], None]) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
            sock.bind((host, 0))
        except OSError:
            sock.close()
            raise
        self._loop.add_reader(sock, self._read, sock, receive)
        return sock

    def _read(self, sock: socket.socket, receive: Callable[[socket.socket, bytes, _Source], None]) -> None:
        for _ in range(AT_ONCE):
            if sock.fileno() < 0:
                return
            try:
                data, source = sock.recvfrom(MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:  # nobody is there, says the machine that this was sent to
                continue
            receive(sock, data, source)

    def _close(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock)
            sock.close()


def _send(sock: socket.socket, data: bytes, to: Address | _Source) -> None:
    try:
        sock.sendto(data, to)
    except OSError:
        return  # as a network does: nobody is told


def _name(sock: socket.socket | None) -> Address:
    if sock is None:
        raise RuntimeError("not open")
    host, port, *_ = sock.getsockname()
    return Address(host, port)
