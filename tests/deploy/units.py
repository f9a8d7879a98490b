"""Unit files, read as systemd reads them: what is said twice adds up, and an empty value begins anew."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
SYSTEMD = PROJECT / "deploy" / "systemd"
UNIT, FOR_XDP, SOCKET = SYSTEMD / "quiclb.service", SYSTEMD / "xdp.conf", SYSTEMD / "quiclb.socket"

# What systemd allows in any case, that it may start the process at all.
IMPLIED = ("@default", "execve")


def missing() -> str | None:
    """Why units cannot be looked at here; None if they can."""
    return None if shutil.which("systemd-analyze") else "no systemd-analyze: install systemd"


def settings(*paths: Path) -> dict[str, list[str]]:
    """All values of each directive of some files, in their order, since it was last emptied."""
    found: dict[str, list[str]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            if not line or line[0] in "#[":
                continue
            name, _, value = line.partition("=")
            found[name] = [*found.get(name, []), value] if value else []
    return found


def words(*paths: Path, of: str) -> list[str]:
    """A directive that is a list of words."""
    return " ".join(settings(*paths).get(of, [])).split()


def system_calls(*paths: Path) -> set[str]:
    """The names of those that SystemCallFilter= leaves."""
    allowed = set().union(*(_named(name) for name in IMPLIED))
    for value in settings(*paths)["SystemCallFilter"]:
        called = set().union(*(_named(name) for name in value.removeprefix("~").split()))
        allowed = allowed - called if value.startswith("~") else allowed | called
    return allowed


@functools.cache
def _named(name: str) -> frozenset[str]:
    if not name.startswith("@"):
        return frozenset([name])
    lines = analyze("syscall-filter", name).stdout.splitlines()[1:]
    members = (line.strip() for line in lines)
    return frozenset().union(*(_named(member) for member in members if member and not member.startswith("#")))


def analyze(*arguments: str | Path, root: Path | None = None) -> subprocess.CompletedProcess[str]:
    command: Sequence[str | Path] = ["systemd-analyze", *([f"--root={root}"] if root else []), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
