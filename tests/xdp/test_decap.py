"""Tunnels that end here: frames through the decapsulation program, and what the stack then gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lb.address import packed
from lb.forward import Forward
from lb.xdp.layout import U32_KEY, sum_u64
from lb.xdp.libbpf import Object
from tests.xdp.bpf import ROOT, Action, Balancer, missing
from tests.xdp.cases import BACKEND_PORT, INTERFACE, ROUTER, cid, tables, ways
from tests.xdp.forwarding import datagram, ip, not_ours, with_ttl
from tests.xdp.frames import (
    DESTINATION_OPTIONS,
    GUE_PORT,
    HOP_BY_HOP,
    IPIP,
    IPV6_IN_IP,
    QINQ,
    ROUTING,
    VLAN,
    Ethernet,
    Extension,
    IPv4,
    IPv6,
    Raw,
    Tag,
    Udp,
    fragments,
    parse,
)

OBJECT = ROOT / "lb/xdp/decap.bpf.o"
COUNTERS = ("decapsulated", "dropped_ecn", "malformed", "passed")  # struct decap_counters

BALANCERS = {4: "10.0.0.1", 6: "2001:db8:f::1"}
HERE = {4: "10.1.0.10", 6: "2001:db8:b::10"}
ELSEWHERE = {4: "10.1.0.11", 6: "2001:db8:b::11"}
VIPS = {4: "192.0.2.1", 6: "2001:db8::1"}
CLIENTS = {4: "198.51.100.7", 6: "2001:db8:c::7"}

DECAPSULATED, DROPPED_ECN, MALFORMED, PASSED = ({name: 1} for name in COUNTERS)
NOT_ECT, ECT_1, ECT_0, CE = range(4)


class Decap:
    """The program, for tunnels that end at HERE."""

    def __init__(self, path: Path = OBJECT) -> None:
        with Object(path) as compiled, ExitStack() as undo:
            compiled.load()
            self._program = undo.enter_context(compiled.program("decap"))
            self._local = undo.enter_context(compiled.map("local"))
            self._count = undo.enter_context(compiled.map("decap_count"))
            for host in HERE.values():
                self.add(host)
            self._opened = undo.pop_all()

    def close(self) -> None:
        self._opened.close()

    def add(self, host: str) -> None:
        """Let tunnels end at another address, too."""
        self._local.update(packed(host), U32_KEY.pack(1))

    def run(self, frame: bytes) -> tuple[Action, bytes, dict[str, int]]:
        """One frame: what becomes of it, its octets then, and what was counted."""
        before = self._counters()
        result = self._program.test_run(frame)
        counted = {name: now - before[name] for name, now in self._counters().items() if now != before[name]}
        return Action(result.retval), result.data, counted

    def _counters(self) -> dict[str, int]:
        octets = self._count.lookup(U32_KEY.pack(0))
        assert octets is not None
        return dict(zip(COUNTERS, sum_u64(octets, len(COUNTERS)), strict=True))


@pytest.fixture(scope="module")
def decap() -> Iterator[Decap]:
    if reason := missing():
        pytest.skip(reason)
    program = Decap()
    yield program
    program.close()


def inner(family: int, payload: bytes = bytes(range(200)), **fields: Any) -> IPv4 | IPv6:
    """A client's packet."""
    return ip(CLIENTS[family], VIPS[family], Udp(50000, 443, payload), **fields)


class Tunnel(NamedTuple):
    """A mode, and the outer family."""

    forward: Forward
    family: int

    def packet(self, content: Any, *, udp: dict[str, Any] | None = None, to: str = "", **fields: Any) -> IPv4 | IPv6:
        """What carries a packet, or octets that are none. `udp` and `fields` are those of the outer headers."""
        if self.forward is Forward.GUE:
            content = Udp(
                **{"source": 0xC123, "destination": GUE_PORT, "payload": content, "checksum": 0, **(udp or {})}
            )
        return ip(BALANCERS[self.family], to or HERE[self.family], content, **fields)

    def raw(self, version: int, octets: bytes) -> Any:
        """Octets as what is inside, said to be a packet of this version."""
        return octets if self.forward is Forward.GUE else Raw(IPIP if version == 4 else IPV6_IN_IP, octets)


