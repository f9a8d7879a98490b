"""Upgrade: a process starts its own successor, from what is installed now, and waits until it balances."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

READY_DESCRIPTOR = "QUICLB_READY_FD"  # environment: where a successor says that it is ready
PATIENCE = 60.0  # seconds that it may take
_READY = b"ready\n"


async def start_successor(config: Path, *, watch: bool, patience: float = PATIENCE) -> int:
    """Start `quiclb run --take-over` and wait for it. Returns its process ID.

    Raises OSError if it ends, or is not ready in time; in that case it is ended.
    """
    if os.getpid() == 1:
        raise OSError("this is process 1 of a container, which ends with it: replace the container")
    reading, writing = os.pipe()
    command = [sys.executable, "-P", "-m", "lb", "run", "--config", str(config), "--take-over"]
    command += ["--watch"] if watch else []
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb")
    )
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[writing],
                env=os.environ | {READY_DESCRIPTOR: str(writing)},
            )
        finally:
            os.close(writing)
        try:
            async with asyncio.timeout(patience):
                said = await reader.read(len(_READY))
                if said == _READY:
                    return process.pid
                status = await process.wait()
        except asyncio.CancelledError:  # we are told to stop: it is not to go on in our place
            _kill(process)
            raise
        except TimeoutError:
            _kill(process)
            await process.wait()
            raise OSError(f"the successor was not ready within {patience:.0f} seconds") from None
        raise OSError(f"the successor ended with status {status}; its log says why")
    finally:
        transport.close()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def say_ready() -> None:
    """Tell the predecessor, if one started this process, that it may end. Once."""
    descriptor = os.environ.pop(READY_DESCRIPTOR, None)
    if descriptor is None:
        return
    # It may be gone, or that was never a descriptor.
    with contextlib.suppress(OSError, ValueError), open(int(descriptor), "wb") as pipe:
        pipe.write(_READY)
