"""Resets that nobody asked for, sent from the addresses that clients know, at no more than a rate.

Sockets are there only while there is something to send: the program sees every packet to these addresses before they
do, and without the program they would swallow what is not theirs.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

from lb.address import Address

# linux/in.h, linux/in6.h: a source address that need not be the machine's.
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75

# Ours.
BURST_SECONDS = 0.1  # what may be sent at once, as seconds of the rate


class Farewell(NamedTuple):
    """A whole UDP payload to a client of a dead backend, from the address that the client knows."""

    backend: str
    local: Address
    client: Address
    datagram: bytes


class Farewells:
    """What is still to be sent for one service."""

    def __init__(self) -> None:
        self._queue: deque[Farewell] = deque()
        self._tokens = 0.0
        self._filled_at: float | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, farewells: Iterable[Farewell]) -> None:
        self._queue.extend(farewells)

    def forget(self, risen: Collection[str]) -> None:
        """Nobody says any more that these backends are dead."""
        if risen:
            self._queue = deque(farewell for farewell in self._queue if farewell.backend not in risen)

    def send(self, rate: float, now: float) -> int:
        """Send what `rate` per second allows at `now` seconds. Returns how many were sent.

        What the kernel refuses is not tried again: its client will hear by its next packet.
        """
        most = max(1.0, rate * BURST_SECONDS)
        since = now - self._filled_at if self._filled_at is not None else BURST_SECONDS
        self._tokens = min(most, self._tokens + max(0.0, since) * rate)
        self._filled_at = now
        due = [self._queue.popleft() for _ in range(min(int(self._tokens), len(self._queue)))]
        self._tokens -= len(due)
        sent = 0
        with contextlib.ExitStack() as opened:
            sockets: dict[Address, socket.socket] = {}
            for _, local, client, datagram in due:
                with contextlib.suppress(OSError):
                    if local not in sockets:
                        sockets[local] = opened.enter_context(_transparent(local))
                    sockets[local].sendto(datagram, client)
                    sent += 1
        return sent


def _transparent(local: Address) -> socket.socket:
    """A socket that sends from `local`, whoever has that address. Raises OSError; needs CAP_NET_ADMIN."""
    made = socket.socket(socket.AF_INET6 if local.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if local.is_ipv6:
            made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        else:
            made.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        made.bind(local)
    except OSError:
        made.close()
        raise
    return made
