"""lb/packet.py: the invariant header, cut anywhere, of any version; and our packet vectors all the way to a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.address import Address
from lb.cid import CidConfig, ConfigId, ConnectionId, ServerId
from lb.packet import Header, parse_header
from lb.routing import Action, Backend, CidSlot, RoutingTable, Server, Service, Unroutable

EXTRA = json.loads((Path(__file__).parent / "data" / "extra-vectors.json").read_text())
# The file says only "unroutable"; for the reasons we say why.
REASONS = {
    "short-no-such-config": Unroutable.NO_CONFIG,
    "short-unknown-sid": Unroutable.UNKNOWN_SERVER,
    "long-dcid-too-short-for-config": Unroutable.TOO_SHORT,
    "long-zero-length-dcid": Unroutable.NO_CID,
    "short-truncated": Unroutable.TOO_SHORT,
    "long-cids-over-20": Unroutable.UNKNOWN_SERVER,
    "dtls12-handshake": Unroutable.CODEPOINT_7,
}


def long_packet(dcid: bytes, scid: bytes, *, first: int = 0xC0, version: int = 1, rest: bytes = b"") -> bytes:
    return bytes([first]) + version.to_bytes(4) + bytes([len(dcid)]) + dcid + bytes([len(scid)]) + scid + rest


def vector_table() -> tuple[RoutingTable, list[str]]:
    """A table with one backend for each server ID of the vectors, and the hex of those IDs in the same order."""
    slots = tuple(
        CidSlot(
            CidConfig(
                ConfigId(c["config_id"]),
                c["server_id_len"],
                c["nonce_len"],
                bytes.fromhex(c["key"]) if c["key"] else None,
            )
        )
        for c in EXTRA["packet_lb_configs"]
    )
    owners = [(c["config_id"], sid) for c in EXTRA["packet_lb_configs"] for sid in c["active_server_ids"]]
    backends = tuple(
        Backend(sid, Address("192.0.2.1", 443), {ConfigId(config_id): frozenset({ServerId(bytes.fromhex(sid))})})
        for config_id, sid in owners
    )
    service = Service("vectors", (Address("192.0.2.80", 443),), slots, backends)
    return RoutingTable.build(service), [sid for _, sid in owners]


@pytest.mark.parametrize("vector", EXTRA["packet_vectors"], ids=lambda v: v["id"])
def test_a_packet_vector_parses_and_finds_its_server(vector: dict[str, Any]) -> None:
    expect = vector["expect"]
    datagram = bytes.fromhex(vector["udp_payload"])
    header = parse_header(datagram)
    assert header is not None
    if expect["form"] == "long":
        assert header == Header(
            True, ConnectionId(bytes.fromhex(expect["dcid"])), ConnectionId(bytes.fromhex(expect["scid"]))
        )
    else:
        assert header == Header(False, ConnectionId(datagram[1:]), None)
        assert header.dcid[:20].hex() == expect["dcid_window"]

    table, server_ids = vector_table()
    found = table.by_cid(header.dcid)
    if expect["route"] == "unroutable":
        assert found is REASONS[vector["id"]]
    else:
        assert isinstance(found, Server)
        assert found.action is Action.FORWARD
        assert expect["route"] == f"server:{server_ids[found.backend]}"


@pytest.mark.parametrize(
    ("dcid_length", "scid_length"),
    [*((i, 255 - i) for i in range(256)), (0, 0), (255, 255), (8, 0), (0, 8), (20, 20)],
)
def test_connection_ids_of_any_length_are_found_and_any_cut_is_noticed(dcid_length: int, scid_length: int) -> None:
    dcid, scid = b"D" * dcid_length, b"S" * scid_length
    whole = long_packet(dcid, scid)
    header = Header(True, ConnectionId(dcid), ConnectionId(scid))
    assert parse_header(whole) == header
    assert parse_header(whole + b"payload") == header
    cuts = range(len(whole)) if dcid_length % 50 == 0 else (0, 1, 5, 6, len(whole) - 1)
    assert {parse_header(whole[:cut]) for cut in cuts} == {None}


def test_a_short_header_has_no_end_of_its_own() -> None:
    packet = bytes([0x40]) + bytes(range(1, 60))
    assert parse_header(b"") is None
    for cut in range(1, len(packet)):
        assert parse_header(packet[:cut]) == Header(False, ConnectionId(packet[1:cut]), None)


def test_only_the_header_form_is_read_from_the_first_octet() -> None:
    """Not the fixed bit (RFC 9287), not the packet type (RFC 9369), nor any other bit that a version may use."""
    expected_long = Header(True, ConnectionId(b"12345678"), ConnectionId(b"abcd"))
    for first in range(128, 256):
        assert parse_header(long_packet(b"12345678", b"abcd", first=first)) == expected_long
    for first in range(128):
        assert parse_header(bytes([first]) + b"12345678") == Header(False, ConnectionId(b"12345678"), None)


@pytest.mark.parametrize("version", [0, 1, 0x6B3343CF, 0x1A2A3A4A, 0xFF00001D, 0xFFFFFFFF])
def test_the_version_makes_no_difference(version: int) -> None:
    packet = long_packet(b"dcid" * 10, b"scid" * 10, version=version, rest=bytes(5))
    assert parse_header(packet) == Header(True, ConnectionId(b"dcid" * 10), ConnectionId(b"scid" * 10))


def read_long_header(octets: Iterator[int]) -> tuple[bytes, bytes] | None:
    """Section 5.1 of RFC 8999, read octet by octet."""
    try:
        for _ in range(5):
            next(octets)
        dcid = bytes([next(octets) for _ in range(next(octets))])
        scid = bytes([next(octets) for _ in range(next(octets))])
    except (StopIteration, RuntimeError):
        return None
    return dcid, scid


@settings(deadline=None)
@given(datagram=st.binary(max_size=600))
def test_any_short_form_datagram_has_a_header_if_it_has_an_octet(datagram: bytes) -> None:
    cleared = bytes([datagram[0] & 0x7F]) + datagram[1:] if datagram else b""
    expected = Header(False, ConnectionId(datagram[1:]), None) if datagram else None
    assert parse_header(cleared) == expected


@settings(deadline=None)
@given(
    start=st.binary(min_size=5, max_size=5),
    lengths=st.tuples(st.integers(0, 255), st.integers(0, 255)),
    cut=st.integers(0, 600),
    rest=st.binary(max_size=60),
)
def test_any_long_form_datagram_is_read_as_octet_by_octet(
    start: bytes, lengths: tuple[int, int], cut: int, rest: bytes
) -> None:
    dcid, scid = (bytes(i % 251 for i in range(length)) for length in lengths)
    octets = bytes([start[0] | 0x80]) + start[1:] + bytes([len(dcid)]) + dcid + bytes([len(scid)]) + scid + rest
    datagram = octets[: max(cut, 1)]
    expected = read_long_header(iter(datagram))
    found = parse_header(datagram)
    assert (None if found is None else (found.dcid, found.scid)) == expected


@settings(deadline=None)
@given(datagram=st.binary(max_size=1500))
def test_no_datagram_raises_on_its_way_to_a_server(datagram: bytes) -> None:
    header = parse_header(datagram)
    if header is not None:
        found = TABLE.by_cid(header.dcid)
        assert isinstance(found, Server | Unroutable)
        assert isinstance(TABLE.whole_cid(header.dcid), bytes | None)


TABLE, _ = vector_table()
