"""status and top: in a pipe, in a real terminal, and when the balancer goes away."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

import pytest

from tests.admin.fake import Running
from tests.commands.conftest import Quiclb

NAMES = ["web/b0", "web/b1", "web/b2", "b3", "b4", "video/b0", "video/b1", "video/b2"]
PATIENCE = 60.0
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


class Terminal:
    """A command in a real terminal of its own, whose output and settings a test sees."""

    def __init__(
        self, *argv: str, columns: int = 80, rows: int = 24, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.ours, self.theirs = pty.openpty()
        self.resize(columns, rows)
        self.settings = termios.tcgetattr(self.theirs)
        self.output = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *argv],
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env={**os.environ, "TERM": "xterm"} | dict(environment),
            start_new_session=True,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def until(self, condition: Callable[[bytes], object]) -> None:
        """Read on until the output so far is as wanted."""
        give_up = time.monotonic() + PATIENCE
        while not condition(self.output):
            assert time.monotonic() < give_up, self.output[-2000:]
            if select.select([self.ours], [], [], 0.1)[0]:
                self.output += os.read(self.ours, 65536)

    def end(self) -> int:
        """The exit status; what is written at last is in `output`."""
        give_up = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < give_up, self.output[-2000:]
            if select.select([self.ours], [], [], 0.05)[0]:
                self.output += os.read(self.ours, 65536)
        while select.select([self.ours], [], [], 0)[0]:
            self.output += os.read(self.ours, 65536)
        return self.process.returncode

    def screens(self) -> list[list[str]]:
        """Every screen that was drawn, as lines without colours."""
        drawn = self.output.split(b"\x1b[H")[1:]
        return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.decode()).split("\r\n") for screen in drawn]


# Whoever started the tests may have them ignore interrupts. The terminal becomes the one that interrupts come from.
START = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from lb.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def where(balancer: Running) -> tuple[str, str]:
    return "--admin", f"unix:{balancer.server.addresses[0]}"


def test_status_shows_all_services_and_backends(quiclb: Quiclb, balancer: Running) -> None:
    status, out, err = quiclb("status")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert re.findall(r"^(\w+)  192", out, re.MULTILINE) == ["web", "video"]
    assert re.findall(r"^  (b\d) +(\w+)", out, re.MULTILINE) == [
        ("b0", "active"), ("b1", "active"), ("b2", "active"), ("b3", "draining"), ("b4", "down"),
        ("b0", "active"), ("b1", "active"), ("b2", "active"),
    ]  # fmt: skip


def test_status_of_one_service(quiclb: Quiclb, balancer: Running) -> None:
    assert "web  " not in quiclb("status", "--service", "video")[1]
    assert quiclb("status", "--service", "vid") == (2, "", "quiclb: --service vid: expected one of web, video\n")


def test_status_as_json_is_what_the_api_says(quiclb: Quiclb, balancer: Running) -> None:
    state = json.loads(quiclb("status", "--json", "--service", "web")[1])
    assert [backend["name"] for backend in state["services"][0]["backends"]] == ["b0", "b1", "b2", "b3", "b4"]
    assert (len(state["services"]), state["generation"], state["rights"]) == (1, 1, "write")


def test_names_are_those_that_other_commands_take(quiclb: Quiclb, balancer: Running) -> None:
    assert quiclb("status", "--names") == (0, "\n".join(NAMES) + "\n", "")
    for name in NAMES:
        assert quiclb("drain", name)[0] == 0


def test_status_in_a_terminal_has_colours_unless_told_otherwise(where: tuple[str, str]) -> None:
    with Terminal("status", *where, environment={"COLUMNS": "60"}) as terminal:
        assert terminal.end() == 0
        lines = re.sub(r"\x1b\[[0-9]*m", "", terminal.output.decode()).splitlines()
        assert b"\x1b[33mdraining" in terminal.output
        assert max(map(len, lines)) <= 60
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with Terminal("status", *where, environment={name: value}) as terminal:
            assert terminal.end() == 0
            assert b"draining" in terminal.output
            assert b"\x1b" not in terminal.output


def test_top_lives_in_a_terminal_and_leaves_it_as_it_was(where: tuple[str, str], balancer: Running) -> None:
    with Terminal("top", "--every", "200ms", *where) as terminal:
        terminal.until(lambda out: out.count(b"q: quit") >= 2)
        balancer.balancer.tick()
        terminal.until(lambda out: re.search(rb"[1-9]\S* datagrams/s: cid [1-9]", out))
        assert termios.tcgetattr(terminal.theirs) != terminal.settings
        terminal.type(b"q")
        assert terminal.end() == 0
        assert termios.tcgetattr(terminal.theirs) == terminal.settings
    assert terminal.output.startswith(ENTER)
    assert terminal.output.rstrip().endswith(LEAVE)
    for screen in terminal.screens()[:-1]:
        assert len(screen) == 24
        assert max(map(len, screen)) <= 80
        assert [name for name in NAMES if not any(line.startswith((name, f"web/{name}")) for line in screen)] == []


@pytest.mark.parametrize("size", [(40, 8), (132, 50), (20, 3)])
def test_top_follows_the_size_of_the_terminal(where: tuple[str, str], size: tuple[int, int]) -> None:
    with Terminal("top", "--every", "1h", *where) as terminal:  # so that only the size can make it draw again
        terminal.until(lambda out: b"q: quit" in out)
        terminal.resize(*size)
        terminal.until(lambda out: out.count(b"q: quit") == 2)
        terminal.type(b"q")
        assert terminal.end() == 0
        screen = terminal.screens()[1]
    assert len(screen) == size[1]
    assert max(map(len, screen)) <= size[0]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda terminal: terminal.type(b"\x03"), 130),
        (lambda terminal: terminal.process.send_signal(signal.SIGTERM), 143),
        (lambda terminal: terminal.type(b"\x04"), 0),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-D"],
)
def test_however_top_ends_the_terminal_is_restored(
    where: tuple[str, str], end: Callable[[Terminal], None], expected: int
) -> None:
    with Terminal("top", *where) as terminal:
        terminal.until(lambda out: b"q: quit" in out)
        end(terminal)
        assert terminal.end() == expected
        assert termios.tcgetattr(terminal.theirs) == terminal.settings
    assert terminal.output.rstrip().endswith(LEAVE)
    assert b"Traceback" not in terminal.output


def test_top_says_when_nobody_answers_and_goes_on_when_somebody_does(where: tuple[str, str], balancer: Running) -> None:
    path = Path(str(balancer.server.addresses[0]))
    with Terminal("top", "--every", "100ms", *where) as terminal:
        terminal.until(lambda out: b"q: quit" in out)
        path.rename(path.with_name("away"))
        terminal.until(lambda out: b"no balancer is there" in out)
        path.with_name("away").rename(path)
        so_far = len(terminal.output)
        terminal.until(lambda out: b"q: quit" in out[so_far:])
        terminal.type(b"q")
        assert terminal.end() == 0


def test_top_ends_after_as_many_looks(where: tuple[str, str]) -> None:
    with Terminal("top", "--every", "100ms", "--count", "3", *where) as terminal:
        assert terminal.end() == 0
        assert len(terminal.screens()) == 3


def test_top_without_a_balancer_leaves_the_terminal_alone(tmp_path: Path) -> None:
    with Terminal("top", "--admin", f"unix:{tmp_path}/none") as terminal:
        assert terminal.end() == 1
    assert terminal.output == f"quiclb: unix:{tmp_path}/none: no balancer is there\r\n".encode()


def test_top_needs_a_terminal_unless_it_is_to_print_json(quiclb: Quiclb, balancer: Running) -> None:
    status, out, err = quiclb("top")
    assert (status, out) == (2, "")
    assert err == "quiclb: top: expected a terminal; `quiclb status` and `quiclb top --json` need none\n"
    status, out, err = quiclb("top", "--json", "--count", "2", "--every", "100ms")
    assert (status, err) == (0, "")
    assert [len(json.loads(line)["services"]) for line in out.splitlines()] == [2, 2]


@pytest.mark.parametrize("argv", [["--every", "1"], ["--every", "0s"], ["--count", "0"], ["--count", "-1"]])
def test_wrong_arguments_of_top(quiclb: Quiclb, argv: list[str]) -> None:
    status, _, err = quiclb("top", *argv)
    assert status == 2
    assert f"argument {argv[0]}: " in err
