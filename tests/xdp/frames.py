"""Frames as values: octets are made from them, and made of octets again. Checksums are computed the slow, plain way.

`bytes(frame)` builds. `parse` is strict: lengths have to fit and checksums have to be right, or it raises FrameError.
So `parse(bytes(frame)) == frame` for every right frame, and a wrong one comes with an explicit `checksum` or `length`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, NamedTuple

# EtherTypes.
IPV4 = 0x0800
IPV6 = 0x86DD
ARP = 0x0806
VLAN = 0x8100
QINQ = 0x88A8

# IP protocols, IPv6 extension headers among them.
HOP_BY_HOP = 0
ICMP = 1
IPIP = 4
TCP = 6
UDP = 17
IPV6_IN_IP = 41
ROUTING = 43
FRAGMENT = 44
AUTHENTICATION = 51
ICMPV6 = 58
DESTINATION_OPTIONS = 60
MOBILITY = 135
_EXTENSIONS = (HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS, MOBILITY)

GUE_PORT = 6080

# ICMP and ICMPv6 types.
UNREACHABLE = 3
FRAGMENTATION_NEEDED = 4  # a code of it
TIME_EXCEEDED = 11
ECHO_REQUEST = 8
ICMPV6_UNREACHABLE = 1
PACKET_TOO_BIG = 2
ICMPV6_TIME_EXCEEDED = 3
ICMPV6_ECHO_REQUEST = 128


class FrameError(ValueError):
    """What is wrong with a frame."""


@dataclass(frozen=True, slots=True)
class Raw:
    """Octets of a protocol that is not looked into: fragments, TCP, anything."""

    protocol: int
    octets: bytes

    def octets_between(self, source: str, destination: str) -> bytes:
        return self.octets


@dataclass(frozen=True, slots=True)
class Udp:
    """A datagram. `checksum` None is the right one, 0 none at all; `length` None is the right one."""

    source: int
    destination: int
    payload: bytes | IPv4 | IPv6 = b""
    checksum: int | None = None
    length: int | None = None

    protocol = UDP

    def octets_between(self, source: str, destination: str) -> bytes:
        payload = bytes(self.payload)
        length = 8 + len(payload) if self.length is None else self.length
        header = _words(self.source, self.destination, length)
        checksum = self.checksum
        if checksum is None:
            pseudo = pseudo_header(source, destination, 8 + len(payload), UDP)
            checksum = internet_checksum(pseudo + header + b"\0\0" + payload) or 0xFFFF
        return header + _words(checksum) + payload


@dataclass(frozen=True, slots=True)
class Icmp:
    """An ICMP message; `rest` is the second word of its header."""

    type: int
    code: int = 0
    rest: int = 0
    body: bytes = b""
    checksum: int | None = None

    protocol = ICMP

    def octets_between(self, source: str, destination: str) -> bytes:
        return self._octets(b"")

    def _octets(self, pseudo: bytes) -> bytes:
        head, tail = bytes((self.type, self.code)), self.rest.to_bytes(4) + self.body
        checksum = internet_checksum(pseudo + head + b"\0\0" + tail) if self.checksum is None else self.checksum
        return head + _words(checksum) + tail


@dataclass(frozen=True, slots=True)
class Icmp6(Icmp):
    """An ICMPv6 message: its checksum covers the addresses too."""

    protocol = ICMPV6

    def octets_between(self, source: str, destination: str) -> bytes:
        return self._octets(pseudo_header(source, destination, 8 + len(self.body), ICMPV6))


@dataclass(frozen=True, slots=True)
class IPv4:
    """An IPv4 packet; the offset of a fragment is in octets."""

    source: str
    destination: str
    content: Udp | Icmp | Raw | IPv4 | IPv6
    ttl: int = 64
    tos: int = 0
    identification: int = 0
    dont_fragment: bool = True
    more_fragments: bool = False
    offset: int = 0
    options: bytes = b""
    length: int | None = None
    checksum: int | None = None

    protocol = IPIP

    def __bytes__(self) -> bytes:
        content = self.content.octets_between(self.source, self.destination)
        header_length = 20 + len(self.options)
        length = header_length + len(content) if self.length is None else self.length
        flags = self.dont_fragment << 14 | self.more_fragments << 13 | self.offset // 8
        head = bytes((0x40 | header_length // 4, self.tos)) + _words(length, self.identification, flags)
        head += bytes((self.ttl, self.content.protocol))
        tail = octets_of(self.source) + octets_of(self.destination) + self.options
        checksum = internet_checksum(head + b"\0\0" + tail) if self.checksum is None else self.checksum
        return head + _words(checksum) + tail + content

    def octets_between(self, source: str, destination: str) -> bytes:
        return bytes(self)


class Extension(NamedTuple):
    """An IPv6 extension header: its number, and its octets after the first, which names the next header."""

    number: int
    octets: bytes


@dataclass(frozen=True, slots=True)
class IPv6:
    """An IPv6 packet."""

    source: str
    destination: str
    content: Udp | Icmp | Raw | IPv4 | IPv6
    hop_limit: int = 64
    traffic_class: int = 0
    flow_label: int = 0
    extensions: tuple[Extension, ...] = ()
    length: int | None = None

    protocol = IPV6_IN_IP

    def __bytes__(self) -> bytes:
        content = self.content.octets_between(self.source, self.destination)
        next_header = self.content.protocol
        for extension in reversed(self.extensions):
            content = bytes((next_header,)) + extension.octets + content
            next_header = extension.number
        length = len(content) if self.length is None else self.length
        head = (6 << 28 | self.traffic_class << 20 | self.flow_label).to_bytes(4) + _words(length)
        head += bytes((next_header, self.hop_limit))
        return head + octets_of(self.source) + octets_of(self.destination) + content

    def octets_between(self, source: str, destination: str) -> bytes:
        return bytes(self)


class Tag(NamedTuple):
    """A VLAN tag: its EtherType, then priority and number."""

    type: int
    control: int


@dataclass(frozen=True, slots=True)
class Other:
    """What is neither IPv4 nor IPv6."""

    ether_type: int
    octets: bytes

    def __bytes__(self) -> bytes:
        return self.octets


@dataclass(frozen=True, slots=True)
class Ethernet:
    """A frame without its check sequence. `padding` is what follows the packet."""

    destination: str
    source: str
    packet: IPv4 | IPv6 | Other
    tags: tuple[Tag, ...] = ()
    padding: bytes = b""

    def __bytes__(self) -> bytes:
        head = octets_of_mac(self.destination) + octets_of_mac(self.source)
        head += b"".join(_words(*tag) for tag in self.tags)
        return head + _words(_ether_type(self.packet)) + bytes(self.packet) + self.padding

    @property
    def ip(self) -> IPv4 | IPv6:
        """The packet of a frame that has one."""
        assert not isinstance(self.packet, Other)
        return self.packet

    @property
    def udp(self) -> Udp:
        """The datagram of a frame that has one."""
        assert isinstance(self.ip.content, Udp)
        return self.ip.content

    @property
    def payload(self) -> bytes:
        """The payload of that datagram."""
        return bytes(self.udp.payload)

    def with_ip(self, **fields: Any) -> Ethernet:
        """The same with other fields of the packet."""
        return replace(self, packet=replace(self.ip, **fields))

    def with_udp(self, **fields: Any) -> Ethernet:
        """The same with other fields of the datagram."""
        return self.with_ip(content=replace(self.udp, **fields))


def parse(frame: bytes) -> Ethernet:
    """The value of a frame. Raises FrameError if a length or a checksum in it is wrong."""
    if len(frame) < 14:
        raise FrameError(f"a frame of {len(frame)} octets")
    at = 12
    tags = []
    while int.from_bytes(frame[at : at + 2]) in (VLAN, QINQ):
        tags.append(Tag(int.from_bytes(frame[at : at + 2]), int.from_bytes(frame[at + 2 : at + 4])))
        at += 4
    ether_type = int.from_bytes(frame[at : at + 2])
    at += 2
    packet: IPv4 | IPv6 | Other
    padding = b""
    if ether_type in (IPV4, IPV6):
        packet = _parse_ip(frame[at:])
        padding = frame[at + len(bytes(packet)) :]
    else:
        packet = Other(ether_type, frame[at:])
    return Ethernet(mac(frame[:6]), mac(frame[6:12]), packet, tuple(tags), padding)


def fragments(packet: IPv4 | IPv6, size: int) -> list[IPv4] | list[IPv6]:
    """A packet in fragments that carry `size` octets each, a multiple of 8."""
    whole = packet.content.octets_between(packet.source, packet.destination)
    protocol = packet.content.protocol
    pieces = [(at, whole[at : at + size], at + size < len(whole)) for at in range(0, len(whole), size)]
    if isinstance(packet, IPv4):
        return [
            replace(packet, content=Raw(protocol, piece), dont_fragment=False, more_fragments=more, offset=at)
            for at, piece, more in pieces
        ]
    return [
        replace(
            packet,
            content=Raw(protocol, piece),
            extensions=(*packet.extensions, Extension(FRAGMENT, b"\0" + _words(at | more) + bytes(4))),
        )
        for at, piece, more in pieces
    ]


def internet_checksum(octets: bytes) -> int:
    """RFC 1071, word by word."""
    octets += bytes(len(octets) % 2)
    total = sum(int.from_bytes(octets[i : i + 2]) for i in range(0, len(octets), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def pseudo_header(source: str, destination: str, length: int, protocol: int) -> bytes:
    """What checksums of UDP and ICMPv6 cover besides the message (RFC 768; RFC 8200, section 8.1)."""
    addresses = octets_of(source) + octets_of(destination)
    if ":" in source:
        return addresses + length.to_bytes(4) + protocol.to_bytes(4)
    return addresses + _words(protocol, length)


def octets_of(address: str) -> bytes:
    """An address as on the wire."""
    return ip_address(address).packed


def octets_of_mac(address: str) -> bytes:
    """A MAC address as on the wire."""
    return bytes.fromhex(address.replace(":", ""))


def mac(octets: bytes) -> str:
    """A MAC address as people write it."""
    return octets.hex(":")


def _words(*words: int) -> bytes:
    return b"".join(word.to_bytes(2) for word in words)


def _ether_type(packet: IPv4 | IPv6 | Other) -> int:
    if isinstance(packet, Other):
        return packet.ether_type
    return IPV4 if isinstance(packet, IPv4) else IPV6


def _parse_ip(octets: bytes) -> IPv4 | IPv6:
    if not octets:
        raise FrameError("no IP header")
    return _parse_ipv4(octets) if octets[0] >> 4 == 4 else _parse_ipv6(octets)


def _parse_ipv4(octets: bytes) -> IPv4:
    header_length = 4 * (octets[0] & 15)
    length = int.from_bytes(octets[2:4])
    if not 20 <= header_length <= length <= len(octets):
        raise FrameError(f"IPv4: header of {header_length}, packet of {length} octets, {len(octets)} there")
    if internet_checksum(octets[:header_length]):
        raise FrameError(f"IPv4: wrong header checksum {octets[10:12].hex()}")
    flags = int.from_bytes(octets[6:8])
    source, destination = str(ip_address(octets[12:16])), str(ip_address(octets[16:20]))
    offset, more = 8 * (flags & 0x1FFF), bool(flags & 0x2000)
    if flags & 0x8000:
        raise FrameError("IPv4: reserved bit")
    content = _parse_content(
        octets[9], octets[header_length:length], source, destination, is_fragment=bool(offset or more)
    )
    return IPv4(
        source,
        destination,
        content,
        ttl=octets[8],
        tos=octets[1],
        identification=int.from_bytes(octets[4:6]),
        dont_fragment=bool(flags & 0x4000),
        more_fragments=more,
        offset=offset,
        options=octets[20:header_length],
    )


def _parse_ipv6(octets: bytes) -> IPv6:
    if len(octets) < 40 or octets[0] >> 4 != 6:
        raise FrameError(f"IPv6: {octets[:40].hex()}")
    length = int.from_bytes(octets[4:6])
    if 40 + length > len(octets):
        raise FrameError(f"IPv6: {length} octets of payload, {len(octets) - 40} there")
    word = int.from_bytes(octets[:4])
    source, destination = str(ip_address(octets[8:24])), str(ip_address(octets[24:40]))
    next_header, rest, extensions = octets[6], octets[40 : 40 + length], []
    while next_header in _EXTENSIONS:
        size = 8
        if next_header == AUTHENTICATION:
            size = 4 * (rest[1] + 2)
        elif next_header != FRAGMENT:
            size = 8 * (rest[1] + 1)
        if size > len(rest):
            raise FrameError(f"IPv6: extension header {next_header} of {size} octets, {len(rest)} there")
        extensions.append(Extension(next_header, rest[1:size]))
        next_header, rest = rest[0], rest[size:]
    is_fragment = any(e.number == FRAGMENT and int.from_bytes(e.octets[1:3]) & 0xFFF9 for e in extensions)
    content = _parse_content(next_header, rest, source, destination, is_fragment=is_fragment)
    return IPv6(
        source,
        destination,
        content,
        hop_limit=octets[7],
        traffic_class=word >> 20 & 0xFF,
        flow_label=word & 0xFFFFF,
        extensions=tuple(extensions),
    )


def _parse_content(
    protocol: int, octets: bytes, source: str, destination: str, *, is_fragment: bool
) -> Udp | Icmp | Raw | IPv4 | IPv6:
    if is_fragment:
        return Raw(protocol, octets)
    if protocol == UDP:
        return _parse_udp(octets, source, destination)
    if protocol in (IPIP, IPV6_IN_IP):
        packet = _parse_ip(octets)
        if packet.protocol != protocol or len(bytes(packet)) != len(octets):
            raise FrameError(f"protocol {protocol} carries {packet}")
        return packet
    if protocol == (ICMPV6 if ":" in source else ICMP):
        pseudo = pseudo_header(source, destination, len(octets), ICMPV6) if protocol == ICMPV6 else b""
        if len(octets) < 8 or internet_checksum(pseudo + octets):
            raise FrameError(f"ICMP: wrong checksum or length in {octets[:8].hex()}")
        kind = Icmp6 if protocol == ICMPV6 else Icmp
        return kind(octets[0], octets[1], int.from_bytes(octets[4:8]), octets[8:])
    return Raw(protocol, octets)


def _parse_udp(octets: bytes, source: str, destination: str) -> Udp:
    if len(octets) < 8 or int.from_bytes(octets[4:6]) != len(octets):
        raise FrameError(f"UDP: wrong length in {octets[:8].hex()}, {len(octets)} octets there")
    checksum = int.from_bytes(octets[6:8])
    if checksum and internet_checksum(pseudo_header(source, destination, len(octets), UDP) + octets):
        raise FrameError(f"UDP: wrong checksum {checksum:04x}")
    destination_port = int.from_bytes(octets[2:4])
    # GUE variant 1: what begins like an IP header is one (draft-ietf-intarea-gue, section 4).
    is_gue = destination_port == GUE_PORT and octets[8:9] and octets[8] >> 4 in (4, 6)
    payload = _parse_ip(octets[8:]) if is_gue else octets[8:]
    return Udp(int.from_bytes(octets[:2]), destination_port, payload, checksum=None if checksum else 0)
