"""What the demonstration tells, and that it does not say that all is well when it is not."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from backend.clients.process import DIES_WITH_US
from backend.demo import lan, namespaces
from backend.demo.__main__ import EXIT_FAILED, EXIT_USAGE
from backend.demo.place import Loopback, StageError
from backend.demo.report import MAX_WIDTH, Report, Row
from backend.demo.scenario import Scene, SkippedError, Step, StepFailedError, play
from backend.demo.stage import LogEvent, Metrics, Play, Stage
from tests.e2e.theatre import perform

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_report_elsewhere_than_on_a_terminal_has_no_escapes() -> None:
    out = io.StringIO()
    _tell(Report(out, {"TERM": "xterm"}))
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    assert out.getvalue().isascii()


@pytest.mark.parametrize(
    ("environment", "has_colour", "is_live"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        ({"TERM": "dumb"}, False, False),
        ({}, False, False),
    ],
)
def test_a_report_uses_what_the_terminal_can(environment: dict[str, str], has_colour: bool, is_live: bool) -> None:
    out = Terminal()
    _tell(Report(out, environment))
    assert ("\x1b[32m" in out.getvalue(), "\r\x1b[K" in out.getvalue()) == (has_colour, is_live)


def test_the_table_has_every_step_and_fits_the_width() -> None:
    out = io.StringIO()
    report = Report(out, {})
    _tell(report)
    table = out.getvalue()[out.getvalue().index("what was done") :].splitlines()

    assert max(map(len, table)) <= MAX_WIDTH
    assert [line.split()[-1] for line in table if line.split()[-1] in ("pass", "FAIL", "skipped")] == [
        "pass",
        "FAIL",
        "skipped",
    ]
    assert report.failed


def test_a_step_that_fails_is_a_row_and_the_next_one_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = []

    def step(title: str, outcome: str | Exception) -> Step:
        async def act(_: Scene) -> str:
            played.append(title)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return Step(title, act)

    monkeypatch.setattr(
        "backend.demo.scenario.STEPS",
        (
            step("one", StepFailedError("nothing")),
            step("two", StageError("it died")),
            step("three", SkippedError("no IPv6")),
            step("four", "fine"),
        ),
    )
    report = Report(io.StringIO(), {})
    asyncio.run(play(Scene(Stage(tmp_path, Play(), Loopback("127.0.0.1", ("a",), {})), report, ["aioquic"])))

    assert played == ["one", "two", "three", "four"]
    assert [(row.title, row.saw, row.passed) for row in report.rows] == [
        ("one", "StepFailedError: nothing", False),
        ("two", "StageError: it died", False),
        ("three", "no IPv6", None),
        ("four", "fine", True),
    ]
    assert report.failed


@pytest.mark.parametrize(
    ("option", "reason"),
    [("--client=nobody", "expected some of"), ("--client=gtlsclient", "expected aioquic or qh3 among them")],
)
def test_a_client_that_cannot_be_used_is_a_mistake(option: str, reason: str) -> None:
    if option == "--client=gtlsclient":
        from backend.clients.fleet import missing

        reason = missing("gtlsclient") or reason
    ended = subprocess.run(
        [sys.executable, "-m", "backend.demo", option],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (ended.returncode, reason in ended.stderr) == (EXIT_USAGE, True)


def test_without_root_there_is_no_xdp_engine_to_demonstrate_and_it_says_so() -> None:
    program = "import os, sys; from backend.demo.__main__ import main; "
    program += "os.geteuid() or os.seteuid(65534); sys.exit(main(['--engine', 'xdp']))"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert (ended.returncode, ended.stderr) == (EXIT_FAILED, "")
    assert "cannot go on: the xdp engine's stage cannot be set: network namespaces need root" in " ".join(
        ended.stdout.split()
    )


@pytest.mark.e2e
def test_a_process_that_ends_when_it_should_run_is_an_error_with_its_last_words() -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        await balancer.child.stop()
        (stage.directory / "balancer-one.yaml").write_text("nonsense: 1\n")
        with pytest.raises(StageError, match="nonsense: unknown key"):
            await stage.run(balancer)

    perform(scene, Play(backends=("a",)))


@pytest.mark.e2e
def test_a_stage_leaves_no_process_and_no_file_behind() -> None:
    left: dict[str, Any] = {}

    async def scene(stage: Stage) -> None:
        children = [stage.balancers["one"].child, *(server.child for server in stage.servers.values())]
        stage.servers["a"].child.signal(signal.SIGSTOP)  # it cannot even be told to end
        left["pids"] = [child.pid for child in children]
        left["directory"] = stage.directory

    perform(scene, Play(backends=("a", "b"), workers=2))
    for pid in left["pids"]:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)
    assert not left["directory"].exists()


@pytest.mark.e2e
@pytest.mark.skipif(bool(lan.missing()), reason=str(lan.missing()))
def test_a_stage_of_namespaces_leaves_none_of_them_and_nothing_mounted() -> None:
    left: dict[str, Any] = {}

    async def scene(stage: Stage) -> None:
        assert isinstance(stage.place, lan.Lan)
        left["namespaces"] = {namespaces.HOME / name for name in stage.place.names}
        left["pins"] = stage.place.pins
        assert {path for path in left["namespaces"] if path.exists()} == left["namespaces"]
        assert list((stage.place.pins / "one").iterdir())
        await stage.balancers["one"].child.kill()  # it cannot even let go of the interface

    before = os.readlink("/proc/thread-self/ns/net")
    perform(scene, Play(backends=("a",), xdp=lan.Xdp()))
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert {path for path in left["namespaces"] if path.exists()} == set()
    assert str(left["pins"]) not in Path("/proc/self/mounts").read_text()
    assert not left["pins"].exists()


def test_metrics_are_summed_over_the_labels_that_are_not_given() -> None:
    metrics = Metrics(
        '# TYPE a counter\na_total{x="1",y="1"} 2.0\na_total{x="1",y="2"} 3.0\na_total{x="2",y="1"} 4.0\n'
    )
    assert [metrics.value("a_total"), metrics.value("a_total", x="1"), metrics.value("a_total", x="3")] == [9, 5, 0]


def test_events_are_found_by_name_time_and_fields() -> None:
    from backend.demo.stage import Child

    child = Child("a", [], Path("unused"))
    child.events = [
        LogEvent(1.0, "backend-down", {"backend": "a"}),
        LogEvent(2.0, "backend-down", {"backend": "b"}),
        LogEvent(3.0, "backend-up", {"backend": "b"}),
    ]
    assert child.find("backend-down") == child.events[:2]
    assert child.find("backend-down", 1.5) == child.events[1:2]
    assert child.find("backend-down", backend="b") == child.events[1:2]
    assert child.find("backend-dead") == []


def _tell(report: Report) -> None:
    report.heading("1/3  a step")
    report.say("something happens, and it takes many words to say what it is that happens " * 3)

    async def watch() -> None:
        async with report.watching(lambda: "half of it"):
            await asyncio.sleep(0)

    asyncio.run(watch())
    report.result(Row("one thing that was done, with a title of some length", "what was seen", 1.5, True))
    report.result(Row("another thing", "what should not have been seen", 12.25, False))
    report.result(Row("a third thing", "there is no such thing here", 0.0, None))
    report.table()


@pytest.mark.e2e
@pytest.mark.skipif(not DIES_WITH_US, reason="there is no setpriv here")
def test_what_was_started_dies_even_if_we_are_killed() -> None:
    program = (
        "import subprocess, sys; "
        "print(subprocess.Popen([*sys.argv[1:], 'sleep', '60'], start_new_session=True).pid, flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, *DIES_WITH_US], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip()
        deadline = time.monotonic() + 10
        while not (child / "cmdline").read_bytes().startswith(b"sleep") and time.monotonic() < deadline:
            time.sleep(0.01)  # it is still setpriv
        parent.kill()

    while _is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_alive(child)


def _is_alive(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
