"""lb/cid.py against the draft's vectors, ours, and a second writing of the cipher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.cid import CidConfig, Codec, ConfigId, Decoded, FourPass, ServerId, config_id_of

DATA = Path(__file__).parent / "data"
DRAFT = json.loads((DATA / "test-vectors.json").read_text())
EXTRA = json.loads((DATA / "extra-vectors.json").read_text())

EXAMPLE = {
    **DRAFT["worked_example"],
    "algorithm": "four-pass",
    "server_id_len": 3,
    "nonce_len": 4,
    "length_self_encoded": True,
    "trace_encrypt": DRAFT["worked_example"]["trace"],
}
VECTORS: list[Any] = [
    *({"id": v["id"], **v["usable"]} for v in DRAFT["quic_lb_vectors"]),
    EXAMPLE,
    *EXTRA["vectors"],
]
LENGTH_PAIRS = [(s, n) for s in range(1, 16) for n in range(4, 20 - s)]
KEY = bytes.fromhex("00112233445566778899aabbccddeeff")


def vector_config(vector: dict[str, Any]) -> CidConfig:
    return CidConfig(
        ConfigId(vector["config_id"]),
        vector["server_id_len"],
        vector["nonce_len"],
        bytes.fromhex(vector["key"]) if vector["key"] else None,
        encodes_length=vector["length_self_encoded"],
        appended_length=len(vector.get("appended", "")) // 2,
    )


def naive_four_pass(key: bytes, text: bytes, passes: tuple[int, ...]) -> tuple[bytes, list[str]]:
    """Sections 5.4.2 and 5.5.2 as the draft writes them, octet by octet; also the hex of every AES input."""
    length = len(text)
    half = -(-length // 2)
    left, right = list(text[:half]), list(text[-half:])
    if length % 2:
        left[-1] &= 0xF0
        right[0] &= 0x0F
    inputs = []
    for number in passes:
        source, target = (left, right) if number % 2 else (right, left)
        expanded = bytes(source).ljust(14, b"\0") + bytes([length, number])
        inputs.append(expanded.hex())
        output = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(expanded)  # noqa: S305
        for i in range(half):
            target[i] ^= output[i]
        if length % 2:
            left[-1] &= 0xF0
            right[0] &= 0x0F
    if length % 2:
        return bytes([*left[:-1], left[-1] | right[0], *right[1:]]), inputs
    return bytes(left + right), inputs


def test_the_files_hold_every_vector() -> None:
    assert [v["id"] for v in DRAFT["quic_lb_vectors"]] == ["B.1-1", "B.1-2", "B.2-1", "B.2-2", "B.2-3", "B.2-4"]
    assert len(EXTRA["vectors"]) == 122
    assert {v["algorithm"] for v in VECTORS} == {"plaintext", "single-pass", "four-pass"}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["id"])
def test_a_vector_encodes_to_its_cid_and_decodes_again(vector: dict[str, Any]) -> None:
    config = vector_config(vector)
    codec = Codec(config)
    server_id, nonce, cid = (bytes.fromhex(vector[k]) for k in ("server_id", "nonce", "cid"))
    appended = bytes.fromhex(vector.get("appended", ""))

    assert config.algorithm == vector["algorithm"]
    assert len(cid) == config.cid_length
    assert codec.encode(server_id, nonce, low_bits=cid[0], appended=appended) == cid
    assert codec.decode(cid) == Decoded(ServerId(server_id), nonce)
    assert codec.server_id(cid[1 : 1 + config.routing_block_length]) == server_id


@pytest.mark.parametrize("vector", [v for v in VECTORS if len(v.get("trace_encrypt", ())) == 5], ids=lambda v: v["id"])
def test_the_naive_cipher_takes_the_traced_steps(vector: dict[str, Any]) -> None:
    """What the comparison below stands on: the second writing is right in every step, not only in the end."""
    plaintext = bytes.fromhex(vector["server_id"] + vector["nonce"])
    block, inputs = naive_four_pass(bytes.fromhex(vector["key"]), plaintext, (1, 2, 3, 4))
    assert inputs == [step["aes_input"] for step in vector["trace_encrypt"][1:]]
    assert block == bytes.fromhex(vector["cid"])[1 : 1 + len(plaintext)]


def test_the_draft_prints_what_we_compute_but_for_two_errata() -> None:
    """One lost a leading zero and its length, the other its config ID."""
    errata = {
        v["id"]: (v["printed"]["cid"], v["usable"]["cid"])
        for v in DRAFT["quic_lb_vectors"]
        if v["printed"]["cid"] != v["usable"]["cid"]
    }
    assert errata == {
        "B.1-2": ("20a350d28b4203487d970b", "2a350d28b42003487d970b"),
        "B.2-4": ("125779c9cc86beb3a3a4a3ca96fce4bfe0cdbc", "725779c9cc86beb3a3a4a3ca96fce4bfe0cdbc"),
    }


@pytest.mark.parametrize("stale", DRAFT["stale_peer_fingerprints"], ids=lambda v: v["id"])
def test_the_cipher_of_older_drafts_is_not_ours(stale: dict[str, Any]) -> None:
    """-15 to -18 laid expand() out in another order: their CIDs must neither come out nor decode."""
    server_id, nonce, cid = (bytes.fromhex(stale[k]) for k in ("server_id", "nonce", "cid"))
    config = CidConfig(ConfigId(stale["config_id"]), len(server_id), len(nonce), bytes.fromhex(stale["key"]))
    codec = Codec(config)
    decoded = codec.decode(cid)
    assert codec.encode(server_id, nonce) != cid
    assert decoded is not None
    assert decoded.server_id != server_id


def test_the_naive_cipher_expands_and_splits_as_the_drafts_examples() -> None:
    expand, _, split = DRAFT["function_examples"]
    assert (expand["function"], expand["pass"], expand["length"]) == ("expand", 2, 6)
    _, inputs = naive_four_pass(KEY, bytes(3) + bytes.fromhex(expand["input_bytes"]), (2,))
    assert inputs == [expand["output"]]

    _, (from_left,) = naive_four_pass(KEY, bytes.fromhex(split["input"]), (1,))
    _, (from_right,) = naive_four_pass(KEY, bytes.fromhex(split["input"]), (2,))
    assert (from_left[:8], from_right[:8]) == (split["left_0"], split["right_0"])


def test_every_legal_pair_of_lengths_is_a_config() -> None:
    assert len(LENGTH_PAIRS) == 120
    assert {(s, n) for s in range(-1, 22) for n in range(-1, 22) if _legal(s, n)} == set(LENGTH_PAIRS)


def _legal(server_id_length: int, nonce_length: int) -> bool:
    try:
        CidConfig(ConfigId(0), server_id_length, nonce_length)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("key", [None, KEY], ids=["plaintext", "keyed"])
@pytest.mark.parametrize(("server_id_length", "nonce_length"), LENGTH_PAIRS)
def test_round_trip_of_every_legal_pair(server_id_length: int, nonce_length: int, key: bytes | None) -> None:
    config = CidConfig(ConfigId(server_id_length % 7), server_id_length, nonce_length, key)
    codec = Codec(config)
    total = server_id_length + nonce_length
    text = bytes((41 * i + 7 * total) & 0xFF for i in range(total))
    server_id, nonce = ServerId(text[:server_id_length]), text[server_id_length:]

    cid = codec.encode(server_id, nonce)

    assert config.algorithm == ("plaintext" if key is None else "single-pass" if total == 16 else "four-pass")
    assert cid[0] == config.config_id << 5 | total
    assert len(cid) == config.cid_length == 1 + total
    assert codec.decode(cid) == Decoded(server_id, nonce)
    assert codec.decode(cid + b"appended") == Decoded(server_id, nonce)
    assert codec.server_id(cid[1:]) == server_id
    assert all(codec.decode(cid[:cut]) is None for cut in range(len(cid)))


@pytest.mark.parametrize("key", [None, KEY], ids=["plaintext", "keyed"])
@pytest.mark.parametrize("total", range(5, 20))
def test_where_the_server_id_ends_does_not_change_the_cid(total: int, key: bytes | None) -> None:
    text = bytes(range(total))
    cids = {
        Codec(CidConfig(ConfigId(3), border, total - border, key)).encode(text[:border], text[border:])
        for border in range(1, total - 3)
    }
    assert len(cids) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config_id": 7}, "config ID 7"),
        ({"config_id": -1}, "config ID -1"),
        ({"config_id": 8}, "config ID 8"),
        ({"server_id_length": 0}, "server ID length 0"),
        ({"server_id_length": -1}, "server ID length -1"),
        ({"nonce_length": 3}, "nonce length 3"),
        ({"server_id_length": 16, "nonce_length": 4}, "take 20 octets together: expected at most 19"),
        ({"server_id_length": 1, "nonce_length": 19}, "take 20 octets together: expected at most 19"),
        ({"key": b""}, "key of 0 octets: expected 16"),
        ({"key": bytes(15)}, "key of 15 octets: expected 16"),
        ({"key": bytes(32)}, "key of 32 octets: expected 16"),
        ({"appended_length": -1}, "-1 appended octets"),
        ({"server_id_length": 4, "nonce_length": 15, "appended_length": 1}, "1 appended octets"),
        ({"server_id_length": 3, "nonce_length": 8, "appended_length": 9}, "9 appended octets"),
    ],
)
def test_what_the_draft_does_not_allow_cannot_be_built(arguments: dict[str, Any], message: str) -> None:
    legal: dict[str, Any] = {"config_id": 0, "server_id_length": 4, "nonce_length": 12}
    with pytest.raises(ValueError, match=message):
        CidConfig(**{**legal, **arguments})


@pytest.mark.parametrize(
    ("server_id", "nonce", "appended", "message"),
    [
        (bytes(3), bytes(8), b"x", "server ID of 3 octets: expected 4"),
        (bytes(5), bytes(8), b"x", "server ID of 5 octets: expected 4"),
        (bytes(4), bytes(7), b"x", "nonce of 7 octets: expected 8"),
        (bytes(4), bytes(9), b"x", "nonce of 9 octets: expected 8"),
        (bytes(4), bytes(8), b"", "0 appended octets: expected 1"),
        (bytes(4), bytes(8), b"xx", "2 appended octets: expected 1"),
    ],
)
def test_lengths_other_than_the_configured_do_not_encode(
    server_id: bytes, nonce: bytes, appended: bytes, message: str
) -> None:
    codec = Codec(CidConfig(ConfigId(0), 4, 8, KEY, appended_length=1))
    with pytest.raises(ValueError, match=message):
        codec.encode(server_id, nonce, appended=appended)


@pytest.mark.parametrize(
    ("encodes_length", "appended_length", "low_bits", "first_octet"),
    [
        (True, 0, 0b11111, 0b101_01100),  # 12 octets follow; low_bits is not for this one
        (True, 3, 0, 0b101_01111),  # appended octets count (section 3.4)
        (False, 0, 0b10110, 0b101_10110),
        (False, 0, 0xFF, 0b101_11111),  # the config ID is safe from low_bits
    ],
)
def test_first_octet(encodes_length: bool, appended_length: int, low_bits: int, first_octet: int) -> None:
    config = CidConfig(ConfigId(5), 4, 8, KEY, encodes_length=encodes_length, appended_length=appended_length)
    cid = Codec(config).encode(bytes(4), bytes(8), low_bits=low_bits, appended=bytes(appended_length))
    assert cid[0] == config.first_octet(low_bits) == first_octet


def test_decoding_looks_at_the_config_id_and_not_at_the_length() -> None:
    codec = Codec(CidConfig(ConfigId(2), 4, 8, KEY))
    cid = codec.encode(b"serv", b"nonce678")
    expected = Decoded(ServerId(b"serv"), b"nonce678")
    for first in range(256):
        assert codec.decode(bytes([first]) + cid[1:]) == (expected if first >> 5 == 2 else None)


def test_config_id_is_the_three_highest_bits() -> None:
    assert [config_id_of(bytes([first])) for first in range(256)] == [first // 32 for first in range(256)]
    assert config_id_of(b"") is None


def test_neither_repr_nor_str_shows_the_key() -> None:
    config = CidConfig(ConfigId(0), 4, 12, KEY)
    text = f"{config!r} {config!s} {Codec(config)!r} {vars(FourPass)!r} {FourPass(KEY, 8)!r}"
    assert repr(KEY) not in text
    assert KEY.hex() not in text


def test_four_pass_permutes_short_strings_too() -> None:
    """The generator's plaintext nonces never repeat because of this."""
    four_pass = FourPass(KEY, 2)
    assert len({four_pass.encrypt(i.to_bytes(2)) for i in range(1 << 16)}) == 1 << 16


