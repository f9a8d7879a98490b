"""Network namespaces for tests: named for the process that runs them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from backend.demo import namespaces as demo
from backend.demo.namespaces import HOME, IP, inside, ip, missing, sysctl

__all__ = ["HOME", "IP", "inside", "ip", "missing", "namespaces", "sysctl"]


@contextlib.contextmanager
def namespaces(*names: str) -> Iterator[tuple[str, ...]]:
    """Namespaces of these names and of this process, each with a loopback interface; gone after the block."""
    full = tuple(f"quiclb-test-{os.getpid()}-{name}" for name in names)
    with demo.namespaces(*full):
        yield full
