"""Changing a running balancer, a real process each, by its API: nothing is lost, and everybody is told."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from lb.admin.client import Client, RefusedError, Where
from tests.builders import short
from tests.fleet import eventually, udp_socket
from tests.test_control import FakeServer, Process, Site, watched


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def api(site: Site) -> Client:
    return Client(Where(site.directory / "run" / "admin.sock"))


def backend(site: Site, name: str) -> dict[str, Any]:
    return api(site).backend("web", name)


def new_connections(site: Site, count: int = 60) -> set[str]:
    """Who gets clients whose packets no connection ID routes."""
    clients = [udp_socket() for _ in range(count)]
    try:
        for client in clients:
            client.sendto(short(b"\xff" + os.urandom(19)), site.vip)
        heard = set()
        for _ in range(count):
            heard.add(str(eventually(lambda: _hear(site))))
        return heard
    finally:
        for client in clients:
            client.close()


def _hear(site: Site) -> str | None:
    for i, sock in enumerate(site.backends):
        sock.setblocking(False)
        try:
            sock.recv(2000)
        except BlockingIOError:
            continue
        finally:
            sock.settimeout(5)
        return f"b{i}"
    return None


def test_a_drained_backend_keeps_its_connections_and_gets_no_new_ones_even_after_a_crash(site: Site) -> None:
    process = site.start()
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)
        answer = api(site).change("web", "b1", {"drain": True})
        assert (answer["state"], answer["overridden"]) == ("draining", ["drain"])
        site.round_trip(client, site.cid(1), 1)
        assert new_connections(site) == {"b0"}

        process.send(signal.SIGKILL)
        process.wait()
        again = site.start()
        assert backend(site, "b1")["state"] == "draining"
        site.round_trip(client, site.cid(1), 1)
        again.send(signal.SIGHUP)
        again.event("reloaded")
        assert new_connections(site) == {"b0"}

        assert api(site).change("web", "b1", {"drain": None})["overridden"] == []
        assert new_connections(site) == {"b0", "b1"}
    told = [line["who"] for line in process.events("changed")]
    assert len(told) == 1
    assert "uid" in told[0]


def test_the_only_backend_is_fenced_and_its_client_is_told_at_once(tmp_path: Path) -> None:
    """Not after any hold-off, and although it is the last one: it is the operator's word."""
    site = Site(tmp_path, backends=1)
    try:
        site.start()
        with udp_socket() as listens, udp_socket() as talks:
            site.round_trip(listens, site.cid(0), 0)
            assert api(site).change("web", "b0", {"fence": True})["state"] == "fenced"
            assert len(listens.recv(2000)) >= 21  # pushed: it said nothing
            talks.sendto(short(site.cid(0)), site.vip)
            assert len(talks.recv(2000)) >= 21
            assert api(site).change("web", "b0", {"fence": False})["state"] == "active"
            site.round_trip(talks, site.cid(0), 0)
    finally:
        site.close()


def test_weights_change_and_go_back_to_the_file(site: Site) -> None:
    site.start()
    assert api(site).change("web", "b0", {"weight": 3})["ring-share"] == pytest.approx(0.75, abs=0.01)
    assert backend(site, "b1")["ring-share"] == pytest.approx(0.25, abs=0.01)
    api(site).change("web", "b1", {"weight": 0})
    assert new_connections(site) == {"b0"}
    with pytest.raises(RefusedError) as refused:
        api(site).change("web", "b0", {"weight": 0})
    assert refused.value.status == 409
    for name in ("b0", "b1"):
        assert api(site).change("web", name, {"weight": None})["weight"] == 1
    assert backend(site, "b0")["ring-share"] == pytest.approx(0.5, abs=0.01)


def test_a_reload_says_what_it_changed_or_everything_that_is_wrong(site: Site) -> None:
    site.write(backends=[0])
    process = site.start()
    site.write()
    answer = api(site).reload()
    assert len(answer["changes"]) == 1
    assert answer["changes"][0].startswith("services.web.backends.b1: added (")
    assert api(site).reload()["changes"] == []

    site.service_options = "health: {interval: 1, fall: 0}"
    site.write()
    with pytest.raises(RefusedError) as refused:
        api(site).reload()
    assert refused.value.status == 422
    assert len(refused.value.reasons) == 2
    state = api(site).state()
    assert state["reload"]["errors"] == list(refused.value.reasons)
    assert (state["reload"]["taken"], state["reload"]["refused"]) == (2, 1)
    assert site.metric("quiclb_config_last_reload_successful") == 0
    assert [line["reason"] for line in process.events("reload-refused")] == list(refused.value.reasons)
    assert backend(site, "b1")["state"] == "active"  # the one in force stays


