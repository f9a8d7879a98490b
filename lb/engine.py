"""What every data plane promises, and what it counts. An engine moves packets as its routing tables say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lb.cid import CONFIG_IDS
from lb.router import Verdict
from lb.routing import RoutingTable, Unroutable

# Called with a service's and a backend's name when an engine sees a sign of trouble: an ICMP unreachable, or
# silence under traffic. It decides nothing; it brings the next health probes forward.
Suspect = Callable[[str, str], None]


@dataclass(slots=True)
class BackendCounters:
    """Datagrams and octets of UDP payload towards a backend and from it, and the flows it has now."""

    datagrams_to: int = 0
    octets_to: int = 0
    datagrams_from: int = 0
    octets_from: int = 0
    flows: int = 0
    unreachable: int = 0  # ICMP errors that the backend, or its network, returned


@dataclass(slots=True)
class ServiceCounters:
    """One service's counters. Lists are indexed by the enums they are named for."""

    verdicts: list[int] = field(default_factory=lambda: [0] * len(Verdict))
    unroutable: list[int] = field(default_factory=lambda: [0] * len(Unroutable))
    config_ids: list[int] = field(default_factory=lambda: [0] * len(CONFIG_IDS))  # datagrams routed by CID
    moves: int = 0  # new flows that began with a routable CID on a short header
    rescued: int = 0  # moves whose 4-tuple hashes to another backend: a 4-tuple balancer would have broken them
    resets_pushed: int = 0
    backends: dict[str, BackendCounters] = field(default_factory=dict)


class Drop:
    """Why an engine could not send what the router had decided (labels of `quiclb_send_failures_total`).

    The same list, in the same order, as `enum failure` in shared.h.
    """

    BUFFER_FULL = "buffer-full"  # EAGAIN, ENOBUFS: the network is slower than the clients
    TOO_LARGE = "too-large"  # EMSGSIZE: longer than the path allows, and DF is set
    UNREACHABLE = "unreachable"  # no route, or a firewall of our own says no
    NO_SOCKET = "no-socket"  # out of descriptors or ports, and no flow could be given up
    NO_FLOW = "no-flow"  # a backend's reply to a client that has no flow any more
    # The xdp engine only.
    HOP_LIMIT = "hop-limit"  # TTL or hop limit used up
    NO_CHECKSUM = "no-checksum"  # UDP without checksum cannot become IPv6
    MAP_FULL = "map-full"  # the 4-tuple table took no entry: routed without memory
    ALL = (BUFFER_FULL, TOO_LARGE, UNREACHABLE, NO_SOCKET, NO_FLOW, HOP_LIMIT, NO_CHECKSUM, MAP_FULL)


@dataclass(slots=True)
class Counters:
    """Everything that one engine counts. Sums of two are the counters of both."""

    services: dict[str, ServiceCounters] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Drop.ALL, 0))
    flows: int = 0
    flow_limit: int = 0
    flows_evicted: int = 0  # given up at a limit, the oldest idle first
    flows_expired: int = 0  # idle for longer than the timeout
    flows_restored: int = 0  # carried over from a process that died
    sockets: int = 0
    socket_limit: int = 0
    # The xdp engine only: a socket's kernel does all this by itself.
    icmp_forwarded: int = 0  # ICMP errors from clients' networks that reached a backend
    too_big_sent: int = 0  # ICMP "fragmentation needed", ICMPv6 "packet too big", to clients
    too_big_limited: int = 0  # those that the limit kept back
    samples_lost: int = 0  # of packets, for debugging: the ring buffer was full


class Engine(Protocol):
    """A data plane. `apply` replaces all tables at once; flows of backends that stay are kept.

    `start` and `apply` raise OSError if an address cannot be listened on; then nothing has changed.
    """

    async def start(self, tables: Sequence[RoutingTable]) -> None: ...
    async def apply(self, tables: Sequence[RoutingTable]) -> None: ...
    async def counters(self) -> Counters: ...
    async def stop(self) -> None: ...


def add_counters(total: Counters, part: Counters) -> None:
    """Add one engine's counters to a total, in place."""
    for name, service in part.services.items():
        into = total.services.setdefault(name, ServiceCounters())
        for mine, theirs in (
            (into.verdicts, service.verdicts),
            (into.unroutable, service.unroutable),
            (into.config_ids, service.config_ids),
        ):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
        into.moves += service.moves
        into.rescued += service.rescued
        into.resets_pushed += service.resets_pushed
        for backend, counted in service.backends.items():
            mine_b = into.backends.setdefault(backend, BackendCounters())
            for slot in BackendCounters.__slots__:
                setattr(mine_b, slot, getattr(mine_b, slot) + getattr(counted, slot))
    for reason, count in part.failures.items():
        total.failures[reason] += count
    for slot in Counters.__slots__:
        if slot not in ("services", "failures"):
            setattr(total, slot, getattr(total, slot) + getattr(part, slot))
