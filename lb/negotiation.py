"""NegotiationProbes: packets that every QUIC server has to answer, whatever it serves and without keeping any state.

That is a long enough packet of a version that it does not speak; the answer is a Version Negotiation packet
(RFC 9000, section 6.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lb.packet import LONG_HEADER, parse_header
from lb.probing import Probes, ProbeSocket, Sent

# The specification's.
FIXED_BIT = 0x40  # RFC 9000, section 17.2: servers may drop packets without it
RESERVED_VERSION = 0x0A0A0A0A  # RFC 9000, section 15: versions 0x?a?a?a?a force negotiation
RESERVED_MASK = 0x0F0F0F0F
MIN_INITIAL = 1200  # RFC 9000, section 14.1: shorter ones need not be answered
VERSION_LENGTH = 4

# Ours.
SCID_LENGTH = 8


class ProbePacket(NamedTuple):
    """A probe as it is on the wire, and the CIDs that its answer must return."""

    datagram: bytes
    dcid: bytes
    scid: bytes


def probe_datagram(random: Callable[[int], bytes]) -> ProbePacket:
    """A packet of a reserved version, padded to 1200 octets. `random(n)` returns n random octets."""
    octets = random(6)
    first_octet = LONG_HEADER | FIXED_BIT | octets[0] & 0x3F
    version = int.from_bytes(octets[1:5]) & ~RESERVED_MASK | RESERVED_VERSION
    # QUIC v1 servers may ignore a first DCID of less than 8 octets (RFC 9000, section 7.2).
    dcid = random(8 + octets[5] % 13)
    scid = random(SCID_LENGTH)
    head = bytes((first_octet,)) + version.to_bytes(VERSION_LENGTH)
    head += bytes((len(dcid),)) + dcid + bytes((len(scid),)) + scid
    return ProbePacket(head + random(MIN_INITIAL - len(head)), dcid, scid)


def is_answer(datagram: bytes, dcid: bytes, scid: bytes) -> bool:
    """Whether a datagram is the Version Negotiation packet that answers a probe (RFC 8999, section 6).

    `dcid` and `scid` are the probe's.
    """
    header = parse_header(datagram)
    if header is None or not header.is_long or header.dcid != scid or header.scid != dcid:
        return False
    if datagram[1 : 1 + VERSION_LENGTH] != bytes(VERSION_LENGTH):
        return False
    versions = len(datagram) - (1 + VERSION_LENGTH + 1 + len(header.dcid) + 1 + len(header.scid))
    return versions > 0 and versions % VERSION_LENGTH == 0


class NegotiationProbes(Probes):
    """Probes of one datagram, that are answered by one."""

    def _ask(self, probe: int, sock: ProbeSocket, now: float) -> None:
        packet = probe_datagram(self._random)
        self._transmit(sock, packet.datagram, now)
        sock.expect(packet.scid, Sent(probe, now, packet.dcid))

    def _hear(self, sock: ProbeSocket, datagram: bytes) -> bool:
        header = parse_header(datagram)
        sent = sock.expected(header.dcid) if header else None
        if header is None or sent is None or not is_answer(datagram, sent.dcid, header.dcid):
            return False
        sock.forget(header.dcid)  # every probe is answered once
        now = self._clock()
        self.round_trip = now - sent.at
        self._check.on_reply(sent.probe, now)
        return True
