"""New keys and server IDs, and the files they go into."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from pathlib import Path

from lb.cid import KEY_LENGTH, ServerId
from lb.keyfile import MAX_TOKEN_KEYS, TOKEN_KEY_LENGTH, read_token_keys
from lb.keys import MAX_SERVER_IDS
from lb.reset_scheme import USUAL_RULE, ResetRule

MAX_SERVER_ID_LENGTH = 15


def cid_key() -> str:
    """A key for CIDs, 32 hex digits."""
    return secrets.token_hex(KEY_LENGTH)


def reset_key(rule: ResetRule = USUAL_RULE) -> str:
    """A balancer's key for stateless resets: 64 hex digits, unless the servers' make needs something else."""
    return rule.new_key(secrets.token_bytes).hex()


def token_key() -> str:
    """A key for the tokens and session tickets of a fleet's servers, 64 hex digits."""
    return secrets.token_hex(TOKEN_KEY_LENGTH)


def add_token_key(path: Path) -> None:
    """Put a new key second into a file of token keys: accepted by whoever reads it, and not used yet.

    The file is replaced as a whole, with the owner and mode that it has. Raises ValueError for a file that is wrong or
    full, and OSError.
    """
    keys = read_token_keys(path)
    if len(keys) == MAX_TOKEN_KEYS:
        raise ValueError(
            f"{path}: holds {MAX_TOKEN_KEYS} keys, and there can be no more: expected the last one removed"
        )
    lines = [key.hex() for key in keys]
    lines.insert(1, token_key())
    status = path.stat()
    new = path.with_name(f".{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
        new.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        raise


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
