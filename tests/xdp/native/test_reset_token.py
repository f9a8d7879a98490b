"""xdp/bpf/sha256.h and token.h against lb/reset.py and `hashlib`."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from lb.reset import reset_token
from lb.xdp.layout import RESET_KEY, ResetKey
from tests.xdp.native.program import Native

KEYS = st.binary(min_size=32, max_size=32)
CIDS = st.binary(min_size=1, max_size=20)
TOKEN = 16


def token(native: Native, key: bytes, cid: bytes, behind: bytes = b"") -> tuple[bytes, bytes]:
    """The token, and the reset key as the program leaves it; `behind` is what follows the CID."""
    answer = native.ask(b"t", key, struct.pack("I", len(cid)), (cid + behind).ljust(20, b"\0")[:20])
    return answer[:TOKEN], answer[TOKEN:]


@given(KEYS, st.binary(min_size=20, max_size=20))
def test_tokens_of_cids_of_every_length(native: Native, key: bytes, octets: bytes) -> None:
    fresh = RESET_KEY.pack(ResetKey(key))
    for length in range(1, 21):
        assert token(native, fresh, octets[:length], octets[length:])[0] == reset_token(key, octets[:length])


@given(KEYS, CIDS, CIDS)
def test_what_is_kept_of_a_key_makes_the_same_tokens_without_it(
    native: Native, key: bytes, first: bytes, second: bytes
) -> None:
    fresh = RESET_KEY.pack(ResetKey(key))
    made, kept = token(native, fresh, first)
    prepared = RESET_KEY.unpack(kept)
    without_key = RESET_KEY.pack(prepared._replace(key=bytes(32)))

    assert made == reset_token(key, first)
    assert (prepared.key, prepared.is_prepared) == (key, 1)
    assert token(native, without_key, second) == (reset_token(key, second), without_key)
    assert token(native, fresh, second)[1] == kept
