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
    files: Callable[[], Iterable[Path]], changed: Callable[[], Awaitable[None]], *, interval: float = INTERVAL
) -> None:
    """Call `changed` whenever any of the files has changed and then stayed as it is for one interval. Never returns.

    `files` is asked at every look: a new configuration may name other keys.
    """
    loop = asyncio.get_running_loop()
    paths = list(files())
    known = before = await loop.run_in_executor(None, signature, paths)
    while True:
        await asyncio.sleep(interval)
        found = await loop.run_in_executor(None, signature, paths)
        if found != known and found == before:
            await changed()
            paths = list(files())
            known = found = await loop.run_in_executor(None, signature, paths)
        before = found
