"""What is built: a wheel carries the program, as object and as source."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.xdp import bpf

SOURCES = sorted((bpf.ROOT / "lb/xdp/bpf").glob("*.[ch]"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, from a copy: building leaves things behind."""
    reason = bpf.not_built()
    if reason:
        pytest.skip(reason)
    home = tmp_path_factory.mktemp("wheel")
    tree = home / "tree"
    shutil.copytree(bpf.ROOT / "lb", tree / "lb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(bpf.ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check"]
    if int(version("setuptools").partition(".")[0]) >= 77:  # what pyproject.toml requires; else pip finds one
        pip += ["--no-build-isolation", "--no-index"]
    build = subprocess.run([*pip, "--wheel-dir", home, tree], capture_output=True, text=True, check=False)
    assert not build.returncode, build.stdout + build.stderr
    (made,) = home.glob("quiclb-*.whl")
    return made


def test_a_wheel_carries_the_program(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        for path in (*(bpf.ROOT / "lb/xdp").glob("*.bpf.o"), *SOURCES):
            assert packed.read(str(path.relative_to(bpf.ROOT))) == path.read_bytes()
    assert {"lb/xdp/quiclb.bpf.o", "lb/xdp/decap.bpf.o"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "backend/", "bench/"))]
    assert len(names) == len(set(names))


def test_an_object_is_as_new_as_its_sources() -> None:
    """The build sees a change, and leaves alone what is up to date."""
    reason = bpf.not_built()
    if reason:
        pytest.skip(reason)
    objects = sorted((bpf.ROOT / "lb/xdp").glob("*.bpf.o"))
    before = [path.stat().st_mtime_ns for path in objects]
    assert min(before) >= max(path.stat().st_mtime_ns for path in SOURCES)
    assert bpf.not_built() is None
    assert [path.stat().st_mtime_ns for path in objects] == before
