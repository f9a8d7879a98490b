"""A slow, plain model of the forward modes: frame in, frame out, as values. And frames of many shapes to try it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from lb.address import Address
from lb.forward import Forward
from lb.routing import Backend, FourTuple
from tests.xdp.cases import CLIENT_PORT, INTERFACE, ROUTER, SOURCES, Way, next_hop
from tests.xdp.frames import (
    ARP,
    AUTHENTICATION,
    DESTINATION_OPTIONS,
    ECHO_REQUEST,
    FRAGMENTATION_NEEDED,
    GUE_PORT,
    HOP_BY_HOP,
    ICMPV6_ECHO_REQUEST,
    MOBILITY,
    PACKET_TOO_BIG,
    QINQ,
    ROUTING,
    TCP,
    UNREACHABLE,
    VLAN,
    Ethernet,
    Extension,
    Icmp,
    Icmp6,
    IPv4,
    IPv6,
    Other,
    Raw,
    Tag,
    Udp,
)

OUTER_TTL = 64
FIRST_GUE_PORT = 0xC000


def ip(source: str, destination: str, content: Any, **fields: Any) -> IPv4 | IPv6:
    """A packet of the family of its addresses; `ttl` and `tos` go by these names in both."""
    if ":" not in source:
        return IPv4(source, destination, content, **fields)
    for name, in_ipv6 in (("ttl", "hop_limit"), ("tos", "traffic_class")):
        if name in fields:
            fields[in_ipv6] = fields.pop(name)
    return IPv6(source, destination, content, **fields)


def datagram(way: Way, payload: bytes, *, port: int = CLIENT_PORT, **fields: Any) -> Ethernet:
    """A client's datagram to the service, as the router hands it to us."""
    flow = way.flow(port)
    content = Udp(flow.client_port, flow.local_port, payload)
    return Ethernet(INTERFACE, ROUTER, ip(flow.client, flow.local, content, **fields))


def answer(backend: Address, destination: Address, payload: bytes, **fields: Any) -> Ethernet:
    """A backend's datagram to whoever it takes for its client."""
    content = Udp(backend.port, destination.port, payload)
    return Ethernet(INTERFACE, next_hop(backend.host), ip(backend.host, destination.host, content, **fields))


def forwarded(forward: Forward, frame: Ethernet, backend: Backend, *, port: int = 0, entropy: int = 0) -> Ethernet:
    """What leaves for the backend. `port` is the one that nat chose, `entropy` the flow's hash in tunnels."""
    packet = with_ttl(frame.ip, -1)
    if forward is Forward.NAT:
        family = 6 if backend.address.is_ipv6 else 4
        packet = readdressed(packet, Address(SOURCES[family], port), backend.address)
    elif forward is Forward.DNAT:
        packet = readdressed(packet, Address(packet.source, frame.udp.source), backend.address)
    elif forward in (Forward.IPIP, Forward.GUE):
        packet = in_tunnel(forward, packet, backend.address.host, entropy)
    return replace(frame, destination=next_hop(backend.address.host), source=INTERFACE, packet=packet)


def the_answer(trigger: Ethernet, payload: bytes) -> Ethernet:
    """A datagram of our own, back to whoever sent one."""
    there = trigger.ip
    content = Udp(trigger.udp.destination, trigger.udp.source, payload)
    return replace(
        trigger,
        destination=trigger.source,
        source=INTERFACE,
        packet=ip(there.destination, there.source, content),
        padding=b"",
    )


def too_big(trigger: Ethernet, mtu: int) -> Ethernet:
    """The ICMP error that says how long a packet may be, from where the packet was for."""
    there = trigger.ip
    content: Icmp = Icmp(UNREACHABLE, FRAGMENTATION_NEEDED, mtu, bytes(there)[: 576 - 28])
    if isinstance(there, IPv6):
        content = Icmp6(PACKET_TOO_BIG, 0, mtu, bytes(there)[: 1280 - 48])
    return replace(
        trigger,
        destination=trigger.source,
        source=INTERFACE,
        packet=ip(there.destination, there.source, content),
        padding=b"",
    )


def flow_of(frame: Ethernet) -> FourTuple:
    """The 4-tuple of a client's datagram."""
    return FourTuple(frame.ip.source, frame.udp.source, frame.ip.destination, frame.udp.destination)


