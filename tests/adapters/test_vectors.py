"""The file that adapters are held to is what `lb` and the published vectors say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lb.cid import CidConfig, Codec
from tests.adapters import vectors

VECTORS: dict[str, Any] = json.loads(vectors.FILE.read_text())


def test_the_file_is_what_the_script_makes() -> None:
    assert vectors.FILE.read_text() == vectors.text(), "run `python -m tests.adapters.vectors`"


@pytest.mark.parametrize("vector", VECTORS["cids"], ids=lambda vector: vector["cid"])
def test_connection_ids_of_the_file_are_those_of_our_codec(vector: dict[str, Any]) -> None:
    server_id, nonce, appended = (bytes.fromhex(vector[name]) for name in ("server_id", "nonce", "appended"))
    codec = Codec(
        CidConfig(
            config_id=vector["config_id"],
            server_id_length=len(server_id),
            nonce_length=len(nonce),
            key=bytes.fromhex(vector["key"]) if vector["key"] else None,
            encodes_length=vector["encodes_length"],
            appended_length=len(appended),
        )
    )
    cid = bytes.fromhex(vector["cid"])
    assert codec.encode(server_id, nonce, low_bits=vector["low_bits"], appended=appended) == cid
    assert codec.decode(cid) == (server_id, nonce)


def test_the_file_has_every_pair_of_lengths_and_every_algorithm() -> None:
    pairs = {(len(vector["server_id"]) // 2, len(vector["nonce"]) // 2) for vector in VECTORS["cids"]}
    assert pairs == {(s, n) for s in range(1, 16) for n in range(4, 19) if s + n <= 19}
    kinds = {(vector["key"] is None, len(vector["server_id"] + vector["nonce"]) == 32) for vector in VECTORS["cids"]}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
    assert any(vector["appended"] for vector in VECTORS["cids"])
    assert any(not vector["encodes_length"] for vector in VECTORS["cids"])
