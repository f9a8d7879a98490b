"""What a terminal shows fits into it, and says what the API said."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lb.terminal import Paint, ago, count, duration, explained, plain, rate, rotation, status, top, traffic

PLAIN, COLOURED = Paint(is_on=False), Paint(is_on=True)


def backend(name: str, **how: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "name": name, "address": "10.0.0.1:443", "state": "active", "since": None, "reason": "", "drain": False,
        "fence": False, "overridden": [], "weight": 1, "effective-weight": 1.0, "ring-share": 0.25, "flows": 1234,
        "packets-per-second": 340.2, "last-packet": 0.02, "round-trip": 0.00123,
    }  # fmt: skip
    return usual | how


def slot(config_id: int, phase: str, **how: Any) -> dict[str, Any]:
    usual = {
        "config-id": config_id, "phase": phase, "algorithm": "single-pass", "packets": 12345,
        "packets-per-second": 99.5, "last-packet": 0.0, "guard": 300.0, "free-in": None, "key-age": 86_400.0,
    }  # fmt: skip
    return usual | how


def state(*backends: dict[str, Any], **how: Any) -> dict[str, Any]:
    service = {
        "name": "web", "listen": ["192.0.2.1:443"], "fail-open": False, "verdicts": {"cid": 1000, "fallback": 10},
        "moves": 7, "rescued": 5, "resets": {"answered": 1, "pushed": 2},
        "cid-configs": [slot(0, "active"), slot(1, "retiring", **{"free-in": 100.0})],
        "backends": list(backends),
    }  # fmt: skip
    usual = {
        "version": "1.2.3", "engine": "udp", "workers": 2, "xdp": None, "generation": 7, "started-at": 1000.0,
        "now": 4725.0, "reload": {"at": 4713.0, "taken": 1, "refused": 0, "errors": []}, "flows": 12_345,
        "flow-limit": 200_000, "flows-evicted": 0, "sockets": 10, "socket-limit": 20_000, "send-failures": {},
        "services": [service],
    }  # fmt: skip
    return usual | how


FLEET = state(
    backend("a"),
    backend("b", state="draining", drain=True, overridden=["drain"], since=4600.0, **{"packets-per-second": 3.4}),
    backend("c", state="down", since=4715.0, reason="timeout", **{"last-packet": None, "round-trip": None}),
    backend("d", weight=10, **{"effective-weight": 2.5}),
)


def test_status_is_a_table() -> None:
    assert status(FLEET, 120, PLAIN) == [
        "quiclb 1.2.3: udp, 2 workers, up 1h02m, file read 12s ago",
        "12.3k of 200k flows, 10 of 20.0k sockets",
        "",
        "web  192.0.2.1:443",
        "  BACKEND  STATE     WEIGHT  SHARE  FLOWS  PPS  LAST    RTT",
        "  a        active         1  25.0%   1234  340  0.0s  1.2ms",
        "  b        draining       1  25.0%   1234  3.4  0.0s  1.2ms  for 2m05s, by the operator: drain",
        "  c        down           1  25.0%   1234  340     -      -  for 10s, timeout",
        "  d        active        10  25.0%   1234  340  0.0s  1.2ms  (now 2.5)",
        "  config ID 0 active, single-pass, 99.5 packets/s, last 0.0s ago",
        "  config ID 1 retiring, single-pass, 99.5 packets/s, last 0.0s ago, free in 1m40s",
        "  moves 7, rescued 5, resets 3",
    ]


def test_what_is_wrong_is_said_at_the_top() -> None:
    reload = {"at": 4000.0, "taken": 1, "refused": 1, "errors": ["workers: 0: expected \x1b[2J", "flows: no"]}
    xdp = {"interface": "eth0", "mode": "generic", "forward": "l2"}
    shown = state(reload=reload, xdp=xdp, **{"flows-evicted": 12, "send-failures": {"unreachable": 3, "too-large": 0}})
    assert status(shown, 120, PLAIN)[:4] == [
        "quiclb 1.2.3: xdp on eth0 (generic, l2), up 1h02m, file read 12m05s ago",
        "12.3k of 200k flows, 10 of 20.0k sockets, 12 flows evicted, not sent: 3 unreachable",
        "last reload refused: workers: 0: expected ?[2J",
        "last reload refused: flows: no",
    ]
    shown["services"][0]["fail-open"] = True
    assert "  too few backends are up: the health checks are not believed" in status(shown, 120, PLAIN)


@pytest.mark.parametrize("width", [40, 50, 60, 79, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    long = state(backend("a-name-of-a-backend-" * 3), backend("b", state="draining", since=0.0, overridden=["drain"]))
    for lines in (status(long, width, PLAIN), top(long, None, (width, 24), PLAIN)):
        assert max(len(line) for line in lines) <= width
        assert any("draining" in line for line in lines)
    coloured = status(long, width, COLOURED)
    assert max(len(re.sub("\x1b\\[[0-9]*m", "", line)) for line in coloured) <= width


def test_columns_go_by_how_dispensable_they_are() -> None:
    def titles(width: int) -> list[str]:
        return next(line for line in status(FLEET, width, PLAIN) if "BACKEND" in line).split()

    assert titles(80) == ["BACKEND", "STATE", "WEIGHT", "SHARE", "FLOWS", "PPS", "LAST", "RTT"]
    assert titles(58) == ["BACKEND", "STATE", "WEIGHT", "SHARE", "FLOWS", "PPS", "LAST"]
    assert titles(40) == ["BACKEND", "STATE", "FLOWS", "PPS", "LAST"]


def test_colours_are_for_states_and_end_where_they_begin() -> None:
    lines = status(FLEET, 120, COLOURED)
    assert "\x1b[32mactive  \x1b[0m" in "\n".join(lines)
    assert "\x1b[31mdown    \x1b[0m" in "\n".join(lines)
    assert [re.sub("\x1b\\[[0-9]*m", "", line) for line in lines] == status(FLEET, 120, PLAIN)


def test_top_is_sorted_and_counts_by_the_second() -> None:
    before = state(now=4723.0)
    before["services"][0]["verdicts"] = {"cid": 800, "fallback": 10}
    lines = top(FLEET, before, (80, 24), PLAIN)
    assert "100 datagrams/s: cid 100" in lines
    names = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert names == ["a", "c", "d", "b"]


@pytest.mark.parametrize("height", [1, 3, 6, 10, 24])
def test_top_leaves_the_last_line_free(height: int) -> None:
    many = state(*(backend(f"b{i}") for i in range(100)))
    lines = top(many, None, (80, height), PLAIN)
    assert len(lines) <= height - 1
    if height == 24:
        assert re.fullmatch(r"and \d+ more", lines[-1])
        assert len([line for line in lines if line.startswith("b")]) + int(lines[-1].split()[1]) == 100


def test_top_names_services_where_there_are_several() -> None:
    several = state(backend("a"))
    several["services"].append(several["services"][0] | {"name": "video"})
    assert {line.split()[0] for line in top(several, None, (80, 24), PLAIN) if "active" in line} == {
        "web/a",
        "video/a",
    }


def test_traffic_is_a_line() -> None:
    draining = backend("a", state="draining", flows=1, **{"last-packet": None, "packets-per-second": 0.0})
    assert traffic("web/a", draining) == "web/a: draining, weight 1, 1 flow, 0.0 packets/s, last packet never"


def test_rotation_is_a_table() -> None:
    free = {"algorithm": None, "key-age": None}
    never = free | {"last-packet": None, "packets": 0, "packets-per-second": 0.0}
    slots = [slot(0, "retiring", **{"free-in": 0.0}), slot(1, "active"), slot(2, "free", **free)]
    slots += [slot(i, "free", **never) for i in (3, 4)]
    assert rotation({"web": slots}, 100, PLAIN) == [
        "SERVICE   ID  PHASE     ALGORITHM    PACKETS   PPS      LAST  KEY AGE",
        "web        0  retiring  single-pass    12.3k  99.5  0.0s ago     1d0h  may be freed",
        "web        1  active    single-pass    12.3k  99.5  0.0s ago     1d0h",
        "web        2  free      -              12.3k  99.5  0.0s ago        -",
        "web      3,4  free      -                  -     -         -        -",
    ]


def test_an_explanation_is_a_line_for_each_thing_known() -> None:
    answer = {"cid": "00", "config-id": None, "services": [{"service": "web", "why": "because"}]}
    assert explained(answer) == "cid: 00\n\nservice: web\nwhy: because"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0s"), (0, "0.0s"), (9.94, "9.9s"), (10, "10s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"),
        (3599.7, "1h00m"), (18_720, "5h12m"), (86_400, "1d0h"), (1e7, "115d17h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert ago(seconds) == f"{text} ago"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9999, "9999"), (10_000, "10.0k"), (123_456, "123k"), (9_999_999, "10000k"), (10**7, "10.0M"),
     (10**12, "1000G")],
)  # fmt: skip
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


def test_rates_and_other_peoples_text() -> None:
    assert [rate(n) for n in (0, 0.04, 99.94, 100.4, 12_345.6)] == ["0.0", "0.0", "99.9", "100", "12.3k"]
    assert plain("a\x1b[2J\r\n\x07b") == "a?[2J???b"
