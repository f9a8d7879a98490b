"""Logs: state changes, one line each, as `key=value` text or as JSON.

An event has a name (`backend-down`) and fields (`service=web backend=b`). Octets never reach a log, only how many
there were: what is not written cannot leak, and keys are octets.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from enum import Enum
from typing import TextIO

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

_PLAIN = re.compile(r"[^\s\"=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # what may stand in text without quotes


def event(logger: logging.Logger, level: int, name: str, /, **fields: object) -> None:
    """Log the event `name`, in the words of the documents, with its fields. Never raises.

    A field named `time`, `level` or `event` gives way to the record's own.
    """
    logger.log(level, name, extra={"fields": fields})


def configure(format: str = "text", level: str = "info", stream: TextIO | None = None) -> None:  # noqa: A002 - the key's name
    """Send all logs of the process, other libraries' too, to `stream` (standard error) and nowhere else.

    Raises ValueError for a format or a level that is not in `FORMATS` or `LEVELS`.
    """
    if format not in FORMATS:
        raise ValueError(f"log format {format!r}: expected one of {', '.join(FORMATS)}")
    if level not in LEVELS:
        raise ValueError(f"log level {level!r}: expected one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(TextFormatter() if format == "text" else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


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
