"""The frames of the bench: what clients send, one per flow, and the CIDs in them."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from lb.cid import CidConfig, Codec, ConfigId, ServerId

BACKENDS = 256
PORT = 443
VIP = IPv4Address("192.0.2.1")
VIP6 = IPv6Address("2001:db8:1::1")
BALANCER_MAC = bytes.fromhex("020000000002")
CLIENT_MAC = bytes.fromhex("020000000001")

# One way to make CIDs each, all in force at once. The key is not a secret: nothing but this bench has it.
_KEY = bytes.fromhex("8f95f09245765f80256934e50c66207f")
PLAINTEXT = CidConfig(ConfigId(0), 4, 12)
SINGLE_PASS = CidConfig(ConfigId(1), 4, 12, key=_KEY)
FOUR_PASS = CidConfig(ConfigId(2), 4, 8, key=_KEY)
FOUR_PASS_LAST = CidConfig(ConfigId(3), 8, 6, key=_KEY)  # the server ID reaches into the right half
CONFIGS = (PLAINTEXT, SINGLE_PASS, FOUR_PASS, FOUR_PASS_LAST)

_CLIENTS = int(IPv4Address("198.18.0.1"))  # RFC 2544: for benchmarks
_CLIENTS6 = int(IPv6Address("2001:2::1"))  # RFC 5180: the same
_UDP = 17
_IPV4, _IPV6, _VLAN = 0x0800, 0x86DD, 0x8100


def server_id(backend: int, config: CidConfig) -> ServerId:
    return ServerId((backend + 1).to_bytes(config.server_id_length))


def backend_address(backend: int, *, is_ipv6: bool = False) -> IPv4Address | IPv6Address:
    if is_ipv6:
        return IPv6Address("2001:db8:2::1") + backend
    return IPv4Address("10.0.0.1") + backend


def short(config: CidConfig, flow: int, length: int) -> bytes:
    """A datagram with a short header for one of the backends."""
    backend = flow % BACKENDS
    # Nonces as a server's generator makes them: no two alike, and no order that a cache could like.
    nonce = (flow * 0x9E3779B97F4A7C15 + 1) % (1 << 8 * config.nonce_length)
    cid = Codec(config).encode(server_id(backend, config), nonce.to_bytes(config.nonce_length))
    return (b"\x40" + cid).ljust(length, b"\xaa")


def initial(flow: int, length: int) -> bytes:
    """A client's first datagram: a long header with a DCID that it made up, and that no configuration claims."""
    dcid = b"\xe7" + (flow * 0x9E3779B97F4A7C15 % (1 << 56)).to_bytes(7)
    return (b"\xc3\0\0\0\1\x08" + dcid + b"\x08" + dcid).ljust(length, b"\xaa")


def frame(flow: int, payload: bytes, *, is_ipv6: bool = False, vlan: bool = False, port: int = PORT) -> bytes:
    """A datagram from that flow's client in UDP, IP and Ethernet.

    Its UDP checksum is any number but zero: whoever changes addresses corrects it without looking whether it was right.
    """
    udp = struct.pack("!HHHH", 1024 + flow % 60000, port, 8 + len(payload), 0x1234) + payload
    if is_ipv6:
        ip = struct.pack("!IHBB", 6 << 28, len(udp), _UDP, 64) + IPv6Address(_CLIENTS6 + flow).packed + VIP6.packed
    else:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, _UDP, 0)
        head += IPv4Address(_CLIENTS + flow).packed + VIP.packed
        ip = head[:10] + _checksum(head) + head[12:]
    tag = struct.pack("!HH", _VLAN, 7) if vlan else b""
    return BALANCER_MAC + CLIENT_MAC + tag + struct.pack("!H", _IPV6 if is_ipv6 else _IPV4) + ip + udp


def _checksum(header: bytes) -> bytes:
    """The Internet checksum of a header whose checksum field is zero (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF).to_bytes(2)
