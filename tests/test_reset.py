"""lb/reset.py: keys and tokens computed a second way, sizes by RFC 9000 section 10.3, the datagram's form."""

from __future__ import annotations

import hashlib
import hmac
import random

import pytest

from lb.cid import ConfigId, ServerId
from lb.packet import parse_header
from lb.reset import MAX_RESET, MIN_RESET, reset_datagram, reset_size, reset_token, server_reset_key

MASTER = bytes(range(32))
SEED = 9000


def zeros(count: int) -> bytes:
    return bytes(count)


def hkdf_expand_block(prk: bytes, info: bytes) -> bytes:
    """RFC 5869, section 2.3, for an output of one hash: T(1) = HMAC(PRK, info || 0x01), from HMAC's definition."""
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in prk.ljust(64, b"\0")) + info + b"\x01").digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in prk.ljust(64, b"\0")) + inner).digest()


@pytest.mark.parametrize(
    ("config_id", "server_id"), [(0, b"\0"), (6, b"\xff" * 15), (3, b"\x3f\xa9\x1c\x02"), (7, b"x")]
)
def test_a_server_key_is_hkdf_expand_of_the_master(config_id: int, server_id: bytes) -> None:
    info = b"quiclb reset" + bytes([config_id]) + server_id
    key = server_reset_key(MASTER, ConfigId(config_id), ServerId(server_id))
    assert key == hkdf_expand_block(MASTER, info)


def test_keys_and_tokens_as_published() -> None:
    """Fixed for good: a balancer and a server of different releases must agree."""
    key = server_reset_key(MASTER, ConfigId(1), ServerId(bytes.fromhex("3fa91c02")))
    assert key.hex() == "ebc9afbe032430c282c92da969c0a6679c935556dc9ff84cbfa99bc5d7d4e676"
    assert (
        reset_token(key, bytes.fromhex("3000112233445566778899aabbccddeeff")).hex()
        == "21bb58ca304229d2717762af2fd2af61"
    )


def test_every_server_and_config_has_a_key_of_its_own() -> None:
    keys = {
        server_reset_key(master, ConfigId(config_id), ServerId(server_id))
        for master in (MASTER, bytes(32))
        for config_id in range(7)
        for server_id in (b"a", b"b", b"ab", b"\0a")
    }
    assert len(keys) == 2 * 7 * 4


@pytest.mark.parametrize("cid", [b"", b"\x07", bytes(8), bytes(range(20)), bytes(255)])
def test_a_token_is_the_start_of_an_hmac_of_the_whole_cid(cid: bytes) -> None:
    assert reset_token(MASTER, cid) == hmac.new(MASTER, cid, hashlib.sha256).digest()[:16]
    assert reset_token(MASTER, cid) != reset_token(MASTER, cid + b"\0")


@pytest.mark.parametrize(
    ("trigger", "smallest", "largest"),
    [
        *((trigger, None, None) for trigger in range(22)),
        *((trigger, trigger - 1, trigger - 1) for trigger in range(22, 44)),
        *((trigger, 42, min(trigger - 1, 100)) for trigger in range(44, 201)),
        (1200, 42, 100),
        (65527, 42, 100),
    ],
)
def test_a_reset_is_shorter_than_its_trigger_and_looks_like_data(
    trigger: int, smallest: int | None, largest: int | None
) -> None:
    source = random.Random(SEED)
    sizes = {reset_size(trigger, source.randbytes) for _ in range(1000)}
    if smallest is None or largest is None:
        assert sizes == {None}
    else:
        assert sizes == set(range(smallest, largest + 1))  # every size, none outside
        assert MIN_RESET <= smallest <= largest < trigger
        assert largest <= MAX_RESET


@pytest.mark.parametrize("size", [21, 22, 42, 43, 100])
@pytest.mark.parametrize("octet", [0x00, 0xFF, 0x95])
def test_a_reset_is_a_short_header_random_octets_and_the_token(size: int, octet: int) -> None:
    token = bytes(range(16))
    datagram = reset_datagram(token, size, lambda count: bytes([octet]) * count)
    assert datagram == bytes([0x40 | octet & 0x3F]) + bytes([octet]) * (size - 17) + token
    header = parse_header(datagram)
    assert header is not None
    assert not header.is_long


def test_a_reset_of_any_size_asks_for_as_much_randomness_as_it_shows() -> None:
    asked: list[int] = []

    def counting(count: int) -> bytes:
        asked.append(count)
        return zeros(count)

    for size in range(MIN_RESET, MAX_RESET + 1):
        assert len(reset_datagram(bytes(16), size, counting)) == size
    assert asked == [size - 16 for size in range(MIN_RESET, MAX_RESET + 1)]
