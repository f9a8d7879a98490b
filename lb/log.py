"""Logs: state changes, one line each, as `key=value` text or as JSON.

An event has a name (`backend-down`) and fields (`service=web backend=b`). Octets never reach a log, only how many
there were: what is not written cannot leak, and keys are octets.

A thread writes the lines. If nobody takes them, they wait, and those that find no room are counted and given up:
whoever moves datagrams does not wait for whoever reads logs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from enum import Enum

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

# Ours.
STDERR = 2
ROOM = 4096  # lines that may wait to be written
FLUSH_PATIENCE = 2.0  # seconds that the end of the process waits for them

# syslog's, sd-daemon(3)
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

_PLAIN = re.compile(r"[^\s\"=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # what may stand in text without quotes


def event(logger: logging.Logger, level: int, name: str, /, **fields: object) -> None:
    """Log the event `name`, in the words of the documents, with its fields. Never raises.

    A field named `time`, `level` or `event` gives way to the record's own.
    """
    logger.log(level, name, extra={"fields": fields})


def configure(format: str = "text", level: str = "info", descriptor: int = STDERR) -> None:  # noqa: A002 - the key's name
    """Send all logs of the process, other libraries' too, to `descriptor` and nowhere else.

    If that is the journal, each line begins with its priority, as sd-daemon(3) says. Raises ValueError for a format
    or a level that is not in `FORMATS` or `LEVELS`.
    """
    if format not in FORMATS:
        raise ValueError(f"log format {format!r}: expected one of {', '.join(FORMATS)}")
    if level not in LEVELS:
        raise ValueError(f"log level {level!r}: expected one of {', '.join(LEVELS)}")
    handler: logging.Handler = logging.NullHandler()
    if descriptor != STDERR or sys.__stderr__ is not None:  # started without one, that number is somebody else's
        handler = LineHandler(descriptor, with_priority=_is_journal(descriptor, os.environ.get("JOURNAL_STREAM", "")))
    handler.setFormatter(TextFormatter() if format == "text" else JsonFormatter())
    root = logging.getLogger()
    for former in root.handlers:
        if isinstance(former, LineHandler):
            former.close()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def flush() -> None:
    """Wait until everything that was logged is written, but not for long. The end of the process does it by itself."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class LineHandler(logging.Handler):
    """Has a thread of its own write one line per record to a descriptor, in one system call each.

    A line that finds `room` lines waiting is given up, and so is one that cannot be written because the disk is full.
    A line `log-lines-lost` says how many, when all is written.
    """

    def __init__(self, descriptor: int, *, with_priority: bool = False, room: int = ROOM) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._with_priority = with_priority
        self._room = room
        self._is_cut = False  # the last line written is only the beginning of one
        self.begin()

    def begin(self) -> None:
        """With nothing to write and without a thread: the state that a forked process begins in, too."""
        # Re-entrant: a signal handler or a finalizer may log in the middle of a line's being logged.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[tuple[str, int]] = deque()  # lines, and how many each stands for
        self._lost = 0
        self._is_writing = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:
            self.handleError(record)
            return
        with self._changed:
            if len(self._waiting) >= self._room or self._is_closed:
                self._lost += 1
                return
            self._waiting.append((line, 1))
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait for what is waiting, `FLUSH_PATIENCE` at most."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._is_writing), FLUSH_PATIENCE)

    def close(self) -> None:
        """Take no more lines, and end the thread once those that wait are written."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _line(self, record: logging.LogRecord) -> str:
        priority = f"<{_PRIORITIES.get(record.levelno, 5)}>" if self._with_priority else ""
        return f"{priority}{self.format(record)}\n"

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._is_closed:
                        return
                    self._changed.wait()
                line, count = self._waiting.popleft()
                self._is_writing = True
            is_written = self._write(line)
            with self._changed:
                if not is_written:
                    self._lost += count
                elif self._lost and not self._waiting:
                    self._waiting.append((self._loss(self._lost), self._lost))
                    self._lost = 0
                self._is_writing = False
                self._changed.notify_all()

    def _loss(self, count: int) -> str:
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, "log-lines-lost", None, None)
        record.fields = {"lines": count}
        return self._line(record)

    def _write(self, line: str) -> bool:
        # The descriptor itself: the end of Python waits for whoever is inside sys.stderr, forever.
        octets = memoryview(("\n" * self._is_cut + line).encode(errors="backslashreplace"))
        length = len(octets)
        try:
            while octets:
                try:
                    octets = octets[os.write(self._descriptor, octets) :]
                except BlockingIOError:  # somebody who shares it has made it non-blocking
                    poll = select.poll()
                    poll.register(self._descriptor, select.POLLOUT)
                    poll.poll()
        except OSError:
            self._is_cut |= len(octets) < length
            return False
        self._is_cut = False
        return True


def _begin_anew() -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LineHandler):
            handler.begin()


os.register_at_fork(after_in_child=_begin_anew)


def _is_journal(descriptor: int, stream: str) -> bool:
    """Whether `stream`, as in $JOURNAL_STREAM of systemd.exec(5), is what `descriptor` is connected to."""
    with contextlib.suppress(OSError):
        found = os.fstat(descriptor)
        return stream == f"{found.st_dev}:{found.st_ino}"
    return False


class TextFormatter(logging.Formatter):
    """`2026-05-29T12:00:00.000000Z warning event=backend-down service=web backend=b`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        words = [time.removesuffix("+00:00") + "Z", record.levelname.lower()]
        words += [f"{_quoted(key)}={_quoted(value)}" for key, value in _fields(record).items()]
        return " ".join(words)


class JsonFormatter(logging.Formatter):
    """One object per line: `time` in seconds since 1970, `level`, `event`, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"time": round(record.created, 6), "level": record.levelname.lower()}
        return json.dumps(head | {k: v for k, v in _fields(record).items() if k not in head})


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """The event's name and fields, as values that JSON has. A record of another library is an event named `log`."""
    fields = getattr(record, "fields", None)
    if isinstance(fields, dict):
        found = {"event": record.msg} | {k: v for k, v in fields.items() if k != "event"}
    else:
        found = {"event": "log", "logger": record.name, "message": _message(record)}
    if record.exc_info and record.exc_info[0]:
        found["exception"] = logging.Formatter().formatException(record.exc_info)
    return {str(key): _plain(value) for key, value in found.items()}


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # their arguments do not fit their message; it still says something
        return str(record.msg)


def _plain(value: object) -> object:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Enum):
        return value.name.lower()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        # JSON has no infinities. Microseconds are as fine as anything here is measured.
        return round(value, 6) if value - value == 0 else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} octets>"
    try:
        return str(value)
    except Exception as error:  # a field's own __str__ is broken: a log line is no place to die of it
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _quoted(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
