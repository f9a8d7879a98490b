"""Packets through the program, one by one: what leaves, octet for octet, and exactly what is counted.

Where a test does not say otherwise, a packet is the first one of its flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from lb.engine import Drop
from lb.forward import Forward
from lb.router import Router, Verdict
from lb.routing import RoutingTable
from tests.builders import long, short
from tests.xdp.bpf import Action, Balancer, Outcome
from tests.xdp.cases import (
    CONFIGS,
    DEAD,
    DECISIONS,
    INTERFACE,
    RING,
    ROUTER,
    SINGLE_PASS,
    STORIES,
    UNROUTABLE,
    WAYS,
    WEB,
    A,
    Decision,
    Story,
    Way,
    cid,
    moment,
    next_hop,
    ways,
)
from tests.xdp.expectations import (
    MODES,
    ROUTABLE,
    TABLES,
    TO_A,
    Loaded,
    assert_forwarded,
    assert_reset,
    by_family,
    by_forward,
    by_mode,
    counts,
    ready,
    table_of,
    what_left,
)
from tests.xdp.forwarding import HEADERS, SHAPES, Shape, datagram, flow_of, malformed, not_ours
from tests.xdp.frames import (
    QINQ,
    UDP,
    VLAN,
    Ethernet,
    IPv6,
    Tag,
    fragments,
    internet_checksum,
    mac,
    parse,
    pseudo_header,
)

OF_ONE_SERVICE = [(decision, Way(4, 4)) for decision in DECISIONS if decision.service]
OF_ANY = [(decision, way) for decision in DECISIONS if not decision.service for way in WAYS]


@pytest.mark.parametrize(
    ("forward", "decision", "way"),
    [
        pytest.param(forward, decision, way, id=f"{forward.name}-{way.client}-{way.backend}-{decision.name}")
        for forward in Forward
        for decision, way in OF_ANY + OF_ONE_SERVICE
        if way in ways(forward)
    ],
)
def test_a_decision(forward: Forward, decision: Decision, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    table = table_of(forward, decision.service or WEB[way])
    frame = datagram(way, decision.payload).with_udp(destination=table.service.listen[0].port)
    route = decision.route
    if route.backend == RING:
        route = route._replace(backend=table.fallback(flow_of(frame)))

    if route.backend is not None:
        assert_forwarded(balancer, frame, table, route)
        return
    outcome = balancer.run(bytes(frame))
    counted = counts(table, frame, route, forward)
    if route.verdict is Verdict.RESET:
        config = next(c for c in CONFIGS if c.config_id == route.config_id)
        assert_reset(outcome, frame, config, counted)
    else:
        assert outcome == Outcome(Action.DROP, bytes(frame), counted)


@by_mode
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_a_story(story: Story, forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    told, expected = [], []
    for step in story.steps:
        now = moment(WEB[way], step, way)
        balancer.apply([now.table])
        outcome = balancer.run(bytes(datagram(way, step.payload, port=now.flow.client_port)))
        verdicts = [verdict for verdict in Verdict if f"{way.service} {verdict.name}" in outcome.counted]
        told.append((verdicts, mac(outcome.frame[:6])))
        hosts = {backend.name: backend.address.host for backend in WEB[way].backends}
        expected.append(([step.verdict], next_hop(hosts[now.backend]) if now.backend else INTERFACE))
    assert told == expected


@pytest.mark.parametrize(
    ("forward", "way", "shape"),
    [
        pytest.param(forward, way, shape, id=f"{forward.name}-{way.client}-{way.backend}-{shape.name}")
        for forward, way in MODES
        for shape in SHAPES
        if shape.family in (None, way.client)
    ],
)
def test_a_shape(forward: Forward, way: Way, shape: Shape, loaded: Loaded) -> None:
    """However a datagram is wrapped it is understood, and what goes around it is right."""
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    frame = shape.change(datagram(way, ROUTABLE))
    if frame.udp.checksum == 0 and forward is Forward.NAT and way == (4, 6):
        # What has no checksum cannot become IPv6 without somebody reading all of it.
        counted = counts(table, frame, TO_A, forward, Drop.NO_CHECKSUM)
        assert balancer.run(bytes(frame)) == Outcome(Action.DROP, bytes(frame), counted)
    else:
        assert_forwarded(balancer, frame, table, TO_A)


@by_mode
def test_payloads_of_every_length(forward: Forward, way: Way, loaded: Loaded) -> None:
    """Checksums of odd and even lengths, and of every remainder."""
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    for size in (*range(18, 66), 1200, 1201, 1350, 1351):
        payload = cid(A).join((b"\x41", bytes(i * size & 0xFF for i in range(size - 18))))
        frame = datagram(way, payload, port=10000 + size)
        assert_forwarded(balancer, frame, table, TO_A)


@by_forward
@by_family
def test_what_is_not_ours_is_left_to_the_stack(forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    for name, frame in not_ours(way):
        assert (name, balancer.run(frame)) == (name, Outcome(Action.PASS, frame, {}))


@by_forward
@by_family
def test_lengths_that_contradict_each_other(forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    for name, frame in malformed(way):
        expected = Outcome(Action.DROP, frame, {f"{way.service} MALFORMED": 1})
        assert (name, balancer.run(frame)) == (name, expected)


@by_mode
@pytest.mark.parametrize("ttl", [0, 1])
def test_a_packet_that_has_come_far_enough(ttl: int, forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    frame = datagram(way, ROUTABLE, ttl=ttl)
    counted = counts(table_of(forward, WEB[way]), frame, TO_A, forward, Drop.HOP_LIMIT)

    assert balancer.run(bytes(frame)) == Outcome(Action.DROP, bytes(frame), counted)


@by_mode
def test_a_backend_whose_mac_address_is_not_known(forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    balancer.apply(TABLES[forward], hops={table.backends[A].address.host: None})
    frame = datagram(way, ROUTABLE)
    counted = counts(table, frame, TO_A, forward, Drop.UNREACHABLE)

    assert balancer.run(bytes(frame)) == Outcome(Action.DROP, bytes(frame), counted)


@by_forward
@by_family
@pytest.mark.parametrize("tags", [(), (Tag(VLAN, 5),), (Tag(QINQ, 5), Tag(VLAN, 6))], ids=len)
def test_fragments_are_dropped_and_counted(forward: Forward, way: Way, tags: tuple[Tag, ...], loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    counted = {f"{way.service} FRAGMENT": 1}
    packet = datagram(way, long(cid(A))).ip
    elsewhere = replace(packet, destination="2001:db8::99" if way.client == 6 else "192.0.2.99")
    first, *later = fragments(packet, 800)
    assert later

    for piece, verdict in (
        *((piece, Outcome(Action.DROP, b"", counted)) for piece in (first, *later)),
        *((piece, Outcome(Action.PASS, b"", {})) for piece in fragments(elsewhere, 800)),
    ):
        frame = bytes(Ethernet(INTERFACE, ROUTER, piece, tags))
        assert balancer.run(frame) == verdict._replace(frame=frame)


@by_forward
@by_family
def test_a_first_fragment_says_which_service_it_is_for(forward: Forward, way: Way, loaded: Loaded) -> None:
    """Another one does not, and counts for one of those that have its address. So does one for no service's port."""
    balancer = ready(loaded, forward)
    if forward is Forward.DNAT:
        service, port = ("strict", 450) if way.client == 4 else (way.service, 443)
    else:
        service, port = next((other.service, other.vip.port) for other in WAYS[2:] if other.client == way.client)
    for of_port, name in ((port, service), (80, way.service)):
        pieces = fragments(datagram(way, long(cid(A))).with_udp(destination=of_port).ip, 800)
        told = [balancer.run(bytes(Ethernet(INTERFACE, ROUTER, piece))).counted for piece in pieces]
        assert told == [{f"{name} FRAGMENT": 1}, {f"{way.service} FRAGMENT": 1}]


