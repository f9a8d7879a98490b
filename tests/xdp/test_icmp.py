"""ICMP errors: those that the program sends when a packet is too long, and those that come for its backends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from lb.address import Address
from lb.engine import Drop
from lb.forward import Forward
from lb.routing import RoutingTable
from tests.builders import long, short
from tests.xdp.bpf import Action, Balancer, Outcome, hop
from tests.xdp.cases import CODEPOINT_7, DEAD, DRAINING, INTERFACE, MTU, ROUTER, WEB, A, B, Way, cid, next_hop
from tests.xdp.expectations import (
    ROUTABLE,
    TABLES,
    TO_A,
    Loaded,
    assert_forwarded,
    by_family,
    by_forward,
    by_mode,
    counts,
    entropy_of,
    nat_source,
    ready,
    table_of,
)
from tests.xdp.forwarding import datagram, in_tunnel, ip, readdressed, too_big, with_ttl
from tests.xdp.frames import (
    ECHO_REQUEST,
    FRAGMENTATION_NEEDED,
    ICMPV6_ECHO_REQUEST,
    ICMPV6_TIME_EXCEEDED,
    ICMPV6_UNREACHABLE,
    PACKET_TOO_BIG,
    TCP,
    TIME_EXCEEDED,
    UNREACHABLE,
    VLAN,
    Ethernet,
    Extension,
    Icmp,
    Icmp6,
    IPv4,
    IPv6,
    Raw,
    Tag,
    Udp,
)

ON_THE_WAY = {4: "203.0.113.9", 6: "2001:db8:9::9"}  # a router between us and a client, or a backend
PARAMETER_PROBLEM = {4: 12, 6: 4}
SCID_OF_B = long(b"client", cid(B), size=200)
ERRORS = {
    4: [(UNREACHABLE, code) for code in range(16)] + [(TIME_EXCEEDED, 0), (TIME_EXCEEDED, 1), (12, 0)],
    6: [(ICMPV6_UNREACHABLE, code) for code in range(8)] + [(PACKET_TOO_BIG, 0), (ICMPV6_TIME_EXCEEDED, 0), (4, 1)],
}


def overhead(forward: Forward, way: Way, header: int) -> int:
    """Octets that a packet grows by; `header` is the length of its own IP header."""
    outer = 20 if way.backend == 4 else 40
    if forward is Forward.NAT:
        return 0 if way.client == way.backend else outer - header
    return {Forward.IPIP: outer, Forward.GUE: outer + 8}.get(forward, 0)


@by_mode
@pytest.mark.parametrize("options", [0, 8])
def test_a_packet_that_would_be_too_long_is_answered(forward: Forward, way: Way, options: int, loaded: Loaded) -> None:
    """RFC 1191, RFC 8201: with the length that would have done. One octet less, and it is on its way."""
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    fields: dict[str, Any] = {}
    if options:
        fields = {"options": b"\x01" * 8} if way.client == 4 else {"extensions": (Extension(60, b"\0\1\4" + bytes(4)),)}
    header = (20 if way.client == 4 else 40) + options
    longest = MTU - overhead(forward, way, header)
    frame = datagram(way, short(cid(A), longest - header - 8), port=1001, **fields)
    assert len(bytes(frame.ip)) == longest
    assert_forwarded(balancer, frame, table, TO_A)

    for tags, padding in (((), b""), ((Tag(VLAN, 3),), b""), ((Tag(VLAN, 3), Tag(VLAN, 4)), bytes(7))):
        frame = datagram(way, short(cid(A), longest - header - 7), **fields)
        frame = replace(frame, tags=tags, padding=padding)
        counted = counts(table, frame, TO_A, forward, Drop.TOO_LARGE) | {"too_big_sent": 1}
        assert balancer.run(bytes(frame)) == Outcome(Action.TX, bytes(too_big(frame, longest)), counted)


@by_mode
def test_one_backends_way_may_be_narrower(forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    narrow = table.backends[A].address.host
    balancer.apply(TABLES[forward], hops={narrow: hop(narrow, 600)})
    longest = 600 - overhead(forward, way, 20 if way.client == 4 else 40)
    frame = datagram(way, short(cid(A), 590))
    counted = counts(table, frame, TO_A, forward, Drop.TOO_LARGE) | {"too_big_sent": 1}

    assert balancer.run(bytes(frame)) == Outcome(Action.TX, bytes(too_big(frame, longest)), counted)
    assert balancer.run(bytes(datagram(way, short(cid(B), 590)))).counted[f"{way.service}/b datagrams_to"] == 1


@by_mode
def test_packets_of_several_buffers(forward: Forward, way: Way, loaded: Loaded) -> None:
    """Jumbo frames: what is behind the first 3500 octets or so is not within the program's sight."""
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    hosts = [backend.address.host for backend in table.backends]
    balancer.apply(TABLES[forward], hops={host: hop(host, 9000) for host in hosts})
    for i, size in enumerate((3000, 3400, 3600, 4096, 8900)):
        assert_forwarded(balancer, datagram(way, short(cid(A), size), port=1000 + i), table, TO_A)
    longest = 9000 - overhead(forward, way, 20 if way.client == 4 else 40)
    frame = datagram(way, short(cid(A), 9000))
    counted = counts(table, frame, TO_A, forward, Drop.TOO_LARGE) | {"too_big_sent": 1}
    assert balancer.run(bytes(frame)) == Outcome(Action.TX, bytes(too_big(frame, longest)), counted)


