"""Connection IDs for servers: nonces that never repeat, and what to issue when there are none left.

A nonce must not be used twice with one server ID under one key (section 9.6 of the draft), whatever the config
ID, the thread or the process. So nonces are a counter from a random start, one per key and server ID, and a
counter that has to outlive its process is reserved in blocks: a durable mark says how far it may have come, and the
next process goes on from the mark. No file, clock or source of randomness here: `Marks` and `random` are given.

A generator must not be copied by fork(): make it in the child, and give every process a server ID of its own.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

from lb.cid import KEY_LENGTH, MAX_CID_LENGTH_V1, UNROUTABLE, CidConfig, Codec, ConnectionId, FourPass, ServerId
from lb.errors import QuicLbError

# The specification's.
MIN_UNROUTABLE_LENGTH = 8  # section 3.2

# Ours.
BLOCK = 1 << 16  # nonces per reservation: one durable write, and at most as many lost in a crash
LOW_SHARE = 8  # on_low is called when an eighth of the nonces is left
SPARE = 1024  # random octets drawn at a time
RETRY_EVERY = 64  # CIDs between two attempts at a store that fails: a full disk must not cost a write per packet


@dataclass(frozen=True, slots=True)
class NonceMark:
    """How far a counter may have come: nonces `start` to `start + reserved - 1` (modulo their number) are spent.

    `permutation_key` is what hides the counter of a plaintext configuration, 16 octets; empty for encrypted ones.
    """

    start: int
    reserved: int
    permutation_key: bytes = field(default=b"", repr=False)


class Marks(Protocol):
    """Marks that outlive the process. `identity` is a hex string that stands for a key and a server ID."""

    def load(self, identity: str) -> NonceMark | None:
        """The last mark saved, None if there never was one. Raises QuicLbError if that cannot be said.

        A generator asks once for each identity; a second asker would share the counter, so refuse it.
        """
        ...

    def save(self, identity: str, mark: NonceMark) -> None:
        """Keep a mark. Durable when it returns; raises OSError if it is not."""
        ...


class CidGenerator:
    """Issues connection IDs under one configuration at a time. Every method may be called from any thread.

    Without a configuration, and whenever it has no nonce that is certainly fresh, it issues 0b111 CIDs, which
    balancers route by address. `standby` configurations are tried in order before it comes to that.
    They should have keys of their own: one that shares key and server ID shares the exhausted nonces.

    `random(n)` returns n unpredictable octets. Without `marks` counters last as long as the generator, and a
    restarted server may repeat k nonces of m with probability about (k + m) / 2**(8 * nonce_length).
    `unroutable_length`, 8 to 20 octets, is the length of 0b111 CIDs; that of the first configuration's unless given.
    `on_low(remaining)` is called once for each configuration when it comes into its last eighth, outside of all locks.

    Raises ValueError for a server ID that does not fit, QuicLbError for a mark that cannot be read or is impossible.
    """

    def __init__(
        self,
        config: CidConfig | None,
        server_id: ServerId | None,
        *,
        random: Callable[[int], bytes],
        marks: Marks | None = None,
        block: int = BLOCK,
        standby: Sequence[tuple[CidConfig, ServerId]] = (),
        unroutable_length: int | None = None,
        on_low: Callable[[int], None] | None = None,
    ) -> None:
        if unroutable_length is None:
            unroutable_length = max(MIN_UNROUTABLE_LENGTH, config.cid_length if config else 0)
        if not MIN_UNROUTABLE_LENGTH <= unroutable_length <= MAX_CID_LENGTH_V1:
            raise ValueError(f"0b111 CIDs of {unroutable_length} octets: expected 8 to 20")
        if block < 1:
            raise ValueError(f"blocks of {block} nonces: expected at least 1")
        self._random = random
        self._marks = marks
        self._block = block
        self._unroutable_length = unroutable_length
        self._on_low = on_low
        self._lock = Lock()
        self._counters: dict[str, _Counter] = {}
        self._sources: list[_Source] = []
        self._attempts = 0
        self._spares = b""
        self._spare_at = 0
        self.issued = 0
        """CIDs issued so far, of every kind."""
        self.unroutable_issued = 0
        """Those of them that begin with 0b111."""
        self.store_error: OSError | None = None
        """Why the last mark could not be saved; None when all is well."""
        self.switch(config, server_id, standby=standby)

    def switch(
        self,
        config: CidConfig | None,
        server_id: ServerId | None,
        *,
        standby: Sequence[tuple[CidConfig, ServerId]] = (),
    ) -> None:
        """Issue under another configuration, or none, from the next CID on (section 3.1: never again the old one).

        A configuration that comes back goes on where it stopped. Raises as the constructor does, and then changes
        nothing.
        """
        if config is None and standby:
            raise ValueError("standby configurations without a configuration in use")
        choices: list[tuple[CidConfig, ServerId | None]] = [(config, server_id)] if config else []
        with self._lock:
            self._sources = [self._source(config, server_id) for config, server_id in (*choices, *standby)]

    def next(self) -> ConnectionId:
        """A connection ID that was never issued before."""
        with self._lock:
            source = self._fresh_source()
            self.issued += 1
            if source is None:
                self.unroutable_issued += 1
                return self._unroutable()
            counter = source.counter
            cid = self._encode(source, counter.take())
            low = not counter.low_told and counter.remaining <= counter.space // LOW_SHARE
            if low:
                counter.low_told = True
            remaining = counter.remaining
        if low and self._on_low:
            self._on_low(remaining)
        return cid

    @property
    def config(self) -> CidConfig | None:
        """The configuration that the next CID would be issued under, None if it would be a 0b111 one."""
        with self._lock:
            source = self._usable()
            return source.config if source else None

    @property
    def remaining(self) -> int:
        """CIDs that this configuration can still issue; blocks lost in crashes are not among them."""
        with self._lock:
            source = self._usable()
            return source.counter.remaining if source else 0

    def _source(self, config: CidConfig, server_id: ServerId | None) -> _Source:
        if server_id is None or len(server_id) != config.server_id_length:
            found = "no server ID" if server_id is None else f"server ID of {len(server_id)} octets"
            raise ValueError(f"{found}: expected {config.server_id_length}")
        identity = _identity(config, server_id)
        counter = self._counters.get(identity)
        if counter is None:
            counter = self._counters[identity] = self._counter(config, identity)
        return _Source(config, Codec(config), server_id, counter)

    def _counter(self, config: CidConfig, identity: str) -> _Counter:
        mark = self._marks.load(identity) if self._marks else None
        if mark is None:
            start = int.from_bytes(self._random(config.nonce_length))
            mark = NonceMark(start, 0, b"" if config.key else self._random(KEY_LENGTH))
        counter = _Counter(identity, config.nonce_length, mark)
        if not self._marks:
            counter.reserved = counter.space
        return counter

    def _usable(self) -> _Source | None:
        for source in self._sources:
            if source.counter.used < source.counter.space:
                return source
        return None

    def _fresh_source(self) -> _Source | None:
        """The configuration to issue under, with at least one nonce reserved; None if there is none."""
        source = self._usable()
        if source is None or source.counter.used < source.counter.reserved or self._reserve(source.counter):
            return source
        return None

    def _reserve(self, counter: _Counter) -> bool:
        assert self._marks is not None  # noqa: S101 - without marks everything is reserved
        if self.store_error:
            self._attempts += 1
            if self._attempts % RETRY_EVERY:
                return False
        reserved = min(counter.used + self._block, counter.space)
        try:
            self._marks.save(counter.identity, NonceMark(counter.start, reserved, counter.permutation_key))
        except OSError as error:
            self.store_error = error
            return False
        self.store_error = None
        self._attempts = 0
        counter.reserved = reserved
        return True

    def _encode(self, source: _Source, nonce: bytes) -> ConnectionId:
        config = source.config
        if config.encodes_length and not config.appended_length:
            return source.codec.encode(source.server_id, nonce)
        spare = self._spare(1 + config.appended_length)
        return source.codec.encode(source.server_id, nonce, low_bits=spare[0], appended=spare[1:])

    def _unroutable(self) -> ConnectionId:
        """Section 3.2: 0b111, the length (always), and octets that collide no more often than random ones."""
        octets_after = self._unroutable_length - 1
        return ConnectionId(bytes((UNROUTABLE << 5 | octets_after,)) + self._spare(octets_after))

    def _spare(self, count: int) -> bytes:
        """Unpredictable octets. Asking for them costs as much as a CID, so many are drawn at a time."""
        begin, self._spare_at = self._spare_at, self._spare_at + count
        if self._spare_at > len(self._spares):
            self._spares = self._random(SPARE)
            begin, self._spare_at = 0, count
        return self._spares[begin : self._spare_at]


class _Counter:
    """The nonces of one key and server ID: where they begin, how many were used, how many may be."""

    __slots__ = (
        "_length",
        "_permute",
        "identity",
        "low_told",
        "permutation_key",
        "reserved",
        "space",
        "start",
        "used",
    )

    def __init__(self, identity: str, nonce_length: int, mark: NonceMark) -> None:
        self.identity = identity
        self.space = 1 << 8 * nonce_length
        if not (0 <= mark.start < self.space and 0 <= mark.reserved <= self.space):
            raise QuicLbError(f"nonce mark {identity}: not one for nonces of {nonce_length} octets")
        self.start = mark.start
        # What was reserved and not used by the process before us is skipped: nobody knows how much was.
        self.used = self.reserved = mark.reserved
        self.low_told = False
        self.permutation_key = mark.permutation_key
        self._length = nonce_length
        self._permute: Callable[[bytes], bytes] | None = None
        if mark.permutation_key:
            # Section 5.4: plaintext nonces must not be related to each other. A permutation keeps them distinct.
            if len(mark.permutation_key) != KEY_LENGTH:
                raise QuicLbError(f"nonce mark {identity}: permutation key of the wrong length")
            self._permute = FourPass(mark.permutation_key, nonce_length).encrypt

    @property
    def remaining(self) -> int:
        return self.space - self.used

    def take(self) -> bytes:
        """The next nonce. Exhausted when the counter is back at its start (section 9.6)."""
        nonce = (self.start + self.used & self.space - 1).to_bytes(self._length)
        self.used += 1
        return self._permute(nonce) if self._permute else nonce


@dataclass(frozen=True, slots=True)
class _Source:
    """A configuration to issue under. Configurations that share key and server ID share a counter."""

    config: CidConfig
    codec: Codec
    server_id: ServerId
    counter: _Counter


def _identity(config: CidConfig, server_id: ServerId) -> str:
    """A name for a nonce space that does not tell the key: 32 hex digits.

    Not the config ID if there is a key: it is no input of the cipher, so two configurations that share key and
    server ID also share nonces (section 9.6). In plaintext it is what keeps two equal routing blocks apart.
    """
    space = bytes((config.server_id_length, config.nonce_length)) + server_id
    if config.key:
        return hmac.digest(config.key, b"quiclb nonces" + space, "sha256")[:16].hex()
    return hashlib.sha256(b"quiclb plaintext nonces" + bytes((config.config_id,)) + space).digest()[:16].hex()
