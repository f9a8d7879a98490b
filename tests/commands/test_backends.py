"""drain, undrain, weight, fence, unfence: what they do to a balancer, and when a drain is over."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lb.commands import backends
from tests.admin.fake import Running
from tests.commands.conftest import Quiclb


def shown(balancer: Running, service: str, backend: str) -> tuple[Any, ...]:
    override = balancer.balancer.overrides.of(service, backend)
    return override.drain, override.weight, override.fence


def at_looks(balancer: Running, *steps: Callable[[], object]) -> None:
    """Do something before each of the next answers that follow a drain of web/b0, on the balancer's own loop."""
    left = list(steps)
    snapshot = balancer.balancer.snapshot

    async def stepping() -> Any:
        if left and balancer.balancer.overrides.of("web", "b0").drain:
            left.pop(0)()
        return await snapshot()

    balancer.balancer.snapshot = stepping  # type: ignore[method-assign]


def nothing() -> None:
    """Nothing happens."""


def test_a_drain_says_what_still_goes_there(quiclb: Quiclb, balancer: Running) -> None:
    status, out, err = quiclb("drain", "web/b0")
    assert (status, err) == (0, "")
    assert out.startswith("web/b0: draining, weight 1, ")
    assert out.endswith(" packets/s, last packet 0.0s ago\n")
    assert shown(balancer, "web", "b0") == (True, None, False)


def test_a_bare_name_will_do_where_one_service_has_it(quiclb: Quiclb, balancer: Running) -> None:
    assert quiclb("fence", "b4")[::2] == (0, "")
    assert shown(balancer, "web", "b4") == (None, None, True)
    status, out, err = quiclb("fence", "b1")
    assert (status, out) == (2, "")
    assert err == "quiclb: b1: backend of more than one service: expected one of web/b1, video/b1\n"
    assert shown(balancer, "web", "b1") == (None, None, False)


@pytest.mark.parametrize(
    ("name", "hint"), [("web/b9", "; did you mean web/"), ("vidoe/b1", "; did you mean video/b1?"), ("zzz", "\n")]
)
def test_a_name_that_nobody_has_is_told_with_the_nearest(
    quiclb: Quiclb, balancer: Running, name: str, hint: str
) -> None:
    status, out, err = quiclb("drain", name)
    assert (status, out) == (2, "")
    assert err.startswith(f"quiclb: {name}: no such backend{hint}")
    assert balancer.balancer.changes == []


def test_every_change_and_its_way_back(quiclb: Quiclb, balancer: Running) -> None:
    for command, expected in (
        (("weight", "web/b0", "7"), (None, 7, False)),
        (("fence", "web/b0"), (None, 7, True)),
        (("drain", "web/b0"), (True, 7, True)),
        (("unfence", "web/b0"), (True, 7, False)),
        (("weight", "web/b0", "file"), (True, None, False)),
        (("undrain", "web/b0"), (None, None, False)),
    ):
        status, out, err = quiclb(*command, "--json")
        assert (status, err) == (0, "")
        assert shown(balancer, "web", "b0") == expected
        told = json.loads(out)
        assert (told["service"], told["name"]) == ("web", "b0")
    assert (told["weight"], told["drain"], told["state"], told["overridden"]) == (1, False, "active", [])


def test_undrain_is_stronger_than_the_file(quiclb: Quiclb, balancer: Running) -> None:
    """b3's file says `drain: true`."""
    assert quiclb("undrain", "b3")[0] == 0
    assert shown(balancer, "web", "b3") == (False, None, False)
    before = balancer.balancer.generation
    assert quiclb("undrain", "b3")[0] == 0
    assert balancer.balancer.generation == before


def test_waiting_ends_at_once_where_nothing_went_for_long(quiclb: Quiclb, balancer: Running) -> None:
    balancer.balancer.now += 5.0
    status, out, err = quiclb("drain", "web/b0", "--wait")
    assert (status, err) == (0, "")
    assert out.splitlines()[0].endswith("last packet 5.0s ago")
    assert out.splitlines()[1].startswith("web/b0: quiet, after 0.")


