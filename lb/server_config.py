"""What one server needs to be routable: the file that a backend reads.

It shares the balancer's words, but not its secrets: the reset key in it is that of the server's own ID.
"""

from __future__ import annotations

import contextlib
import stat
from dataclasses import dataclass, field
from pathlib import Path

from lb.cid import CidConfig, ServerId
from lb.document import Document, shown_file
from lb.keys import ServerKeys, read_key_file
from lb.reset import RESET_KEY_LENGTH
from lb.schema import INVALID, Reading, Record, json_schema

_NO_SERVER_ID = ServerId(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server. Without a `cid_config` it has no server ID (no octets) and issues unroutable CIDs.

    `reset_key` is the server ID's own, 32 octets. `nonce_file` keeps the high-water mark of its nonces.
    `made` says when the file was written (RFC 3339, UTC, whole seconds), None if it does not say so.
    `key_files` are those that were read with it.
    """

    name: str
    cid_config: CidConfig | None = None
    server_id: ServerId = _NO_SERVER_ID
    reset_key: bytes | None = field(default=None, repr=False)
    nonce_file: Path | None = None
    made: str | None = None
    key_files: tuple[Path, ...] = field(default=(), compare=False)


def load_server_config(path: Path) -> ServerConfig:
    """Read a server's file and the key files it names. Raises ConfigErrors with every mistake in them."""
    document = Document.of_keys(path)
    reading = Reading(document)
    _check_mode(path, reading)
    keys: ServerKeys = Record(ServerKeys).read(document.root, "", reading)
    if keys is INVALID:
        document.raise_mistakes()
    cid_config = keys.cid_config
    config = None
    files = [keys.reset_key_file]
    if cid_config is not None and cid_config is not INVALID:
        config = cid_config.cid_config("cid-config", reading)
        files.insert(0, cid_config.key_file)
        _check_server_id(keys.server_id, cid_config.server_id_length, reading)
    elif cid_config is None and keys.server_id is not None:
        reading.mistake("server-id", "a server ID without a cid-config: expected both or neither")
    reset_key = read_key_file(keys.reset_key_file, RESET_KEY_LENGTH, "reset-key-file", reading)
    document.raise_mistakes()
    return ServerConfig(
        name=keys.name,
        cid_config=config,
        server_id=keys.server_id or _NO_SERVER_ID,
        reset_key=reset_key,
        nonce_file=keys.nonce_file,
        made=keys.made,
        key_files=tuple(file for file in files if file is not None),
    )


def schema() -> str:
    """The JSON Schema of the file that `load_server_config` reads."""
    return json_schema(ServerKeys, "The configuration of one server behind quiclb")


def _check_mode(path: Path, reading: Reading) -> None:
    # Whoever writes the file says which keys are used. Reading it does no harm: it names files and holds no key.
    with contextlib.suppress(OSError):  # gone, after it was read
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & stat.S_IWOTH:
            reading.mistake(shown_file(path), f"mode {mode:04o} lets everybody write it: expected 0600 or 0640")


def _check_server_id(server_id: ServerId | None, length: int, reading: Reading) -> None:
    if server_id is None:
        reading.mistake("server-id", "missing: expected one, since there is a cid-config")
    elif server_id is not INVALID and length is not INVALID and len(server_id) != length:
        octets = "1 octet" if len(server_id) == 1 else f"{len(server_id)} octets"
        message = f"{server_id.hex()}: {octets}, but cid-config.server-id-length is {length}"
        reading.mistake("server-id", message)
