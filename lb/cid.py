"""QUIC-LB connection IDs: how a server ID and a nonce sit in one, and how to get them out again.

This file and `xdp/bpf/cid.h` are the only two places that know. It has no socket, no clock and no randomness:
nonces and spare bits are arguments.

Source: draft-ietf-quic-load-balancers, the editors' copy after -21; section numbers below are its own.
Decoding cannot fail on a long enough CID (there is no integrity check, section 9.7): whether the server ID
that comes out is anybody's is for the routing table to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, NewType, Protocol

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

ConnectionId = NewType("ConnectionId", bytes)
ServerId = NewType("ServerId", bytes)
ConfigId = NewType("ConfigId", int)

# The specification's.
UNROUTABLE = ConfigId(0b111)  # section 3.2: the codepoint of servers that have no configuration
CONFIG_IDS = tuple(ConfigId(i) for i in range(7))
KEY_LENGTH = 16  # AES-128
AES_BLOCK = 16
MIN_SERVER_ID_LENGTH = 1
MIN_NONCE_LENGTH = 4
MAX_ROUTING_BLOCK = 19  # so that the CID fits QUIC v1's 20 octets
MAX_CID_LENGTH_V1 = 20
LENGTH_BITS = 0b0001_1111  # of the first octet: the number of octets after it (section 3.3)


def config_id_of(cid: bytes) -> ConfigId | None:
    """The config ID in the three most significant bits of the first octet; None for a zero-length CID."""
    return ConfigId(cid[0] >> 5) if cid else None


@dataclass(frozen=True, slots=True)
class CidConfig:
    """How connection IDs with one config ID carry a server ID (section 5.3).

    `key` is absent (plaintext) or 16 octets; lengths are in octets. With `encodes_length` the five low bits of the
    first octet hold the number of octets after it, appended ones included (section 3.4); decoding never looks
    at them, since some servers leave the appended octets out of the count.
    `appended_length` octets of the server's own follow the routing block (section 5.4).

    Raises ValueError for anything that section 5.3 does not allow, so that no such value exists.
    """

    config_id: ConfigId
    server_id_length: int
    nonce_length: int
    key: bytes | None = field(default=None, repr=False)
    encodes_length: bool = True
    appended_length: int = 0

    def __post_init__(self) -> None:
        if self.config_id not in CONFIG_IDS:
            raise ValueError(f"config ID {self.config_id}: expected 0 to 6 (0b111 marks unroutable CIDs)")
        if self.server_id_length < MIN_SERVER_ID_LENGTH:
            raise ValueError(f"server ID length {self.server_id_length}: expected at least 1 octet")
        if self.nonce_length < MIN_NONCE_LENGTH:
            raise ValueError(f"nonce length {self.nonce_length}: expected at least 4 octets")
        if self.routing_block_length > MAX_ROUTING_BLOCK:
            raise ValueError(
                f"server ID and nonce take {self.routing_block_length} octets together: expected at most 19"
            )
        if self.appended_length < 0 or self.cid_length > MAX_CID_LENGTH_V1:
            raise ValueError(f"{self.appended_length} appended octets: a CID holds at most 20 octets in all")
        if self.key is not None and len(self.key) != KEY_LENGTH:
            raise ValueError(f"key of {len(self.key)} octets: expected 16")

    @property
    def routing_block_length(self) -> int:
        """Octets that the server ID and the nonce take together, 5 to 19."""
        return self.server_id_length + self.nonce_length

    @property
    def cid_length(self) -> int:
        """Octets of a whole CID, the first octet and the appended ones included."""
        return 1 + self.routing_block_length + self.appended_length

    @property
    def algorithm(self) -> str:
        """`plaintext`, `single-pass` or `four-pass`: a function of the key and the lengths alone (section 5.4)."""
        if self.key is None:
            return "plaintext"
        return "single-pass" if self.routing_block_length == AES_BLOCK else "four-pass"

    def first_octet(self, low_bits: int = 0) -> int:
        """The first octet of a CID; `low_bits` fills the five low bits of one that does not encode its length.

        They should be random then (section 3.3).
        """
        low = self.cid_length - 1 if self.encodes_length else low_bits & LENGTH_BITS
        return self.config_id << 5 | low


class Decoded(NamedTuple):
    """What a connection ID carries."""

    server_id: ServerId
    nonce: bytes


class _Cipher(Protocol):
    """Encrypts and decrypts one routing block of a fixed length."""

    def encrypt(self, plaintext: bytes) -> bytes: ...
    def decrypt(self, block: bytes) -> bytes: ...
    def decrypt_server_id(self, block: bytes) -> bytes:
        """The first `server_id_length` octets of the plaintext."""
        ...


class Codec:
    """Encodes and decodes the connection IDs of one `CidConfig`. Not to be shared between threads."""

    __slots__ = ("_block_end", "_cipher", "config", "server_id")

    def __init__(self, config: CidConfig) -> None:
        self.config = config
        self._block_end = 1 + config.routing_block_length
        self._cipher = _cipher(config)
        self.server_id: Callable[[bytes], bytes] = self._cipher.decrypt_server_id
        """Routing block (exactly as long as configured) to server ID: all that a balancer needs of a CID."""

    def encode(self, server_id: bytes, nonce: bytes, *, low_bits: int = 0, appended: bytes = b"") -> ConnectionId:
        """The connection ID for a server ID and a nonce, both of exactly the configured length (section 5.4).

        `appended` is what the server wants to add for its own use, of the configured length.
        Raises ValueError for any other length: it is the caller's bug, not a packet's.
        """
        config = self.config
        if len(server_id) != config.server_id_length:
            raise ValueError(f"server ID of {len(server_id)} octets: expected {config.server_id_length}")
        if len(nonce) != config.nonce_length:
            raise ValueError(f"nonce of {len(nonce)} octets: expected {config.nonce_length}")
        if len(appended) != config.appended_length:
            raise ValueError(f"{len(appended)} appended octets: expected {config.appended_length}")
        block = self._cipher.encrypt(server_id + nonce)
        return ConnectionId(bytes((config.first_octet(low_bits),)) + block + appended)

    def decode(self, cid: bytes) -> Decoded | None:
        """Server ID and nonce of a connection ID (section 5.5).

        None if it is too short or its config ID is another one. Octets after the routing block are ignored.
        """
        if len(cid) < self._block_end or cid[0] >> 5 != self.config.config_id:
            return None
        plaintext = self._cipher.decrypt(cid[1 : self._block_end])
        border = self.config.server_id_length
        return Decoded(ServerId(plaintext[:border]), plaintext[border:])


class _Plaintext:
    """Section 5.4 without a key: the routing block is server ID and nonce as they are."""

    __slots__ = ("_server_id_length",)

    def __init__(self, server_id_length: int) -> None:
        self._server_id_length = server_id_length

    def encrypt(self, plaintext: bytes) -> bytes:
        return plaintext

    def decrypt(self, block: bytes) -> bytes:
        return block

    def decrypt_server_id(self, block: bytes) -> bytes:
        return block[: self._server_id_length]


class _SinglePass:
    """Section 5.4.1: server ID and nonce fill exactly one AES block. The only user of AES decryption."""

    __slots__ = ("_server_id_length", "decrypt", "encrypt")

    def __init__(self, key: bytes, server_id_length: int) -> None:
        ecb = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305 - one block, never repeated
        # One context for good: a fresh one per call costs ten times the block.
        self.encrypt: Callable[[bytes], bytes] = ecb.encryptor().update
        self.decrypt: Callable[[bytes], bytes] = ecb.decryptor().update
        self._server_id_length = server_id_length

    def decrypt_server_id(self, block: bytes) -> bytes:
        return self.decrypt(block)[: self._server_id_length]


class FourPass:
    """Section 5.4.2: a four-pass Feistel network over halves of 4 * length bits, AES as its round function.

    The draft writes the halves as octets and, for an odd length, shares the middle octet and clears a nibble
    after each pass. As integers of exactly 4 * length bits they need no odd case. It permutes the strings of any
    `length` from 2 to 20 octets, shorter ones than a routing block too.

    Errata of the text, as of 2026-05-29:
    * 5.5.2, second stanza of the decryption: "left_1" must read "right_1", or odd lengths do not decode.
    * 5.4.2.4, step 10 of the worked example: the operand printed b3e4357c is b334357c (the AES output one line above);
      the CID is right.
    * Appendix B.1, second vector: the nonce lost a leading zero and the first octet its length; it should
      read nonce 03487d970b, CID 2a350d28b42003487d970b.
    * Appendix B.2, fourth vector: labelled config rotation bits 3, which with 18 octets is a first octet of 72,
      but printed with 12 (config ID 0); the 18 octets after it are right.
    """

    __slots__ = ("_aes", "_half_bits", "_length", "_mask", "_pad_left", "_pad_right", "_server_id_length")

    def __init__(self, key: bytes, length: int, server_id_length: int = 0) -> None:
        ecb = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305 - inputs differ by pass and length
        self._aes: Callable[[bytes], bytes] = ecb.encryptor().update
        self._server_id_length = server_id_length
        self._length = length
        self._half_bits = 4 * self._length
        self._mask = (1 << self._half_bits) - 1
        # expand(): a left half starts at the first bit of the block, a right half ends with an octet.
        self._pad_left = 128 - self._half_bits
        self._pad_right = 128 - 8 * ((self._length + 1) // 2)

    def encrypt(self, plaintext: bytes) -> bytes:
        value = int.from_bytes(plaintext)
        left, right = value >> self._half_bits, value & self._mask
        right ^= self._from_left(left, 1)
        left ^= self._from_right(right, 2)
        right ^= self._from_left(left, 3)
        left ^= self._from_right(right, 4)
        return (left << self._half_bits | right).to_bytes(self._length)

    def decrypt(self, block: bytes) -> bytes:
        left, right = self._left_0_and_right_1(block)
        right ^= self._from_left(left, 1)
        return (left << self._half_bits | right).to_bytes(self._length)

    def decrypt_server_id(self, block: bytes) -> bytes:
        # Section 5.5.2: the pass that restores the right half is only needed if the server ID reaches into it.
        if 2 * self._server_id_length > self._length:
            return self.decrypt(block)[: self._server_id_length]
        left, _ = self._left_0_and_right_1(block)
        spare = self._half_bits - 8 * self._server_id_length
        return (left >> spare).to_bytes(self._server_id_length)

    def _left_0_and_right_1(self, block: bytes) -> tuple[int, int]:
        value = int.from_bytes(block)
        left, right = value >> self._half_bits, value & self._mask
        left ^= self._from_right(right, 4)
        right ^= self._from_left(left, 3)
        left ^= self._from_right(right, 2)
        return left, right

    def _from_left(self, left: int, pass_number: int) -> int:
        """truncate(AES(expand(length, pass, left))), as the bits that a right half is made of."""
        block = left << self._pad_left | self._length << 8 | pass_number
        return int.from_bytes(self._aes(block.to_bytes(AES_BLOCK))) >> self._pad_right & self._mask

    def _from_right(self, right: int, pass_number: int) -> int:
        """The same from a right half, as the bits that a left half is made of."""
        block = right << self._pad_right | self._length << 8 | pass_number
        return int.from_bytes(self._aes(block.to_bytes(AES_BLOCK))) >> self._pad_left


def _cipher(config: CidConfig) -> _Cipher:
    if config.key is None:
        return _Plaintext(config.server_id_length)
    if config.routing_block_length == AES_BLOCK:
        return _SinglePass(config.key, config.server_id_length)
    return FourPass(config.key, config.routing_block_length, config.server_id_length)