def test_of_two_who_change_the_same_thing_at_once_one_is_told(site: Site) -> None:
    """Both have seen the same generation: the first change makes it another one."""
    site.start()
    seen = api(site).state()["generation"]
    answers: list[str] = []

    def change(weight: int) -> None:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(10)
        connection.sock.connect(str(site.directory / "run" / "admin.sock"))
        body = json.dumps({"weight": weight})
        headers = {"Content-Type": "application/json", "If-Match": f'"{seen}"'}
        connection.request("PATCH", "/v1/services/web/backends/b0", body, headers)
        response = connection.getresponse()
        answers.append(f"{response.status} {response.read().decode()}")
        connection.close()

    threads = [threading.Thread(target=change, args=(weight,)) for weight in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [answer for answer in answers if answer.startswith("200 ")]
    told = [answer for answer in answers if answer.startswith("412 ")]
    assert (len(taken), len(told)) == (1, 3)
    assert backend(site, "b0")["weight"] == json.loads(taken[0][4:])["weight"]


def test_whoever_is_not_there_cannot_be_changed(site: Site) -> None:
    site.start()
    for service, name in (("web", "b9"), ("dns", "b0")):
        with pytest.raises(RefusedError) as refused:
            api(site).change(service, name, {"drain": True})
        assert refused.value.status == 404


def test_a_watched_file_is_reloaded_when_it_changes_or_one_of_its_keys(site: Site) -> None:
    site.write(backends=[0])
    process = site.start(options=["--watch"])
    site.write()
    event = process.event("reloaded")
    assert (event["who"], event["changes"]) == ("watch", 1)
    (site.directory / "lb.yaml").write_text("nonsense")
    assert process.event("reload-refused")["who"] == "watch"
    site.write()
    process.event("reloaded", count=2)
    key = site.directory / "cid.key"
    key.write_text(key.read_text().upper())
    process.event("reloaded", count=3)


def test_after_a_rise_a_backend_begins_slowly(site: Site) -> None:
    process, servers = watched(site, interval="100ms", hold_off="60s")
    assert all(isinstance(server, FakeServer) for server in servers)
    site.service_options = site.service_options.replace("fall: 2", "fall: 2, slow-start: 1h")
    site.write()
    api(site).reload()
    assert backend(site, "b1")["effective-weight"] == 1
    servers[1].silent.set()
    process.event("backend-down")
    servers[1].silent.clear()
    process.event("backend-up")
    slow = eventually(lambda: (found := backend(site, "b1"))["state"] == "active" and found)
    assert (slow["weight"], slow["effective-weight"]) == (1, pytest.approx(0.1))
    assert slow["ring-share"] == pytest.approx(1 / 11, abs=0.01)


def test_who_was_down_gets_nobody_from_the_next_process_until_it_answers(site: Site) -> None:
    """Killed or upgraded: it does not have to find out again who is down, at the cost of new connections."""
    process, servers = watched(site, interval="1s", hold_off="60s")
    servers[1].silent.set()
    process.event("backend-down")
    eventually((site.directory / "run" / "down.json").exists)
    eventually(lambda: "b1" in (site.directory / "run" / "down.json").read_text())
    process.kill()
    again = site.start()
    assert backend(site, "b1")["state"] == "down"
    assert again.events("backend-down") == []
    servers[1].silent.clear()
    again.event("backend-up")
    eventually(lambda: backend(site, "b1")["state"] == "active")
    eventually(lambda: "b1" not in (site.directory / "run" / "down.json").read_text())


def test_the_state_shows_who_is_asked_for_and_when_last(site: Site) -> None:
    site.start()
    with udp_socket() as client:
        eventually(lambda: site.round_trip(client, site.cid(1), 1) and backend(site, "b1")["last-packet"] is not None)
        found = eventually(lambda: site.round_trip(client, site.cid(1), 1) and _busy(backend(site, "b1")))
    assert found is not None
    assert found["flows"] == 1
    assert found["last-packet"] <= 5
    [slot] = api(site).state()["services"][0]["cid-configs"]
    assert (slot["config-id"], slot["phase"], slot["algorithm"]) == (0, "active", "single-pass")
    assert slot["packets"] >= 2


def _busy(found: dict[str, Any]) -> dict[str, Any] | None:
    return found if found["packets-per-second"] > 0 else None


class Load(threading.Thread):
    """A client that sends numbered datagrams at a pace, and a backend that answers each; both count what comes.

    It runs in a `with` block, unless it is ended before.
    """

    def __init__(self, site: Site, backend: int, *, pause: float = 0.0005) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self.heard: list[int] = []  # at the backend
        self.answered: list[int] = []  # back at the client
        self.seen_as: set[tuple[str, int]] = set()
        self._site, self._backend, self._pause = site, site.backends[backend], pause
        self._cid = site.cid(backend)
        self._ended = threading.Event()
        self._client = udp_socket()

    def run(self) -> None:
        backend, client = self._backend, self._client
        backend.setblocking(False)
        client.setblocking(False)
        while not self._ended.wait(self._pause):
            client.sendto(b"\x41" + self._cid + self.sent.to_bytes(8), self._site.vip)
            self.sent += 1
            self._take()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._client.close()

    def end(self) -> None:
        """Stop sending, and wait for what is on its way."""
        self._ended.set()
        self.join()
        eventually(lambda: self._take() == self.sent)

    def _take(self) -> int:
        """Read what has come. Returns how many answers came until now."""
        for sock, numbers in ((self._backend, self.heard), (self._client, self.answered)):
            while True:
                try:
                    datagram, sender = sock.recvfrom(2000)
                except BlockingIOError:
                    break
                numbers.append(int.from_bytes(datagram[-8:]))
                if sock is self._backend:
                    self.seen_as.add(sender)
                    sock.sendto(datagram, sender)
        return len(self.answered)


@contextlib.contextmanager
def successor_of(site: Site, predecessor: Process) -> Iterator[int]:
    """Upgrade, and end the successor when the block does."""
    pid = api(site).upgrade()["pid"]
    try:
        assert predecessor.wait() == 0
        yield pid
    finally:
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: _is_over(pid), 15)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_upgrade_loses_no_datagram_and_no_port(site: Site, workers: int) -> None:
    """A thousand a second or so, both ways, through a new process: each arrives once, and from the same port."""
    site.options = f"workers: {workers}"
    site.write()
    process = site.start()
    with Load(site, 1) as load:
        eventually(lambda: len(load.answered) > 200)
        with successor_of(site, process) as pid:
            before = len(load.answered)
            eventually(lambda: len(load.answered) > before + 200)
            load.end()
            assert load.heard == list(range(load.sent))
            assert sorted(load.answered) == list(range(load.sent))
            assert len(load.seen_as) == 1
            assert api(site).state()["flows"] == 1
            assert pid != process.process.pid
    assert process.event("handed-over")["successor"] == pid