def in_tunnel(forward: Forward, packet: IPv4 | IPv6, host: str, entropy: int) -> IPv4 | IPv6:
    content: Any = packet
    if forward is Forward.GUE:
        content = Udp(FIRST_GUE_PORT | entropy & 0x3FFF, GUE_PORT, packet, checksum=0)
    if ":" not in host:
        return IPv4(SOURCES[4], host, content, ttl=OUTER_TTL, tos=tos_of(packet))
    return IPv6(SOURCES[6], host, content, hop_limit=OUTER_TTL, traffic_class=tos_of(packet), flow_label=entropy)


def readdressed(packet: IPv4 | IPv6, source: Address, destination: Address) -> IPv4 | IPv6:
    """A datagram with other addresses; with another header if they are of the other family."""
    assert isinstance(packet.content, Udp)
    content = replace(packet.content, source=source.port, destination=destination.port)
    if source.is_ipv6 == isinstance(packet, IPv6):
        return replace(packet, source=source.host, destination=destination.host, content=content)
    return ip(source.host, destination.host, content, ttl=ttl_of(packet), tos=tos_of(packet))


def ttl_of(packet: IPv4 | IPv6) -> int:
    return packet.ttl if isinstance(packet, IPv4) else packet.hop_limit


def tos_of(packet: IPv4 | IPv6) -> int:
    return packet.tos if isinstance(packet, IPv4) else packet.traffic_class


def with_ttl(packet: IPv4 | IPv6, change: int) -> IPv4 | IPv6:
    if isinstance(packet, IPv4):
        return replace(packet, ttl=packet.ttl + change)
    return replace(packet, hop_limit=packet.hop_limit + change)


class Shape(NamedTuple):
    """How a frame may look and still be a datagram. `family` is that of its packet, None for either."""

    name: str
    family: int | None
    change: Callable[[Ethernet], Ethernet]


def _frame(**fields: Any) -> Callable[[Ethernet], Ethernet]:
    return lambda frame: replace(frame, **fields)


def _packet(**fields: Any) -> Callable[[Ethernet], Ethernet]:
    return lambda frame: frame.with_ip(**fields)


_PRIORITY_5 = 5 << 13
_ROUTER_ALERT = bytes.fromhex("94040000")
_HOP_BY_HOP = Extension(HOP_BY_HOP, bytes.fromhex("00 050200000100"))  # router alert, padding
_DESTINATION = Extension(DESTINATION_OPTIONS, bytes.fromhex("01 010c") + bytes(12))
_ARRIVED = Extension(ROUTING, bytes.fromhex("02 04 00 00000000") + bytes(16))  # no segments left
_ON_ITS_WAY = Extension(ROUTING, bytes.fromhex("02 04 01 00000000") + bytes(16))
_LONGEST = Extension(DESTINATION_OPTIONS, bytes.fromhex("ff") + 8 * bytes.fromhex("01fa") + bytes(2048 - 18))
HEADERS = (_HOP_BY_HOP, _DESTINATION, _ARRIVED)

SHAPES = (
    Shape("plain", None, lambda frame: frame),
    Shape("one VLAN tag", None, _frame(tags=(Tag(VLAN, _PRIORITY_5 | 100),))),
    Shape("two VLAN tags", None, _frame(tags=(Tag(QINQ, 4094), Tag(VLAN, _PRIORITY_5 | 7)))),
    Shape("padding of Ethernet", None, _frame(padding=bytes(6))),
    Shape("padding that is not zero", None, _frame(padding=b"\xff" * 18)),
    Shape("from another router", None, _frame(source="02:00:00:00:00:ff")),
    Shape("without a UDP checksum", 4, lambda frame: frame.with_udp(checksum=0)),
    Shape("DSCP EF, ECT(1)", 4, _packet(tos=46 << 2 | 1)),
    Shape("DSCP CS6, CE", 6, _packet(traffic_class=48 << 2 | 3)),
    Shape("every bit of DSCP and ECN", 4, _packet(tos=0xFF)),
    Shape("every bit of traffic class and flow label", 6, _packet(traffic_class=0xFF, flow_label=0xFFFFF)),
    Shape("TTL 2", 4, _packet(ttl=2)),
    Shape("TTL 255", 4, _packet(ttl=255)),
    Shape("hop limit 2", 6, _packet(hop_limit=2)),
    Shape("hop limit 255", 6, _packet(hop_limit=255)),
    Shape("identification, and may be fragmented", 4, _packet(identification=0xBEEF, dont_fragment=False)),
    Shape("an IPv4 option", 4, _packet(options=_ROUTER_ALERT)),
    Shape("40 octets of IPv4 options", 4, _packet(options=b"\x01" * 39 + b"\x00")),
    Shape("hop-by-hop options", 6, _packet(extensions=(_HOP_BY_HOP,))),
    Shape("three extension headers", 6, _packet(extensions=HEADERS)),
    Shape(
        "VLAN tags, option, padding",
        4,
        _frame(tags=(Tag(VLAN, 1), Tag(VLAN, 2)), padding=b"\xaa" * 5),
    ),
)


