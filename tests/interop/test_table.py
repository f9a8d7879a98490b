"""The page that a run makes, and what a run is told to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backend.adapters.registry import ADAPTERS, Feature
from backend.clients.visitors import CLIENTS
from tests.interop.__main__ import PAGE, main
from tests.interop.cells import NEEDS_CIDS, TOGETHER, Cell, Engine, Result, Verdict
from tests.interop.run import Wanted
from tests.interop.scenarios import SCENARIOS
from tests.interop.table import COLUMNS, HEAD, page, summary, table


def result(
    verdict: Verdict,
    saw: str = "",
    *,
    engine: Engine = Engine.UDP,
    server: str = "aioquic",
    client: str = "qh3",
    feature: Feature = Feature.REQUEST,
    attempts: int = 1,
) -> Result:
    return Result(Cell(engine, server, client, feature), verdict, saw, 1.5, attempts)


def test_every_scenario_is_played_and_has_a_column() -> None:
    assert set(SCENARIOS) == set(COLUMNS) == set(Feature)
    assert list(SCENARIOS)[-1] is Feature.RETRY  # from then on all servers demand one


def test_a_row_is_a_client_at_a_server_and_a_reason_has_one_number() -> None:
    reason, notes = "libcurl has no active migration", {"Another.": 1}
    migration = Feature.ACTIVE_MIGRATION
    rows = table(
        [
            result(Verdict.NOT_RUN, reason, client="pycurl", feature=migration),
            result(Verdict.NOT_RUN, reason, client="curl_cffi", feature=migration),
            result(Verdict.FAIL, "it did\nnot", client="curl_cffi"),
            result(Verdict.PASS, "server a", client="pycurl"),
            result(Verdict.PASS, "server b"),
        ],
        notes,
    )
    link = "](#why-not-and-what-went-wrong)"
    assert rows == [
        "| server | client | request | migration |",
        "|---|---|:-:|:-:|",
        "| aioquic | qh3 | ✓ |  |",
        f"| aioquic | curl_cffi | ✗ [2{link} | · [3{link} |",
        f"| aioquic | pycurl | ✓ | · [3{link} |",
    ]
    assert notes == {"Another.": 1, "it did not.": 2, "libcurl has no active migration.": 3}


def test_a_control_is_as_expected_where_it_fails_because_it_knows_no_connection_ids() -> None:
    for feature in Feature:
        control = result(Verdict.FAIL, "nothing", engine=Engine.CONTROL, feature=feature)
        assert control.is_as_expected == (feature in NEEDS_CIDS)
        passed = result(Verdict.PASS, "all", engine=Engine.CONTROL, feature=feature)
        assert passed.is_as_expected == (feature not in NEEDS_CIDS)
        assert result(Verdict.PASS, feature=feature).is_as_expected
        assert not result(Verdict.FAIL, feature=feature).is_as_expected
        assert result(Verdict.NOT_RUN, engine=Engine.CONTROL, feature=feature).is_as_expected


def test_a_control_that_fails_before_anything_moved_shows_nothing() -> None:
    moved = result(Verdict.FAIL, "no connection", engine=Engine.CONTROL, feature=Feature.NAT_REBINDING)
    assert moved.is_as_expected
    assert not replace(moved, was_disturbed=False).is_as_expected


def test_a_control_that_gets_through_is_marked_and_told() -> None:
    moved = result(Verdict.PASS, "all of it", engine=Engine.CONTROL, feature=Feature.NAT_REBINDING)
    text = page([moved])
    assert "| aioquic | qh3 | ✓ [1](#why-not-and-what-went-wrong) |" in text
    assert "1. The control got through where it must not." in text
    not_run = result(Verdict.NOT_RUN, "no nginx", engine=Engine.CONTROL, feature=Feature.NAT_REBINDING)
    assert "1. no nginx." in page([not_run])
    assert summary([moved]).splitlines()[1] == "the control got through: nginx aioquic qh3 nat-rebinding: all of it"


def test_the_page_is_the_same_for_the_same_verdicts_however_long_they_took() -> None:
    verdicts = [
        result(Verdict.PASS, "10 octets in 0.3 s"),
        result(Verdict.FAIL, "nothing for 2.5 s", engine=Engine.CONTROL, feature=Feature.BALANCERS_SWAP),
        result(Verdict.PASS, "server c", engine=Engine.XDP, client="pycurl"),
    ]
    others = [
        result(Verdict.PASS, "server c", engine=Engine.XDP, client="pycurl", attempts=2),
        result(Verdict.FAIL, "nothing after 17 octets", engine=Engine.CONTROL, feature=Feature.BALANCERS_SWAP),
        result(Verdict.PASS, "10 octets in 0.8 s"),
    ]
    assert page(verdicts) == page(others)


def test_a_summary_says_what_took_two_attempts() -> None:
    told = summary([result(Verdict.PASS, "all (at first: nothing)", attempts=2), result(Verdict.PASS)])
    assert told == (
        "2 cells: 2 pass, 0 fail (0 of the control, as they must), 0 not run\n"
        "at the second attempt: udp aioquic qh3 request: pass: all (at first: nothing)"
    )


def test_results_survive_the_way_from_the_process_that_played_them() -> None:
    played = result(Verdict.FAIL, "nothing", engine=Engine.CONTROL, feature=Feature.ROTATION, attempts=2)
    assert Result.from_json(played.as_json()) == played


def test_the_published_page_is_of_a_run_of_everything() -> None:
    text = PAGE.read_text()
    assert text.startswith(HEAD)
    for engine in (Engine.UDP, Engine.XDP):
        _, _, rest = text.partition(f"\n## The {engine} engine\n")
        rows = rest.partition("\n## ")[0]
        for server in ADAPTERS:
            for client in CLIENTS:
                assert f"\n| {server} | {client} |" in rows
    assert "The control got through" not in text


def test_a_run_of_everything_has_each_pair_once_for_each_engine_and_one_control() -> None:
    places = Wanted().places()
    assert len(places) == len(set(places)) == 2 * len(ADAPTERS) + 1
    assert Wanted().is_everything
    assert not Wanted(clients=("qh3",)).is_everything
    assert len(Wanted().cells(*places[0])) == len(CLIENTS) * len(Feature)


def test_a_client_or_server_that_cannot_says_so_before_anything_is_started() -> None:
    cells = Wanted().cells(Engine.UDP, "aioquic")
    reasons = {(cell.client, cell.feature): cell.why_not() for cell in cells if cell.why_not()}
    assert reasons[("pycurl", Feature.ACTIVE_MIGRATION)] == "libcurl has no active migration"
    assert ("aioquic", Feature.ACTIVE_MIGRATION) not in reasons
    assert Cell(Engine.UDP, "hypercorn", "aioquic", Feature.RETRY).why_not() == "hypercorn sends none"
    for (client, server, feature), reason in TOGETHER.items():
        assert Cell(Engine.XDP, server, client, feature).why_not() == reason


def test_what_nobody_knows_is_no_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--servers", "apache"])
    assert ended.value.code == 2
    assert "'apache': expected some of aioquic," in capsys.readouterr().err