@by_family
def test_an_only_fragment_is_one_too(way: Way, loaded: Loaded) -> None:
    """RFC 6946 has such a thing. No QUIC stack sends it."""
    balancer = ready(loaded, Forward.L2)
    packet = datagram(way, ROUTABLE).ip
    if isinstance(packet, IPv6):
        frame = bytes(Ethernet(INTERFACE, ROUTER, fragments(packet, 800)[0]))
        assert balancer.run(frame) == Outcome(Action.DROP, frame, {f"{way.service} FRAGMENT": 1})
    else:
        frame = bytes(Ethernet(INTERFACE, ROUTER, replace(packet, dont_fragment=False)))
        assert balancer.run(frame).action is Action.TX


LAYERS = {
    4: Shape(
        "VLAN tags, options", 4, lambda f: replace(f.with_ip(options=b"\x01" * 8), tags=(Tag(QINQ, 1), Tag(VLAN, 2)))
    ),
    6: Shape("VLAN tag, extension headers", 6, lambda f: replace(f.with_ip(extensions=HEADERS), tags=(Tag(VLAN, 2),))),
}


@by_mode
@pytest.mark.parametrize("payload", [long(cid(A), b"scid", size=60), ROUTABLE], ids=["long", "short"])
def test_a_frame_cut_at_every_octet(payload: bytes, forward: Forward, way: Way, loaded: Loaded) -> None:
    """Nobody's until its UDP header is there; nothing to forward until all of the packet is there."""
    balancer = ready(loaded, forward)
    frame = LAYERS[way.client].change(datagram(way, payload))
    whole = bytes(frame)
    ours_from = len(whole) - len(payload)
    for length in range(14, len(whole)):
        cut = whole[:length]
        malformed = Outcome(Action.DROP, cut, {f"{way.service} MALFORMED": 1})
        expected = malformed if length >= ours_from else Outcome(Action.PASS, cut, {})
        assert (length, balancer.run(cut)) == (length, expected)
    assert_forwarded(balancer, frame, table_of(forward, WEB[way]), TO_A)


