"""Flows of the socket engine: the listeners they come in by, the members they go to, the ports in between.

A flow is a client's 4-tuple and a backend: one client socket may carry connections to several backends. It is
known upstream by a local port and the backend's address, so that one port serves one flow of every backend.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Any

from lb.address import Address
from lb.engine import BackendCounters, ServiceCounters
from lb.mmsg import raw_address
from lb.router import Router, RouterLimits, Verdict
from lb.routing import RoutingTable
from lb.silence import SilenceWatch
from lb.sockets import Port, source_control

# A client by its socket address, as the kernel has it; for wildcard listeners, and the address that it sent to.
Key = bytes | tuple[bytes, bytes]

# Longer than any datagram, so that no datagram can begin with it.
NO_SHORTCUT = bytes(65536)
PORT_REST = 2.0  # seconds before a port that a flow gave up serves another: late replies would reach the wrong client
ENDED = -1  # the number of a flow that is no more
OTHER = 7  # index of datagrams that no config ID routed
SAMPLE = 32  # flows looked at to find an old one


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePolicy:
    """What an engine must know about a service beyond its table. `silence` 0 means not to listen for it."""

    router: RouterLimits
    push_rate: float  # pushed resets per second; 0 for none
    silence: float


class RunningService:
    """A service as it runs: its router, its backends, what was counted."""

    __slots__ = ("by_config_down", "counters", "farewells", "members", "past", "policy", "pushing", "router")

    def __init__(self, table: RoutingTable, policy: ServicePolicy, random: Callable[[int], bytes]) -> None:
        self.policy = policy
        self.router = Router(table, random=random, limits=policy.router)
        self.counters = ServiceCounters()
        self.by_config_down = [0] * OTHER  # datagrams with the verdict CID_DOWN
        self.members: list[Member] = []  # in the order of the table's backends
        self.past = [0] * (OTHER + 1)  # `by_config` of members that are no more
        self.farewells: deque[Flow] = deque()  # flows whose clients are to be told that their server is dead
        self.pushing = False

    def counted(self) -> ServiceCounters:
        """What was counted so far, put together."""
        by_config = [sum(column) for column in zip(self.past, *(m.by_config for m in self.members), strict=True)]
        counters = self.counters
        counters.verdicts[Verdict.CID] = sum(by_config[:OTHER])
        counters.config_ids = [a + b for a, b in zip(by_config[:OTHER], self.by_config_down, strict=True)]
        counters.backends = {member.name: member.counted() for member in self.members}
        return counters


class Listener:
    """One address that clients send to, and the flows that came in through it.

    `ports` are several if another process had several workers: all are read from, and the first is answered from.
    """

    __slots__ = ("address", "flows", "port", "ports", "service")

    def __init__(self, address: Address, ports: Sequence[Port], service: RunningService) -> None:
        self.address = address
        self.ports = ports
        self.port = ports[0]
        self.service = service
        # The flow that a client used last; its others hang on `sibling`.
        self.flows: dict[Key, Flow] = {}


class Member:
    """One backend of a service, as the engine knows it."""

    __slots__ = (
        "address",
        "by_config",
        "datagrams_from",
        "flows",
        "name",
        "octets_from",
        "octets_to",
        "raw",
        "service",
        "silent",
        "sockaddr",
        "unreachable",
    )

    def __init__(self, service: str, name: str, address: Address) -> None:
        self.service = service
        self.name = name
        self.address = address
        self.sockaddr: Any = (address.host, address.port, 0, 0) if address.is_ipv6 else tuple(address)
        self.raw = raw_address(address)
        self.by_config = [0] * (OTHER + 1)  # datagrams to it: with the verdict CID by config ID, all others at OTHER
        self.octets_to = self.datagrams_from = self.octets_from = 0
        self.flows = self.unreachable = 0
        self.silent = SilenceWatch()

    def counted(self) -> BackendCounters:
        return BackendCounters(
            datagrams_to=sum(self.by_config),
            octets_to=self.octets_to,
            datagrams_from=self.datagrams_from,
            octets_from=self.octets_from,
            flows=self.flows,
            unreachable=self.unreachable,
        )


class Upstream(Port):
    """A port towards backends. `flows` tells replies apart by whom they are from.

    `since` is when it was another process's: nobody knows which flows it has just served there.
    """

    __slots__ = ("flows", "since")

    def __init__(self, port: Port, since: float = float("-inf")) -> None:
        super().__init__(port.sock)
        self.tos, self.segment = port.tos, port.segment
        self.since = since
        self.flows: dict[bytes, Flow] = {}


class Ports:
    """What one backend's address makes of a pool of ports. Services that have the address in common share this.

    Every port of the pool has a flow of this address, or is in `_free`, or comes at or after `_unused` and is not
    in `_carried`. So none is handed out twice.
    """

    __slots__ = ("_carried", "_free", "_hand", "_unused")

    def __init__(self) -> None:
        self._free: deque[tuple[float, Upstream]] = deque()  # ports given back, and when
        self._unused = 0  # the first port that never served this address
        self._carried: set[Upstream] = set()  # ports after that one which flows of another process have or had
        self._hand = 0

    def take(self, pool: Sequence[Upstream], now: float) -> Upstream | None:
        """A port given back long ago, or one that was never used; None if there is neither."""
        if self._free and now - self._free[0][0] >= PORT_REST:
            return self._free.popleft()[1]
        while self._unused < len(pool):
            upstream = pool[self._unused]
            self._unused += 1
            if upstream in self._carried:
                self._carried.remove(upstream)
            elif now - upstream.since < PORT_REST:
                self.give_back(upstream, upstream.since)
            else:
                return upstream
        return None

    def take_early(self) -> Upstream | None:
        """The port that was given back first, however short a while ago; None if all are in use."""
        return self._free.popleft()[1] if self._free else None

    def give_back(self, upstream: Upstream, now: float) -> None:
        self._free.append((now, upstream))

    def carry_on(self, upstream: Upstream) -> None:
        """A flow of another process has this port. To be called before the first `take`."""
        if upstream in self._carried:  # another flow had it, and has ended
            self._free = deque(item for item in self._free if item[1] is not upstream)
        self._carried.add(upstream)

    def victim(self, member: Member, pool: Sequence[Upstream]) -> Flow | None:
        """A flow of this address, which is that member's, to give up when all ports are in use."""
        self._hand += SAMPLE  # each time from another sample
        return most_idle(member, pool, self._hand)


