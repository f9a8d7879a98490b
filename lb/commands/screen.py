"""The terminal that a command is started in: how wide it is, whether it has colours; and all of it, for `top`."""

from __future__ import annotations

import functools
import os
import select
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from lb.commands.arguments import terminate
from lb.terminal import Paint

# ECMA-48 and xterm's.
ALTERNATE, NORMAL = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # and without a cursor, or with one
HOME, END_OF_LINE, END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
# Ours.
MIN_WIDTH = 40


def paint() -> Paint:
    """Colours where somebody sees them and has not said no: https://no-color.org"""
    return Paint(is_on=sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not _is_dumb())


def width() -> int:
    """Columns that a line may take; without bounds where no terminal shows it."""
    return max(shutil.get_terminal_size().columns, MIN_WIDTH) if sys.stdout.isatty() else sys.maxsize


def is_there() -> bool:
    """Whether there is a whole terminal to take."""
    return sys.stdin.isatty() and sys.stdout.isatty() and not _is_dumb()


def show(lines: Sequence[str]) -> None:
    """Put these lines, as many as there is room for, in the place of what is on the screen."""
    sys.stdout.write(HOME + f"{END_OF_LINE}\n".join(lines) + END_OF_LINE + END_OF_SCREEN)
    sys.stdout.flush()


@contextmanager
def whole() -> Iterator[Callable[[float], bytes | None]]:
    """The whole terminal, keys as they are pressed, and everything as it was afterwards."""
    keyboard = sys.stdin.fileno()
    was = termios.tcgetattr(keyboard)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    woken = signal.signal(signal.SIGWINCH, functools.partial(_wake, writer))
    ended = signal.signal(signal.SIGTERM, terminate)
    try:
        tty.setcbreak(keyboard)
        attributes = termios.tcgetattr(keyboard)
        attributes[6][termios.VSUSP] = b"\0"  # whoever stopped us would find a shell on our screen
        termios.tcsetattr(keyboard, termios.TCSADRAIN, attributes)
        sys.stdout.write(ALTERNATE)
        yield functools.partial(_wait, keyboard, reader)
    finally:
        sys.stdout.write(NORMAL)
        sys.stdout.flush()
        termios.tcsetattr(keyboard, termios.TCSAFLUSH, was)
        signal.signal(signal.SIGTERM, ended)
        signal.signal(signal.SIGWINCH, woken)
        os.close(reader)
        os.close(writer)


def _wait(keyboard: int, reader: int, seconds: float) -> bytes | None:
    ready, _, _ = select.select([keyboard, reader], [], [], seconds)
    if reader in ready:
        os.read(reader, 64)
    return os.read(keyboard, 1) if keyboard in ready else None


def _wake(writer: int, *_: object) -> None:
    with suppress(BlockingIOError):  # full: it will wake all the same
        os.write(writer, b"\0")


def _is_dumb() -> bool:
    return os.environ.get("TERM", "dumb") == "dumb"
