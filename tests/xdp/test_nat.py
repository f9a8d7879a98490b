"""The modes in which backends' packets come back through the balancer: nat, which remembers, and dnat, which asks."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lb.address import Address
from lb.engine import Drop
from lb.forward import Forward
from lb.routing import RoutingTable
from tests import namespaces
from tests.builders import long, short
from tests.xdp.bpf import Action, Balancer, Outcome
from tests.xdp.cases import (
    CLIENT_PORT,
    CLIENTS,
    INTERFACE,
    MTU,
    NAMES,
    ROUTER,
    SOURCES,
    WAYS,
    WEB,
    A,
    B,
    Way,
    cid,
    service,
)
from tests.xdp.expectations import (
    ROUTABLE,
    TABLES,
    TO_A,
    Loaded,
    assert_forwarded,
    by_family,
    nat_source,
    ready,
    table_of,
)
from tests.xdp.forwarding import SHAPES, Shape, answer, datagram, readdressed, too_big, with_ttl
from tests.xdp.frames import Ethernet, fragments, parse

by_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.service)


def begun(loaded: Loaded, way: Way, payload: bytes = ROUTABLE) -> tuple[Balancer, Ethernet, Address]:
    """A balancer, a client's first packet to A through it, and what A sees it as."""
    balancer = ready(loaded, Forward.NAT)
    frame = datagram(way, payload)
    assert balancer.run(bytes(frame)).action is Action.TX
    return balancer, frame, nat_source(balancer, frame, table_of(Forward.NAT, WEB[way]), A)


def returned(frame: Ethernet, way: Way, mac: str = ROUTER, port: int = CLIENT_PORT) -> Ethernet:
    """What a backend's packet must have become for its client."""
    packet = readdressed(with_ttl(frame.ip, -1), way.vip, Address(CLIENTS[way.client], port))
    return replace(frame, destination=mac, source=INTERFACE, packet=packet)


def came_back(way: Way, frame: Ethernet, backend: int = A) -> dict[str, int]:
    name = f"{way.service}/{NAMES[backend]}"
    return {f"{name} datagrams_from": 1, f"{name} octets_from": len(frame.payload)}


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        pytest.param(way, shape, id=f"{way.client}-{way.backend}-{shape.name}")
        for way in WAYS
        for shape in SHAPES
        if shape.family in (None, way.backend)
    ],
)
def test_a_backends_answer_comes_from_the_service(way: Way, shape: Shape, loaded: Loaded) -> None:
    balancer, _, ours = begun(loaded, way)
    backend = table_of(Forward.NAT, WEB[way]).backends[A].address
    frame = shape.change(answer(backend, ours, b"\x41" + bytes(80)))
    outcome = balancer.run(bytes(frame))
    if frame.udp.checksum == 0 and way == (6, 4):
        assert outcome == Outcome(Action.DROP, bytes(frame), {Drop.NO_CHECKSUM: 1})
    else:
        assert outcome == Outcome(Action.TX, bytes(returned(frame, way)), came_back(way, frame))


@by_way
def test_what_is_nobodys_answer_is_the_stacks(way: Way, loaded: Loaded) -> None:
    balancer, _, ours = begun(loaded, way)
    backend = table_of(Forward.NAT, WEB[way]).backends[A].address
    right = answer(backend, ours, bytes(30))
    other_host = "2001:db8:b::77" if backend.is_ipv6 else "10.77.0.1"
    for name, frame in (
        ("from another port", right.with_udp(source=backend.port + 1)),
        ("from another host", right.with_ip(source=other_host)),
        ("to another port of ours", right.with_udp(destination=ours.port + 1)),
        ("to a port that is not nat's", right.with_udp(destination=22)),
        ("to another host", right.with_ip(destination=other_host)),
    ):
        assert (name, balancer.run(bytes(frame))) == (name, Outcome(Action.PASS, bytes(frame), {}))