@st.composite
def configs(draw: st.DrawFn) -> CidConfig:
    server_id_length, nonce_length = draw(st.sampled_from(LENGTH_PAIRS))
    return CidConfig(
        ConfigId(draw(st.integers(0, 6))),
        server_id_length,
        nonce_length,
        draw(st.none() | st.binary(min_size=16, max_size=16)),
        encodes_length=draw(st.booleans()),
        appended_length=draw(st.integers(0, 19 - server_id_length - nonce_length)),
    )


@settings(deadline=None)
@given(config=configs(), cid=st.binary(max_size=300))
def test_any_octets_decode_or_are_none(config: CidConfig, cid: bytes) -> None:
    decoded = Codec(config).decode(cid)
    routing_end = 1 + config.routing_block_length
    if len(cid) < routing_end or cid[0] >> 5 != config.config_id:
        assert decoded is None
    else:
        assert decoded is not None
        assert (len(decoded.server_id), len(decoded.nonce)) == (config.server_id_length, config.nonce_length)
        again = Codec(config).encode(decoded.server_id, decoded.nonce, appended=bytes(config.appended_length))
        assert again[1:routing_end] == cid[1:routing_end]


@settings(deadline=None)
@given(key=st.binary(min_size=16, max_size=16), text=st.binary(min_size=2, max_size=20))
def test_four_pass_is_what_the_draft_writes(key: bytes, text: bytes) -> None:
    block, _ = naive_four_pass(key, text, (1, 2, 3, 4))
    assert FourPass(key, len(text)).encrypt(text) == block
    assert FourPass(key, len(text)).decrypt(block) == text
    assert naive_four_pass(key, block, (4, 3, 2, 1))[0] == text


@settings(deadline=None)
@given(config=configs(), data=st.data())
def test_three_passes_find_the_server_id_that_four_do(config: CidConfig, data: st.DataObject) -> None:
    block = data.draw(st.binary(min_size=config.routing_block_length, max_size=config.routing_block_length))
    decoded = Codec(config).decode(bytes([config.config_id << 5]) + block)
    assert decoded is not None
    assert Codec(config).server_id(block) == decoded.server_id


def _all_configs() -> Iterator[CidConfig]:
    for key in (None, KEY):
        for server_id_length, nonce_length in LENGTH_PAIRS:
            yield CidConfig(ConfigId(6), server_id_length, nonce_length, key)


def test_no_config_takes_a_short_cid_or_an_unroutable_one() -> None:
    for config in _all_configs():
        codec = Codec(config)
        assert codec.decode(b"") is None
        assert codec.decode(b"\xc0") is None
        assert codec.decode(b"\xff" * 20) is None
