"""Configuration files and keys for tests, made anew in a temporary directory each time."""

from __future__ import annotations

import shutil
from pathlib import Path

from lb.cli import main

EXAMPLES = Path(__file__).parent.parent / "config"

CID_KEY = "8f95f09245765f80256934e50c66207f"
OTHER_CID_KEY = "fdf726a9893ec05c0632d3956680baf0"
RESET_KEY = "a0" * 32
OTHER_RESET_KEY = "b1" * 32


def write_key(path: Path, digits: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(digits + "\n")
    path.chmod(mode)
    return path


def write_keys(directory: Path) -> None:
    """The key files that the examples name, in `directory`/secrets."""
    for name, digits in {
        "cid-0.key": CID_KEY,
        "cid-1.key": OTHER_CID_KEY,
        "reset-0.key": RESET_KEY,
        "reset-1.key": OTHER_RESET_KEY,
    }.items():
        write_key(directory / "secrets" / name, digits)


def examples(directory: Path) -> Path:
    """A copy of config/ with keys as the comments in it tell to make them."""
    shutil.copytree(EXAMPLES, directory, dirs_exist_ok=True)
    secrets = directory / "secrets"
    secrets.mkdir()
    for i in (0, 1):
        assert main(["keygen", "cid", "-o", f"{secrets}/cid-{i}.key"]) == 0
        assert main(["keygen", "reset", "-o", f"{secrets}/reset-{i}.key"]) == 0
    ours = ["--config-id", "0", "--server-id", "3fa91c02", "-o", f"{secrets}/reset-a.key"]
    assert main(["keygen", "server-reset", "--master", f"{secrets}/reset-0.key", *ours]) == 0
    return directory
