"""tests/data/reset-vectors.json: tokens of other people's servers, and which of them are from running ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lb.reset_scheme import Keys, ResetRule, Scheme, TokenKey

FILE = Path(__file__).parent / "data" / "reset-vectors.json"


class Vector(NamedTuple):
    """One token. `rule` and `address` and `worker` are what a balancer would be told."""

    stack: str
    source: str
    rule: ResetRule
    secret: bytes
    address: str
    worker: int
    cid: bytes
    token: bytes

    def __str__(self) -> str:
        return f"{self.stack}-worker-{self.worker}-at-{self.address}-{len(self.cid)}-octets".replace(" ", "-")

    @property
    def token_key(self) -> TokenKey:
        return self.rule.token_key(self.secret, self.address, self.worker)


def _vector(given: dict[str, Any]) -> Vector:
    rule = ResetRule(Scheme(given["scheme"]), Keys.SHARED, worker_number=given.get("worker", 0) is not None)
    return Vector(
        given["stack"],
        given["source"],
        rule,
        bytes.fromhex(given["secret"]),
        given.get("address", "198.51.100.1"),
        given.get("worker") or 0,
        bytes.fromhex(given["cid"]),
        bytes.fromhex(given["token"]),
    )


VECTORS = tuple(_vector(given) for given in json.loads(FILE.read_text()))