@by_way
def test_answers_that_cannot_be_sent(way: Way, loaded: Loaded) -> None:
    balancer, _, ours = begun(loaded, way)
    backend = table_of(Forward.NAT, WEB[way]).backends[A].address
    for ttl in (0, 1):
        frame = answer(backend, ours, bytes(30), ttl=ttl)
        assert balancer.run(bytes(frame)) == Outcome(Action.DROP, bytes(frame), {Drop.HOP_LIMIT: 1})
    frame = answer(backend, ours, bytes(30)).with_udp(length=39)
    assert balancer.run(bytes(frame)) == Outcome(Action.PASS, bytes(frame), {})
    frame = answer(backend, ours, bytes(1600))
    growth = {(4, 4): 0, (6, 6): 0, (4, 6): -20, (6, 4): 20}[way]
    expected = bytes(too_big(frame, MTU - growth))
    assert balancer.run(bytes(frame)) == Outcome(Action.TX, expected, {Drop.TOO_LARGE: 1, "too_big_sent": 1})
    for piece in fragments(answer(backend, ours, bytes(800)).ip, 400):
        fragment = bytes(replace(frame, packet=piece))
        assert balancer.run(fragment) == Outcome(Action.PASS, fragment, {})


@by_way
def test_a_flow_has_one_port_for_each_backend(way: Way, loaded: Loaded) -> None:
    """One client socket may carry connections to several backends. Each answers to a port of its own choosing."""
    balancer = ready(loaded, Forward.NAT)
    table = table_of(Forward.NAT, WEB[way])
    frames = {number: datagram(way, short(cid(number))) for number in (A, B)}
    first = [balancer.run(bytes(frame)).frame for frame in frames.values()]
    again = [balancer.run(bytes(frame)) for frame in frames.values()]

    assert [outcome.frame for outcome in again] == first
    for outcome in again:  # and they count as one move each
        assert not [name for name in outcome.counted if "moves" in name or "rescued" in name]
    for number, frame in frames.items():
        ours = nat_source(balancer, frame, table, number)
        back = answer(table.backends[number].address, ours, bytes(50))
        assert balancer.run(bytes(back)) == Outcome(Action.TX, bytes(returned(back, way)), came_back(way, back, number))


@by_way
def test_many_flows_come_back_each_to_its_client(way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, Forward.NAT)
    table = table_of(Forward.NAT, WEB[way])
    frames = {port: datagram(way, ROUTABLE, port=port) for port in range(10_000, 10_400)}
    ports = set()
    for port, frame in frames.items():
        assert_forwarded(balancer, frame, table, TO_A)
        ports.add(nat_source(balancer, frame, table, A).port)
        assert len(ports) == port - 10_000 + 1
    for port, frame in frames.items():
        back = answer(table.backends[A].address, nat_source(balancer, frame, table, A), bytes(20))
        assert balancer.run(bytes(back)).frame == bytes(returned(back, way, port=port))


@by_way
def test_answers_follow_a_client_to_another_router(way: Way, loaded: Loaded) -> None:
    balancer, frame, ours = begun(loaded, way)
    back = answer(table_of(Forward.NAT, WEB[way]).backends[A].address, ours, bytes(50))
    moved = "02:00:00:00:00:77"
    balancer.run(bytes(replace(frame, source=moved)))

    assert balancer.run(bytes(back)).frame == bytes(returned(back, way, moved))


@by_way
def test_what_python_learns_of_a_flow(way: Way, loaded: Loaded) -> None:
    """The CID of the last short header that its CID routed: to tell its client should the server die."""
    balancer, _, _ = begun(loaded, way, long(cid(A)))
    slot = balancer.slot(way.service, A)
    flow = balancer.nat_flow(way.flow(), slot)
    assert flow is not None
    assert (flow.cid_octets, flow.short_header_seen, flow.datagrams_to) == (0, 0, 1)
    assert flow.client_mac == bytes.fromhex(ROUTER.replace(":", ""))

    for payload, noted in (
        (short(cid(A)), (cid(A) + b"\x5a" * 3, 20)),
        (short(cid(A), size=0), (cid(A), 17)),
        (long(cid(A)), (cid(A), 17)),
    ):
        balancer.run(bytes(datagram(way, payload)))
        flow = balancer.nat_flow(way.flow(), slot)
        assert flow is not None
        assert (flow.cid[: flow.cid_octets], flow.cid_octets, flow.short_header_seen) == (*noted, 1)
    assert flow.datagrams_to == 4


