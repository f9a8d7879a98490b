"""Ring slots (xdp/bpf/decode.h) against lb/routing.py; checksums (checksum.h, forward.h) against a plain RFC 1071."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address

from hypothesis import example, given
from hypothesis import strategies as st

from lb.address import packed
from lb.routing import FourTuple, ring_slot
from lb.xdp.layout import FLOW, Flow
from tests.xdp.native.program import Native

ADDRESSES = st.ip_addresses().map(str)
PORTS = st.integers(0, 0xFFFF)
U64 = st.integers(0, (1 << 64) - 1)
HEADERS = st.binary(min_size=20, max_size=60).map(lambda octets: octets[: len(octets) // 4 * 4])


@given(ADDRESSES, PORTS, ADDRESSES, PORTS, U64)
def test_the_ring_slot_of_a_4_tuple(
    native: Native, client: str, client_port: int, local: str, local_port: int, seed: int
) -> None:
    flow = Flow(packed(client), packed(local), client_port.to_bytes(2), local_port.to_bytes(2))
    (slot,) = struct.unpack("I", native.ask(b"r", FLOW.pack(flow), struct.pack("Q", seed)))
    assert slot == ring_slot(FourTuple(client, client_port, local, local_port), seed)


def checksum(octets: bytes) -> int:
    """RFC 1071, section 1; as a number in network order."""
    total = 0
    for at in range(0, len(octets), 2):
        total += int.from_bytes(octets[at : at + 2])
        if total > 0xFFFF:
            total -= 0xFFFF
    return total ^ 0xFFFF


def in_memory(number: int) -> int:
    """A 16-bit number in network order, as a load of this machine sees it."""
    return int.from_bytes(number.to_bytes(2), "little")


def words(octets: bytes, size: int) -> int:
    """The plain sum of words of `size` octets as they lie in memory."""
    return sum(int.from_bytes(octets[at : at + size], "little") for at in range(0, len(octets), size))


def updated(native: Native, before: int, gone: int, come: int) -> tuple[int, int]:
    """The new checksum of a header, and of UDP."""
    header, udp = struct.unpack("2H", native.ask(b"k", struct.pack("<HQQ", before, gone, come)))
    return header, udp


@given(HEADERS, st.integers(0, 14), st.binary(min_size=4, max_size=12), st.sampled_from([2, 4]))
def test_a_changed_header_has_the_checksum_that_summing_it_up_would_give(
    native: Native, header: bytes, word: int, new: bytes, size: int
) -> None:
    at = min(4 * word, len(header) - 4)
    new = new[: min(len(new), len(header) - at) // 4 * 4]
    changed = header[:at] + new + header[at + len(new) :]
    before, after = (in_memory(checksum(octets)) for octets in (header, changed))
    gone, come = words(header[at : at + len(new)], size), words(new, size)

    seen, seen_udp = updated(native, before, gone, come)
    # A sum of nothing but zeros, which no header has, is the one that has two names.
    if any(header) and any(changed):
        assert seen == after
    if before:
        assert seen_udp == (seen or 0xFFFF)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_udp_without_a_checksum_stays_without(native: Native, gone: int, come: int) -> None:
    assert updated(native, 0, gone, come)[1] == 0


@given(ADDRESSES)
def test_an_address_adds_its_words_and_an_ipv4_address_adds_itself(native: Native, address: str) -> None:
    (seen,) = struct.unpack("H", native.ask(b"a", packed(address)))
    plain = packed(address)[12:] if "." in address else packed(address)
    assert seen % 0xFFFF == in_memory(checksum(plain) ^ 0xFFFF) % 0xFFFF


def udp_checksum(native: Native, flow: bytes, protocol: int, length: int, total: int) -> int:
    (seen,) = struct.unpack("H", native.ask(b"u", flow, struct.pack("<IIQ", protocol, length, total)))
    return int(seen)


@given(
    client=ADDRESSES,
    local=ADDRESSES,
    ports=st.tuples(PORTS, PORTS),
    protocol=st.sampled_from([socket.IPPROTO_UDP, socket.IPPROTO_ICMPV6]),
    payload=st.binary(max_size=200),
)
def test_the_checksum_of_a_whole_datagram(
    native: Native, client: str, local: str, ports: tuple[int, int], protocol: int, payload: bytes
) -> None:
    source, destination = packed(client), packed(local)
    flow = FLOW.pack(Flow(source, destination, ports[0].to_bytes(2), ports[1].to_bytes(2)))
    length = 8 + len(payload)
    rest = struct.pack(">4H", *ports, length, 0) + payload + bytes(len(payload) % 2)

    def seen(covered: bytes) -> int:
        return udp_checksum(native, flow, protocol, length, words(covered, 2))

    if "." in client:
        source = source[12:]
    if "." in local:
        destination = destination[12:]
    whole = source + destination + struct.pack(">HH", protocol, length) + rest
    right = in_memory(checksum(whole)) or 0xFFFF
    assert seen(rest) == right
    # With it in its place all sums up to zero, which UDP writes as ones.
    assert seen(rest[:6] + right.to_bytes(2, "little") + rest[8:]) == 0xFFFF


@given(U64)
def test_a_sum_of_any_size_is_folded(native: Native, total: int) -> None:
    folded = (total - 1) % 0xFFFF + 1 if total else 0
    assert udp_checksum(native, bytes(FLOW.size), 0, 0, total) == (folded ^ 0xFFFF or 0xFFFF)


@given(st.binary(min_size=20, max_size=20), st.integers(0, 255))
@example(bytes.fromhex("450000000000400040000000000000003bff0000"), 0x40)  # from 0xfeff to 0
@example(bytes(20), 1)
@example(bytes(20), 2)
def test_a_hop_takes_one_of_the_ttl_and_keeps_the_checksum_right(native: Native, header: bytes, ttl: int) -> None:
    def with_ttl(ttl: int) -> bytes:
        rest = b"\x45" + header[1:8] + bytes([ttl]) + header[9:10] + bytes(2) + header[12:]
        return rest[:10] + checksum(rest).to_bytes(2) + rest[12:]

    assert native.ask(b"i", with_ttl(ttl)) == (with_ttl(ttl - 1) if ttl > 1 else b"")


@given(
    addresses=st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)),
    octets=st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255)),
    length=st.integers(20, 0xFFFF),
)
def test_an_ipv4_header_of_our_own(
    native: Native, addresses: tuple[IPv4Address, IPv4Address], octets: tuple[int, int, int], length: int
) -> None:
    protocol, ttl, traffic_class = octets
    header = native.ask(b"I", *(packed(str(address)) for address in addresses), bytes(octets), struct.pack("I", length))
    fields = struct.unpack(">BBHHHBBH4s4s", header)

    assert fields[:7] == (0x45, traffic_class, length, 0, 0x4000, ttl, protocol)
    assert fields[8:] == tuple(address.packed for address in addresses)
    assert checksum(header) == 0
