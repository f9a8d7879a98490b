"""Watching files: whoever changes the configuration need not say so. Files are looked at, not subscribed to.

So it works with whatever replaces them: editors, configuration management, the symlinks of a mounted ConfigMap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

INTERVAL = 1.0  # seconds between looks

Signature = tuple[tuple[int, int, int] | None, ...]


def signature(paths: Iterable[Path]) -> Signature:
    """What tells versions of files apart: inode, size and time of change of each; None for one that is not there."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


async def watch(
    files: Callable[[], Iterable[Path]],
    changed: Callable[[], Awaitable[None]],
    *,
    known: Signature | None = None,
    interval: float = INTERVAL,
) -> None:
    """Call `changed` whenever any of the files has changed and then stayed as it is for one interval. Never returns.

    `known` is the signature of the files as they were read; by default, as they are now. `files` is asked again after
    each call: a new configuration may name other keys.
    """
    loop = asyncio.get_running_loop()
    paths = list(files())
    if known is None:
        known = await loop.run_in_executor(None, signature, paths)
    before = known
    while True:
        await asyncio.sleep(interval)
        found = await loop.run_in_executor(None, signature, paths)
        if found != known and found == before:
            await changed()
            # What was written since then has not been read: only files that are new to us are taken as they are now.
            seen, paths = dict(zip(paths, found, strict=True)), list(files())
            now = await loop.run_in_executor(None, signature, paths)
            known = found = tuple(seen.get(path, state) for path, state in zip(paths, now, strict=True))
        before = found