@by_way
def test_without_a_free_port_a_new_flow_has_to_wait(way: Way, loaded: Loaded) -> None:
    balancer = loaded(Forward.NAT, nat_ports=range(20_000, 20_002))
    balancer.apply(TABLES[Forward.NAT])
    balancer.forget()
    told = [balancer.run(bytes(datagram(way, ROUTABLE, port=port))) for port in (1001, 1002, 1003, 1001, 1002, 1003)]

    assert [outcome.action for outcome in told] == [Action.TX, Action.TX, Action.DROP] * 2
    for outcome in told[2::3]:
        assert outcome == Outcome(
            Action.DROP,
            bytes(datagram(way, ROUTABLE, port=1003)),
            {f"{way.service} CID": 1, f"{way.service} config 0": 1, Drop.NO_SOCKET: 1},
        )
    # Ports are each backend's own.
    assert balancer.run(bytes(datagram(way, short(cid(B)), port=1003))).action is Action.TX


@by_way
def test_a_backend_that_is_replaced_gets_flows_of_its_own(way: Way, loaded: Loaded) -> None:
    """At the same place in the table, and perhaps at the same number: nobody gets what was meant for the other one."""
    balancer, frame, _ = begun(loaded, way)
    old = WEB[way].backends[A]
    new = replace(old, address=Address(old.address.host, old.address.port + 1))
    service = replace(WEB[way], backends=(new, *WEB[way].backends[1:]))
    table = RoutingTable.build(service)
    balancer.apply([table])
    outcome = balancer.run(bytes(frame))

    left = parse(outcome.frame)
    assert (left.ip.destination, left.udp.destination) == (new.address.host, new.address.port)
    back = answer(new.address, nat_source(balancer, frame, table, A), bytes(20))
    assert balancer.run(bytes(back)).frame == bytes(returned(back, way))


@by_way
def test_a_way_back_that_was_evicted_is_made_anew(way: Way, loaded: Loaded) -> None:
    """The maps forget the idlest; the half that is used by the other direction only may be among them."""
    balancer, frame, ours = begun(loaded, way)
    table = table_of(Forward.NAT, WEB[way])
    balancer.maps["nat_in"].delete_batch([key for key, _ in balancer.maps["nat_in"].items()])
    back = answer(table.backends[A].address, ours, bytes(20))
    assert balancer.run(bytes(back)).action is Action.PASS
    for _ in range(64):
        assert balancer.run(bytes(frame)).action is Action.TX
    back = answer(table.backends[A].address, nat_source(balancer, frame, table, A), bytes(20))

    assert balancer.run(bytes(back)).frame == bytes(returned(back, way))


@by_way
def test_a_port_that_somebody_else_has_is_not_taken(way: Way, loaded: Loaded) -> None:
    """However the first port to try is chosen: all but one are in use, and that one is found within a few flows."""
    balancer = loaded(Forward.NAT, nat_ports=range(20_000, 20_008))
    balancer.apply(TABLES[Forward.NAT])
    balancer.forget()
    table = table_of(Forward.NAT, WEB[way])
    taken = {}
    for port in range(1000, 1200):
        frame = datagram(way, ROUTABLE, port=port)
        outcome = balancer.run(bytes(frame))
        if outcome.action is Action.TX:
            taken[nat_source(balancer, frame, table, A).port] = frame
        else:
            assert outcome.counted[Drop.NO_SOCKET] == 1
    assert len(taken) == 8
    for port, frame in taken.items():
        assert nat_source(balancer, frame, table, A).port == port


@by_way
def test_a_port_that_clients_send_to_is_not_taken(way: Way, loaded: Loaded) -> None:
    """The only address of a machine may be a service's and the one that backends see."""
    balancer = loaded(Forward.NAT, nat_ports=range(20_000, 20_008))
    listens = tuple(Address(host, 20_003) for host in SOURCES.values())
    ours = replace(service(9, "ours", listens[0], 4), listen=listens)
    balancer.apply((*TABLES[Forward.NAT], RoutingTable.build(ours)))
    balancer.forget()
    table = table_of(Forward.NAT, WEB[way])
    frames = [datagram(way, ROUTABLE, port=port) for port in range(1000, 1200)]
    sent = [frame for frame in frames if balancer.run(bytes(frame)).action is Action.TX]

    assert sorted(nat_source(balancer, frame, table, A).port for frame in sent) == [
        port for port in range(20_000, 20_008) if port != 20_003
    ]


# dnat