TUNNELS = [Tunnel(forward, family) for forward in (Forward.IPIP, Forward.GUE) for family in (4, 6)]
by_tunnel = pytest.mark.parametrize("tunnel", TUNNELS, ids=lambda t: f"{t.forward.name}{t.family}")
by_family = pytest.mark.parametrize("family", [4, 6])


def framed(packet: IPv4 | IPv6, **fields: Any) -> Ethernet:
    return Ethernet(INTERFACE, ROUTER, packet, **fields)


class Shape(NamedTuple):
    """How the outside of a tunnel's frame may look; `family` is that of the outer packet, None for either."""

    name: str
    family: int | None = None
    frame: dict[str, Any] = {}
    packet: dict[str, Any] = {}
    udp: dict[str, Any] | None = None


SHAPES = (
    Shape("plain"),
    Shape("one VLAN tag", frame={"tags": (Tag(VLAN, 100),)}),
    Shape("two VLAN tags", frame={"tags": (Tag(QINQ, 5 << 13 | 4094), Tag(VLAN, 7))}),
    Shape("padding", frame={"padding": b"\xff" * 11}),
    Shape("the last hop", packet={"ttl": 1}),
    Shape("DSCP that is not the inner one's", packet={"tos": 46 << 2}),
    Shape("an IPv4 option", 4, packet={"options": bytes.fromhex("94040000")}),
    Shape("40 octets of options", 4, packet={"options": b"\x01" * 40}, frame={"tags": (Tag(QINQ, 1), Tag(VLAN, 2))}),
    Shape("it may be fragmented", 4, packet={"dont_fragment": False, "identification": 0xBEEF}),
    Shape(
        "a tunnel encapsulation limit", 6, packet={"extensions": (Extension(DESTINATION_OPTIONS, b"\0\4\1\4\1\0\0"),)}
    ),
    Shape("a flow label, hop-by-hop options", 6, packet={"extensions": (Extension(HOP_BY_HOP, b"\0\5\2\0\0\1\0"),)}),
    Shape("a UDP checksum", udp={"checksum": None}),
    Shape("a wrong UDP checksum", udp={"checksum": 0xBAD}),
)


def applies(shape: Shape, tunnel: Tunnel) -> bool:
    return shape.family in (None, tunnel.family) and (shape.udp is None or tunnel.forward is Forward.GUE)


@by_family
@pytest.mark.parametrize(
    ("tunnel", "shape"),
    [
        pytest.param(tunnel, shape, id=f"{shape.name}, {tunnel.forward.name}{tunnel.family}")
        for tunnel in TUNNELS
        for shape in SHAPES
        if applies(shape, tunnel)
    ],
)
def test_the_inner_packet_is_all_that_is_left(decap: Decap, tunnel: Tunnel, family: int, shape: Shape) -> None:
    packet = inner(family)
    packed_up = tunnel.packet(packet, udp=shape.udp, **shape.packet)

    action, left, counted = decap.run(bytes(framed(packed_up, **shape.frame)))

    assert (action, counted) == (Action.PASS, DECAPSULATED)
    assert framed(packet, **shape.frame) == parse(left)


@by_tunnel
@pytest.mark.parametrize(
    "packet",
    [
        inner(4, b""),
        inner(4, options=b"\x01" * 40, ttl=1, tos=0xB8, identification=1, dont_fragment=False),
        inner(6, b"", hop_limit=1, traffic_class=0xB8, flow_label=0xFFFFF),
        inner(6, extensions=(Extension(HOP_BY_HOP, b"\0\5\2\0\0\1\0"),)),
        inner(4, bytes(8000)),  # over several buffers
        inner(6, bytes(8000)),
        ip(CLIENTS[4], VIPS[4], Raw(253, b"neither UDP nor TCP")),
        *fragments(inner(4, bytes(96), dont_fragment=False), 48),
        *fragments(inner(6, bytes(96)), 48),
        Tunnel(Forward.IPIP, 4).packet(inner(6)),  # a tunnel in the tunnel is for the stack
    ],
    ids=str,
)
def test_the_inner_packet_may_be_any(decap: Decap, tunnel: Tunnel, packet: IPv4 | IPv6) -> None:
    frame = bytes(framed(tunnel.packet(packet)))

    assert (Action.PASS, bytes(framed(packet)), DECAPSULATED) == decap.run(frame)