@by_mode
def test_a_reset_for_triggers_of_every_size(forward: Forward, way: Way, loaded: Loaded) -> None:
    """RFC 9000, section 10.3, by the same rules as lb.router's: test_router.py has them for the udp engine."""
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    assert balancer.run(bytes(datagram(way, b""))).counted == {f"{way.service} EMPTY": 1}
    for size in range(1, 201):
        frame = datagram(way, short(cid(DEAD), size)[:size], port=1000 + size)
        if size < 1 + len(cid(DEAD)):
            assert_forwarded(
                balancer, frame, table, Router(table, random=bytes).route(frame.payload, flow_of(frame), 0.0)
            )
        elif size < 22:
            too_small = {f"{way.service} RESET_TOO_SMALL": 1}
            assert (size, balancer.run(bytes(frame))) == (size, Outcome(Action.DROP, bytes(frame), too_small))
        else:
            assert_reset(balancer.run(bytes(frame)), frame, SINGLE_PASS, {f"{way.service} RESET": 1})


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        pytest.param(way, shape, id=f"{way.client}-{way.backend}-{shape.name}")
        for way in WAYS[:2]
        for shape in SHAPES
        if shape.family in (None, way.client)
    ],
)
def test_a_reset_for_triggers_of_every_shape(way: Way, shape: Shape, loaded: Loaded) -> None:
    balancer = ready(loaded, Forward.L2)
    frame = shape.change(datagram(way, short(cid(DEAD))))
    assert_reset(balancer.run(bytes(frame)), frame, SINGLE_PASS, {f"{way.service} RESET": 1})


def identified(frame: bytes) -> Iterator[bytes]:
    """An IPv4 frame with every possible identification."""
    for word in range(65536):
        header = frame[14:18] + word.to_bytes(2) + frame[20:24] + bytes(2) + frame[26:34]
        yield frame[:14] + header[:10] + internet_checksum(header).to_bytes(2) + header[12:] + frame[34:]


