"""What tests of the program expect, and how they say so: tables, ways and modes, counters, what must have left."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lb.address import Address
from lb.cid import CidConfig, ConfigId
from lb.engine import Drop
from lb.forward import Forward
from lb.reset import reset_token, server_reset_key
from lb.router import Route, Verdict
from lb.routing import RoutingTable, Service
from tests.builders import RESET_KEY, server_id, short
from tests.xdp.bpf import NAT_PORTS, Action, Balancer, Outcome
from tests.xdp.cases import DEAD, SOURCES, WAYS, A, cid, tables, ways
from tests.xdp.forwarding import flow_of, forwarded, the_answer
from tests.xdp.frames import Ethernet, IPv6, Udp, parse

TABLES = {forward: tables(forward) for forward in Forward}
MODES = [(forward, way) for forward in Forward for way in ways(forward)]
by_mode = pytest.mark.parametrize(
    ("forward", "way"), MODES, ids=[f"{forward.name}-{way.client}-{way.backend}" for forward, way in MODES]
)
by_forward = pytest.mark.parametrize("forward", Forward, ids=lambda forward: forward.name)
by_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.service)
by_family = pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.service)
Loaded = Callable[..., Balancer]
ROUTABLE = short(cid(A))
TO_A = Route(Verdict.CID, A, ConfigId(0))


def ready(loaded: Loaded, forward: Forward) -> Balancer:
    """A balancer with the tables of all cases, which remembers nothing."""
    balancer = loaded(forward)
    balancer.apply(TABLES[forward])
    balancer.forget()
    return balancer


def table_of(forward: Forward, service: Service) -> RoutingTable:
    return next(table for table in TABLES[forward] if table.service is service)


def counts(
    table: RoutingTable, frame: Ethernet, route: Route, forward: Forward, failure: str | None = None
) -> dict[str, int]:
    """What a datagram of a new flow adds to the counters; `failure` if it could not be sent."""
    name, payload = table.service.name, frame.payload
    counted = {f"{name} {route.verdict.name}": 1}
    if route.unroutable is not None:
        counted[f"{name} unroutable {route.unroutable.name}"] = 1
    if route.backend is None:
        return counted
    if failure is not None:
        counted[failure] = 1
    else:
        backend = f"{name}/{table.backends[route.backend].name}"
        counted |= {f"{backend} datagrams_to": 1, f"{backend} octets_to": len(payload)}
    if route.config_id is not None:
        counted[f"{name} config {route.config_id}"] = 1
        if forward is Forward.NAT and not payload[0] & 0x80 and failure not in (Drop.UNREACHABLE, Drop.TOO_LARGE):
            counted[f"{name} moves"] = 1
            counted |= {f"{name} rescued": 1} if table.fallback(flow_of(frame)) != route.backend else {}
    return counted


def what_left(balancer: Balancer, frame: Ethernet, table: RoutingTable, backend: int, left: bytes) -> Ethernet:
    """What must have left. What the program is free to choose is taken from what did leave."""
    port = nat_source(balancer, frame, table, backend).port if balancer.forward is Forward.NAT else 0
    entropy = entropy_of(left) if balancer.forward in (Forward.IPIP, Forward.GUE) else 0
    return forwarded(balancer.forward, frame, table.backends[backend], port=port, entropy=entropy)


def nat_source(balancer: Balancer, frame: Ethernet, table: RoutingTable, backend: int) -> Address:
    """What a backend sees a client as in nat mode, once it has seen something of it."""
    there = balancer.nat_flow(flow_of(frame), balancer.slot(table.service.name, backend))
    assert there is not None
    port = int.from_bytes(there.port)
    assert port in NAT_PORTS
    return Address(SOURCES[6 if table.backends[backend].address.is_ipv6 else 4], port)


def entropy_of(tunnelled: bytes) -> int:
    """What tells flows from each other outside a tunnel, as far as there is anything."""
    outer = parse(tunnelled).ip
    if isinstance(outer, IPv6):
        return outer.flow_label
    return outer.content.source & 0x3FFF if isinstance(outer.content, Udp) else 0


def assert_forwarded(balancer: Balancer, frame: Ethernet, table: RoutingTable, route: Route) -> None:
    assert route.backend is not None
    outcome = balancer.run(bytes(frame))
    expected = what_left(balancer, frame, table, route.backend, outcome.frame)
    assert outcome == Outcome(Action.TX, bytes(expected), counts(table, frame, route, balancer.forward))


def assert_reset(outcome: Outcome, trigger: Ethernet, config: CidConfig, counted: dict[str, int]) -> None:
    """RFC 9000, section 10.3: the form of a short header, shorter than its trigger, with the token of the CID.

    The trigger has a CID of DEAD.
    """
    left = parse(outcome.frame).payload
    size = len(trigger.payload)
    assert outcome == Outcome(Action.TX, bytes(the_answer(trigger, left)), counted)
    key = server_reset_key(RESET_KEY, config.config_id, server_id(DEAD, config.server_id_length))
    assert left[-16:] == reset_token(key, cid(DEAD, config))
    assert left[0] & 0xC0 == 0x40
    assert len(left) == size - 1 if size <= 43 else 42 <= len(left) <= min(size - 1, 100)
