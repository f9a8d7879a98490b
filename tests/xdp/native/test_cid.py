"""xdp/bpf/aes128.h and cid.h, through what Python renders for them, against lb/cid.py and `cryptography`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lb.cid import CidConfig, Codec, ConfigId
from lb.xdp.aes128 import decrypt_schedule, encrypt_schedule, sliced_schedule
from lb.xdp.image import cid_config
from lb.xdp.layout import SETTINGS, Settings
from tests.test_cid import LENGTH_PAIRS, VECTORS, vector_config
from tests.xdp.native.program import Native

BLOCKS = st.binary(min_size=16, max_size=16)
CID = 20  # octets that the program looks at; those behind the routing block may be anything


def settings_octets(*, constant_time: bool) -> bytes:
    zero = SETTINGS.unpack(bytes(SETTINGS.size))
    return SETTINGS.pack(Settings(*zero)._replace(constant_time=constant_time))


@pytest.fixture(scope="module", params=[False, True], ids=["tables", "constant-time"])
def native(native: Native, request: pytest.FixtureRequest) -> Iterator[Native]:
    native.ask(b"S", settings_octets(constant_time=request.param))
    yield native
    native.ask(b"S", settings_octets(constant_time=False))


def server_id(native: Native, config: CidConfig, cid: bytes) -> bytes:
    return native.ask(b"c", cid_config(config), cid.ljust(CID, b"\xa5")[:CID])


@given(BLOCKS, BLOCKS)
def test_blocks_are_encrypted_and_decrypted_as_by_everybody_else(native: Native, key: bytes, block: bytes) -> None:
    ecb = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305
    encrypted, decrypted = ecb.encryptor().update(block), ecb.decryptor().update(block)

    assert native.ask(b"e", encrypt_schedule(key), block) == encrypted
    assert native.ask(b"d", decrypt_schedule(key), block) == decrypted
    assert native.ask(b"E", sliced_schedule(key), block) == encrypted
    assert native.ask(b"D", sliced_schedule(key), block) == decrypted


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["id"])
def test_a_vector_decodes(native: Native, vector: dict[str, Any]) -> None:
    assert server_id(native, vector_config(vector), bytes.fromhex(vector["cid"])) == bytes.fromhex(
        vector["server_id"]
    ).ljust(16, b"\0")


@pytest.mark.parametrize("is_keyed", [False, True], ids=["plaintext", "keyed"])
@pytest.mark.parametrize(("server_id_length", "nonce_length"), LENGTH_PAIRS)
@hypothesis_settings(max_examples=8)
@given(data=st.data())
def test_every_configuration_decodes_as_in_python(
    native: Native, server_id_length: int, nonce_length: int, is_keyed: bool, data: st.DataObject
) -> None:
    """Any octets, made by a server or not: Python says what they decode to, and what is behind them does not count."""
    key = data.draw(BLOCKS, "key") if is_keyed else None
    config = CidConfig(ConfigId(0), server_id_length, nonce_length, key)
    octets = data.draw(st.binary(min_size=CID, max_size=CID), "octets")
    decoded = Codec(config).decode(bytes([octets[0] & 0x1F]) + octets[1:])
    assert decoded is not None

    assert server_id(native, config, octets) == decoded.server_id.ljust(16, b"\0")
    assert server_id(native, config, octets[: config.cid_length]) == decoded.server_id.ljust(16, b"\0")


@given(
    lengths=st.sampled_from(LENGTH_PAIRS),
    key=st.none() | BLOCKS,
    plaintext=st.binary(min_size=19, max_size=19),
    appended=st.binary(max_size=14),
)
def test_what_python_encodes_decodes(
    native: Native, lengths: tuple[int, int], key: bytes | None, plaintext: bytes, appended: bytes
) -> None:
    border, end = lengths[0], sum(lengths)
    appended = appended[: CID - 1 - end]
    config = CidConfig(ConfigId(3), *lengths, key, appended_length=len(appended))
    cid = Codec(config).encode(plaintext[:border], plaintext[border:end], appended=appended)

    assert server_id(native, config, cid) == plaintext[:border].ljust(16, b"\0")