def ending(frame: Ethernet) -> Iterator[bytes]:
    """A datagram with every possible last word."""
    octets = bytes(frame.with_udp(payload=frame.payload[:-2] + bytes(2), checksum=0))
    udp = octets[-8 - len(frame.payload) :]
    head, middle = octets[: 6 - len(udp)], udp[8:-2]
    rest = internet_checksum(pseudo_header(frame.ip.source, frame.ip.destination, len(udp), UDP) + udp) ^ 0xFFFF
    for word in range(65536):
        total = rest + word
        checksum = (total & 0xFFFF) + (total >> 16) ^ 0xFFFF or 0xFFFF
        yield head + checksum.to_bytes(2) + middle + word.to_bytes(2)


@pytest.mark.parametrize("forward", [Forward.NAT, Forward.DNAT, Forward.L2], ids=lambda forward: forward.name)
def test_every_checksum_of_an_ipv4_header(forward: Forward, loaded: Loaded) -> None:
    """RFC 1624 is about the few for which the obvious arithmetic is wrong."""
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[Way(4, 4)])
    frame = datagram(Way(4, 4), short(cid(A), 20))
    left = balancer.run(bytes(frame)).frame
    assert left == bytes(what_left(balancer, frame, table, A, left))
    for came, expected in zip(identified(bytes(frame)), identified(left), strict=True):
        assert balancer.loaded.program.test_run(came).data == expected


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.service)
def test_every_checksum_of_udp(way: Way, loaded: Loaded) -> None:
    """One that comes out as zero is sent as ones: zero would be none (RFC 768)."""
    balancer = ready(loaded, Forward.NAT)
    table = table_of(Forward.NAT, WEB[way])
    frame = datagram(way, short(cid(A), 20))
    left = balancer.run(bytes(frame)).frame
    assert left == bytes(what_left(balancer, frame, table, A, left))
    for came, expected in zip(ending(frame), ending(parse(left)), strict=True):
        assert balancer.loaded.program.test_run(came).data == expected


@by_forward
@by_family
def test_nobody_listens_on_any_other_port(forward: Forward, way: Way, loaded: Loaded) -> None:
    """Listeners are looked up by a hash of address and port first: some ports share a line with one."""
    balancer = ready(loaded, forward)
    listening = {address.port for table in TABLES[forward] for address in table.service.listen}
    run = balancer.loaded.program.test_run
    ours = bytes(datagram(way, ROUTABLE))
    for port in range(65536):
        if port not in listening:
            frame = ours[:-68] + bytes(2) + port.to_bytes(2) + ours[-64:]
            assert run(frame).retval == Action.PASS
            if port % 64 == 0:
                assert run(ours).retval == Action.TX
    assert not [name for name in balancer.counted() if "FALLBACK" in name]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.service)
def test_a_slot_that_is_given_to_another_backend(way: Way, loaded: Loaded) -> None:
    """What is remembered of whoever was there before is void: the newcomer, who takes no new flows, gets none."""
    loaded(Forward.L2)
    service = WEB[way]
    balancer = Balancer(Forward.L2, sizes={"backends": 6})
    try:
        balancer.apply([RoutingTable.build(service)])
        home = RoutingTable.build(service).fallback(way.flow())
        assert home is not None
        assert balancer.run(bytes(datagram(way, UNROUTABLE))).counted[f"{way.service} FALLBACK"] == 1
        slot = balancer.slot(way.service, home)
        others = tuple(backend for i, backend in enumerate(service.backends) if i != home)
        for number in range(12):
            balancer.apply([RoutingTable.build(replace(service, backends=others))])
            stranger = replace(service.backends[home], name=f"stranger {number}", weight=0)
            balancer.apply([table := RoutingTable.build(replace(service, backends=(*others, stranger)))])
            if balancer.slot(way.service, 4) == slot:
                break
        assert balancer.slot(way.service, 4) == slot
        now = table.fallback(way.flow())
        assert now not in (None, 4)
        outcome = balancer.run(bytes(datagram(way, UNROUTABLE)))
        assert outcome.counted[f"{way.service} FALLBACK"] == 1
        assert outcome.counted[f"{way.service}/{table.backends[now or 0].name} datagrams_to"] == 1
    finally:
        balancer.close()
