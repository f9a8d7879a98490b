"""Tokens: by which a client proves to any server of the fleet that it can be reached at its address.

A Retry token proves it for the connection that is being made, one from a NEW_TOKEN frame for one in the next days
(RFC 9000, section 8.1). Nothing is kept of those that are refused. Each server accepts a token once; what that
leaves open, and what a source address is worth behind a balancer, is in docs/tokens.md.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from enum import Enum, StrEnum, auto
from typing import NamedTuple

from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
from aioquic.quic.connection import NetworkAddress
from aioquic.tls import pull_opaque, push_opaque

from backend.memory import Memory, Recall
from backend.seal import Broken, Kind, Seal, mark_of

# Ours.
RETRY_LIFETIME = 30.0  # seconds; a client returns it at once
NEW_TOKEN_LIFETIME = 3 * 86400.0  # seconds
MAX_CLOCK_SKEW = 5.0  # seconds that another server's clock may be ahead of ours
REMEMBERED = 131_072  # used tokens of each kind; about 14 MB
_MOST = 96  # octets inside; a Retry token takes 74 at most


class TokenVerdict(Enum):
    """What became of a token that came in an Initial."""

    ACCEPTED = auto()
    OFF = auto()  # a NEW_TOKEN token, and none are accepted here
    FOREIGN = auto()  # no token of ours: another make's, or another fleet's
    TRUNCATED = auto()
    OVERSIZED = auto()
    UNKNOWN_KEY = auto()  # a retired one, or another fleet's
    FORGED = auto()  # or damaged
    EXPIRED = auto()
    NOT_YET = auto()  # made in the future: two servers' clocks disagree
    WRONG_VERSION = auto()  # of QUIC (RFC 9369, section 5)
    WRONG_ADDRESS = auto()
    WRONG_PORT = auto()
    WRONG_CID = auto()
    REPLAYED = auto()
    FORGOTTEN = auto()  # so old that this server, whose memory is full, cannot tell whether it is replayed


class Binding(StrEnum):
    """What a Retry token is bound to. The port as well is what RFC 9000, section 8.1.4, asks for."""

    PORT = "port"
    ADDRESS = "address"


class Proof(NamedTuple):
    """What a good token says. `original` is the DCID of the client's first Initial, if there was a Retry."""

    kind: Kind
    original: bytes | None
    mark: bytes
    made_at: float


class Tokens:
    """Makes tokens and checks them. `clock` is the wall clock: servers share nothing else to tell the time by."""

    def __init__(
        self,
        seal: Seal,
        clock: Callable[[], float],
        *,
        binding: Binding = Binding.PORT,
        offers_new_tokens: bool = True,
        remembered: int = REMEMBERED,
    ) -> None:
        self.counts = {kind: Counter[TokenVerdict]() for kind in (Kind.RETRY_TOKEN, Kind.NEW_TOKEN)}
        self.offers_new_tokens = offers_new_tokens
        self._seal = seal
        self._clock = clock
        self._binding = binding
        self._used = {
            Kind.RETRY_TOKEN: Memory(RETRY_LIFETIME, remembered),
            Kind.NEW_TOKEN: Memory(NEW_TOKEN_LIFETIME, remembered),
        }

    def for_retry(self, address: NetworkAddress, version: int, original: bytes, retry_source: bytes) -> bytes:
        """A token for a Retry that answers an Initial to `original` and has `retry_source` as its SCID."""
        buf = self._begun(address, version)
        buf.push_uint16(address[1])
        push_opaque(buf, 1, original)
        push_opaque(buf, 1, retry_source)
        return self._seal.seal(Kind.RETRY_TOKEN, buf.data)

    def for_later(self, address: NetworkAddress, version: int) -> bytes:
        """A token for a NEW_TOKEN frame to a client at an address that it has proved to be its own."""
        return self._seal.seal(Kind.NEW_TOKEN, self._begun(address, version).data)

    def check(self, token: bytes, address: NetworkAddress, version: int, dcid: bytes) -> Proof | None:
        """What a token of an Initial to `dcid` proves now; None if nothing. It is used up by `use` only."""
        kind = kind_of(token)
        checked = self._check(kind, token, address, version, dcid)
        if isinstance(checked, Proof):
            return checked
        self.counts[kind][checked] += 1
        return None

    def use(self, proof: Proof) -> None:
        """A connection was made of it."""
        self.counts[proof.kind][TokenVerdict.ACCEPTED] += 1
        self._used[proof.kind].add(proof.mark, proof.made_at, self._clock())

    def _begun(self, address: NetworkAddress, version: int) -> Buffer:
        buf = Buffer(capacity=_MOST)
        buf.push_uint64(int(self._clock() * 1000))
        buf.push_uint32(version)
        push_opaque(buf, 1, packed(address))
        return buf

    def _check(
        self, kind: Kind, token: bytes, address: NetworkAddress, version: int, dcid: bytes
    ) -> Proof | TokenVerdict:
        is_retry = kind is Kind.RETRY_TOKEN
        if not is_retry and not self.offers_new_tokens:
            return TokenVerdict.OFF
        opened = self._seal.open(kind, token, _MOST)
        if isinstance(opened, Broken):
            return TokenVerdict[opened.name]
        buf = Buffer(data=opened)
        made_at = buf.pull_uint64() / 1000
        age = self._clock() - made_at
        if age < -MAX_CLOCK_SKEW:
            return TokenVerdict.NOT_YET
        if age > (RETRY_LIFETIME if is_retry else NEW_TOKEN_LIFETIME):
            return TokenVerdict.EXPIRED
        if buf.pull_uint32() != version:
            return TokenVerdict.WRONG_VERSION
        if pull_opaque(buf, 1) != packed(address):
            return TokenVerdict.WRONG_ADDRESS
        original = None
        if is_retry:
            if buf.pull_uint16() != address[1] and self._binding is Binding.PORT:
                return TokenVerdict.WRONG_PORT
            original = pull_opaque(buf, 1)
            if pull_opaque(buf, 1) != dcid:
                # A client must send to the Retry's SCID (RFC 9000, section 17.2.5.2).
                return TokenVerdict.WRONG_CID
        mark = mark_of(token)
        recall = self._used[kind].recall(mark, made_at)
        if recall is Recall.USED:
            return TokenVerdict.REPLAYED
        if recall is Recall.FORGOTTEN:
            return TokenVerdict.FORGOTTEN
        return Proof(kind, original, mark, made_at)


def kind_of(token: bytes) -> Kind:
    """What a token says it is. All that is not ours is taken for an old one from a NEW_TOKEN frame.

    A client with a bad Retry token can only be told so (INVALID_TOKEN), since it heeds no second Retry; one with any
    other bad token is as one without (RFC 9000, section 8.1.3).
    """
    return Kind.RETRY_TOKEN if token[:1] == bytes([Kind.RETRY_TOKEN]) else Kind.NEW_TOKEN


def packed(address: NetworkAddress) -> bytes:
    """An IP address as 4 or 16 octets."""
    return ipaddress.ip_address(address[0].partition("%")[0]).packed
