"""AES-128 as the XDP program wants it: lookup tables and key schedules. The program encrypts, this file never does.

Source: FIPS 197; section numbers below are its own. A column of the state is a word whose least significant octet is
row 0, so that words in the memory of a little-endian machine are octets in the standard's order.
"""

from __future__ import annotations

import struct
from functools import cache

# The specification's.
KEY_LENGTH = 16
ROUNDS = 10
_POLYNOMIAL = 0b1_0001_1011  # section 4.2: what products of octets are reduced by
_GENERATOR = 3  # its powers are all octets but 0
_SUB_BYTES = 0x63  # section 5.1.1: the constant of the affine map
_MIX_COLUMNS = (2, 1, 1, 3)  # section 5.1.3: what an octet in row 0 adds to rows 0 to 3
_INV_MIX_COLUMNS = (14, 9, 13, 11)  # section 5.3.3


def encrypt_schedule(key: bytes) -> bytes:
    """The key expansion (section 5.2): 44 words, four for each AddRoundKey of the cipher."""
    if len(key) != KEY_LENGTH:
        raise ValueError(f"key of {len(key)} octets: expected {KEY_LENGTH}")
    words = list(struct.unpack("<4I", key))
    round_constant = 1
    for i in range(4, 4 * ROUNDS + 4):
        word = words[i - 1]
        if i % 4 == 0:
            # RotWord moves row 1 to row 0; SubWord.
            word = (
                _S_BOX[word >> 8 & 0xFF]
                | _S_BOX[word >> 16 & 0xFF] << 8
                | _S_BOX[word >> 24] << 16
                | _S_BOX[word & 0xFF] << 24
            ) ^ round_constant
            round_constant = _times(round_constant, 2)
        words.append(words[i - 4] ^ word)
    return struct.pack("<44I", *words)


def decrypt_schedule(key: bytes) -> bytes:
    """The key expansion of the equivalent inverse cipher (section 5.3.5), in the order in which that uses it."""
    words = struct.unpack("<44I", encrypt_schedule(key))
    last = 4 * ROUNDS
    turned: list[int] = list(words[last:])
    for first in range(last - 4, 0, -4):
        turned += map(_inv_mix_column, words[first : first + 4])
    return struct.pack("<44I", *turned, *words[:4])


def sliced_schedule(key: bytes) -> bytes:
    """The key expansion for the cipher that works on bit planes: two 64-bit words for each AddRoundKey.

    Bit 16 * i + 4 * row + column of the two is bit i of the octet in that row and column.
    """
    octets = encrypt_schedule(key)
    rounds = []
    for first in range(0, len(octets), 16):
        planes = 0
        for position, octet in enumerate(octets[first : first + 16]):
            planes |= _PLANES[octet] << (4 * (position % 4) + position // 4)
        rounds.append(planes.to_bytes(16, "little"))
    return b"".join(rounds)


@cache
def tables() -> bytes:
    """`struct aes_tables` of aes128.h: per row and octet SubBytes with MixColumns, their inverses, and both S-boxes."""
    encrypt = [word for row in _columns(_MIX_COLUMNS) for word in (row[octet] for octet in _S_BOX)]
    decrypt = [word for row in _UNMIXED for word in (row[octet] for octet in _INV_S_BOX)]
    return struct.pack("<2048I", *encrypt, *decrypt) + _S_BOX + _INV_S_BOX


def _times(a: int, b: int) -> int:
    """The product in GF(2^8)."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a & 0x100:
            a ^= _POLYNOMIAL
        b >>= 1
    return product


def _s_box() -> bytes:
    """SubBytes of every octet: its inverse in the field (0 for 0), then the affine map."""
    powers = [1]
    while len(powers) < 255:
        powers.append(_times(powers[-1], _GENERATOR))
    inverses = [0] * 256
    for exponent, power in enumerate(powers):
        inverses[power] = powers[-exponent % 255]
    twice = (inverse << 8 | inverse for inverse in inverses)  # so that a shift is a rotation
    return bytes((t ^ t >> 4 ^ t >> 5 ^ t >> 6 ^ t >> 7) & 0xFF ^ _SUB_BYTES for t in twice)


def _columns(factors: tuple[int, ...]) -> list[list[int]]:
    """For each row: what every octet in that row makes of its column under (Inv)MixColumns."""
    row_0 = [sum(_times(octet, factor) << 8 * row for row, factor in enumerate(factors)) for octet in range(256)]
    return [[(word << 8 * row | word >> 32 - 8 * row) & 0xFFFFFFFF for word in row_0] for row in range(4)]


def _inv_mix_column(word: int) -> int:
    row_0, row_1, row_2, row_3 = _UNMIXED
    return row_0[word & 0xFF] ^ row_1[word >> 8 & 0xFF] ^ row_2[word >> 16 & 0xFF] ^ row_3[word >> 24]


_S_BOX = _s_box()
_INV_S_BOX = bytes(_S_BOX.index(octet) for octet in range(256))
_UNMIXED = _columns(_INV_MIX_COLUMNS)
_PLANES = [sum((octet >> i & 1) << 16 * i for i in range(8)) for octet in range(256)]
