"""The metrics port: what anybody may see there, and that nobody can change anything by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from lb.address import Address
from lb.admin import server
from lb.admin.openapi import OPERATIONS
from lb.keys import AdminConfig
from lb.routing import BackendState
from tests.admin.certificates import Authority
from tests.admin.client import ask, connect, raw, status_of
from tests.admin.fake import LOOPBACK, Running, running
from tests.admin.test_server import eventually

TEXT = "text/plain; charset=utf-8"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Running]:
    with running(addresses=[tmp_path / "admin.sock"], metrics=LOOPBACK) as made:
        yield made


def port(made: Running) -> Address:
    address = made.server.metrics_address
    assert address is not None
    return address


def test_metrics_are_there_for_anybody_in_both_formats(made: Running) -> None:
    answer = ask(port(made), "GET", "/metrics?name[]=x", headers={"Host": "lb.example"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    names = {family.name for family in parse_text(answer.body.decode())}
    assert {"quiclb_datagrams", "quiclb_backend_flows", "process_open_fds"} <= names

    answer = ask(port(made), "GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = parse_openmetrics(answer.body.decode())  # type: ignore[no-untyped-call]
    assert {family.name for family in families} == names


def test_probes(made: Running) -> None:
    for path in ("/livez", "/readyz"):
        answer = ask(port(made), "GET", path)
        assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"ok\n", TEXT)


def test_all_backends_down_is_no_reason_to_be_restarted(made: Running) -> None:
    down = {name: dict.fromkeys(table.index, BackendState.DOWN) for name, table in made.balancer.tables.items()}
    made.balancer.states = down
    assert ask(made.server.addresses[0], "POST", "/v1/reload", {}).status == 200
    assert all(table.fail_open for table in made.balancer.tables.values())
    for path in ("/livez", "/readyz"):
        assert ask(port(made), "GET", path).status == 200


def test_without_tables_it_lives_and_is_not_ready(made: Running) -> None:
    made.balancer.tables.clear()
    assert ask(port(made), "GET", "/livez").status == 200
    assert ask(port(made), "GET", "/readyz").status == 503


def test_nothing_of_the_api_is_there_and_nothing_can_be_changed(made: Running) -> None:
    public = {"/", "/metrics", "/livez", "/readyz"}
    for operation in OPERATIONS:
        status = ask(port(made), operation.method, operation.path, {} if operation.request else None).status
        assert status == (200 if operation.path in public else 404 if operation.method == "GET" else 405)
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        answer = ask(port(made), method, "/metrics")
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    assert made.balancer.changes == []


def test_it_needs_no_token_and_speaks_no_tls(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x" * 16)
    token.chmod(0o600)
    authority = Authority(tmp_path)
    pair = authority.issue("localhost")
    config = AdminConfig(write_token_file=token, certificate_file=pair.certificate, key_file=pair.key)
    with running(config, metrics=LOOPBACK) as made:
        assert ask(port(made), "GET", "/metrics").status == 200
        assert ask(made.address, "GET", "/metrics", tls=authority.client()).status == 401


def test_connections_are_bounded_apart_from_the_apis(made: Running) -> None:
    held = [connect(port(made)) for _ in range(server.MAX_SCRAPES)]
    eventually(lambda: status_of(raw(port(made), b"")) == 503)
    assert ask(made.server.addresses[0], "GET", "/metrics").status == 200
    for sock in held:
        sock.close()
    eventually(lambda: ask(port(made), "GET", "/metrics").status == 200)


def test_a_scrape_that_fails_is_503_logged_once_and_logged_again_after_a_good_one(
    made: Running, caplog: pytest.LogCaptureFixture
) -> None:
    counters = made.balancer.counters
    for _ in range(2):
        for _ in range(3):
            made.balancer.counters = None  # type: ignore[assignment] # whatever it is
            assert ask(port(made), "GET", "/metrics").status == 503
        made.balancer.counters = counters
        assert ask(port(made), "GET", "/metrics").status == 200
    assert [record.msg for record in caplog.records] == ["metrics-error"] * 2
