"""Captures: the UDP datagrams in a pcap or pcapng file, one after the other. Files of any size take little memory.

It knows link layers and IP as far as it must, with dpkt's help, and nothing of QUIC.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, NamedTuple

import dpkt  # type: ignore[import-untyped]

from lb.address import Address

# The specifications'. LINKTYPE numbers, of https://www.tcpdump.org/linktypes.html
SECTION_HEADER = b"\x0a\x0d\x0d\x0a"  # of pcapng, whichever octet comes first
LITTLE_ENDIAN = b"\x4d\x3c\x2b\x1a"
INTERFACE_BLOCKS, PACKET_BLOCKS = (1,), (2, 6)
BLOCK_OVERHEAD = 12  # type, length, length again
TIME_RESOLUTION = 9  # an option of an interface
FRAGMENT_HEADER = 44
# Ours.
MAX_READ = 1 << 20  # octets of a block or a packet, more than any is long

LINK_LAYERS: dict[int, Any] = {
    0: dpkt.loopback.Loopback,
    1: dpkt.ethernet.Ethernet,
    12: None,  # RAW: the IP version is in the packet
    14: None,
    101: None,
    108: dpkt.loopback.Loopback,
    113: dpkt.sll.SLL,
    228: None,
    229: None,
    276: dpkt.sll2.SLL2,
}


class Datagram(NamedTuple):
    """A UDP datagram. `number` is that of its frame, from 1; `at` is in seconds of the capture's clock.

    `payload` may be only the first of its `length` octets.
    """

    number: int
    at: float
    source: Address
    destination: Address
    payload: bytes
    length: int


class Capture:
    """A file of packets. Iterating gives its datagrams, once; `skipped` counts what else there was, by reason."""

    def __init__(self, file: BufferedReader) -> None:
        """Raises ValueError if this is no capture."""
        self.skipped: Counter[str] = Counter()
        bounded = _Bounded(file)
        try:
            is_pcapng = file.peek(len(SECTION_HEADER))[: len(SECTION_HEADER)] == SECTION_HEADER
            self._frames = self._pcapng(bounded) if is_pcapng else self._pcap(dpkt.pcap.Reader(bounded))
        except (ValueError, dpkt.Error):
            raise ValueError("neither a pcap nor a pcapng file") from None

    def __iter__(self) -> Iterator[Datagram]:
        for number, (at, link, frame) in enumerate(self._frames, 1):
            found = self._datagram(number, at, link, frame)
            if isinstance(found, Datagram):
                yield found
            else:
                self.skipped[found] += 1

    def _datagram(self, number: int, at: float, link: int, frame: bytes) -> Datagram | str:
        """The datagram in a frame, or why there is none."""
        try:
            ip = _ip(link, frame)
        except Exception:  # dpkt parses all that it knows of, and what it raises at nonsense is not documented
            return "malformed"
        if ip is None:
            return "not IP"
        if _is_fragment(ip):
            return "fragment"
        if ip.p != dpkt.ip.IP_PROTO_UDP:
            return "not UDP"
        udp = ip.data
        if not isinstance(udp, dpkt.udp.UDP):
            return "cut short"
        # 0: longer than the field can say, which segmentation offload makes.
        length = udp.ulen - udp.__hdr_len__ if udp.ulen else len(udp.data)
        if length < 0:
            return "malformed"
        family = socket.AF_INET if isinstance(ip, dpkt.ip.IP) else socket.AF_INET6
        source, destination = (socket.inet_ntop(family, host) for host in (ip.src, ip.dst))
        payload = bytes(udp.data[:length])
        return Datagram(number, at, Address(source, udp.sport), Address(destination, udp.dport), payload, length)

    def _pcap(self, reader: Any) -> Iterator[tuple[float, int, bytes]]:
        try:
            for at, frame in reader:
                yield float(at), reader.datalink(), frame
        except (ValueError, dpkt.Error):
            self.skipped["end of a file that is cut off or damaged"] += 1

    def _pcapng(self, file: _Bounded) -> Iterator[tuple[float, int, bytes]]:
        try:
            yield from _pcapng_frames(file)
        except (ValueError, IndexError, UnicodeDecodeError, dpkt.Error):
            self.skipped["end of a file that is cut off or damaged"] += 1


class _Bounded:
    """A file that gives no more at once than any packet needs, whatever a length in it says."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MAX_READ:
            raise ValueError(f"{count} octets at once")
        return self._file.read(count)


def _ip(link: int, frame: bytes) -> Any:
    """The IP packet in a frame, as dpkt has it; None if there is none. Raises anything for a packet that is none."""
    layer = LINK_LAYERS.get(link, LINK_LAYERS)
    if layer is LINK_LAYERS:
        return None
    if layer is not None:
        packet = layer(frame).data
    elif not frame:
        return None
    else:
        packet = (dpkt.ip6.IP6 if frame[0] >> 4 == 6 else dpkt.ip.IP)(frame)
    return packet if isinstance(packet, dpkt.ip.IP | dpkt.ip6.IP6) else None


def _is_fragment(ip: Any) -> bool:
    if isinstance(ip, dpkt.ip.IP):
        return bool(ip.mf or ip.offset)
    header = ip.extension_hdrs.get(FRAGMENT_HEADER)
    return header is not None and bool(header.m_flag or header.frag_off)


def _pcapng_frames(file: _Bounded) -> Iterator[tuple[float, int, bytes]]:
    """Time, link type and octets of each packet. dpkt's own loop takes all interfaces for the first one."""
    order: Any = "little"
    interfaces: list[tuple[int, float]] = []  # link type, ticks per second
    while head := file.read(8):
        if head[:4] == SECTION_HEADER:
            mark = file.read(4)
            order = "little" if mark == LITTLE_ENDIAN else "big"
            interfaces = []
            head += mark
        length = int.from_bytes(head[4:8], order)
        kind = int.from_bytes(head[:4], order)
        block = head + file.read(length - len(head))
        if len(block) < max(length, BLOCK_OVERHEAD):
            raise ValueError("it ends within a block")
        is_little = order == "little"
        if kind in INTERFACE_BLOCKS:
            interface = _block("InterfaceDescriptionBlock", block, is_little)
            interfaces.append((interface.linktype, _ticks(interface)))
        elif kind in PACKET_BLOCKS:
            packet = _block("PacketBlock" if kind == PACKET_BLOCKS[0] else "EnhancedPacketBlock", block, is_little)
            link, ticks = interfaces[packet.iface_id]
            yield (packet.ts_high << 32 | packet.ts_low) / ticks, link, packet.pkt_data


def _block(name: str, octets: bytes, is_little: bool) -> Any:
    return getattr(dpkt.pcapng, name + "LE" * is_little)(octets)


def _ticks(interface: Any) -> float:
    """Per second: a power of ten, or of two if the highest bit says so; microseconds if nothing is said."""
    for option in interface.opts:
        if option.code == TIME_RESOLUTION and option.data:
            value = option.data[0]
            return float((2 if value & 0x80 else 10) ** (value & 0x7F))
    return 1e6