@by_tunnel
@by_family
def test_congestion_comes_through(decap: Decap, tunnel: Tunnel, family: int) -> None:
    """RFC 6040, figure 4: rows are what comes in, columns what it comes in."""
    table: dict[int, dict[int, int | None]] = {
        NOT_ECT: {NOT_ECT: NOT_ECT, ECT_0: NOT_ECT, ECT_1: NOT_ECT, CE: None},  # dropped
        ECT_0: {NOT_ECT: ECT_0, ECT_0: ECT_0, ECT_1: ECT_1, CE: CE},
        ECT_1: {NOT_ECT: ECT_1, ECT_0: ECT_1, ECT_1: ECT_1, CE: CE},
        CE: {NOT_ECT: CE, ECT_0: CE, ECT_1: CE, CE: CE},
    }
    af41, expedited = 34 << 2, 46 << 2
    for came, row in table.items():
        for outer, becomes in row.items():
            frame = bytes(framed(tunnel.packet(inner(family, tos=af41 | came), tos=expedited | outer)))
            action, left, counted = decap.run(frame)
            if becomes is None:
                assert (action, counted) == (Action.DROP, DROPPED_ECN)
            else:
                assert (action, counted) == (Action.PASS, DECAPSULATED)
                assert framed(inner(family, tos=af41 | becomes)) == parse(left)


def passing() -> Iterator[tuple[str, bytes]]:
    """Frames that are nobody's, or not for us."""
    for tunnel in TUNNELS:
        kind = f"{tunnel.forward.name}{tunnel.family}"
        whole = (
            tunnel.packet(inner(4, bytes(160)), dont_fragment=False) if tunnel.family == 4 else tunnel.packet(inner(4))
        )
        yield f"{kind} to another host", bytes(framed(tunnel.packet(inner(6), to=ELSEWHERE[tunnel.family])))
        yield f"{kind}, first fragment", bytes(framed(fragments(whole, 96)[0]))
        yield f"{kind}, last fragment", bytes(framed(fragments(whole, 96)[-1]))
        yield f"{kind} behind three VLAN tags", bytes(framed(whole, tags=(Tag(VLAN, 1),) * 3))
    for family in (4, 6):
        gue = Tunnel(Forward.GUE, family)
        yield f"another port, {family}", bytes(framed(gue.packet(inner(4), udp={"destination": 6081})))
        yield (
            f"from the port, not to it, {family}",
            bytes(framed(gue.packet(inner(4), udp={"source": GUE_PORT, "destination": BACKEND_PORT}))),
        )
        for first in (0x00, 0x20, 0x3F, 0x80, 0xFF):
            yield f"GUE of another variant, {first:#x}, {family}", bytes(framed(gue.packet(bytes([first]) + bytes(40))))
        yield f"TCP, {family}", bytes(framed(ip(CLIENTS[family], HERE[family], Raw(6, bytes(20)))))
    under_way = Extension(ROUTING, bytes.fromhex("02 04 01 00000000") + bytes(16))
    yield (
        "a tunnel that is not yet where it goes",
        bytes(framed(Tunnel(Forward.IPIP, 6).packet(inner(4), extensions=(under_way,)))),
    )
    for way in ways(Forward.DNAT):
        for name, octets in not_ours(way):
            yield f"{name}, {way.client}", octets


@pytest.mark.parametrize("frame", [pytest.param(octets, id=name) for name, octets in passing()])
def test_all_else_passes_as_it_is(decap: Decap, frame: bytes) -> None:
    assert (Action.PASS, frame, PASSED) == decap.run(frame)


