"""The C headers as an ordinary program (native.c): how it is built, and Python's end of its pipes."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

HEADERS = Path(__file__).parents[3] / "lb" / "xdp" / "bpf"
SOURCE = Path(__file__).parent / "native.c"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing")
# Parts of the program that are not used here, and what is for clang only.
LEFT_OUT = ("-Wno-unused-function", "-Wno-unknown-pragmas", "-ffunction-sections", "-Wl,--gc-sections")


def compile_c(source: Path, executable: Path, *flags: str) -> Path:
    """An executable with our headers. What the compiler says fails the test."""
    command = ["gcc", *FLAGS, *LEFT_OUT, *flags, "-I", str(HEADERS), str(source), "-o", str(executable)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}:\n{done.stderr}")
    return executable


class Native:
    """The running program. It ends at the first thing that a sanitizer dislikes, and then so does the test."""

    def __init__(self, executable: Path, said: Path) -> None:
        self._said = said
        with said.open("wb") as errors:
            self._process = subprocess.Popen(
                [executable],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Looking for leaks takes ptrace, which containers may refuse.
                env={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
            )

    def __enter__(self) -> Native:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def ask(self, kind: bytes, *octets: bytes) -> bytes:
        """The answer to one request: a letter of `serve` in native.c, and what it takes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = b"".join(octets)
        try:
            self._process.stdin.write(kind + struct.pack("I", len(request)) + request)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        length = self._process.stdout.read(4)
        if len(length) < 4:
            self._fail()
        return self._process.stdout.read(*struct.unpack("I", length))

    def _fail(self) -> None:
        status = self._process.wait()
        pytest.fail(f"the program ended with status {status}:\n{self._said.read_text()}")
