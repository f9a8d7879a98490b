"""Captures, packed by hand: what a tool wrote that is not the one that reads."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

ETHERNET, NULL, RAW, SLL, LOOP, IPV4, IPV6, SLL2 = 1, 0, 101, 113, 108, 228, 229, 276
IPV4_TYPE, IPV6_TYPE, ARP_TYPE, VLAN_TYPE, QINQ_TYPE = 0x0800, 0x86DD, 0x0806, 0x8100, 0x88A8


def udp(payload: bytes, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """An IP packet of the addresses' family."""
    segment = struct.pack("!HHHH", source[1], destination[1], 8 + len(payload), 0) + payload
    return ip(17, segment, source[0], destination[0])


def ip(protocol: int, segment: bytes, source: str, destination: str, *, fragment: int = 0) -> bytes:
    """`fragment` is the 16 bits of IPv4's flags and offset."""
    if ":" in source:
        ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
        return struct.pack("!IHBB", 6 << 28, len(segment), protocol, 64) + ends + segment
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, fragment, 64, protocol, 0) + ends + segment


def ethernet(packet: bytes, *vlans: int) -> bytes:
    frame = bytes(12)
    for i, vlan in enumerate(vlans):
        frame += struct.pack("!HH", QINQ_TYPE if len(vlans) > 1 and not i else VLAN_TYPE, vlan)
    return frame + struct.pack("!H", _type(packet)) + packet


def framed(link: int, packet: bytes) -> bytes:
    """A packet as it is captured on an interface of that link type."""
    match link:
        case 1:
            return ethernet(packet)
        case 0:
            return struct.pack("<I", 2 if _type(packet) == IPV4_TYPE else 30) + packet
        case 108:
            return struct.pack("!I", 2 if _type(packet) == IPV4_TYPE else 30) + packet
        case 113:
            return struct.pack("!HHH8sH", 0, 1, 6, bytes(8), _type(packet)) + packet
        case 276:
            return struct.pack("!HHiHBB8s", _type(packet), 0, 1, 1, 0, 6, bytes(8)) + packet
    return packet


def pcap(frames: Iterable[bytes], link: int = ETHERNET, *, order: str = "<", nanoseconds: bool = False) -> bytes:
    """A file whose packets are half a second apart."""
    magic = 0xA1B23C4D if nanoseconds else 0xA1B2C3D4
    half = 500_000_000 if nanoseconds else 500_000
    file = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 262144, link)
    for i, frame in enumerate(frames):
        file += struct.pack(f"{order}IIII", i // 2, i % 2 * half, len(frame), len(frame)) + frame
    return file


def pcapng(frames: Iterable[tuple[int, bytes]], links: Iterable[int] = (ETHERNET,), *, order: str = "<") -> bytes:
    """A section with an interface for each link type, and packets half a second apart: interface and octets.

    The first interface counts microseconds, the others say that they count nanoseconds.
    """
    file = _block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1), order)
    for i, link in enumerate(links):
        resolution = struct.pack(f"{order}HHB3xHH", 9, 1, 9, 0, 0) if i else b""
        file += _block(1, struct.pack(f"{order}HHI", link, 0, 0) + resolution, order)
    file += _block(5, bytes(12), order)  # statistics, which nobody wants
    for i, (interface, frame) in enumerate(frames):
        at = i * (500_000_000 if interface else 500_000)
        header = struct.pack(f"{order}IIIII", interface, at >> 32, at & 0xFFFFFFFF, len(frame), len(frame))
        file += _block(6, header + frame.ljust(-(-len(frame) // 4) * 4, b"\0"), order)
    return file


def _block(kind: int, body: bytes, order: str) -> bytes:
    length = struct.pack(f"{order}I", 12 + len(body))
    return struct.pack(f"{order}I", kind) + length + body + length


def _type(packet: bytes) -> int:
    return IPV6_TYPE if packet[0] >> 4 == 6 else IPV4_TYPE
