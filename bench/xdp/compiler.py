"""Compiles BPF programs as .ci/build-bpf does: with clang, or else with the one inside ziglang."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.machine import BUILD

HERE = Path(__file__).parent
HEADERS = HERE.parents[1] / "lb" / "xdp" / "bpf"
HARNESS = HERE / "harness.bpf.c"

_CLANG = os.environ.get("CLANG", "clang")
_FLAGS = ("-O2", "-g", "-target", "bpf", "-mcpu=v3")


class CompilerError(Exception):
    """There is no compiler for BPF, or it did not like the source; the text is its own."""


def is_there() -> bool:
    return shutil.which(_CLANG) is not None or _zig() is not None


def compile_bpf(source: Path, program: Path, flags: Sequence[str] = ()) -> Path:
    """Compile `source` into the object file `program`, and return that."""
    command = [*_compiler(), *_FLAGS, *flags, f"-I{HEADERS}", *_system_headers(), "-c", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilerError(f"{source.name}: {done.stderr.strip()}")
    return program


def harness(directory: Path = BUILD) -> Path:
    """The object file of harness.bpf.c, compiled if it is out of date."""
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "harness.bpf.o"
    newest = max(path.stat().st_mtime for path in (HARNESS, HEADERS / "bpf.h"))
    if not program.exists() or program.stat().st_mtime < newest:
        compile_bpf(HARNESS, program, ("-Wall", "-Wextra", "-Werror"))
    return program


def _compiler() -> list[str]:
    if shutil.which(_CLANG):
        return [_CLANG]
    if zig := _zig():
        return [str(zig / "zig"), "clang"]
    raise CompilerError("it needs clang, or the package ziglang")


def _system_headers() -> list[str]:
    if shutil.which(_CLANG):
        # Where Debian keeps what differs between machines; a compiler for bpf does not look there.
        return ["-idirafter", f"/usr/include/{platform.machine()}-linux-gnu"]
    include = f"{_zig()}/lib/libc/include"
    return ["-isystem", f"{include}/any-linux-any", "-isystem", f"{include}/x86-linux-any"]


def _zig() -> Path | None:
    found = importlib.util.find_spec("ziglang")
    return Path(found.origin).parent if found and found.origin else None