def test_an_upgrade_that_does_not_come_about_is_told_and_loses_nothing_either(site: Site) -> None:
    process = site.start()
    with Load(site, 1) as load:
        eventually(lambda: len(load.answered) > 100)
        good = (site.directory / "lb.yaml").read_text()
        (site.directory / "lb.yaml").write_text("nonsense")
        with pytest.raises(RefusedError, match="status 2"):
            api(site).upgrade()
        (site.directory / "lb.yaml").write_text(good)
        before = len(load.answered)
        eventually(lambda: len(load.answered) > before + 100)
        load.end()
        assert sorted(load.answered) == list(range(load.sent))
    assert process.process.poll() is None
    assert api(site).change("web", "b1", {"drain": True})["state"] == "draining"  # the old one is in charge


def test_a_reload_and_a_drain_lose_no_datagram(site: Site) -> None:
    process = site.start()
    changes: list[dict[str, Any]] = [{"drain": True}, {"weight": 5}, {"drain": None, "weight": None}]
    with Load(site, 1) as load:
        eventually(lambda: len(load.answered) > 100)
        for number, change in enumerate(changes):
            api(site).change("web", "b1", change)
            site.service_options = f"health: {{probe: none, fall: {number + 4}}}"
            site.write()
            assert len(api(site).reload()["changes"]) == 1
        load.end()
        assert load.heard == list(range(load.sent))
        assert sorted(load.answered) == list(range(load.sent))
    process.event("reloaded", count=3)


def test_what_the_operator_said_and_the_upgrade_by_signal_go_together(site: Site) -> None:
    process = site.start()
    api(site).change("web", "b1", {"drain": True})
    process.send(signal.SIGUSR2)
    successor = process.event("handed-over")["successor"]
    try:
        assert process.wait() == 0
        assert backend(site, "b1")["state"] == "draining"
    finally:
        os.kill(successor, signal.SIGTERM)
        eventually(lambda: _is_over(successor), 15)


def _is_over(pid: int) -> bool:
    try:
        return b" Z " in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