def test_waiting_ends_when_it_is_quiet_and_not_before(quiclb: Quiclb, balancer: Running) -> None:
    """Packets come until the second look; each look is a line of JSON."""
    fake = balancer.balancer

    def silence() -> None:
        fake.now += 2.5

    at_looks(balancer, nothing, functools.partial(fake.tick, 0.1), silence, silence)
    status, out, err = quiclb("drain", "web/b0", "--wait", "--quiet", "4s", "--timeout", "60s", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [(line["last-packet"], line["quiet"]) for line in lines] == [
        (0.0, False),
        (0.0, False),
        (2.5, False),
        (5.0, True),
    ]
    assert [line["waited"] for line in lines] == sorted(line["waited"] for line in lines)


def test_waiting_has_an_end_and_the_drain_stays(quiclb: Quiclb, balancer: Running) -> None:
    status, out, err = quiclb("drain", "web/b0", "--wait", "--timeout", "300ms")
    assert status == 1
    assert err.startswith("quiclb: web/b0: still not quiet, after 0.")
    assert "flows, " in out
    assert shown(balancer, "web", "b0") == (True, None, False)


def test_a_drain_that_is_taken_back_ends_the_waiting(quiclb: Quiclb, balancer: Running) -> None:
    fake = balancer.balancer

    def back() -> None:
        fake.overrides = fake.overrides.changed("web", "b0", {"drain": None})

    at_looks(balancer, nothing, back)
    status, _, err = quiclb("drain", "web/b0", "--wait")
    assert status == 1
    assert "not draining any more: somebody took it back" in err


def test_a_backend_that_the_file_has_no_more_is_drained(quiclb: Quiclb, balancer: Running) -> None:
    fake = balancer.balancer

    def leave() -> None:
        fake.config = type(fake.config)(services=fake.config.services[1:])
        fake.tables = fake._build()

    at_looks(balancer, nothing, leave)
    status, out, _ = quiclb("drain", "web/b0", "--wait")
    assert status == 0
    assert out.endswith("web/b0: the configuration has no such backend any more\n")


def test_a_balancer_that_is_away_for_a_moment_does_not_end_the_waiting(quiclb: Quiclb, balancer: Running) -> None:
    """As when it is upgraded meanwhile."""
    fake = balancer.balancer
    path = Path(str(balancer.server.addresses[0]))
    back = threading.Timer(2.5, lambda: path.with_name("away").rename(path))  # two looks fail

    def leave() -> None:
        path.rename(path.with_name("away"))
        fake.now += 10
        back.start()

    at_looks(balancer, nothing, leave)
    status, out, err = quiclb("drain", "web/b0", "--wait", "--quiet", "20s", "--timeout", "4s", "--json")
    back.join()
    last = [json.loads(line)["last-packet"] for line in out.splitlines()]
    assert (status, last[0], last[-1]) == (1, 0.0, 10.0)
    assert "still not quiet" in err


def test_a_balancer_that_does_not_come_back_ends_the_waiting(
    quiclb: Quiclb, balancer: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "ABSENCE", 0.5)
    path = Path(str(balancer.server.addresses[0]))
    at_looks(balancer, nothing, lambda: path.rename(path.with_name("away")))
    status, _, err = quiclb("drain", "web/b0", "--wait")
    path.with_name("away").rename(path)
    assert (status, err) == (1, f"quiclb: unix:{path}: no balancer is there\n")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_waiting_and_leaves_the_drain(
    balancer: Running, number: signal.Signals, expected: int
) -> None:
    where = f"unix:{balancer.server.addresses[0]}"
    # Whoever started the tests may have them ignore interrupts.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    call = f"{heed}; from lb.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", call, "drain", "web/b0", "--wait", "--admin", where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout
        assert waiting.stdout.readline().startswith("web/b0: draining")
        os.kill(waiting.pid, number)
        out, err = waiting.communicate(timeout=30)
    assert (waiting.returncode, out, err) == (expected, "", "")
    assert shown(balancer, "web", "b0") == (True, None, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["drain", "b4", "--timeout", "5"], "argument --timeout: '5': expected a duration"),
        (["drain", "b4", "--timeout", "5s"], "--timeout: expected --wait as well"),
        (["drain", "b4", "--timeout", "0s"], "argument --timeout: '0s': expected a duration"),
        (["drain", "b4", "--quiet", "-1s"], "argument --quiet: expected one argument"),
        (["drain", "b4", "--quiet", "1e3s"], "argument --quiet: '1e3s': expected a duration"),
        (["weight", "b4", "1001"], "'1001': expected an integer, 0 to 1000, or `file`"),
        (["weight", "b4", "0000005000"], "'0000005000': expected an integer, 0 to 1000, or `file`"),
        (["drain", "\x1b[31m"], "quiclb: ?[31m: no such backend"),
        (["weight", "b4", "-1"], "'-1': expected an integer, 0 to 1000, or `file`"),
        (["weight", "b4", "1.5"], "'1.5': expected an integer, 0 to 1000, or `file`"),
        (["weight", "b4", "\u0661"], "expected an integer"),
        (["fence"], "the following arguments are required: BACKEND"),
        (["fence", "b4", "--admin", "here"], "'here': expected unix:PATH, HOST:PORT or https://HOST:PORT"),
        (["fence", "b4", "--admin", "127.0.0.1:0"], "expected unix:PATH, HOST:PORT or https://HOST:PORT"),
        (["fence", "b4", "--admin", "unix:"], "expected a path behind unix:"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(quiclb: Quiclb, balancer: Running, argv: list[str], message: str) -> None:
    status, out, err = quiclb(*argv)
    assert (status, out) == (2, "")
    assert message in err
    assert balancer.balancer.changes == []
