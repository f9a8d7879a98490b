"""The cost of one routing decision: no socket, no packet, only the Router and its table."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.load import server_id
from bench.network import BACKENDS
from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId
from lb.router import Router, RouterLimits, Verdict
from lb.routing import Backend, CidSlot, FourTuple, RoutingTable, Service, Unroutable

SIZE = 1200  # octets of a datagram
FLOWS = 256
_KEY = bytes(range(16))

_T = TypeVar("_T")

# name, server ID length, nonce length, key. The first is what the others are compared with.
ALGORITHMS = (
    ("plaintext, 4 + 12", 4, 12, None),
    ("single-pass, 4 + 12", 4, 12, _KEY),
    ("four-pass, 3 passes, 4 + 8", 4, 8, _KEY),
    ("four-pass, 4 passes, 8 + 6", 8, 6, _KEY),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians over the rounds, nanoseconds per call; None where there is no such call."""

    case: str
    by_cid: float | None
    route: float


def measure(rounds: int = 15, calls: int = 20_000) -> list[Cost]:
    """The cost of every case, the cases taking turns in every round so that all of them see the same machine."""
    cases: list[tuple[str, str, Callable[[int], float]]] = []
    for name, server_id_length, nonce_length, key in ALGORITHMS:
        config = CidConfig(ConfigId(0), server_id_length, nonce_length, key)
        cases.append((name, "by_cid", _by_cid(config)))
        cases.append((name, "route", _route_by_cid(config)))
    cases.append(("unroutable, (4-tuple, SCID) table", "route", _route_by_table(_initial, Verdict.TABLE_SCID)))
    cases.append(("unroutable, DCID table", "route", _route_by_table(_short_codepoint_7, Verdict.TABLE_DCID)))
    cases.append(("unroutable, 4-tuple table", "route", _route_by_table(_short, Verdict.TABLE_FLOW)))
    cases.append(("unroutable, fallback, recorded", "route", _route_by_fallback()))

    times: dict[tuple[str, str], list[float]] = {(name, call): [] for name, call, _ in cases}
    for _ in range(rounds):
        for name, call, run in cases:
            times[name, call].append(run(calls) / calls * 1e9)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return [
        Cost(name, medians.get((name, "by_cid")), medians[name, "route"])
        for name in dict.fromkeys(name for name, _, _ in cases)
    ]


def _by_cid(config: CidConfig) -> Callable[[int], float]:
    by_cid = _table(config).by_cid
    dcids = [datagram[1:] for datagram in _routable(config)]
    for flow, dcid in enumerate(dcids):
        server = by_cid(dcid)
        assert not isinstance(server, Unroutable)
        assert server.backend == flow % BACKENDS

    def run(calls: int) -> float:
        arguments = _repeat(dcids, calls)
        start = time.perf_counter()
        for dcid in arguments:
            by_cid(dcid)
        return time.perf_counter() - start

    return run


def _route_by_cid(config: CidConfig) -> Callable[[int], float]:
    router = _router(config)
    return _timed_route(router, list(zip(_routable(config), _flows(FLOWS), strict=True)), Verdict.CID)


def _route_by_table(datagram: Callable[[int], bytes], expected: Verdict) -> Callable[[int], float]:
    router = _router(CidConfig(ConfigId(0), 4, 12))
    work = [(datagram(i), flow) for i, flow in enumerate(_flows(FLOWS))]
    for first, flow in work:
        assert router.route(first, flow, 0.0).verdict is Verdict.FALLBACK
    return _timed_route(router, work, expected)


def _route_by_fallback() -> Callable[[int], float]:
    # A decision is only new once: each run gets a router that has seen nobody.
    def run(calls: int) -> float:
        router = _router(CidConfig(ConfigId(0), 4, 12))
        work = [(_initial(i), flow) for i, flow in enumerate(_flows(calls))]
        took = _time(router, work)
        assert router.route(*work[-1], 0.0).verdict is Verdict.TABLE_SCID
        return took

    return run


def _timed_route(router: Router, work: Sequence[tuple[bytes, FourTuple]], expected: Verdict) -> Callable[[int], float]:
    for datagram, flow in work:
        assert router.route(datagram, flow, 0.0).verdict is expected
    return lambda calls: _time(router, _repeat(work, calls))


def _time(router: Router, work: Sequence[tuple[bytes, FourTuple]]) -> float:
    route = router.route
    start = time.perf_counter()
    for datagram, flow in work:
        route(datagram, flow, 0.0)
    return time.perf_counter() - start


def _router(config: CidConfig) -> Router:
    return Router(_table(config), limits=RouterLimits(new_flows_rate=0), random=os.urandom)


def _table(config: CidConfig) -> RoutingTable:
    backends = tuple(
        Backend(f"b{i}", Address("192.0.2.1", 4433 + i), {config.config_id: frozenset({server_id(i, config)})})
        for i in range(BACKENDS)
    )
    return RoutingTable.build(Service("bench", (Address("192.0.2.2", 443),), (CidSlot(config),), backends))


def _routable(config: CidConfig) -> list[bytes]:
    codec = Codec(config)
    cids = (codec.encode(server_id(i % BACKENDS, config), os.urandom(config.nonce_length)) for i in range(FLOWS))
    return [(b"\x40" + cid).ljust(SIZE, b"\0") for cid in cids]


def _initial(number: int) -> bytes:
    """A long header with a DCID that a client made up and that no configuration claims."""
    dcid = b"\xff" + number.to_bytes(7)
    return (b"\xc0\0\0\0\1\x08" + dcid + b"\x08" + number.to_bytes(8)).ljust(SIZE, b"\0")


def _short_codepoint_7(number: int) -> bytes:
    """A short header whose CID says its own length: 8 octets."""
    return (b"\x40\xe7" + number.to_bytes(7)).ljust(SIZE, b"\0")


def _short(number: int) -> bytes:
    """A short header of unknown DCID length: its config ID, 1, is nobody's."""
    return (b"\x40\x20" + number.to_bytes(7)).ljust(SIZE, b"\0")


def _flows(count: int) -> list[FourTuple]:
    return [FourTuple(f"198.51.100.{i % 251}", 1024 + i // 251, "192.0.2.2", 443) for i in range(count)]


def _repeat(items: Sequence[_T], count: int) -> list[_T]:
    return [items[i % len(items)] for i in range(count)]
