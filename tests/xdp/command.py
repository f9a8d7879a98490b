"""The command as a process, in a network namespace."""

from __future__ import annotations

import subprocess
import sys

from tests.namespaces import inside


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "lb", *map(str, argv)]


def quiclb(namespace: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    with inside(namespace):
        return subprocess.run(command(*argv), capture_output=True, text=True, check=False, timeout=60)


def begin(namespace: str, *argv: object) -> subprocess.Popen[bytes]:
    """A command that goes on. Nothing of what it prints is held back by a buffer of ours."""
    with inside(namespace):
        return subprocess.Popen(command(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