def wrong() -> Iterator[tuple[str, Callable[[Tunnel], Ethernet]]]:
    """Tunnels to us with something in them that no packet begins with."""

    def of(version: int, octets: bytes) -> Callable[[Tunnel], Ethernet]:
        return lambda tunnel: framed(tunnel.packet(tunnel.raw(version, octets)))

    ipv4, ipv6 = bytes(inner(4)), bytes(inner(6))
    yield "nothing, IPv4", of(4, b"")
    yield "nothing, IPv6", of(6, b"")
    yield "IP version 5", of(4, b"\x55" + ipv4[1:])
    yield "IP version 7", of(6, b"\x70" + ipv6[1:])
    yield "an IPv4 header of four words", of(4, b"\x44" + ipv4[1:])
    yield "an IPv4 header longer than its packet", of(4, b"\x4f" + ipv4[1:2] + (59).to_bytes(2) + ipv4[4:])
    yield "an IPv4 length of 0", of(4, bytes(inner(4, length=0)))
    yield "an IPv4 length beyond the tunnel's", of(4, bytes(inner(4, length=len(ipv4) + 1)))
    yield "an IPv6 length beyond the tunnel's", of(6, bytes(inner(6, length=len(ipv6) - 39)))
    yield "an IPv4 header cut short", of(4, ipv4[:19])
    yield "an IPv6 header cut short", of(6, ipv6[:39])
    yield "an IPv4 packet cut short", of(4, ipv4[:-1])
    yield "an IPv6 packet cut short", of(6, ipv6[:-1])
    yield (
        "octets beyond the tunnel's",
        lambda tunnel: framed(tunnel.packet(tunnel.raw(4, ipv4[:-4])), padding=ipv4[-4:]),
    )


@by_tunnel
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in wrong()])
def test_what_is_no_packet_is_dropped(decap: Decap, tunnel: Tunnel, make: Callable[[Tunnel], Ethernet]) -> None:
    frame = bytes(make(tunnel))

    assert (Action.DROP, frame, MALFORMED) == decap.run(frame)


@by_family
@pytest.mark.parametrize(("version", "said"), [(4, IPV6_IN_IP), (6, IPIP)])
def test_what_is_inside_must_be_what_the_protocol_says(decap: Decap, family: int, version: int, said: int) -> None:
    frame = bytes(framed(ip(BALANCERS[family], HERE[family], Raw(said, bytes(inner(version))))))

    assert (Action.DROP, frame, MALFORMED) == decap.run(frame)


@by_family
@pytest.mark.parametrize("length", [0, 7, 8, 267, 65535])
def test_a_udp_length_that_cannot_be_is_dropped(decap: Decap, family: int, length: int) -> None:
    frame = bytes(framed(Tunnel(Forward.GUE, family).packet(inner(6), udp={"length": length})))

    assert (Action.DROP, frame, MALFORMED) == decap.run(frame)


@by_tunnel
@by_family
def test_nothing_is_unpacked_that_is_not_all_there(decap: Decap, tunnel: Tunnel, family: int) -> None:
    """Cut anywhere, a frame is dropped, or still the stack's if it is not known yet to be a tunnel."""
    frame = bytes(framed(tunnel.packet(inner(family, b"all of it")), tags=(Tag(VLAN, 9),)))
    transport = 18 + (20 if tunnel.family == 4 else 40)
    known = transport + 8 if tunnel.forward is Forward.GUE else transport
    for length in range(14, len(frame)):
        expected = (Action.PASS, PASSED) if length < known else (Action.DROP, MALFORMED)
        action, left, counted = decap.run(frame[:length])
        assert (length, *expected, frame[:length]) == (length, action, counted, left)


@pytest.mark.parametrize("forward", [Forward.IPIP, Forward.GUE])
def test_what_the_balancer_packs_is_unpacked(decap: Decap, loaded: Callable[..., Balancer], forward: Forward) -> None:
    """Both programs, one after the other: the client's packet arrives, one hop older."""
    balancer = loaded(forward)
    balancer.apply(tables(forward))
    balancer.forget()
    for way in ways(forward):
        for ecn in (NOT_ECT, ECT_1, ECT_0, CE):
            sent = datagram(way, b"\x41" + cid(0) + bytes(40), tos=10 << 2 | ecn)
            on_its_way = parse(balancer.run(bytes(sent)).frame)
            decap.add(on_its_way.ip.destination)

            action, left, counted = decap.run(bytes(on_its_way))

            assert (action, counted) == (Action.PASS, DECAPSULATED)
            assert replace(on_its_way, packet=with_ttl(sent.ip, -1)) == parse(left)
