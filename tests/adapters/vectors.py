"""What every adapter has to compute as `lb` does: connection IDs, reset tokens, names of nonce spaces, hidden counters.

`python -m tests.adapters.vectors` writes tests/data/adapter-vectors.json. The connection IDs are those of the
independent codecs behind test-vectors.json and extra-vectors.json, and one more for every pair of lengths; the rest is
what `lb` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from lb.cid import MAX_ROUTING_BLOCK, MIN_NONCE_LENGTH, CidConfig, Codec, ConfigId, FourPass, ServerId
from lb.generator import _identity
from lb.reset import reset_token

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "adapter-vectors.json"
SEED = 5


def adapter_vectors() -> dict[str, list[dict[str, Any]]]:
    """The whole file. Octet strings are lower-case hex digits."""
    random = Random(SEED)
    cids = [*_published(), *_independent(), *_every_length(random)]
    return {
        "cids": cids,
        "tokens": [_token(random, length) for length in range(1, 21)],
        "identities": [_space(cid) for cid in cids[:: len(cids) // 40]],
        "permutations": [_permutation(random, length) for length in range(MIN_NONCE_LENGTH, MAX_ROUTING_BLOCK)],
    }


def text() -> str:
    """What the file holds."""
    lists = (
        f'"{name}": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"
        for name, entries in adapter_vectors().items()
    )
    return "{\n" + ",\n".join(lists) + "\n}\n"


def _published() -> Iterator[dict[str, Any]]:
    """The standard's own, in their usable form."""
    for vector in json.loads((DATA / "test-vectors.json").read_text())["quic_lb_vectors"]:
        if "usable" in vector:
            yield _cid(vector["usable"])


def _independent() -> Iterator[dict[str, Any]]:
    for vector in json.loads((DATA / "extra-vectors.json").read_text())["vectors"]:
        yield _cid(vector)


def _cid(vector: dict[str, Any]) -> dict[str, Any]:
    cid = bytes.fromhex(vector["cid"])
    block_end = 1 + vector["server_id_len"] + vector["nonce_len"]
    return {
        "config_id": vector["config_id"],
        "key": vector["key"],
        "server_id": vector["server_id"],
        "nonce": vector["nonce"],
        "encodes_length": vector["length_self_encoded"] and cid[0] & 31 == len(cid) - 1,
        "low_bits": cid[0] & 31,
        "appended": cid[block_end:].hex(),
        "cid": vector["cid"],
    }


def _every_length(random: Random) -> Iterator[dict[str, Any]]:
    """One for every pair of lengths that the standard allows, with and without a key, appended octets and length."""
    for block in range(1 + MIN_NONCE_LENGTH, MAX_ROUTING_BLOCK + 1):
        for server_id_length in range(1, block - MIN_NONCE_LENGTH + 1):
            config = CidConfig(
                config_id=ConfigId(random.randrange(7)),
                server_id_length=server_id_length,
                nonce_length=block - server_id_length,
                key=random.randbytes(16) if random.random() < 0.8 else None,
                encodes_length=random.random() < 0.5,
                appended_length=random.randint(0, 19 - block),
            )
            server_id, nonce = random.randbytes(server_id_length), random.randbytes(config.nonce_length)
            low_bits, appended = random.randrange(32), random.randbytes(config.appended_length)
            yield {
                "config_id": config.config_id,
                "key": config.key.hex() if config.key else None,
                "server_id": server_id.hex(),
                "nonce": nonce.hex(),
                "encodes_length": config.encodes_length,
                "low_bits": low_bits,
                "appended": appended.hex(),
                "cid": Codec(config).encode(server_id, nonce, low_bits=low_bits, appended=appended).hex(),
            }


def _token(random: Random, length: int) -> dict[str, Any]:
    key, cid = random.randbytes(32), random.randbytes(length)
    return {"key": key.hex(), "cid": cid.hex(), "token": reset_token(key, cid).hex()}


def _space(cid: dict[str, Any]) -> dict[str, Any]:
    """The name under which a nonce file keeps a key's and server ID's mark."""
    key, server_id = cid["key"], bytes.fromhex(cid["server_id"])
    nonce_length = len(cid["nonce"]) // 2
    config = CidConfig(cid["config_id"], len(server_id), nonce_length, bytes.fromhex(key) if key else None)
    return {
        "config_id": config.config_id,
        "key": key,
        "server_id": cid["server_id"],
        "nonce_length": nonce_length,
        "identity": _identity(config, ServerId(server_id)),
    }


def _permutation(random: Random, length: int) -> dict[str, Any]:
    """A plaintext nonce: the counter through the four passes, under the key that the nonce file keeps with it."""
    key, counter = random.randbytes(16), random.randbytes(length)
    return {"key": key.hex(), "counter": counter.hex(), "nonce": FourPass(key, length).encrypt(counter).hex()}


if __name__ == "__main__":
    FILE.write_text(text())