def not_ours(way: Way) -> Iterator[tuple[str, bytes]]:
    """Frames for the stack: nobody counts them, nobody changes them."""
    datagram_of_ours = datagram(way, bytes(60))
    packet = datagram_of_ours.ip
    vip, client, is_ipv6 = packet.destination, packet.source, isinstance(packet, IPv6)

    def frame(content: Any, destination: str = vip, **fields: Any) -> bytes:
        return bytes(replace(datagram_of_ours, packet=ip(client, destination, content, **fields)))

    yield "another port", frame(Udp(CLIENT_PORT, 80, bytes(60)))
    yield "another address", frame(packet.content, "2001:db8::2" if is_ipv6 else "192.0.2.2")
    yield "TCP", frame(Raw(TCP, bytes.fromhex("c35001bb00000000000000005002faf000000000")))
    yield "a ping", frame(Icmp6(ICMPV6_ECHO_REQUEST, rest=1) if is_ipv6 else Icmp(ECHO_REQUEST, rest=1))
    yield "an unknown protocol", frame(Raw(253, bytes(60)))
    yield "nothing behind the IP header", frame(Raw(17, b""))
    yield "UDP header cut short", frame(Raw(17, bytes(7)))
    yield "ARP", bytes(replace(datagram_of_ours, packet=Other(ARP, bytes.fromhex("0001080006040001") + bytes(20))))
    yield "an EtherType of nobody", bytes(replace(datagram_of_ours, packet=Other(0x88B5, bytes(packet))))
    yield "three VLAN tags", bytes(replace(datagram_of_ours, tags=(Tag(VLAN, 1), Tag(VLAN, 2), Tag(VLAN, 3))))
    other_type = 0x0800 if is_ipv6 else 0x86DD
    yield "the other family's EtherType", bytes(replace(datagram_of_ours, packet=Other(other_type, bytes(packet))))
    if is_ipv6:
        for name, extensions in (
            ("a routing header with segments left", (_ON_ITS_WAY,)),
            ("authentication", (Extension(AUTHENTICATION, bytes.fromhex("04") + bytes(22)),)),
            ("mobility", (Extension(MOBILITY, bytes.fromhex("00") + bytes(6)),)),
            ("too many extension headers", (_DESTINATION,) * 9),
        ):
            yield name, frame(packet.content, extensions=extensions)
        yield "no next header", frame(Raw(59, bytes(packet)[40:]))
        yield "an extension header beyond the end", frame(Raw(HOP_BY_HOP, bytes.fromhex("11ff050200000100") + bytes(8)))
    else:
        octets = bytes(packet)
        yield "IP version 5", bytes(replace(datagram_of_ours, packet=Other(0x0800, b"\x55" + octets[1:])))
        yield "a header of 4 words", bytes(replace(datagram_of_ours, packet=Other(0x0800, b"\x44" + octets[1:])))
        yield "a header beyond the end", bytes(replace(datagram_of_ours, packet=Other(0x0800, b"\x4f" + octets[1:20])))
        yield "a total length of no more than the header", frame(packet.content, length=20)
        yield "a total length of less than the header", frame(packet.content, length=19)
        yield "a total length of 0", frame(packet.content, length=0)


def malformed(way: Way) -> Iterator[tuple[str, bytes]]:
    """Frames for a listener whose lengths contradict each other: dropped, and counted as such."""
    frame = datagram(way, b"\x41" + bytes(59))
    for length in (0, 7, 69, 65535):
        yield f"UDP length {length} of 68", bytes(frame.with_udp(length=length))
    yield "UDP length beyond IP's, and padding behind it", bytes(replace(frame.with_udp(length=70), padding=bytes(10)))
    yield "the frame ends before the packet", bytes(frame)[:-1]
    yield "the frame ends behind the UDP header", bytes(frame)[:-60]