@contextmanager
def a_router(way: Way) -> Iterator[tuple[str, int]]:
    """A namespace that routes: clients are behind ROUTER. Its name, and the index of its interface."""
    length, every = (24, "0.0.0.0/0") if way.client == 4 else (64, "::/0")
    ours, gateway = ("198.18.0.1", "198.18.0.2") if way.client == 4 else ("2001:db8:12::1", "2001:db8:12::2")
    with namespaces.namespaces("dnat") as (name,):
        namespaces.ip(
            name,
            "link add quic0 type veth peer name quic1",
            "link set quic0 up",
            "link set quic1 up",
            f"address add {ours}/{length} dev quic0" + (" nodad" if way.client == 6 else ""),
            f"neighbour add {gateway} lladdr {ROUTER} dev quic0",
            f"route add {every} via {gateway}",
        )
        with namespaces.inside(name):
            forwarding = "ipv4/conf/all/forwarding" if way.client == 4 else "ipv6/conf/all/forwarding"
            Path("/proc/sys/net", forwarding).write_text("1")
            yield name, socket.if_nametoindex("quic0")


def context(frame: bytes, ifindex: int) -> bytes:
    """A struct xdp_md of a frame that came by an interface."""
    return struct.pack("<6I", 0, len(frame), 0, ifindex, 0, 0)


@pytest.fixture
def needs_namespaces() -> None:
    reason = namespaces.missing()
    if reason:
        pytest.skip(reason)


@by_family
@pytest.mark.usefixtures("needs_namespaces")
def test_dnat_answers_go_where_the_routes_say(way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, Forward.DNAT)
    backend = table_of(Forward.DNAT, WEB[way]).backends[A].address
    with a_router(way) as (_, ifindex):
        for shape in SHAPES:
            if shape.family in (None, way.client):
                frame = shape.change(answer(backend, Address(CLIENTS[way.client], CLIENT_PORT), b"\x41" + bytes(80)))
                outcome = balancer.run(bytes(frame), context(bytes(frame), ifindex))
                expected = Outcome(Action.TX, bytes(returned(frame, way)), came_back(way, frame))
                assert (shape.name, outcome) == (shape.name, expected)
        for ttl in (0, 1):
            frame = answer(backend, Address(CLIENTS[way.client], CLIENT_PORT), bytes(30), ttl=ttl)
            outcome = balancer.run(bytes(frame), context(bytes(frame), ifindex))
            assert outcome.action is not Action.TX
            assert outcome.frame == bytes(frame)


@by_family
@pytest.mark.usefixtures("needs_namespaces")
def test_dnat_leaves_to_the_stack_what_it_cannot_send_itself(way: Way, loaded: Loaded) -> None:
    """A neighbour to be resolved, another interface, no route, another host's packet: as they came."""
    balancer = ready(loaded, Forward.DNAT)
    backend = table_of(Forward.DNAT, WEB[way]).backends[A].address
    frame = answer(backend, Address(CLIENTS[way.client], CLIENT_PORT), bytes(30))
    local = "198.18.0.77" if way.client == 4 else "2001:db8:12::77"
    with a_router(way) as (name, ifindex):

        def told(sent: Ethernet, by: int = ifindex) -> Outcome:
            return balancer.run(bytes(sent), context(bytes(sent), by))

        assert told(frame).action is Action.TX
        for other in (
            frame.with_ip(destination=local),  # on the link, and nobody knows its MAC address
            frame.with_udp(source=backend.port + 1),
            frame.with_ip(source=local),
        ):
            assert told(other) == Outcome(Action.PASS, bytes(other), {})
        assert told(frame, socket.if_nametoindex("quic1")) == Outcome(Action.PASS, bytes(frame), {})
        namespaces.ip(name, "route delete " + ("0.0.0.0/0" if way.client == 4 else "::/0"))
        assert told(frame) == Outcome(Action.PASS, bytes(frame), {})


@pytest.mark.parametrize("forward", [f for f in Forward if f.returns_directly], ids=lambda forward: forward.name)
@by_family
def test_what_returns_directly_is_none_of_our_business(forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    backend = table_of(forward, WEB[way]).backends[A].address
    for destination in (Address(SOURCES[way.client], 20_000), Address(CLIENTS[way.client], CLIENT_PORT)):
        frame = bytes(answer(backend, destination, bytes(30)))
        assert balancer.run(frame) == Outcome(Action.PASS, frame, {})
