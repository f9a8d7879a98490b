"""Captures are read whatever link they are from, and whatever nonsense is in them."""

from __future__ import annotations

import io
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.address import Address
from lb.pcap import MAX_READ, Capture, Datagram
from tests import captures
from tests.captures import ethernet, framed, ip, pcap, pcapng, udp

V4 = (("198.51.100.7", 50000), ("192.0.2.1", 443))
V6 = (("2001:db8::7", 50000), ("2001:db8::1", 443))
LINKS = ["NULL", "ETHERNET", "RAW", "LOOP", "SLL", "SLL2"]


def read(file: bytes) -> tuple[list[Datagram], dict[str, int]]:
    capture = Capture(io.BufferedReader(io.BytesIO(file)))
    return list(capture), dict(capture.skipped)


def datagram(number: int, ends: tuple[tuple[str, int], tuple[str, int]], payload: bytes) -> Datagram:
    source, destination = (Address(*end) for end in ends)
    return Datagram(number, (number - 1) / 2, source, destination, payload, len(payload))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("ends", [V4, V6], ids=["IPv4", "IPv6"])
def test_datagrams_of_every_link_layer(link: str, ends: tuple[tuple[str, int], tuple[str, int]]) -> None:
    number = getattr(captures, link)
    frames = [framed(number, udp(payload, *ends)) for payload in (b"one", b"two")]
    expected = [datagram(1, ends, b"one"), datagram(2, ends, b"two")]
    assert read(pcap(frames, number)) == (expected, {})
    assert read(pcapng([(0, frame) for frame in frames], [number])) == (expected, {})


@pytest.mark.parametrize(("link", "ends"), [(captures.IPV4, V4), (captures.IPV6, V6)], ids=["IPv4", "IPv6"])
def test_links_of_one_ip_version(link: int, ends: tuple[tuple[str, int], tuple[str, int]]) -> None:
    assert read(pcap([udp(b"one", *ends)], link))[0] == [datagram(1, ends, b"one")]


@pytest.mark.parametrize("vlans", [(7,), (7, 8)], ids=["VLAN", "QinQ"])
def test_vlan_tags_are_looked_behind(vlans: tuple[int, ...]) -> None:
    assert read(pcap([ethernet(udp(b"one", *V4), *vlans)]))[0] == [datagram(1, V4, b"one")]


@pytest.mark.parametrize("order", "<>")
def test_either_order_of_octets_and_either_clock(order: str) -> None:
    frames = [ethernet(udp(b"one", *V4)), ethernet(udp(b"two", *V4))]
    expected = [datagram(1, V4, b"one"), datagram(2, V4, b"two")]
    assert read(pcap(frames, order=order))[0] == expected
    assert read(pcap(frames, order=order, nanoseconds=True))[0] == expected
    assert read(pcapng([(0, frame) for frame in frames], order=order))[0] == expected


def test_interfaces_of_one_file_have_their_own_links_and_clocks() -> None:
    links = [captures.ETHERNET, captures.RAW]
    file = pcapng([(0, ethernet(udp(b"one", *V4))), (1, udp(b"two", *V6))], links)
    assert read(file)[0] == [datagram(1, V4, b"one"), datagram(2, V6, b"two")]
    # A second section begins anew.
    assert [one.payload for one in read(file + pcapng([(0, udp(b"three", *V4))], [captures.RAW]))[0]] == [
        b"one",
        b"two",
        b"three",
    ]


def test_what_is_no_datagram_is_counted_by_the_reason() -> None:
    segment = udp(b"whole", *V4)[20:]
    frames = {
        "not IP": bytes(12) + b"\x08\x06" + bytes(28),
        "not UDP": ethernet(ip(6, bytes(20), "198.51.100.7", "192.0.2.1")),
        "fragment": ethernet(ip(17, segment, "198.51.100.7", "192.0.2.1", fragment=0x2000)),
        "a later fragment": ethernet(ip(17, segment, "198.51.100.7", "192.0.2.1", fragment=0x0010)),
        "an IPv6 fragment": ethernet(ip(44, struct.pack("!BBHI", 17, 0, 1, 9) + segment, "2001:db8::7", "2001:db8::1")),
        "a later IPv6 fragment": ethernet(
            ip(44, struct.pack("!BBHI", 17, 0, 0x0100, 9) + segment, "2001:db8::7", "2001:db8::1")
        ),
        "cut short": ethernet(udp(b"", *V4))[:-4],
        "malformed": ethernet(ip(17, struct.pack("!HHHH", 1, 2, 7, 0), "198.51.100.7", "192.0.2.1")),
        "no header": b"\0",
    }
    found, skipped = read(pcap(frames.values()))
    assert found == []
    assert skipped == {"not IP": 1, "not UDP": 1, "fragment": 4, "cut short": 1, "malformed": 2}


