"""RFC 8999: the part of a QUIC packet that no version changes, and nothing else.

This file must never learn about the fixed bit (RFC 9287 lets either side clear it), packet types (QUIC v2
numbers them anew, RFC 9369) or the set of versions: routing that depends on them breaks with the next one.
"""

from __future__ import annotations

from typing import NamedTuple

from lb.cid import ConnectionId

# RFC 8999, section 5.1.
LONG_HEADER = 0x80
DCID_LENGTH_AT = 5
MIN_LONG_HEADER = 7  # first octet, version, two empty CIDs


class Header(NamedTuple):
    """The version-independent header of the first QUIC packet in a datagram.

    `dcid` of a short header is everything after the first octet: the header does not say where its DCID ends
    (RFC 8999, section 5.2), only who issued it knows. `scid` is None for a short header.
    """

    is_long: bool
    dcid: ConnectionId
    scid: ConnectionId | None


def parse_header(datagram: bytes) -> Header | None:
    """The header of a UDP payload, or None if the payload ends before the header does.

    A datagram may hold several packets; senders do not mix DCIDs in one (RFC 9000, section 12.2), so that
    the first is enough.
    """
    if not datagram:
        return None
    if not datagram[0] & LONG_HEADER:
        return Header(False, ConnectionId(datagram[1:]), None)

    # CIDs of up to 255 octets: RFC 8999 allows what QUIC v1 does not.
    if len(datagram) < MIN_LONG_HEADER:
        return None
    dcid_end = DCID_LENGTH_AT + 1 + datagram[DCID_LENGTH_AT]
    if len(datagram) <= dcid_end:
        return None
    scid_end = dcid_end + 1 + datagram[dcid_end]
    if len(datagram) < scid_end:
        return None
    return Header(
        True,
        ConnectionId(datagram[DCID_LENGTH_AT + 1 : dcid_end]),
        ConnectionId(datagram[dcid_end + 1 : scid_end]),
    )
