"""The API of a real balancer, a process of its own: what it says is what packets do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import pytest

from lb.admin.openapi import ANSWERS, SCHEMAS, document
from tests.admin.client import Answer, ask, connect
from tests.builders import KEY, RESET_KEY
from tests.fleet import eventually, udp_socket
from tests.test_control import Site

B0, B1 = "/v1/services/web/backends/b0", "/v1/services/web/backends/b1"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def socket_of(site: Site) -> Path:
    return site.directory / "run" / "admin.sock"


def get(site: Site, path: str) -> Answer:
    answer = ask(socket_of(site), "GET", path)
    assert answer.status == 200, answer.body
    return answer


def test_by_default_it_is_a_unix_socket_that_goes_with_the_process(site: Site) -> None:
    process = site.start()
    assert get(site, "/v1/state").json["rights"] == "write"
    assert os.stat(socket_of(site)).st_mode & 0o777 == 0o600
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert not socket_of(site).exists()


def test_a_killed_one_leaves_a_socket_that_the_next_one_replaces(site: Site) -> None:
    site.start().kill()
    assert socket_of(site).exists()
    site.start()
    assert get(site, "/readyz").body == b"ok\n"


def test_all_that_is_shown_has_the_shape_that_is_described(site: Site) -> None:
    site.start()
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)
    # Rates and rotations are looked at once a second.
    eventually(lambda: get(site, "/v1/history").json["services"])
    eventually(lambda: get(site, "/v1/rotation").json["web"][0]["packets"])
    for name, path in (
        ("state", "/v1/state"),
        ("history", "/v1/history"),
        ("rotation", "/v1/rotation"),
        ("backend", B1),
        ("openapi", "/v1/openapi.json"),
        ("configuration", "/v1/configuration"),
    ):
        jsonschema.Draft202012Validator({"components": {"schemas": SCHEMAS}, **ANSWERS[name]}).validate(
            get(site, path).json
        )
    state = get(site, "/v1/state").json
    web = state["services"][0]
    assert web["verdicts"]["cid"] == 1
    assert web["backends"][1]["datagrams-to"] == web["backends"][1]["datagrams-from"] == 1
    assert (web["cid-configs"][0]["phase"], web["cid-configs"][0]["packets"]) == ("active", 1)
    assert state["flows"] == 1
    for secret in (KEY, RESET_KEY):
        assert secret.hex().encode() not in get(site, "/v1/configuration").body


def test_a_drained_backend_gets_no_new_connections_and_keeps_the_old_until_it_is_undrained(site: Site) -> None:
    process = site.start()
    assert get(site, B1).json["ring-share"] > 0.4
    drained = ask(socket_of(site), "PATCH", B1, {"drain": True})

    assert (drained.json["state"], drained.json["drain"], drained.json["ring-share"]) == ("draining", True, 0.0)
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)
    changed = process.event("changed")
    assert changed["who"] == f"uid {os.getuid()} by unix socket"
    assert "b1" in json.dumps(changed)

    undrained = ask(socket_of(site), "PATCH", B1, {"drain": None})
    assert (undrained.json["state"], undrained.json["overridden"]) == ("active", [])


def test_a_fenced_backend_is_dead_at_once_and_its_client_is_told(site: Site) -> None:
    site.start()
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)
        assert ask(socket_of(site), "PATCH", B1, {"fence": True}).json["state"] == "fenced"
        assert len(client.recv(2000)) >= 42  # a stateless reset, unasked
        explained = ask(socket_of(site), "POST", "/v1/explain", {"cid": site.cid(1).hex()}).json
        assert explained["services"][0]["verdict"] == "reset"
    assert get(site, "/v1/state").json["services"][0]["resets"]["pushed"] == 1


def test_a_reload_tells_what_changed_or_all_that_is_wrong(site: Site) -> None:
    site.write(backends=[0])
    site.start()
    before = get(site, "/v1/state").json["generation"]
    site.write()
    answer = ask(socket_of(site), "POST", "/v1/reload", {})
    assert answer.status == 200
    assert answer.json["generation"] != before
    assert any("b1" in line and "added" in line for line in answer.json["changes"])

    site.write(extra="    colour: blue\n    resets: {hold-off: soon}")
    refused = ask(socket_of(site), "POST", "/v1/reload", {})
    assert refused.status == 422
    assert len(refused.json["reasons"]) == 2
    state = get(site, "/v1/state").json
    assert state["reload"]["refused"] == 1
    assert len(state["reload"]["errors"]) == 2
    assert len(state["services"][0]["backends"]) == 2


def test_of_many_who_change_at_once_one_wins(site: Site) -> None:
    site.start()
    etag = get(site, "/v1/state").headers["etag"]

    def one(weight: int) -> int:
        return ask(socket_of(site), "PATCH", B0, {"weight": weight}, headers={"If-Match": etag}).status

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(one, range(2, 10)))
    assert sorted(statuses) == [200] + [412] * 7
    assert get(site, B0).json["weight"] == 2 + statuses.index(200)


def test_over_tcp_a_reader_may_look_and_only_a_writer_may_change_something(site: Site) -> None:
    for name in ("read", "write"):
        (site.directory / f"{name}.token").write_text(f"{name}-token-of-16-and-more\n")
        (site.directory / f"{name}.token").chmod(0o600)
    with udp_socket() as reserved:
        port = reserved.getsockname()[1]
    site.options = (
        f'admin: {{listen: ["127.0.0.1:{port}"], read-token-file: read.token, write-token-file: write.token}}'
    )
    site.write()
    process = site.start()
    address = site.admin._replace(port=port)

    def status(token: str, method: str, path: str, given: object = None) -> int:
        headers = {"Authorization": f"Bearer {token}-token-of-16-and-more"}
        return ask(address, method, path, given, headers=headers).status

    assert [status(who, "GET", "/v1/state") for who in ("no", "read", "write")] == [401, 200, 200]
    assert [status(who, "PATCH", B0, {"drain": True}) for who in ("no", "read", "write")] == [401, 403, 200]
    assert process.event("changed")["who"] == "127.0.0.1 by write token"
    assert process.event("admin-refused")["peer"] == "127.0.0.1"
    assert "token-of-16" not in "".join(process.lines)


def test_slow_clients_of_the_api_hold_up_no_datagram(site: Site) -> None:
    site.start()
    held = []
    try:
        for _ in range(40):
            sock = connect(socket_of(site))
            sock.sendall(b"GET /v1/state HTTP/1.1\r\nHost: localhost\r\n")
            held.append(sock)
        with udp_socket() as client:
            for number in range(50):
                site.round_trip(client, site.cid(number % 2), number % 2)
    finally:
        for sock in held:
            sock.close()


def test_schemathesis_finds_nothing_in_the_real_one(site: Site, tmp_path: Path) -> None:
    """All but the upgrade, which would replace what is tested."""
    with udp_socket() as reserved:
        port = reserved.getsockname()[1]
    site.options = f'admin: {{listen: ["127.0.0.1:{port}"]}}'
    site.write()
    process = site.start()
    (tmp_path / "schemathesis.toml").write_text(
        "[checks.positive_data_acceptance]\n"
        'expected-statuses = ["2xx", "404", "409", "412", "422"]\n'
        '[parameters]\nservice = "web"\nbackend = "b0"\nfile = "index.html"\nIf-Match = "*"\n'
    )
    (tmp_path / "openapi.json").write_text(json.dumps(document("1")))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"),
        *("run", "openapi.json", "--url", f"http://127.0.0.1:{port}", "--exclude-operation-id", "upgrade"),
        *("--max-examples", "5", "--generation-deterministic", "--seed", "1", "--no-color"),
        *("--checks", "all", "--phases", "coverage,fuzzing", "--request-timeout", "40"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=115, check=False)

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert process.events("changed")
    assert process.process.poll() is None
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)


def test_an_upgrade_is_answered_by_the_old_one_and_served_by_the_new(site: Site) -> None:
    process = site.start()
    before = get(site, "/v1/state").json["started-at"]
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)
        answer = ask(socket_of(site), "POST", "/v1/upgrade", {})
        try:
            assert (answer.status, answer.json) == (200, {"pid": answer.json.get("pid")})
            assert process.process.wait(15) == 0
            assert get(site, "/v1/state").json["started-at"] > before
            site.round_trip(client, site.cid(1), 1)
            assert process.event("changed")["who"] == f"uid {os.getuid()} by unix socket"
        finally:
            if "pid" in answer.json:
                os.kill(answer.json["pid"], signal.SIGTERM)
                eventually(lambda: not socket_of(site).exists(), patience=15)
