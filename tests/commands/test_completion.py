"""Completion, by a real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.admin.fake import Running
from tests.commands.conftest import Quiclb


def completed(script: Path, directory: Path, *words: str) -> set[str]:
    """What bash would offer for the last of these words."""
    asked = """
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        _shtab_quiclb 2>/dev/null
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", asked, "bash", script, *words],
        capture_output=True, text=True, check=True, timeout=60, cwd=directory,
    )  # fmt: skip
    assert done.stderr == ""
    return {line.strip() for line in done.stdout.splitlines()} - {""}


@pytest.fixture
def script(quiclb: Quiclb, tmp_path: Path) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    status, out, err = quiclb("completion", "bash")
    assert (status, err) == (0, "")
    (tmp_path / "script").write_text(out)
    return tmp_path / "script"


def test_bash_completes_commands_options_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "quiclb.yaml").touch()
    here = tmp_path / "here"
    assert {"drain", "explain", "status"} <= completed(script, here, "quiclb", "")
    assert completed(script, here, "quiclb", "un") == {"undrain", "unfence"}
    assert completed(script, here, "quiclb", "rotation", "") >= {"status", "prepare", "activate", "retire"}
    assert completed(script, here, "quiclb", "drain", "--w") == {"--wait"}
    assert completed(script, here, "quiclb", "completion", "") == {"bash", "zsh", "tcsh"}
    assert completed(script, here, "quiclb", "check", "-c", "qu") == {"quiclb.yaml"}


def test_bash_completes_the_names_of_a_balancers_backends(script: Path, tmp_path: Path, balancer: Running) -> None:
    command = tmp_path / "quiclb"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lb "$@"\n')
    command.chmod(0o755)
    os.environ["QUICLB_ADMIN"] = f"unix:{balancer.server.addresses[0]}"
    try:
        assert completed(script, tmp_path, str(command), "drain", "") >= {"web/b0", "b3", "b4", "video/b2"}
        assert completed(script, tmp_path, str(command), "fence", "b") == {"b3", "b4"}
    finally:
        del os.environ["QUICLB_ADMIN"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_there_is_a_script_for_every_shell(quiclb: Quiclb, shell: str) -> None:
    status, out, err = quiclb("completion", shell)
    assert (status, err) == (0, "")
    assert "quiclb" in out
    assert "drain" in out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=out, text=True, check=True, timeout=60)
