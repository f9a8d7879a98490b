"""Files that are written so that they last, and that nobody else can read halfway."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_file(path: Path, octets: bytes, *, mode: int, like: os.stat_result | None = None) -> None:
    """Write a file that was not there before, durably; with `like` for the same owner and group, where that is allowed.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        if like is not None:
            for owner, group in ((-1, like.st_gid), (like.st_uid, -1)):
                with contextlib.suppress(PermissionError):
                    os.fchown(descriptor, owner, group)
        os.fchmod(descriptor, mode)
        file.write(octets)
        file.flush()
        os.fsync(descriptor)


def sync_directory(directory: Path) -> None:
    """Have what was made and renamed in a directory outlast a crash. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
