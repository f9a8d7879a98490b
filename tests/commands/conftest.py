"""The command, called as a function, and a balancer that is a fake one behind the real API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from lb.cli import main
from tests.admin.fake import Running, running

Quiclb: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No balancer is found by default, whatever runs on this machine."""
    monkeypatch.delenv("QUICLB_ADMIN", raising=False)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "nowhere"))


@pytest.fixture
def quiclb(capsys: pytest.CaptureFixture[str]) -> Quiclb:
    """Exit status, standard output and standard error of a command."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as done:
            status = int(str(done.code))
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def balancer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Where commands find it by default, with packets already. Its clock moves with `tick` only."""
    path = tmp_path / "run" / "admin.sock"
    path.parent.mkdir(mode=0o700)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(path.parent))
    with running(addresses=[path]) as made:
        for _ in range(5):
            made.balancer.tick()
        yield made
