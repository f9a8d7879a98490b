"""lb/xdp/aes128.py against FIPS 197's own numbers and against `cryptography`.

By a cipher that is written here on top of what the file renders, and works as the C code does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from lb.xdp.aes128 import decrypt_schedule, encrypt_schedule, sliced_schedule, tables

KEYS = st.binary(min_size=16, max_size=16)
BLOCKS = st.binary(min_size=16, max_size=16)

# FIPS 197, appendix A.1: some of the round keys, as octets; and C.1: a block.
EXPANDED_KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
ROUND_KEYS = {1: "a0fafe1788542cb123a339392a6c7605", 10: "d014f9a8c9ee2589e13f0cc8b6630ca6"}
KEY = bytes.fromhex("000102030405060708090a0b0c0d0e0f")
PLAINTEXT = bytes.fromhex("00112233445566778899aabbccddeeff")
CIPHERTEXT = bytes.fromhex("69c4e0d86a7b0430d8cdb78070b4c55a")
# C.1 again, the equivalent inverse cipher: what round 1 adds.
DECRYPTION_ROUND_1 = "13aa29be9c8faff6f770f58000f7bf03"

WORDS = struct.unpack_from("<2048I", tables())
S_BOX, INV_S_BOX = tables()[8192:8448], tables()[8448:]


def by_tables(schedule: bytes, block: bytes, words: tuple[int, ...], s_box: bytes, direction: int) -> bytes:
    """Nine rounds of tables and one of the S-box; rows come from columns to the right (1) or to the left (-1)."""

    def octets(columns: list[int]) -> list[list[int]]:
        """The four octets, one of each row, that make each new column."""
        return [[columns[(i + direction * row) % 4] >> 8 * row & 0xFF for row in range(4)] for i in range(4)]

    keys = struct.unpack("<44I", schedule)
    columns = [word ^ key for word, key in zip(struct.unpack("<4I", block), keys[:4], strict=True)]
    for first in range(4, 40, 4):
        new = []
        for rows, key in zip(octets(columns), keys[first : first + 4], strict=True):
            for row, octet in enumerate(rows):
                key ^= words[256 * row + octet]  # noqa: PLW2901 - a sum
            new.append(key)
        columns = new
    last = bytes(s_box[octet] for rows in octets(columns) for octet in rows)
    return bytes(a ^ b for a, b in zip(last, schedule[160:], strict=True))


def encrypted(schedule: bytes, block: bytes) -> bytes:
    return by_tables(schedule, block, WORDS[:1024], S_BOX, 1)


def decrypted(schedule: bytes, block: bytes) -> bytes:
    return by_tables(schedule, block, WORDS[1024:], INV_S_BOX, -1)


def test_the_example_of_the_key_expansion() -> None:
    schedule = encrypt_schedule(EXPANDED_KEY)
    assert schedule[:16] == EXPANDED_KEY
    assert {i: schedule[16 * i : 16 * i + 16].hex() for i in ROUND_KEYS} == ROUND_KEYS


def test_the_example_block() -> None:
    assert encrypted(encrypt_schedule(KEY), PLAINTEXT) == CIPHERTEXT
    assert decrypted(decrypt_schedule(KEY), CIPHERTEXT) == PLAINTEXT
    assert decrypt_schedule(KEY)[16:32].hex() == DECRYPTION_ROUND_1


@given(KEYS, BLOCKS)
def test_schedules_and_tables_encrypt_and_decrypt_as_everybody_elses(key: bytes, block: bytes) -> None:
    ecb = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305
    assert encrypted(encrypt_schedule(key), block) == ecb.encryptor().update(block)
    assert decrypted(decrypt_schedule(key), block) == ecb.decryptor().update(block)


def test_the_s_boxes_undo_each_other() -> None:
    assert len(tables()) == 8704
    assert bytes(range(256)) == bytes(INV_S_BOX[octet] for octet in S_BOX)
    assert sorted(S_BOX) == list(range(256))
    assert (S_BOX[0x00], S_BOX[0x53]) == (0x63, 0xED)  # the example of section 5.1.1


@given(KEYS)
def test_a_sliced_schedule_has_the_same_bits_elsewhere(key: bytes) -> None:
    octets = encrypt_schedule(key)
    for round_number in range(11):
        planes = int.from_bytes(sliced_schedule(key)[16 * round_number : 16 * round_number + 16], "little")
        for row in range(4):
            for column in range(4):
                octet = octets[16 * round_number + 4 * column + row]
                bits = [planes >> 16 * i + 4 * row + column & 1 for i in range(8)]
                assert octet == sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize("schedule", [encrypt_schedule, decrypt_schedule, sliced_schedule])
@pytest.mark.parametrize("length", [0, 15, 17, 32])
def test_only_aes_128_keys_are_taken(schedule: Callable[[bytes], bytes], length: int) -> None:
    with pytest.raises(ValueError, match=f"^key of {length} octets: expected 16$"):
        schedule(bytes(length))
