"""lb/admin/api.py: what each request does, and what is said about one that is wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lb.admin import api
from lb.admin.api import Balancer
from lb.admin.http import Problem
from lb.operations import Refused
from tests.admin.client import DEADLINE, Answer, ask, raw, status_of
from tests.admin.fake import FakeBalancer, Running, running
from tests.admin.test_server import eventually
from tests.builders import KEY, RESET_KEY, cid_of

B0 = "/v1/services/web/backends/b0"


@pytest.fixture
def made() -> Iterator[Running]:
    with running() as made:
        made.balancer.tick()
        yield made


def get(made: Running, path: str) -> Any:
    answer = ask(made.address, "GET", path)
    assert answer.status == 200
    return answer.json


def lasting(backend: dict[str, Any]) -> dict[str, Any]:
    """Without what is another from one moment to the next."""
    return {name: value for name, value in backend.items() if name not in ("since", "last-packet")}


# What it shows.


def test_the_state_is_all_there_is_to_know(made: Running) -> None:
    answer = ask(made.address, "GET", "/v1/state")
    state = answer.json

    assert (answer.status, answer.headers["etag"], answer.headers["content-type"]) == (200, '"1"', "application/json")
    assert (state["engine"], state["workers"], state["xdp"], state["rights"]) == ("udp", 2, None, "write")
    web, video = state["services"]
    assert [b["state"] for b in web["backends"]] == ["active", "active", "active", "draining", "down"]
    assert [c["phase"] for c in web["cid-configs"]] == ["retiring", "active", "prepared"]
    assert video["name"] == "video"
    assert lasting(get(made, B0)) == lasting(web["backends"][0])


def test_no_secret_ever_leaves_it(made: Running) -> None:
    told = b"".join(
        ask(made.address, "GET", path).body
        for path in ("/v1/state", "/v1/history", "/v1/configuration", "/v1/rotation", "/v1/openapi.json", "/metrics")
    ).lower()

    for secret in (KEY, KEY[::-1], KEY[:8] * 2, RESET_KEY, RESET_KEY[::-1]):
        assert secret not in told
        assert secret.hex().encode() not in told
    assert b"a seed" not in told
    assert b'"seed":true' in told


def test_history_and_rotation(made: Running) -> None:
    made.balancer.tick()
    made.balancer.tick()
    history = get(made, "/v1/history")
    rotation = get(made, "/v1/rotation")

    assert history["interval"] == 1.0
    assert len(history["services"]["web"]["verdicts"]["cid"]) == 2
    assert len(history["services"]["web"]["backends"]["b0"]) == 2
    assert [(slot["config-id"], slot["phase"]) for slot in rotation["web"]] == [
        (0, "retiring"),
        (1, "active"),
        (2, "prepared"),
    ]


def test_a_cid_and_a_datagram_are_explained_by_the_tables_in_force(made: Running) -> None:
    cid = cid_of(0).hex()
    by_cid = ask(made.address, "POST", "/v1/explain", {"cid": cid, "service": "web"}).json
    by_datagram = ask(made.address, "POST", "/v1/explain", {"datagram": "40" + cid, "service": "web"}).json
    several = ask(
        made.address, "POST", "/v1/explain", {"datagrams": [{"datagram": "40" + cid, "client": "192.0.2.7:1"}] * 3}
    ).json

    assert by_cid["services"][0]["server-id"] == by_datagram["services"][0]["server-id"] == "a0000000"
    assert len(several["datagrams"]) == 3
    for wrong in ({"cid": cid, "service": "none"}, {"cid": cid, "client": "somewhere"}):
        answer = ask(made.address, "POST", "/v1/explain", wrong)
        assert answer.status == 422
        assert answer.json["error"].split(":")[0] in wrong


def test_head_is_get_without_a_body(made: Running) -> None:
    for path in ("/v1/state", "/metrics", "/livez"):
        answer = ask(made.address, "HEAD", path)
        assert (answer.status, answer.body) == (200, b"")


def test_no_answer_may_be_kept_or_framed_or_run_scripts_from_elsewhere(made: Running) -> None:
    for path in ("/v1/state", "/", "/nowhere"):
        headers = ask(made.address, "GET", path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers


# What it changes.


def test_drain_weight_and_fence_last_until_they_are_taken_back(made: Running) -> None:
    for change, said, state in (
        ({"drain": True}, ["drain"], "draining"),
        ({"weight": 7}, ["drain", "weight"], "draining"),
        ({"fence": True}, ["drain", "weight", "fence"], "fenced"),
        ({"fence": False, "drain": None}, ["weight"], "active"),
        ({"weight": None}, [], "active"),
    ):
        answer = ask(made.address, "PATCH", B0, change)
        assert (answer.status, answer.json["overridden"], answer.json["state"]) == (200, said, state)
        assert lasting(answer.json) == lasting(get(made, B0))
        assert answer.headers["etag"] == f'"{made.balancer.generation}"'
    assert {who for who, _ in made.balancer.changes} == {"127.0.0.1 without proof"}
    assert len(made.balancer.changes) == 5


def test_a_reload_says_what_changed(made: Running) -> None:
    assert ask(made.address, "POST", "/v1/reload", {}).json == {
        "generation": 2,
        "changes": ["services.web.backends.b0.weight: 1 -> 2"],
    }


def test_a_reload_of_a_bad_file_says_everything_that_is_wrong(made: Running) -> None:
    made.balancer.reload_errors = ("services[0].name: 5: expected a name", "services[1]: nothing")
    answer = ask(made.address, "POST", "/v1/reload", {})

    assert answer.status == 422
    assert answer.json["reasons"] == ["services[0].name: 5: expected a name", "services[1]: nothing"]
    assert "nothing was changed" in answer.json["error"]


def test_rotation_steps(made: Running) -> None:
    path = "/v1/services/web/rotation"
    done = ask(made.address, "POST", path, {"do": "prepare", "config-id": 4, "server-id-length": 3, "plaintext": True})
    in_use = ask(made.address, "POST", path, {"do": "prepare", "config-id": 1})
    nowhere = ask(made.address, "POST", "/v1/services/none/rotation", {"do": "retire", "config-id": 1})

    assert (done.status, done.json["generation"]) == (200, 2)
    assert (in_use.status, in_use.json["reasons"]) == (409, ["config ID 1 is in use", "expected one that is free"])
    assert nowhere.status == 404


def test_an_upgrade_names_the_successor(made: Running) -> None:
    assert ask(made.address, "POST", "/v1/upgrade", {}).json == {"pid": 4242}


# What is wrong.


@pytest.mark.parametrize(
    ("method", "path", "given", "status", "error"),
    [
        ("GET", "/nowhere", None, 404, "/nowhere: see /v1/openapi.json"),
        ("GET", "/v1/state/", None, 404, "/v1/state/: see /v1/openapi.json"),
        ("GET", "/v1/services/none/backends/b0", None, 404, "none, b0: there is no such backend"),
        ("GET", "/v1/services/web/backends/%62%30%0a", None, 404, 'web, "b0\\n": there is no such backend'),
        ("PATCH", "/v1/services/web/backends/none", {}, 404, "web, none: there is no such backend"),
        ("GET", "/page/..%2fapi.py", None, 404, "../api.py: the page has no such part"),
        ("DELETE", "/v1/state", None, 405, "DELETE: expected GET, HEAD"),
        ("POST", B0, {}, 405, "POST: expected GET, HEAD, PATCH"),
        ("GET", "/v1/state?full=1", None, 400, "?full=1: expected no query"),
        ("GET", "/v1/state", b"{}", 400, "a body: expected none"),
        ("PATCH", B0, b"", 400, "not JSON: Expecting value at line 1, column 1"),
        ("PATCH", B0, b"{drain", 400, None),
        ("PATCH", B0, [], 400, "a list: expected an object"),
        ("PATCH", B0, {"drain": 1}, 400, "drain: 1: expected true or false or null"),
        ("PATCH", B0, {"weight": 1001}, 400, "weight: 1001: expected an integer, 0 to 1000 or null"),
        ("PATCH", B0, {"weight": -1}, 400, "weight: -1: expected an integer, 0 to 1000 or null"),
        ("PATCH", B0, {"fence": None}, 400, "fence: null: expected true or false"),
        ("PATCH", B0, {"weigth": 1}, 400, "weigth: unknown; there is drain, weight, fence"),
        ("POST", "/v1/reload", {"force": True}, 400, "force: unknown; there is nothing to say"),
        ("POST", "/v1/services/web/rotation", {}, 400, 'do: null: expected "prepare" or "activate" or "retire"'),
        ("POST", "/v1/services/web/rotation", {"do": "activate"}, 400, None),
        ("POST", "/v1/services/web/rotation", {"do": "retire", "config-id": 7}, 400, None),
        ("POST", "/v1/explain", {}, 400, None),
        ("POST", "/v1/explain", {"cid": "0"}, 400, 'cid: "0": expected hex digits, two for each octet'),
        ("POST", "/v1/explain", {"cid": "00", "datagram": "00"}, 400, None),
    ],
)
def test_what_is_wrong_is_said(
    made: Running, method: str, path: str, given: Any, status: int, error: str | None
) -> None:
    answer = ask(made.address, method, path, given)

    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    if error is not None:
        assert answer.json["error"] == error
    assert set(answer.json) <= {"error", "reasons"}
    assert made.balancer.changes == []
    if status == 405:
        assert answer.headers["allow"] == answer.json["error"].partition("expected ")[2]


def test_several_mistakes_are_named_at_once(made: Running) -> None:
    answer = ask(made.address, "PATCH", B0, {"drain": 1, "weight": "x"})

    assert len(answer.json["reasons"]) == 2
    assert answer.json["error"] == answer.json["reasons"][0]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": ""},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_a_body_that_is_not_said_to_be_json_is_415(made: Running, headers: dict[str, str]) -> None:
    assert ask(made.address, "POST", "/v1/reload", {}, headers=headers).status == 415
    assert made.balancer.changes == []


def test_a_change_without_a_body_is_415_or_400(made: Running) -> None:
    head = b"POST /v1/reload HTTP/1.1\r\nHost: localhost\r\n"
    assert status_of(raw(made.address, head + b"\r\n")) == 415
    assert status_of(raw(made.address, head + b"Content-Type: application/json\r\n\r\n")) == 400
    assert made.balancer.changes == []


def test_a_body_that_is_broken_is_400(made: Running) -> None:
    head = b"POST /v1/reload HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert status_of(raw(made.address, head + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n{}\r\n0\r\n\r\n")) == 400
    assert made.balancer.changes == []


# One after the other.


def test_of_two_who_change_the_same_state_the_loser_is_told(made: Running) -> None:
    etag = ask(made.address, "GET", B0).headers["etag"]
    first = ask(made.address, "PATCH", B0, {"drain": True}, headers={"If-Match": etag})
    second = ask(made.address, "PATCH", B0, {"drain": False}, headers={"If-Match": etag})
    third = ask(made.address, "PATCH", B0, {"drain": False}, headers={"If-Match": first.headers["etag"]})

    assert (first.status, second.status, third.status) == (200, 412, 200)
    assert second.json == {"error": "the generation is 2, and not 1"}
    assert [what for _, what in made.balancer.changes] == ["web.b0 {'drain': True}", "web.b0 {'drain': False}"]


def test_of_many_at_once_one_wins(made: Running) -> None:
    def one(number: int) -> int:
        return ask(made.address, "PATCH", B0, {"weight": number}, headers={"If-Match": '"1"'}).status

    with ThreadPoolExecutor(10) as pool:
        statuses = Counter(pool.map(one, range(20)))
    assert statuses == {200: 1, 412: 19}
    assert len(made.balancer.changes) == 1


def test_without_a_condition_all_are_made_one_after_the_other(made: Running) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda n: ask(made.address, "PATCH", B0, {"weight": n}), range(20)))
    assert {answer.status for answer in answers} == {200}
    assert made.balancer.generation == 21


@pytest.mark.parametrize(
    ("given", "status"),
    [('"1"', 200), ("1", 200), ("*", 200), ('"2"', 412), ('W/"1"', 400), ('"1", "2"', 400), ("one", 400), ('""', 400)],
)
def test_conditions(made: Running, given: str, status: int) -> None:
    assert ask(made.address, "POST", "/v1/reload", {}, headers={"If-Match": given}).status == status


# A balancer that is late, or in trouble.


def test_a_balancer_that_does_not_answer_is_503_and_so_is_its_scrape(
    made: Running, caplog: pytest.LogCaptureFixture
) -> None:
    made.balancer.hold.clear()
    with ThreadPoolExecutor(4) as pool:
        paths = ["/v1/state", "/metrics", "/readyz", B0]
        answers = list(pool.map(lambda path: ask(made.address, "GET", path), paths))
    assert [answer.status for answer in answers] == [503] * 4
    assert answers[0].json == {"error": "the balancer did not answer in time"}
    assert ask(made.address, "GET", "/livez").status == 200  # its loop turns
    made.loop.call_soon_threadsafe(made.balancer.hold.set)
    assert ask(made.address, "GET", "/v1/state").status == 200
    assert [record.msg for record in caplog.records] == ["metrics-error"]


def test_a_loop_that_does_not_turn_is_not_alive(made: Running) -> None:
    release = asyncio.run_coroutine_threadsafe(_block(made), made.loop)
    assert ask(made.address, "GET", "/livez").status == 503
    made.balancer.let_go.set()
    release.result(DEADLINE)
    assert ask(made.address, "GET", "/livez").status == 200


async def _block(made: Running) -> None:
    made.balancer.let_go.wait(DEADLINE)


def test_a_change_that_takes_too_long_is_made_all_the_same() -> None:
    async def story() -> None:
        balancer = FakeBalancer()
        asked = Balancer(balancer, asyncio.get_running_loop())
        balancer.hold.clear()
        with pytest.raises(Problem) as raised:
            await asked.ask(balancer.reload(who="me"), 0.05)
        assert raised.value.status == 503
        balancer.hold.set()
        async with asyncio.timeout(DEADLINE):
            while not balancer.changes:  # noqa: ASYNC110 - nobody would set an event
                await asyncio.sleep(0.01)

    asyncio.run(story())


def test_nobody_is_shown_an_older_state_than_there_was_when_he_asked() -> None:
    """Snapshots are shared by those who ask at the same time, and begun after the last of them asked."""

    async def story() -> None:
        balancer = FakeBalancer()
        asked = Balancer(balancer, asyncio.get_running_loop())
        for _ in range(3):
            first = asyncio.create_task(asked.snapshot())
            await asyncio.sleep(0)
            await balancer.change("web", "b0", {"weight": 3}, who="me")
            second = asyncio.create_task(asked.snapshot())
            assert (await second).generation == balancer.generation
            await first
        balancer.snapshots = 0
        await asyncio.gather(*(asked.snapshot() for _ in range(1000)))
        assert balancer.snapshots <= 2

    asyncio.run(story())


def test_what_nobody_expected_is_500_and_in_the_log(
    made: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "describe", _broken)
    answer = ask(made.address, "GET", "/v1/configuration")

    assert (answer.status, answer.json) == (500, {"error": "see the log"})
    assert "boom" in caplog.text
    assert ask(made.address, "GET", "/v1/state").status == 200


def _broken(_config: object) -> dict[str, Any]:
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("error", "status", "reasons"),
    [
        (Refused("failed", "the successor died"), 422, None),
        (Refused("invalid", "no", "and no"), 422, ["no", "and no"]),
        (OSError(98, "Address already in use"), 422, None),
        (TimeoutError(), 503, None),
    ],
)
def test_what_operations_raise_is_told(made: Running, error: Exception, status: int, reasons: list[str] | None) -> None:
    made.balancer.trouble = error
    answer = ask(made.address, "POST", "/v1/upgrade", {})

    assert (answer.status, answer.json.get("reasons")) == (status, reasons)
    assert answer.json["error"]


def test_the_log_is_told_of_refusals_at_a_bounded_rate(made: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def refused() -> list[Any]:
        return [record.__dict__["fields"] for record in caplog.records if record.msg == "admin-refused"]

    def attack() -> Answer:
        return ask(made.address, "GET", "/v1/state", headers={"Host": "evil.example"})

    for _ in range(50):
        assert attack().status == 403
    assert len(refused()) < 25
    eventually(lambda: attack().status == 403 and "more" in refused()[-1])
    assert json.dumps([{**fields, "peer": str(fields["peer"])} for fields in refused()])
