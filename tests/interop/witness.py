"""A witness on the way between one client and the balancer: what its datagrams give away without any key."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
from aioquic.quic.packet import QuicPacketType, pull_quic_header

from lb.packet import LONG_HEADER
from lb.reset import MIN_RESET, TOKEN_LENGTH


@dataclass(slots=True)
class Witness:
    """What it has seen. `cid_length` is that of the servers' connection IDs."""

    cid_length: int
    up: Counter[QuicPacketType] = field(default_factory=Counter)  # long headers from the client
    down: Counter[QuicPacketType] = field(default_factory=Counter)  # and from the server
    versions: set[int] = field(default_factory=set)  # of the server's long headers
    cids: list[bytes] = field(default_factory=list)  # that the client used in short headers, each change once
    sources: list[Any] = field(default_factory=list)  # that it used them from, each change once
    retry_scid: bytes = b""
    proofs: int = 0  # Initials that carry a token
    last_words: set[bytes] = field(default_factory=set)  # last 16 octets of short headers from the server

    def see(self, is_up: bool, datagram: bytes, client: Any) -> None:
        """Note a datagram: a relay's tap."""
        if not datagram:  # nginx sends such when it gives a session up
            return
        if not datagram[0] & LONG_HEADER:
            if is_up:
                self._short(datagram[1 : 1 + self.cid_length], client)
            elif len(datagram) >= MIN_RESET:
                self.last_words.add(datagram[-TOKEN_LENGTH:])
            return
        buffer = Buffer(data=datagram)
        while not buffer.eof():
            begins = buffer.tell()
            try:
                header = pull_quic_header(buffer, host_cid_length=self.cid_length if is_up else 0)
            except ValueError:  # padding, or a header that a client with connection IDs got
                return
            if header.version is None:
                if is_up:
                    self._short(header.destination_cid, client)
                return
            (self.up if is_up else self.down)[header.packet_type] += 1
            if is_up and header.packet_type is QuicPacketType.INITIAL and header.token:
                self.proofs += 1
            if not is_up:
                self.versions.add(header.version)
                if header.packet_type is QuicPacketType.RETRY:
                    self.retry_scid = header.source_cid
            buffer.seek(begins + header.packet_length)

    @property
    def cid(self) -> bytes:
        """That the client uses now."""
        return self.cids[-1] if self.cids else b""

    def _short(self, cid: bytes, client: Any) -> None:
        if not self.cids or self.cids[-1] != cid:
            self.cids.append(cid)
        if not self.sources or self.sources[-1] != client:
            self.sources.append(client)