class Flow:
    """A client's 4-tuple and its backend."""

    __slots__ = (
        "cid",
        "client",
        "config_id",
        "control",
        "established",
        "key",
        "listener",
        "local",
        "member",
        "number",
        "seen",
        "short_header_seen",
        "shortcut",
        "sibling",
        "upstream",
    )

    def __init__(
        self, listener: Listener, key: Key, client: Any, local: bytes | None, member: Member, upstream: Upstream
    ) -> None:
        self.listener = listener
        self.key = key  # in `listener.flows`
        self.client = client  # its socket address
        self.local = local  # packed address that the client sent to, for wildcard listeners
        self.control = source_control(local)  # what makes replies leave from there
        self.member = member
        self.upstream = upstream
        self.sibling: Flow | None = None  # the same client's flow to another backend
        self.number = ENDED
        self.seen = 0.0
        self.cid: bytes | None = None  # the last routable CID that it carried
        self.shortcut = NO_SHORTCUT  # equal to `cid` while the table that routed it is in force
        self.config_id = 0
        self.short_header_seen = False
        self.established = False  # the backend answered after the client had sent a short header


class Flows:
    """Every flow by its number, 0 to capacity - 1, and the order in which they may be given up."""

    def __init__(self, capacity: int) -> None:
        self._slots: list[Flow | None] = []
        self._capacity = capacity
        self._free: deque[int] = deque()
        # Not established yet, oldest first. A dict's first key is far to seek after many were removed before it.
        self._young: OrderedDict[Flow, None] = OrderedDict()
        self._hand = 0
        self.count = 0

    def __iter__(self) -> Iterator[Flow]:
        return (flow for flow in self._slots if flow is not None)

    @property
    def numbers(self) -> int:
        """How many numbers were ever in use: all are below this."""
        return len(self._slots)

    @property
    def is_full(self) -> bool:
        return self.count >= self._capacity

    def add(self, flow: Flow) -> None:
        """Give a flow a number and its place in the order."""
        if self._free:
            flow.number = self._free.popleft()
            self._slots[flow.number] = flow
        else:
            flow.number = len(self._slots)
            self._slots.append(flow)
        self.count += 1
        if not flow.established:
            self._young[flow] = None

    def remove(self, flow: Flow) -> None:
        self._slots[flow.number] = None
        self._free.append(flow.number)
        flow.number = ENDED
        self._young.pop(flow, None)
        self.count -= 1

    def establish(self, flow: Flow) -> None:
        flow.established = True
        self._young.pop(flow, None)

    def expired(self, now: float, steps: int, idle: float, young: float) -> list[Flow]:
        """Of the next `steps` flows those idle for over `idle` seconds, or `young` if not established."""
        return [
            flow
            for flow in self._next(min(steps, len(self._slots)))
            if now - flow.seen > (idle if flow.established else young)
        ]

    def victim(self) -> Flow | None:
        """A flow to give up: the oldest that is not established, else the most idle of a sample."""
        young = next(iter(self._young), None)
        if young is not None:
            return young
        sample = islice(self._next(len(self._slots)), SAMPLE)
        return min(sample, key=attrgetter("seen"), default=None)

    def _next(self, steps: int) -> Iterator[Flow]:
        """The flows of the next `steps` numbers, round and round; whoever comes next goes on from there."""
        for _ in range(steps):
            if self._hand >= len(self._slots):
                self._hand = 0
            flow = self._slots[self._hand]
            self._hand += 1
            if flow is not None:
                yield flow


def most_idle(member: Member, upstreams: Sequence[Upstream], start: int) -> Flow | None:
    """A flow of one backend to give up, so that another may have its port: young ones first, from a sample."""
    found = (upstreams[(start + offset) % len(upstreams)].flows.get(member.raw) for offset in range(len(upstreams)))
    sample = islice((flow for flow in found if flow is not None), SAMPLE)
    return min(sample, key=attrgetter("established", "seen"), default=None)
