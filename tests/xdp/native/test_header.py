"""xdp/bpf/quic.h against lb/packet.py: the same header, or none, of whatever octets; and never an octet too far."""

from __future__ import annotations

import struct
from typing import NamedTuple

from hypothesis import example, given
from hypothesis import strategies as st

from lb.packet import Header, parse_header
from tests.xdp.native.program import Native


class Found(NamedTuple):
    """What quic.h says of a header."""

    is_long: bool
    dcid: bytes


def found(native: Native, payload: bytes, *, readable: int | None = None, behind: bytes = b"") -> Found | None:
    """`readable` octets of the payload are in the frame's first buffer; `behind` is what is there after all of it."""
    buffer = payload[:readable] if readable is not None else payload + behind
    answer = native.ask(b"h", struct.pack("I", len(payload)), buffer)
    if not answer:
        return None
    is_long, at, length = struct.unpack("3I", answer)
    return Found(bool(is_long), payload[at : at + length])


def as_found(header: Header | None) -> Found | None:
    return None if header is None else Found(header.is_long, header.dcid)


@st.composite
def long_headers(draw: st.DrawFn) -> bytes:
    dcid, scid = draw(st.binary(max_size=255)), draw(st.binary(max_size=255))
    return (
        bytes([draw(st.integers(0x80, 0xFF))])
        + draw(st.binary(min_size=4, max_size=4))
        + bytes([len(dcid)])
        + dcid
        + bytes([len(scid)])
        + scid
    )


PAYLOADS = st.binary(min_size=1, max_size=600) | long_headers()
BEHIND = st.binary(max_size=30)


@given(PAYLOADS, BEHIND)
@example(b"\x40", b"")
@example(b"\xc0" + bytes(6), b"")
@example(b"\xc0" + bytes(5), b"\0")
def test_any_octets(native: Native, payload: bytes, behind: bytes) -> None:
    """What is behind a payload, as Ethernet's padding is, is not part of it."""
    assert found(native, payload, behind=behind) == as_found(parse_header(payload))


@given(long_headers(), BEHIND)
def test_a_long_header_cut_anywhere(native: Native, whole: bytes, behind: bytes) -> None:
    assert found(native, whole + behind) == found(native, whole, behind=behind) == as_found(parse_header(whole))
    dcid_end = 6 + whole[5]
    cuts = {1, 5, 6, 7, dcid_end, dcid_end + 1, len(whole) - 1}
    assert {found(native, whole[:cut], behind=whole[cut:]) for cut in cuts if cut < len(whole)} == {None}


@given(PAYLOADS, st.data())
def test_what_is_not_in_the_first_buffer_is_not_read(native: Native, payload: bytes, data: st.DataObject) -> None:
    """A long header of which the length octets are not all there has none; nothing else makes a difference."""
    readable = data.draw(st.integers(0, len(payload)))
    header = as_found(parse_header(payload))
    seen = found(native, payload, readable=readable)
    if header is None or not readable:
        assert seen is None
    elif header.is_long:
        assert seen == (header if readable >= 7 + len(header.dcid) else None)
    else:
        assert seen == header
