"""What clients' paths may cost a server, and what became of them: limits, counters, and where it prefers to be.

Nothing here has a clock or a socket of its own, or knows a connection: `backend/routable.py` asks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from aioquic.quic.connection import NetworkAddress

from lb.address import Address
from lb.limiter import RateLimiter

# Ours. Behind a balancer in `nat` mode all clients have its address, and another one's after a take-over.
VALIDATIONS_PER_SOURCE = 1000.0  # per second, and source prefix
SHORTEST_DOUBT = 0.5  # seconds
LONGEST_DOUBT = 30.0


class PathEvent(Enum):
    """What became of a path, or of something that was asked on one."""

    MIGRATED = auto()  # a connection is followed to another path
    VALIDATED = auto()  # the client has answered there
    FAILED = auto()  # it has not, in time: back to a path on which it has
    LIMITED = auto()  # not followed: too many attempts by the connection, or from that source
    CHALLENGE_IGNORED = auto()  # the client has asked more often than a connection is answered


class Expense(Enum):
    """What a client can have a server do again and again."""

    VALIDATION = auto()
    PATH_RESPONSE = auto()
    CONNECTION_ID = auto()


class Allowance(NamedTuple):
    per_second: float
    at_once: float


# Ours. Honest clients stay far below: one whose NAT rebinds every second takes half of the first and a third of none.
ALLOWANCES = {
    Expense.VALIDATION: Allowance(2.0, 16.0),
    Expense.PATH_RESPONSE: Allowance(8.0, 32.0),
    Expense.CONNECTION_ID: Allowance(1.0, 16.0),  # in place of one that the client has retired
}


class Doubts:
    """How much longer a connection stays where it is after each path that came to nothing, until one does not.

    Somebody who has a copy of each packet come first, from his own address, would have the connection most of the time.
    """

    __slots__ = ("_failures", "_until")

    def __init__(self) -> None:
        self._failures = 0
        self._until = 0.0

    def failed(self, now: float) -> None:
        self._until = now + min(SHORTEST_DOUBT * 2**self._failures, LONGEST_DOUBT)
        self._failures += 1

    def proved(self) -> None:
        self._failures = 0
        self._until = 0.0

    def are_gone(self, now: float) -> bool:
        return now >= self._until


class Budget:
    """What one connection may still cost. An idle one costs a few dozen octets."""

    __slots__ = ("_limiters",)

    def __init__(self) -> None:
        self._limiters: dict[Expense, RateLimiter] = {}

    def allow(self, expense: Expense, now: float) -> bool:
        """Take it from the budget, at `now` seconds, if it is in there."""
        limiter = self._limiters.get(expense)
        if limiter is None:
            rate, at_once = ALLOWANCES[expense]
            limiter = self._limiters[expense] = RateLimiter(rate, 0, at_once / rate)
        return limiter.allow("", now)


class Paths:
    """What all connections of a server have in common: counters, and a limit for each source.

    `source_rate` is the most validations per second that addresses of one prefix may begin; 0 is no limit.
    """

    def __init__(self, source_rate: float = VALIDATIONS_PER_SOURCE) -> None:
        self.counts: Counter[PathEvent] = Counter()
        self._sources = RateLimiter(0, source_rate)

    def allow(self, budget: Budget, doubts: Doubts, addr: NetworkAddress, now: float) -> bool:
        """Whether a connection may begin to validate a path to `addr`."""
        if (
            doubts.are_gone(now)
            and budget.allow(Expense.VALIDATION, now)
            and self._sources.allow(addr[0].partition("%")[0], now)
        ):
            return True
        self.counts[PathEvent.LIMITED] += 1
        return False


@dataclass(slots=True)
class PreferredAddress:
    """Where clients are asked to go on: one address of the server's own for each family (RFC 9000, section 9.6).

    `sockets` are those at these addresses; a path's `NetworkAddress` ends in the one that it came by.
    """

    ipv4: Address | None = None
    ipv6: Address | None = None
    sockets: set[object] = field(default_factory=set)

    @property
    def addresses(self) -> list[Address]:
        return [each for each in (self.ipv4, self.ipv6) if each is not None]

    def add(self, address: Address, sock: object) -> None:
        """Raises ValueError for a second one of a family, and for one that is no single address."""
        if address.is_wildcard:
            raise ValueError(f"{address}: clients cannot send there; expected one address of this machine")
        if any(each.is_ipv6 == address.is_ipv6 for each in self.addresses):
            raise ValueError(f"{address}: a second preferred address of its family; expected one")
        if address.is_ipv6:
            self.ipv6 = address
        else:
            self.ipv4 = address
        self.sockets.add(sock)

    def is_at(self, addr: NetworkAddress) -> bool:
        """Whether datagrams from there came to one of these addresses."""
        return addr[-1] in self.sockets
