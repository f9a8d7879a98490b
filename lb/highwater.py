"""Nonce marks in one small file, so that a restarted server repeats no nonce.

The file is written whole and renamed into place, and belongs to one process at a time. It names no key and no
server ID, but holds the keys that hide plaintext counters: mode 0600.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from pathlib import Path
from threading import Lock
from typing import Any

from lb.errors import QuicLbError
from lb.generator import NonceMark

FORMAT = "quiclb nonce marks 1"
LARGEST = 16 << 20  # octets, about a hundred thousand marks
_PRIVATE = 0o600


class HighWaterFile:
    """`Marks` that live in the file `path`; a file `path`.lock beside it is held as long as this is open.

    No file is a fresh start. Raises QuicLbError if another process has it, if others may read it, or if it is
    damaged: what is lost cannot be guessed. May be shared between threads, not across fork().
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._thread = Lock()
        self._claimed: set[str] = set()
        self._lock: int | None = self._open_lock()
        try:
            self._marks = self._read()
        except BaseException:
            self.close()
            raise

    def load(self, identity: str) -> NonceMark | None:
        with self._thread:
            if identity in self._claimed:
                raise QuicLbError(f"{self.path}: nonces {identity} already have a generator in this process; share it")
            self._claimed.add(identity)
            return self._marks.get(identity)

    def save(self, identity: str, mark: NonceMark) -> None:
        with self._thread:
            if self._lock is None:
                raise OSError(errno.EBADF, "closed", str(self.path))
            marks = {**self._marks, identity: mark}
            self._write(_dump(marks))
            self._marks = marks

    def close(self) -> None:
        """Let another process have the file. Nothing can be saved afterwards."""
        with self._thread:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> HighWaterFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_lock(self) -> int:
        # The marks' own inode changes with every rename, so the lock is on a file that stays. It is never
        # removed: whoever removes a lock file lets a third process lock another one of the same name.
        path = f"{self.path}.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, _PRIVATE)
        except OSError as error:
            raise QuicLbError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno != errno.EWOULDBLOCK:
                raise QuicLbError(f"{path}: {error.strerror}") from error
            raise QuicLbError(
                f"{self.path}: in use by another process; every process needs a nonce file and server IDs of its own"
            ) from None
        return lock

    def _read(self) -> dict[str, NonceMark]:
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise QuicLbError(f"{self.path}: {error.strerror}") from error
        try:
            mode = os.fstat(file).st_mode
            if not stat.S_ISREG(mode):
                raise QuicLbError(f"{self.path}: expected a regular file")
            if mode & 0o077:
                raise QuicLbError(f"{self.path}: mode {mode & 0o777:04o}, expected 0600; it holds secrets")
            with open(file, "rb", closefd=False) as stream:
                content = stream.read(LARGEST + 1)
        except OSError as error:
            raise QuicLbError(f"{self.path}: {error.strerror}") from error
        finally:
            os.close(file)
        try:
            return _parse(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # Not `from` the reason: it may quote what it choked on, which may be a key.
            raise QuicLbError(
                f"{self.path}: damaged, so that it no longer says which nonces are spent. Restore the newest copy of "
                "it, or give this server new server IDs (or new keys) and then delete it"
            ) from None

    def _write(self, content: bytes) -> None:
        temporary = f"{self.path}.new"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, _PRIVATE)
        with open(file, "wb") as stream:
            os.fchmod(file, _PRIVATE)  # whatever a leftover had
            stream.write(content)
            stream.flush()
            os.fsync(file)
        os.rename(temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _dump(marks: dict[str, NonceMark]) -> bytes:
    table = {
        identity: {
            "start": mark.start,
            "reserved": mark.reserved,
            "permutation_key": mark.permutation_key.hex(),
        }
        for identity, mark in sorted(marks.items())
    }
    document = {"format": FORMAT, "sha256": _digest(table), "marks": table}
    return json.dumps(document, indent=1).encode() + b"\n"


def _parse(content: bytes) -> dict[str, NonceMark]:
    """The marks of a file. Raises one of many exceptions, all of which mean that it is not one of ours."""
    if len(content) > LARGEST:
        raise ValueError("too long")
    document = json.loads(content)
    table = document["marks"]
    if document["format"] != FORMAT or document["sha256"] != _digest(table):
        raise ValueError("another format, or damaged")
    return {identity: _mark(**fields) for identity, fields in table.items()}


def _mark(start: int, reserved: int, permutation_key: str) -> NonceMark:
    if type(start) is not int or type(reserved) is not int:
        raise TypeError("start and reserved are integers")
    return NonceMark(start, reserved, bytes.fromhex(permutation_key))


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
