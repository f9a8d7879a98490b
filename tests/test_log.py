"""lb/log.py: one event, one line, and nothing secret in it."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.address import Address
from lb.config import Probe
from lb.log import JsonFormatter, TextFormatter, configure, event
from lb.routing import BackendState

logger = logging.getLogger("lb.test")


@pytest.fixture(autouse=True)
def _the_root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def lines(format: str, level: str, *events: tuple[int, str, dict[str, object]]) -> list[str]:  # noqa: A002
    stream = io.StringIO()
    configure(format, level, stream)
    for severity, name, fields in events:
        event(logger, severity, name, **fields)
    return stream.getvalue().splitlines()


FIELDS: list[tuple[object, str, object]] = [
    # value, as text, as JSON
    ("web", "web", "web"),
    ("", '""', ""),
    ("two words", '"two words"', "two words"),
    ("a=b", '"a=b"', "a=b"),
    ('say "hi"', r'"say \"hi\""', 'say "hi"'),
    ("line\nfeed\r", r'"line\nfeed\r"', "line\nfeed\r"),
    ("back\\slash", r'"back\\slash"', "back\\slash"),
    ("\x1b[31m", r'"\u001b[31m"', "\x1b[31m"),
    ("a\u2028b", r'"a\u2028b"', "a\u2028b"),
    ("zürich", "zürich", "zürich"),
    (True, "true", True),
    (None, "null", None),
    (42, "42", 42),
    (0.1 + 0.2, "0.3", 0.3),
    (math.inf, "inf", "inf"),
    (math.nan, "nan", "nan"),
    (BackendState.DOWN, "down", "down"),
    (Probe.VERSION_NEGOTIATION, "version-negotiation", "version-negotiation"),
    (Address("2001:db8::1", 443), "[2001:db8::1]:443", "[2001:db8::1]:443"),
    (Path("/etc/quiclb.yaml"), "/etc/quiclb.yaml", "/etc/quiclb.yaml"),
    (bytes(range(16)), '"<16 octets>"', "<16 octets>"),
    (bytearray(3), '"<3 octets>"', "<3 octets>"),
]


@pytest.mark.parametrize(("value", "text", "_json"), FIELDS)
def test_fields_as_text(value: object, text: str, _json: object) -> None:
    (line,) = lines("text", "info", (logging.WARNING, "backend-down", {"backend": value}))
    time, _, rest = line.partition(" ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time)
    assert rest == f"warning event=backend-down backend={text}"


@pytest.mark.parametrize(("value", "_text", "as_json"), FIELDS)
def test_fields_as_json(value: object, _text: str, as_json: object) -> None:
    (line,) = lines("json", "info", (logging.ERROR, "reload-refused", {"reason": value}))
    found = json.loads(line)
    assert isinstance(found.pop("time"), float)
    assert found == {"level": "error", "event": "reload-refused", "reason": as_json}


def test_the_level_is_obeyed() -> None:
    severities = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
    said: list[tuple[int, str, dict[str, object]]] = [(severity, "event", {}) for severity in severities]
    counts = [len(lines("text", level, *said)) for level in ("debug", "info", "warning", "error")]
    assert counts == [4, 3, 2, 1]


@pytest.mark.parametrize(("format_", "level", "named"), [("xml", "info", "'xml'"), ("text", "loud", "'loud'")])
def test_an_unknown_format_or_level_is_refused(format_: str, level: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        configure(format_, level)


def test_a_field_cannot_pass_for_the_record() -> None:
    fields = {"time": 1, "level": "x", "event": "y", "name": "n", "logger": "l", "ours": 1}
    (line,) = lines("json", "info", (logging.INFO, "real", fields))
    found = json.loads(line)
    assert found.pop("time") > 1
    assert found == {"level": "info", "event": "real", "name": "n", "logger": "l", "ours": 1}


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("format_", ["text", "json"])
def test_a_broken_value_does_not_break_the_log(format_: str, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines(format_, "info", (logging.INFO, "event", {"value": Broken(), "other": 1}))
    assert "<Broken: RuntimeError>" in line
    assert capsys.readouterr().err == ""


def test_what_other_libraries_log_has_the_same_form() -> None:
    stream = io.StringIO()
    configure("json", "info", stream)
    logging.getLogger("other").warning("slow: %s", "5 s")
    logging.getLogger("other").warning("wrong: %s %s", "one")  # noqa: PLE1206 - on purpose
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("other").exception("failed")
    first, second, third = (json.loads(line) for line in stream.getvalue().splitlines())
    head = {"level": "warning", "event": "log", "logger": "other"}
    assert first == {"time": first["time"], **head, "message": "slow: 5 s"}
    assert second == {"time": second["time"], **head, "message": "wrong: %s %s"}
    assert third["message"] == "failed"
    assert third["exception"].endswith("ValueError: boom")


def test_configuring_again_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("text", "info", first)
    configure("text", "info", second)
    event(logger, logging.INFO, "once")
    assert (first.getvalue(), second.getvalue().count("once")) == ("", 1)


def test_the_default_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    event(logger, logging.INFO, "started")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(" info event=started\n")


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.binary(), st.integers(), st.floats(), st.none())))
def test_whatever_the_fields_it_is_one_line(fields: dict[str, object]) -> None:
    record = logging.LogRecord("lb", logging.INFO, "", 0, "event", None, None)
    record.fields = fields
    assert len(TextFormatter().format(record).splitlines()) == 1
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["event"] == "event"
