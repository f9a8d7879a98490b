"""The program, built and started once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from lb.xdp.aes128 import tables
from tests.xdp.native.program import SANITIZERS, SOURCE, Native, compile_c


@pytest.fixture(scope="session")
def gcc() -> str:
    """A compiler with sanitizers."""
    found = shutil.which("gcc")
    if found is None:
        pytest.skip("no gcc, which compiles the C headers for this machine")
    return found


@pytest.fixture(scope="session")
def native(gcc: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Native]:
    build = tmp_path_factory.mktemp("native")
    with Native(compile_c(SOURCE, build / "native", *SANITIZERS), build / "said") as program:
        program.ask(b"A", tables())
        yield program
