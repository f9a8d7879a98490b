"""Seal: what only the servers that share a key can make and read, and a client carries from one to another.

    kind (8) | key ID (32) | salt (96) | AEAD nonce (96) | sealed octets | tag (128)

Every message has an AES-256-GCM key of its own, HMAC-SHA256 of the salt under a key that follows from the file's
key and the kind. So there is no number of messages after which random nonces repeat: a flood that is answered by
Retry makes more of them than 2^32, which is all that one key and 96 random bits allow.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum, auto
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lb.keyfile import MAX_TOKEN_KEYS, TOKEN_KEY_LENGTH

# Ours.
_KEY_ID_LENGTH = 4
_SALT_LENGTH = 12
_NONCE_LENGTH = 12
_TAG_LENGTH = 16
_SALT_AT = 1 + _KEY_ID_LENGTH
_NONCE_AT = _SALT_AT + _SALT_LENGTH
_SEALED_AT = _NONCE_AT + _NONCE_LENGTH
OVERHEAD = _SEALED_AT + _TAG_LENGTH  # octets
MARK_LENGTH = 8


class Kind(IntEnum):
    """What was sealed: the first octet, and with it the format's version.

    The first bit of a Retry token is 0 and that of another 1, as a Retry offload tells them apart
    (draft-ietf-quic-retry-offload, section 3).
    """

    RETRY_TOKEN = 0x01
    NEW_TOKEN = 0x81
    SESSION_TICKET = 0xC1


class Broken(Enum):
    """Why nothing can be read of some octets."""

    FOREIGN = auto()  # another kind of thing, or another maker's
    TRUNCATED = auto()
    OVERSIZED = auto()
    UNKNOWN_KEY = auto()  # retired, or another fleet's
    FORGED = auto()  # or damaged


class Seal:
    """Seals with the first of some keys, and reads what was sealed with any of them."""

    def __init__(self, keys: Sequence[bytes], random: Callable[[int], bytes]) -> None:
        """`random` gives as many octets as it is asked for. Raises ValueError, as `switch` does."""
        self.random = random
        self._keys: Mapping[bytes, _Key] = {}
        self._newest: _Key
        self.switch(keys)

    def switch(self, keys: Sequence[bytes]) -> None:
        """Use other keys from now on. Raises ValueError if they are too few or too many, or cannot be told apart."""
        derived = [_Key.of(key) for key in keys]
        by_id = {key.key_id: key for key in derived}
        if not 1 <= len(derived) <= MAX_TOKEN_KEYS:
            raise ValueError(f"{len(derived)} token keys: expected 1 to {MAX_TOKEN_KEYS}")
        if len(by_id) < len(derived):
            raise ValueError("two token keys have one key ID: expected another key")
        self._keys = by_id
        self._newest = derived[0]

    def seal(self, kind: Kind, octets: bytes) -> bytes:
        key = self._newest
        head = bytes([kind]) + key.key_id
        salt, nonce = self.random(_SALT_LENGTH), self.random(_NONCE_LENGTH)
        return head + salt + nonce + key.aead(kind, salt).encrypt(nonce, octets, head)

    def open(self, kind: Kind, sealed: bytes, most: int) -> bytes | Broken:
        """The octets inside, `most` at most, if they were sealed as this kind and with a key that is known."""
        if not sealed or sealed[0] != kind:
            return Broken.FOREIGN
        if len(sealed) < OVERHEAD:
            return Broken.TRUNCATED
        if len(sealed) > OVERHEAD + most:
            return Broken.OVERSIZED
        key = self._keys.get(sealed[1:_SALT_AT])
        if key is None:
            return Broken.UNKNOWN_KEY
        aead = key.aead(kind, sealed[_SALT_AT:_NONCE_AT])
        try:
            return aead.decrypt(sealed[_NONCE_AT:_SEALED_AT], sealed[_SEALED_AT:], sealed[:_SALT_AT])
        except InvalidTag:
            return Broken.FORGED


def mark_of(sealed: bytes) -> bytes:
    """A few octets by which something sealed is remembered: the end of its tag, which nobody can choose."""
    return sealed[-MARK_LENGTH:]


class _Key(NamedTuple):
    """What follows from one key of the file."""

    key_id: bytes
    by_kind: Mapping[Kind, bytes]

    @classmethod
    def of(cls, key: bytes) -> _Key:
        if len(key) != TOKEN_KEY_LENGTH:
            raise ValueError(f"a token key of {len(key)} octets: expected {TOKEN_KEY_LENGTH}")
        return cls(
            _derive(key, b"quiclb token key id")[:_KEY_ID_LENGTH],
            {kind: _derive(key, b"quiclb " + kind.name.encode()) for kind in Kind},
        )

    def aead(self, kind: Kind, salt: bytes) -> AESGCM:
        return AESGCM(_derive(self.by_kind[kind], salt))

    def __repr__(self) -> str:
        return f"_Key({self.key_id.hex()})"


def _derive(key: bytes, info: bytes) -> bytes:
    """HKDF-Expand-SHA256 of one block (RFC 5869, section 2.3): the key is uniform already."""
    return hmac.digest(key, info + b"\x01", "sha256")