@by_family
@pytest.mark.usefixtures("one_cpu")
def test_answers_are_limited(way: Way, loaded: Loaded) -> None:
    """A thousand per second and CPU, as Linux does."""
    balancer = ready(loaded, Forward.L2)
    balancer.refill()
    frame = bytes(datagram(way, short(cid(A), 1600)))
    run = balancer.loaded.program.test_run
    began = time.monotonic()
    told = [run(frame) for _ in range(2500)]
    seconds = time.monotonic() - began
    sent = sum(result.retval == Action.TX for result in told)
    kept_back = [result.data for result in told if result.retval == Action.DROP]

    assert 1000 <= sent <= 1000 * (1 + seconds + 0.01) + 1  # the program's clock is a coarse one
    assert kept_back == [frame] * (2500 - sent)
    assert balancer.counted() == {
        f"{way.service} CID": 2500,
        f"{way.service} config 0": 2500,
        Drop.TOO_LARGE: 2500,
        "too_big_sent": sent,
        "too_big_limited": 2500 - sent,
    }


@pytest.mark.parametrize("client", ["0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "ff02::1"])
def test_nobody_is_answered_who_cannot_be_one_host(client: str, loaded: Loaded) -> None:
    """RFC 1122, section 3.2.2; RFC 4443, section 2.4."""
    balancer = ready(loaded, Forward.L2)
    way = Way(6, 6) if ":" in client else Way(4, 4)
    for payload, counted in (
        (short(cid(DEAD)), {f"{way.service} RESET_LIMITED": 1}),
        (
            short(cid(A), 1600),
            {f"{way.service} CID": 1, f"{way.service} config 0": 1, Drop.TOO_LARGE: 1},
        ),
    ):
        frame = bytes(datagram(way, payload).with_ip(source=client))
        assert balancer.run(frame) == Outcome(Action.DROP, frame, counted)


def about(quoted: bytes, way: Way, destination: str, kind: tuple[int, int], rest: int = 0) -> Ethernet:
    """An ICMP error that a router on the way sends."""
    content = (Icmp6 if way.client == 6 else Icmp)(*kind, rest, quoted)
    return Ethernet(INTERFACE, ROUTER, ip(ON_THE_WAY[way.client], destination, content))


def answered(way: Way, payload: bytes, port: int = 50000) -> IPv4 | IPv6:
    """What a backend's datagram looks like on its way to the client."""
    flow = way.flow(port)
    return ip(flow.local, flow.client, Udp(flow.local_port, flow.client_port, payload), ttl=50)


def to_backend(
    balancer: Balancer, error: Ethernet, quoted: IPv4 | IPv6, way: Way, number: int, left: bytes
) -> Ethernet:
    """What must have left for a backend: the error as it is, or as if it were about what the backend sent."""
    table = table_of(balancer.forward, WEB[way])
    backend = table.backends[number]
    packet = with_ttl(error.ip, -1)
    if balancer.forward in (Forward.NAT, Forward.DNAT):
        assert isinstance(packet.content, Icmp)
        assert isinstance(quoted.content, Udp)
        seen_as = Address(quoted.destination, quoted.content.destination)
        if balancer.forward is Forward.NAT:
            seen_as = nat_source(balancer, datagram(way, b""), table, number)
        sent = bytes(readdressed(quoted, backend.address, seen_as))[: len(packet.content.body)]
        packet = replace(packet, destination=backend.address.host, content=replace(packet.content, body=sent))
    elif balancer.forward in (Forward.IPIP, Forward.GUE):
        packet = in_tunnel(balancer.forward, packet, backend.address.host, entropy_of(left))
    return replace(error, destination=next_hop(backend.address.host), source=INTERFACE, packet=packet)


def assert_error_reaches(
    balancer: Balancer, way: Way, number: int, quoted: IPv4 | IPv6, octets: int, kind: tuple[int, int]
) -> None:
    error = about(bytes(quoted)[:octets], way, quoted.source, kind, rest=1400)
    outcome = balancer.run(bytes(error))
    if balancer.forward is Forward.NAT and way.client != way.backend:
        # In the other family the quote would need headers that nobody has sent.
        assert outcome == Outcome(Action.DROP, bytes(error), {Drop.NO_FLOW: 1})
        return
    expected = to_backend(balancer, error, quoted, way, number, outcome.frame)
    assert outcome == Outcome(Action.TX, bytes(expected), {"icmp_forwarded": 1})


@by_mode
def test_an_error_of_every_type_reaches_the_backend(forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    balancer.run(bytes(datagram(way, short(cid(B)))))
    for kind in ERRORS[way.client]:
        assert_error_reaches(balancer, way, B, answered(way, SCID_OF_B), 10_000, kind)


@by_mode
def test_whose_error_it_is(forward: Forward, way: Way, loaded: Loaded) -> None:
    """A quoted long header says so by its Source CID; else the 4-tuple does, by what is remembered or by the ring."""
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    kind = ERRORS[way.client][0]
    home = table.fallback(way.flow())
    assert home is not None
    other = A if home != A else B
    unknown = long(b"client", cid(0x999), size=200)
    for number in (home, other, B):  # in nat mode only a flow says how the backend knows the client
        balancer.run(bytes(datagram(way, short(cid(number)))))

    assert_error_reaches(balancer, way, home, answered(way, ROUTABLE), 10_000, kind)
    assert_error_reaches(balancer, way, B, answered(way, SCID_OF_B), 10_000, kind)
    assert_error_reaches(balancer, way, home, answered(way, unknown), 10_000, kind)
    assert_error_reaches(balancer, way, home, answered(way, long(b"client", cid(DEAD), size=200)), 10_000, kind)
    assert_error_reaches(balancer, way, home, answered(way, long(b"client", CODEPOINT_7)), 10_000, kind)

    # The flow outranks the ring.
    balancer.run(bytes(datagram(way, short(CODEPOINT_7))))
    draining = RoutingTable.build(WEB[way], {table.backends[home].name: DRAINING})
    balancer.apply([draining])
    assert draining.fallback(way.flow()) != home
    assert_error_reaches(balancer, way, home, answered(way, ROUTABLE), 10_000, kind)


@by_mode
def test_a_quote_cut_at_every_octet(forward: Forward, way: Way, loaded: Loaded) -> None:
    """Without all of the UDP header it is nobody's; without all of the Source CID it is the 4-tuple's."""
    balancer = ready(loaded, forward)
    table = table_of(forward, WEB[way])
    home = table.fallback(way.flow())
    assert home is not None
    for number in (home, B):
        balancer.run(bytes(datagram(way, short(cid(number)))))
    quoted = answered(way, SCID_OF_B)
    headers = (20 if way.client == 4 else 40) + 8
    scid_end = headers + len(long(b"client", cid(B), size=0))
    for octets in range(scid_end + 8):
        if octets < headers:
            error = bytes(about(bytes(quoted)[:octets], way, quoted.source, ERRORS[way.client][0]))
            assert (octets, balancer.run(error)) == (octets, Outcome(Action.PASS, error, {}))
        else:
            number = home if octets < scid_end else B
            assert_error_reaches(balancer, way, number, quoted, octets, ERRORS[way.client][0])


@by_mode
def test_a_quote_with_every_option(forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    balancer.run(bytes(datagram(way, short(cid(B)))))
    quoted = answered(way, SCID_OF_B)
    assert isinstance(quoted.content, Udp)
    variants: list[IPv4 | IPv6] = [replace(quoted, content=replace(quoted.content, checksum=0))]
    if isinstance(quoted, IPv4):
        variants += [replace(quoted, options=b"\x01" * 12), replace(quoted, identification=77, dont_fragment=False)]
    else:
        variants += [replace(quoted, traffic_class=0x88, flow_label=99)]
    for variant in variants:
        assert_error_reaches(balancer, way, B, variant, 10_000, ERRORS[way.client][0])


@by_forward
@by_family
def test_errors_that_are_not_ours(forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    balancer.run(bytes(datagram(way, short(cid(B)))))
    quoted = answered(way, SCID_OF_B)
    assert isinstance(quoted.content, Udp)
    vip, kind = quoted.source, ERRORS[way.client][0]
    other_host = "2001:db8::99" if way.client == 6 else "192.0.2.99"
    redirect, echo = ((137, 0), (ICMPV6_ECHO_REQUEST, 0)) if way.client == 6 else ((5, 1), (ECHO_REQUEST, 0))
    for name, quote, destination, kind_of in (
        ("an echo request", quoted, vip, echo),
        ("a redirect", quoted, vip, redirect),
        ("of another port", replace(quoted, content=replace(quoted.content, source=80)), vip, kind),
        ("of another host", replace(quoted, source=other_host), vip, kind),
        ("for another host", quoted, other_host, kind),
        ("for and of another host", replace(quoted, source=other_host), other_host, kind),
        ("about TCP", replace(quoted, content=Raw(TCP, bytes(40))), vip, kind),
        ("about nothing", None, vip, kind),
    ):
        error = bytes(about(b"" if quote is None else bytes(quote), way, destination, kind_of))
        assert (name, balancer.run(error)) == (name, Outcome(Action.PASS, error, {}))
    if isinstance(quoted, IPv4):
        error = bytes(about(bytes(replace(quoted, offset=8)), way, vip, kind))
        assert balancer.run(error) == Outcome(Action.PASS, error, {})
    cut = bytes(about(bytes(quoted), way, vip, kind))
    for length in range(14, len(cut) - 200):
        assert balancer.run(cut[:length]).action is not Action.TX, length


@by_mode
@pytest.mark.parametrize("ttl", [0, 1])
def test_an_error_that_has_come_far_enough(ttl: int, forward: Forward, way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, forward)
    balancer.run(bytes(datagram(way, short(cid(B)))))
    error = about(bytes(answered(way, SCID_OF_B)), way, way.vip.host, ERRORS[way.client][0])
    error = replace(error, packet=with_ttl(error.ip, ttl - 64))
    failure = Drop.NO_FLOW if forward is Forward.NAT and way.client != way.backend else Drop.HOP_LIMIT

    assert balancer.run(bytes(error)) == Outcome(Action.DROP, bytes(error), {failure: 1})


@by_family
def test_nat_without_a_flow_has_nobody_to_tell(way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, Forward.NAT)
    error = bytes(about(bytes(answered(way, SCID_OF_B)), way, way.vip.host, ERRORS[way.client][0]))

    assert balancer.run(error) == Outcome(Action.DROP, error, {Drop.NO_FLOW: 1})


@by_family
def test_a_backends_network_refuses_our_packets(way: Way, loaded: Loaded) -> None:
    """Mode nat. Unreachable: news for its health. Too long: the client is told, as if by us. All else: the stack's."""
    balancer = ready(loaded, Forward.NAT)
    table = table_of(Forward.NAT, WEB[way])
    frame = datagram(way, short(cid(B), 1000))
    balancer.run(bytes(frame))
    ours = nat_source(balancer, frame, table, B)
    sent = readdressed(frame.ip, ours, table.backends[B].address)
    for kind in ERRORS[way.client]:
        for octets in (2000, (20 if way.client == 4 else 40) + 8):
            error = about(bytes(sent)[:octets], way, ours.host, kind, rest=1400)
            outcome = balancer.run(bytes(error))
            if kind in ((UNREACHABLE, FRAGMENTATION_NEEDED), (PACKET_TOO_BIG, 0)):
                assert isinstance(error.ip.content, Icmp)
                packet = replace(
                    with_ttl(error.ip, -1),
                    source=way.vip.host,
                    destination=frame.ip.source,
                    content=replace(error.ip.content, body=bytes(frame.ip)[:octets]),
                )
                left = bytes(Ethernet(ROUTER, INTERFACE, packet))
                assert (kind, outcome) == (kind, Outcome(Action.TX, left, {"too_big_sent": 1}))
            elif kind[0] in (UNREACHABLE, ICMPV6_UNREACHABLE) and kind[0] == ERRORS[way.client][0][0]:
                counted = {f"{way.service}/b unreachable": 1}
                assert (kind, outcome) == (kind, Outcome(Action.DROP, bytes(error), counted))
            else:
                assert (kind, outcome) == (kind, Outcome(Action.PASS, bytes(error), {}))

    assert isinstance(sent.content, Udp)
    stranger = bytes(replace(sent, content=replace(sent.content, source=19999)))
    error = about(stranger, way, ours.host, ERRORS[way.client][0])
    assert balancer.run(bytes(error)) == Outcome(Action.PASS, bytes(error), {})
