"""Tickets: TLS session tickets that any server of the fleet can resume from, with 0-RTT if it is asked for.

A ticket is the session itself, sealed (RFC 8446, section 4.6.1, and RFC 5077 for the idea): no server keeps
anything about it. Only 0-RTT has a memory, so that a server accepts a ClientHello once (RFC 8446, section 8). What
that does not prevent is in docs/tokens.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
from aioquic.tls import pull_opaque, push_opaque

from backend.memory import Memory, Recall
from backend.seal import MARK_LENGTH, Broken, Kind, Seal
from backend.tokens import MAX_CLOCK_SKEW

# Ours.
TICKET_LIFETIME = 86400  # seconds; the standard allows seven days
FRESHNESS = 10.0  # seconds that a ClientHello's own account of its age may be wrong (RFC 8446, section 8.3)
REMEMBERED = 65_536  # ClientHellos with early data that were accepted
_MOST = 320  # octets inside


class TicketVerdict(Enum):
    """What became of a ticket that came in a ClientHello."""

    RESUMED = auto()
    FOREIGN = auto()
    TRUNCATED = auto()
    OVERSIZED = auto()
    UNKNOWN_KEY = auto()  # a retired one, or another fleet's
    FORGED = auto()  # or damaged
    EXPIRED = auto()
    NOT_YET = auto()  # issued in the future: two servers' clocks disagree
    WRONG_VERSION = auto()  # of QUIC (RFC 9369, section 5)
    NOT_RESUMED = auto()  # good, but for another cipher suite, or its owner could not prove to have the secret


class EarlyVerdict(Enum):
    """What became of an offer of early data, from a client whose ticket was good."""

    ACCEPTED = auto()
    OFF = auto()
    NOT_PROMISED = auto()  # the ticket was issued without
    WRONG_VERSION = auto()
    WRONG_PROTOCOL = auto()  # another ALPN, or another application's settings
    REDUCED_LIMITS = auto()  # the client may have relied on more (RFC 9000, section 7.4.1)
    STALE = auto()  # created too long ago, or in the future
    REPLAYED = auto()
    FORGOTTEN = auto()  # created before this process, or before what it still remembers


class Promises(NamedTuple):
    """What a client remembers for 0-RTT: transport parameters that a server must not reduce (RFC 9000, 7.4.1)."""

    active_connection_id_limit: int
    initial_max_data: int
    initial_max_stream_data_bidi_local: int
    initial_max_stream_data_bidi_remote: int
    initial_max_stream_data_uni: int
    initial_max_streams_bidi: int
    initial_max_streams_uni: int
    max_datagram_frame_size: int  # 0 is none


class Session(NamedTuple):
    """What a ticket holds. `promises` is None if early data was not allowed; `issued_at` is in whole milliseconds."""

    issued_at: int
    age_add: int
    version: int
    cipher_suite: int
    secret: bytes
    alpn: str
    application: bytes
    promises: Promises | None

    def encode(self) -> bytes:
        """Raises ValueError if it is longer than any ticket may be."""
        buf = Buffer(capacity=_MOST)
        buf.push_uint64(self.issued_at)
        buf.push_uint32(self.age_add)
        buf.push_uint32(self.version)
        buf.push_uint16(self.cipher_suite)
        push_opaque(buf, 1, self.secret)
        push_opaque(buf, 1, self.alpn.encode())
        push_opaque(buf, 1, self.application)
        buf.push_uint8(self.promises is not None)
        for promise in self.promises or ():
            buf.push_uint_var(promise)
        return buf.data

    @classmethod
    def decode(cls, octets: bytes) -> Session:
        """Raises ValueError for what `encode` does not write."""
        buf = Buffer(data=octets)
        issued_at, age_add, version = buf.pull_uint64(), buf.pull_uint32(), buf.pull_uint32()
        cipher_suite = buf.pull_uint16()
        secret, alpn, application = pull_opaque(buf, 1), pull_opaque(buf, 1).decode(), pull_opaque(buf, 1)
        promises = Promises(*(buf.pull_uint_var() for _ in Promises._fields)) if buf.pull_uint8() else None
        if not buf.eof():
            raise ValueError("more than a session")
        return cls(issued_at, age_add, version, cipher_suite, secret, alpn, application, promises)

    def __repr__(self) -> str:
        return f"Session(issued_at={self.issued_at}, cipher_suite={self.cipher_suite:#06x}, alpn={self.alpn!r})"


class Tickets:
    """Issues tickets and opens them. `clock` is the wall clock, in seconds.

    `application` is whatever else the application tells its clients, who then rely on it: 0-RTT is accepted only by
    a server that says the same (for HTTP/3 its SETTINGS, RFC 9114, section 7.2.4.2).
    """

    def __init__(
        self,
        seal: Seal,
        clock: Callable[[], float],
        *,
        early_data: bool = False,
        application: bytes = b"",
        remembered: int = REMEMBERED,
    ) -> None:
        self.counts: Counter[TicketVerdict] = Counter()
        self.early_counts: Counter[EarlyVerdict] = Counter()
        self.early_data = early_data
        self._seal = seal
        self._clock = clock
        self._application = application
        # What a process before this one has accepted, this one does not know (RFC 8446, section 8.2).
        self._accepted = Memory(2 * FRESHNESS, remembered, since=clock())

    def issue(self, version: int, cipher_suite: int, secret: bytes, alpn: str, promises: Promises) -> tuple[bytes, int]:
        """A ticket for a session that has just begun, and the number that hides its age from others."""
        age_add = int.from_bytes(self._seal.random(4))
        session = Session(
            int(self._clock() * 1000),
            age_add,
            version,
            cipher_suite,
            secret,
            alpn,
            self._application,
            promises if self.early_data else None,
        )
        return self._seal.seal(Kind.SESSION_TICKET, session.encode()), age_add

    def open(self, ticket: bytes, version: int) -> Session | None:
        """The session that a ticket holds, if it may be resumed now by this version of QUIC."""
        opened = self._open(ticket, version)
        if isinstance(opened, Session):
            return opened
        self.counts[opened] += 1
        return None

    def accepts_early(
        self, session: Session, obfuscated_age: int, binder: bytes, version: int, alpn: str, promises: Promises
    ) -> bool:
        """Whether early data may come with a ClientHello; its binder, that was checked, is remembered if so."""
        verdict = self._early(session, obfuscated_age, binder, version, alpn, promises)
        self.early_counts[verdict] += 1
        return verdict is EarlyVerdict.ACCEPTED

    def _open(self, ticket: bytes, version: int) -> Session | TicketVerdict:
        opened = self._seal.open(Kind.SESSION_TICKET, ticket, _MOST)
        if isinstance(opened, Broken):
            return TicketVerdict[opened.name]
        session = Session.decode(opened)
        age = self._clock() - session.issued_at / 1000
        if age < -MAX_CLOCK_SKEW:
            return TicketVerdict.NOT_YET
        if age > TICKET_LIFETIME:
            return TicketVerdict.EXPIRED
        if session.version != version:
            return TicketVerdict.WRONG_VERSION
        return session

    def _early(
        self, session: Session, obfuscated_age: int, binder: bytes, version: int, alpn: str, promises: Promises
    ) -> EarlyVerdict:
        if not self.early_data:
            return EarlyVerdict.OFF
        if session.promises is None:
            return EarlyVerdict.NOT_PROMISED
        if session.version != version:
            return EarlyVerdict.WRONG_VERSION
        if (session.alpn, session.application) != (alpn, self._application):
            return EarlyVerdict.WRONG_PROTOCOL
        if any(now < then for now, then in zip(promises, session.promises, strict=True)):
            return EarlyVerdict.REDUCED_LIMITS
        created_at = (session.issued_at + (obfuscated_age - session.age_add) % 2**32) / 1000
        now = self._clock()
        if abs(now - created_at) > FRESHNESS:
            return EarlyVerdict.STALE
        mark = binder[-MARK_LENGTH:]
        recall = self._accepted.recall(mark, created_at)
        if recall is Recall.USED:
            return EarlyVerdict.REPLAYED
        if recall is Recall.FORGOTTEN:
            return EarlyVerdict.FORGOTTEN
        self._accepted.add(mark, created_at, now)
        return EarlyVerdict.ACCEPTED
