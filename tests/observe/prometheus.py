"""Programs of Debian's package prometheus; tests that need them are skipped where they are not."""

from __future__ import annotations

import pytest

from bench.prometheus import find


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`."""
    found = find(name)
    if found is None:
        pytest.skip(f"{name} (of Debian's prometheus) is not installed")
    return found


def promtool() -> str:
    return program("promtool")
