"""What the person who watches gets to see: a line for each event, progress while something takes long, one table."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

# Ours.
REFRESH = 0.2  # seconds between two progress lines on a terminal, one over the other
REFRESH_PLAIN = 2.0  # seconds between them elsewhere
MIN_WIDTH, MAX_WIDTH = 72, 120  # columns

_COLOURS = {"bold": "1", "dim": "2", "green": "32", "red": "31", "yellow": "33"}


@dataclass(frozen=True, slots=True)
class Row:
    """One step of the scenario. `passed` is None if it was not played; then `saw` says why."""

    title: str
    saw: str
    seconds: float
    passed: bool | None


class Report:
    """Tells on `stream`. In place and in colour on a terminal that can, line by line anywhere else."""

    def __init__(self, stream: TextIO, environment: Mapping[str, str] = os.environ) -> None:
        self.rows: list[Row] = []
        self._stream = stream
        self._is_terminal = stream.isatty() and environment.get("TERM", "dumb") != "dumb"
        self._has_colour = self._is_terminal and "NO_COLOR" not in environment
        self._width = max(MIN_WIDTH, min(MAX_WIDTH, shutil.get_terminal_size((100, 24)).columns))
        self._start = time.monotonic()

    @property
    def failed(self) -> bool:
        return any(row.passed is False for row in self.rows)

    def heading(self, text: str) -> None:
        self._line("")
        self._line(self._paint(text, "bold"))

    def say(self, text: str) -> None:
        """One event. Later lines of a long one are indented below the first."""
        stamp = f"{time.monotonic() - self._start:6.1f}s  "
        lines = [line for given in text.splitlines() for line in textwrap.wrap(given, self._width - len(stamp)) or [""]]
        for i, line in enumerate(lines):
            self._line(self._paint(stamp if i == 0 else " " * len(stamp), "dim") + line)

    @contextlib.asynccontextmanager
    async def watching(self, describe: Callable[[], str]) -> AsyncIterator[None]:
        """Show what `describe` says, again and again, as long as the block takes."""
        showing = asyncio.create_task(self._show(describe))
        try:
            yield
        finally:
            showing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await showing
            if self._is_terminal:
                self._stream.write("\r\x1b[K")
                self._stream.flush()

    def result(self, row: Row) -> None:
        """Note how a step ended, for the table."""
        self.rows.append(row)
        self.say(f"{self._verdict(row)}: {row.saw}")

    def table(self) -> None:
        """The rows, one below the other, cells wrapped to what the terminal is wide."""
        titles = ("what was done", "what the clients saw", "time", "result")
        time_width, verdict_width, gaps = 7, 7, 3 * 2
        room = self._width - time_width - verdict_width - gaps
        done_width = room * 2 // 5
        widths = (done_width, room - done_width, time_width, verdict_width)
        rule = self._paint("-" * self._width, "dim")
        self._line("")
        self._line(self._paint("  ".join(t.ljust(w) for t, w in zip(titles, widths, strict=True)).rstrip(), "bold"))
        self._line(rule)
        for row in self.rows:
            cells = [textwrap.wrap(row.title, widths[0]), textwrap.wrap(row.saw, widths[1])]
            for i in range(max(map(len, cells))):
                done, saw = (cell[i] if i < len(cell) else "" for cell in cells)
                line = f"{done:{widths[0]}}  {saw:{widths[1]}}"
                if i == 0:
                    line += f"  {row.seconds:{time_width - 2}.1f} s  {self._verdict(row)}"
                self._line(line.rstrip())
        self._line(rule)

    def _verdict(self, row: Row) -> str:
        if row.passed is None:
            return self._paint("skipped", "yellow")
        return self._paint("pass", "green") if row.passed else self._paint("FAIL", "red")

    async def _show(self, describe: Callable[[], str]) -> None:
        while True:
            await asyncio.sleep(REFRESH if self._is_terminal else REFRESH_PLAIN)
            if self._is_terminal:
                stamp = f"{time.monotonic() - self._start:6.1f}s  "
                self._stream.write("\r\x1b[K" + (stamp + "... " + describe())[: self._width - 1])
                self._stream.flush()
            else:
                self.say("... " + describe())

    def _line(self, text: str) -> None:
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
        self._stream.write(text + "\n")
        self._stream.flush()

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self._has_colour else text