def test_the_beginning_of_a_datagram_comes_with_its_length() -> None:
    """As with tcpdump -s."""
    (found,), _ = read(pcap([ethernet(udp(bytes(1200), *V4))[:100]]))
    assert (len(found.payload), found.length) == (100 - 14 - 20 - 8, 1200)


def test_padding_behind_a_short_packet_is_none_of_it() -> None:
    (found,), _ = read(pcap([ethernet(udp(b"one", *V4)) + bytes(20)]))
    assert found.payload == b"one"


def test_other_links_have_nothing_for_us() -> None:
    assert read(pcap([b"some radio"], 105)) == ([], {"not IP": 1})


@pytest.mark.parametrize("file", [b"", b"services:\n", b"\x1f\x8b" + bytes(40), b"\xd4\xc3\xb2\xa1"])
def test_what_is_no_capture_is_refused(file: bytes) -> None:
    with pytest.raises(ValueError, match="neither a pcap nor a pcapng file"):
        read(file)


@pytest.mark.parametrize("make", [pcap, lambda frames: pcapng([(0, frame) for frame in frames])])
def test_a_file_that_is_cut_off_gives_what_it_has(make: object) -> None:
    """As one that is still written to."""
    file = make([ethernet(udp(bytes(60), *V4))] * 2)  # type: ignore[operator]
    for lost in (1, 30, 90):
        found, skipped = read(file[:-lost])
        assert [one.number for one in found if one.length == len(one.payload)] == [1]
        assert sum(skipped.values()) <= 1


def test_a_length_of_nonsense_takes_no_memory() -> None:
    """A damaged or hostile file says that a packet has 4 GiB."""
    header = pcap([])
    huge = header + struct.pack("<IIII", 0, 0, 0xFFFFFFF0, 0xFFFFFFF0) + bytes(100)
    block = pcapng([]) + struct.pack("<II", 6, 0xFFFFFFF0) + bytes(100)
    small = pcapng([]) + struct.pack("<II", 6, 4) + bytes(100)
    for file in (huge, block, small):
        tracemalloc.start()
        try:
            assert read(file) == ([], {"end of a file that is cut off or damaged": 1})
            assert tracemalloc.get_traced_memory()[1] < MAX_READ
        finally:
            tracemalloc.stop()


def test_a_large_file_takes_little_memory() -> None:
    class Endless(io.RawIOBase):
        """Packets on and on, made when they are read."""

        def __init__(self, packets: int) -> None:
            self._rest, self._left = pcap([]), packets
            self._record = pcap([ethernet(udp(bytes(1200), *V4))])[24:]

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            while len(self._rest) < len(buffer) and self._left:
                self._rest += self._record
                self._left -= 1
            part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
            buffer[: len(part)] = part
            return len(part)

    capture = Capture(io.BufferedReader(Endless(3000)))  # 3.7 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in capture) == 3000
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


GOOD = [
    pcap([ethernet(udp(b"one", *V4)), ethernet(udp(b"two", *V6), 7)]),
    pcapng([(0, ethernet(udp(b"one", *V4))), (1, udp(b"two", *V6))], [1, 101]),
    pcap([framed(113, udp(b"one", *V6))], 113),
]


@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8))
def test_no_file_raises_anything_but_value_errors(good: bytes, changes: list[tuple[int, int]]) -> None:
    file = bytearray(good)
    for place, value in changes:
        file[place % len(file)] = value
    try:
        found, _ = read(bytes(file))
    except ValueError:
        return
    assert all(len(one.payload) <= one.length for one in found)
