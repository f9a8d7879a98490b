"""New keys and server IDs, and the files they go into."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from lb.cid import KEY_LENGTH, ServerId
from lb.keys import MAX_SERVER_IDS
from lb.reset import RESET_KEY_LENGTH

MAX_SERVER_ID_LENGTH = 15


def cid_key() -> str:
    """A key for CIDs, 32 hex digits."""
    return secrets.token_hex(KEY_LENGTH)


def reset_key() -> str:
    """A master key for stateless resets, 64 hex digits."""
    return secrets.token_hex(RESET_KEY_LENGTH)


def server_ids(length: int, count: int) -> list[ServerId]:
    """`count` different random server IDs of `length` octets. Raises ValueError if there are not as many."""
    if not 1 <= length <= MAX_SERVER_ID_LENGTH:
        raise ValueError(f"--length {length}: expected 1 to {MAX_SERVER_ID_LENGTH}")
    most = min(256**length, MAX_SERVER_IDS)
    if not 1 <= count <= most:
        raise ValueError(f"--count {count}: expected 1 to {most} for server IDs of {length} octets")
    found: dict[ServerId, None] = {}
    while len(found) < count:
        found[ServerId(secrets.token_bytes(length))] = None
    return list(found)


def write(text: str, path: Path | None) -> None:
    """Write a line to standard output, or to a file that is new and the owner's alone. Raises OSError."""
    if path is None:
        sys.stdout.write(text + "\n")
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text + "\n")
