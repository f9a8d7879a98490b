"""xdp/bpf/sha256.h and token.h against lb/reset_scheme.py."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.reset_scheme import Arithmetic, TokenKey, haproxy, hmac_sha256, mvfst, nginx, picoquic
from lb.xdp.image import token_key
from lb.xdp.layout import RESET_KEY
from tests.reset_vectors import VECTORS, Vector
from tests.xdp.native.program import Native

SECRETS = st.binary(min_size=32, max_size=32)
CIDS = st.binary(min_size=1, max_size=20)
ADDRESSES = st.ip_addresses().map(str)
KEYS = st.one_of(
    st.builds(hmac_sha256, SECRETS),
    st.builds(haproxy, st.binary(min_size=8, max_size=100)),
    st.builds(nginx, st.binary(min_size=16, max_size=100), st.none() | st.integers(0, 1023)),
    st.builds(mvfst, SECRETS, ADDRESSES),
    st.builds(picoquic, st.binary(min_size=16, max_size=16)),
    # As long as there is room for.
    st.builds(TokenKey, st.just(Arithmetic.HMAC), SECRETS, st.binary(max_size=40)),
    st.builds(TokenKey, st.just(Arithmetic.HKDF), st.binary(max_size=55), st.binary(max_size=40)),
    st.builds(TokenKey, st.just(Arithmetic.HASH), st.binary(max_size=34)),
)
TOKEN = 16


def token(native: Native, key: bytes, cid: bytes, behind: bytes = b"") -> tuple[bytes, bytes]:
    """The token, and the reset key as the program leaves it; `behind` is what follows the CID."""
    answer = native.ask(b"t", key, struct.pack("I", len(cid)), (cid + behind).ljust(20, b"\0")[:20])
    return answer[:TOKEN], answer[TOKEN:]


@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_the_tokens_of_other_peoples_servers(native: Native, vector: Vector) -> None:
    assert token(native, token_key(vector.token_key), vector.cid, b"\xff" * 20)[0] == vector.token


@given(KEYS, st.binary(min_size=20, max_size=20))
def test_tokens_of_cids_of_every_length(native: Native, key: TokenKey, octets: bytes) -> None:
    fresh = token_key(key)
    for length in range(1, 21):
        assert token(native, fresh, octets[:length], octets[length:])[0] == key.token(octets[:length])


@given(SECRETS, st.binary(max_size=40), CIDS, CIDS)
def test_what_is_kept_of_a_key_makes_the_same_tokens_without_it(
    native: Native, secret: bytes, suffix: bytes, first: bytes, second: bytes
) -> None:
    key = TokenKey(Arithmetic.HMAC, secret, suffix)
    fresh = token_key(key)
    made, kept = token(native, fresh, first)
    prepared = RESET_KEY.unpack(kept)
    without_key = RESET_KEY.pack(prepared._replace(key=bytes(56)))

    assert made == key.token(first)
    assert (prepared.key[:32], prepared.is_prepared) == (secret, 1)
    assert token(native, without_key, second) == (key.token(second), without_key)
    assert token(native, fresh, second)[1] == kept


@given(KEYS.filter(lambda key: key.arithmetic is not Arithmetic.HMAC), CIDS)
def test_of_other_keys_nothing_is_kept(native: Native, key: TokenKey, cid: bytes) -> None:
    assert token(native, token_key(key), cid)[1] == token_key(key)
