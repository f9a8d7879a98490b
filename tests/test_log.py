"""lb/log.py: one event, one line, and nothing secret in it."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.address import Address
from lb.config import Probe
from lb.log import FLUSH_PATIENCE, ROOM, JsonFormatter, TextFormatter, configure, event, flush
from lb.routing import BackendState
from tests.fleet import eventually

logger = logging.getLogger("lb.test")


@pytest.fixture(autouse=True)
def _the_root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def lines(format: str, level: str, *events: tuple[int, str, dict[str, object]]) -> list[str]:  # noqa: A002
    with tempfile.TemporaryFile("w+") as file:
        configure(format, level, file.fileno())
        for severity, name, fields in events:
            event(logger, severity, name, **fields)
        return written(file.fileno())


def written(descriptor: int) -> list[str]:
    """What is in a file that is logged to."""
    flush()
    return os.pread(descriptor, 1 << 20, 0).decode().splitlines()


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


def test_what_other_libraries_log_has_the_same_form(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as file:
        configure("json", "info", file.fileno())
        first, second, third = (json.loads(line) for line in others(file.fileno()))
    head = {"level": "warning", "event": "log", "logger": "other"}
    assert first == {"time": first["time"], **head, "message": "slow: 5 s"}
    assert second == {"time": second["time"], **head, "message": "wrong: %s %s"}
    assert third["message"] == "failed"
    assert third["exception"].endswith("ValueError: boom")


def others(descriptor: int) -> list[str]:
    logging.getLogger("other").warning("slow: %s", "5 s")
    logging.getLogger("other").warning("wrong: %s %s", "one")  # noqa: PLE1206 - on purpose
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("other").exception("failed")
    return written(descriptor)


def test_configuring_again_replaces(tmp_path: Path) -> None:
    with (tmp_path / "first").open("w+") as first, (tmp_path / "second").open("w+") as second:
        configure("text", "info", first.fileno())
        event(logger, logging.INFO, "before")
        configure("text", "info", second.fileno())
        event(logger, logging.INFO, "after")
        assert [line.split("=")[1] for line in written(second.fileno())] == ["after"]
        assert [line.split("=")[1] for line in eventually(lambda: written(first.fileno()))] == ["before"]
    assert [thread.name for thread in threading.enumerate()].count("log") == 1


def test_the_default_is_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    configure()
    event(logger, logging.INFO, "started")
    flush()
    captured = capfd.readouterr()
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


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads, with no room left: its two ends."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, b"." * 4095 + b"\n")
    yield reading, writing
    os.set_blocking(reading, False)
    drained(reading)  # or the thread that is inside write() holds it open
    os.close(reading)
    os.close(writing)


def drained(descriptor: int) -> bytes:
    octets = b""
    while True:
        try:
            octets += os.read(descriptor, 65536)
        except BlockingIOError:
            return octets


@pytest.mark.parametrize("is_blocking", [True, False])
def test_nobody_who_logs_waits_for_a_reader_and_the_lines_that_are_lost_are_counted(
    full_pipe: tuple[int, int], is_blocking: bool
) -> None:
    reading, writing = full_pipe
    os.set_blocking(writing, is_blocking)
    configure("json", "info", writing)
    began = time.monotonic()
    for number in range(ROOM + 100):
        event(logger, logging.INFO, "flow", number=number)
    took = time.monotonic() - began
    assert took < 5, "a write that blocks would have taken forever"

    with os.fdopen(os.dup(reading)) as reader:
        assert reader.readline().endswith(".\n")
        found = [json.loads(reader.readline())]
        while found[-1]["event"] == "flow":
            found.append(json.loads(reader.readline()))
        event(logger, logging.INFO, "later")
        later = json.loads(reader.readline())
    *flows, loss = found
    assert [line["number"] for line in flows] == list(range(len(flows)))
    assert len(flows) in (ROOM, ROOM + 1)  # one may be in the thread's hands while the others wait
    assert (loss["event"], loss["level"]) == ("log-lines-lost", "warning")
    assert loss["lines"] == ROOM + 100 - len(flows)
    assert later["event"] == "later"


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    """A limit of the file's size stands in for the disk: the kernel writes what there is room for, and then EFBIG."""
    file = tmp_path / "log"
    code = f"""
import logging, os, resource, signal
from lb.log import configure, event, flush
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
configure("json", "info", os.open({str(file)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
def say(number):
    event(logging.getLogger("lb"), logging.INFO, "flow", number=number)
    flush()
say(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize({str(file)!r}) + 10, hard))
for number in (2, 3, 4):
    say(number)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
say(5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    first, cut, fifth, loss = file.read_text().splitlines()
    assert (json.loads(first)["number"], json.loads(fifth)["number"], json.loads(loss)["lines"]) == (1, 5, 3)
    assert len(cut) == 10


def test_the_end_of_the_process_waits_for_the_lines_but_not_for_a_reader(full_pipe: tuple[int, int]) -> None:
    code = "import logging, lb.log as l; l.configure(); [l.event(logging.getLogger(), 40, 'e') for _ in range({})]"
    done = subprocess.run([sys.executable, "-c", code.format(1000)], capture_output=True, check=True, timeout=60)
    assert len(done.stderr.splitlines()) == 1000

    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code.format(5)], stderr=full_pipe[1], check=True, timeout=60)
    assert time.monotonic() - began >= FLUSH_PATIENCE


def test_a_forked_process_logs_for_itself(tmp_path: Path) -> None:
    code = """
import logging, os, lb.log as l
l.configure()
l.event(logging.getLogger(), 40, "parent")
l.flush()
child = os.fork()
l.event(logging.getLogger(), 40, "parent" if child else "child")
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert sorted(line.split("=")[1] for line in done.stderr.splitlines()) == ["child", "parent", "parent"]


def test_without_a_standard_error_nothing_is_written_to_whoever_has_its_number_now(tmp_path: Path) -> None:
    code = f"""
import logging, os, lb.log as l
assert os.open({str(tmp_path / "others")!r}, os.O_WRONLY | os.O_CREAT) == 2
l.configure()
l.event(logging.getLogger(), 40, "e")
"""
    subprocess.run(f'exec "{sys.executable}" -c "$CODE" 2>&-', shell=True, env={"CODE": code}, check=True, timeout=60)  # noqa: S602
    assert (tmp_path / "others").read_bytes() == b""


@pytest.mark.parametrize("format_", ["text", "json"])
def test_lines_for_the_journal_begin_with_their_priority(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    found = os.fstat(writing)
    with os.fdopen(reading) as reader, os.fdopen(writing, "w"):
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        configure(format_, "debug", writing)
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            event(logger, level, "e")
        assert [reader.readline()[:3] for _ in range(4)] == ["<7>", "<6>", "<4>", "<3>"]

        # The journal of somebody who redirected us to somewhere else.
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        configure(format_, "info", writing)
        event(logger, logging.INFO, "e")
        assert reader.readline()[0] in "2{"
