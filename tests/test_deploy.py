"""deploy/: what is shipped there fits the command that it starts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lb.cli import main
from tests.files import write_key

SYSTEMD = Path(__file__).parent.parent / "deploy" / "systemd"
UNIT, FOR_XDP = SYSTEMD / "quiclb.service", SYSTEMD / "xdp.conf"


def directives(path: Path = UNIT) -> dict[str, str]:
    lines = (line for line in path.read_text().splitlines() if line and line[0] not in "#[")
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_keeps_return_paths_over_a_restart() -> None:
    unit = directives()

    assert (unit["RuntimeDirectory"], unit["RuntimeDirectoryPreserve"], unit["Restart"]) == ("quiclb", "yes", "always")


@pytest.mark.parametrize(
    ("path", "directive"), [(UNIT, "ExecStartPre"), (UNIT, "ExecStart"), (FOR_XDP, "ExecStartPre")]
)
def test_the_units_commands_are_understood(
    path: Path, directive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a file of mistakes in the place of the real one, all say what is wrong with it, and status 2."""
    command = shlex.split(directives(path)[directive])
    assert command[:2] == ["/usr/bin/env", "quiclb"]
    mistaken = write_key(tmp_path / "quiclb.yaml", "colour: blue")

    assert main([word.replace("/etc/quiclb/quiclb.yaml", str(mistaken)) for word in command[2:]]) == 2
    assert "colour: unknown key" in capsys.readouterr().err
