"""The running balancer, as a process: it starts, reloads, survives, and stops; what it says and what it never says."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId
from lb.config import load_config
from lb.control import Balancer
from lb.packet import parse_header
from tests.builders import KEY, RESET_KEY, server_id, short
from tests.fleet import PATIENCE, eventually, free_port, udp_socket

CONFIG = CidConfig(ConfigId(0), 4, 12, KEY)


class Site:
    """A directory with a configuration and its keys, backends on real sockets, and balancers that run from it."""

    def __init__(self, directory: Path, *, backends: int = 2) -> None:
        self.directory = directory
        self.vip = Address("127.0.0.1", free_port())
        self.admin = Address("127.0.0.1", free_port())
        self.backends = [udp_socket() for _ in range(backends)]
        self.processes: list[Process] = []
        self.options = ""
        self.service_options = "health: {probe: none}"
        for name, octets in (("cid.key", KEY), ("reset.key", RESET_KEY), ("other.key", KEY[::-1])):
            self._secret(name, octets)
        self.write()

    def write(self, *, backends: list[int] | None = None, key_file: str = "cid.key", extra: str = "") -> None:
        lines = [
            f"metrics: {self.admin}",
            f"runtime-directory: {self.directory}/run",
            "log: {format: json}",
            self.options,
            "services:",
            "  - name: web",
            f'    listen: ["{self.vip}"]',
            "    seed: not for everybody",
            "    cid-configs:",
            f"      - {{config-id: 0, server-id-length: 4, nonce-length: 12, key-file: {key_file},",
            "         reset-key-file: reset.key}",
            "    backends:",
        ]
        for i in range(len(self.backends)) if backends is None else backends:
            address = Address(*self.backends[i].getsockname())
            lines.append(f'      - {{name: b{i}, address: "{address}", server-ids: {{0: ["{server_id(i).hex()}"]}}}}')
        lines += [f"    {self.service_options}", extra]
        (self.directory / "lb.yaml").write_text("\n".join(lines) + "\n")

    def start(self, *, ready: bool = True, options: Sequence[str] = ()) -> Process:
        process = Process(self.directory / "lb.yaml", options=options)
        self.processes.append(process)
        if ready:
            process.event("started")
        return process

    def cid(self, backend: int) -> bytes:
        return Codec(CONFIG).encode(server_id(backend), os.urandom(12))

    def round_trip(self, client: socket.socket, cid: bytes, backend: int) -> tuple[str, int]:
        client.sendto(short(cid), self.vip)
        got, seen_as = self.backends[backend].recvfrom(2000)
        assert got == short(cid)
        self.backends[backend].sendto(b"reply", seen_as)
        assert client.recvfrom(2000) == (b"reply", tuple(self.vip))
        return seen_as  # type: ignore[no-any-return]

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        with urllib.request.urlopen(f"http://{self.admin}/metrics", timeout=PATIENCE) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for sock in self.backends:
            sock.close()

    def _secret(self, name: str, octets: bytes) -> None:
        path = self.directory / name
        path.write_text(octets.hex() + "\n")
        path.chmod(0o600)


class Process:
    """`quiclb run` in a process of its own, and the events that it logs. `by` is a command that runs it."""

    def __init__(self, config: Path, by: Sequence[str] = (), options: Sequence[str] = ()) -> None:
        command = [*by, sys.executable, "-m", "lb", "run", "-c", str(config), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def events(self, name: str) -> list[dict[str, Any]]:
        found = (json.loads(line) for line in list(self.lines) if line.startswith("{"))
        return [event for event in found if event["event"] == name]

    def event(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait for the `count`th event of that name."""
        return eventually(lambda: self.events(name)[count - 1 :], patience=15)[0]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def kill(self) -> None:
        self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_forwards_and_stops_cleanly(site: Site, number: signal.Signals) -> None:
    process = site.start()
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)
    process.send(number)

    assert process.wait() == 0
    assert process.event("stopped")


def test_a_mistake_ends_it_with_every_error_and_status_2(site: Site) -> None:
    site.write(extra="    colour: blue\n    resets: {hold-off: soon}")
    process = site.start(ready=False)

    assert process.wait() == 2
    text = "".join(process.lines)
    assert "services[0].colour" in text
    assert "services[0].resets.hold-off" in text


@pytest.mark.parametrize("what", ["listen", "admin"])
def test_an_address_in_use_ends_it_with_its_name_and_status_1(site: Site, what: str) -> None:
    with udp_socket(*site.vip) if what == "listen" else socket.create_server(site.admin):
        process = site.start(ready=False)

        assert process.wait() == 1
        assert str(site.vip if what == "listen" else site.admin) in process.event("failed")["reason"]


def test_a_reload_takes_what_is_right_and_keeps_flows(site: Site) -> None:
    site.write(backends=[0])
    process = site.start()
    with udp_socket() as client:
        cid = site.cid(0)
        port = site.round_trip(client, cid, 0)
        site.write()
        process.send(signal.SIGHUP)
        process.event("reloaded")

        assert site.round_trip(client, cid, 0) == port
        site.round_trip(client, site.cid(1), 1)
    assert site.metric('quiclb_reloads_total{result="ok"}') == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra": "    colour: blue"}, "services[0].colour"),
        ({"extra": "  ]["}, "lb.yaml"),
        ({"key_file": "missing.key"}, "services[0].cid-configs[0].key-file"),
        ({"key_file": "other.key"}, "services[0].cid-configs[0]: config ID 0 is in use"),
        ({"extra": "workers: 3"}, "workers: 3"),
    ],
)
def test_a_reload_that_cannot_be_taken_changes_nothing_and_says_why(
    site: Site, change: dict[str, str], reason: str
) -> None:
    process = site.start()
    with udp_socket() as client:
        cid = site.cid(1)
        port = site.round_trip(client, cid, 1)
        site.write(**change)  # type: ignore[arg-type]
        process.send(signal.SIGHUP)

        assert reason in process.event("reload-refused")["reason"]
        assert site.round_trip(client, cid, 1) == port
    assert site.metric('quiclb_reloads_total{result="refused"}') == 1


def test_a_reload_whose_new_address_is_taken_changes_nothing(site: Site) -> None:
    process = site.start()
    with udp_socket() as taken, udp_socket() as client:
        text = (site.directory / "lb.yaml").read_text()
        second = Address(*taken.getsockname())
        (site.directory / "lb.yaml").write_text(text.replace(f'"{site.vip}"', f'"{site.vip}", "{second}"'))
        process.send(signal.SIGHUP)

        assert str(second) in process.event("reload-refused")["reason"]
        site.round_trip(client, site.cid(1), 1)


def test_killed_and_started_again_it_carries_on_with_the_same_ports(site: Site) -> None:
    process = site.start()
    with udp_socket() as client:
        cid = site.cid(1)
        port = site.round_trip(client, cid, 1)
        process.kill()
        again = site.start()

        assert again.event("flows-restored")["flows"] == 1
        site.backends[1].sendto(b"the rest of a download", port)
        assert client.recvfrom(2000) == (b"the rest of a download", tuple(site.vip))
        assert site.round_trip(client, cid, 1) == port


def test_a_damaged_return_path_file_is_a_word_in_the_log_and_no_more(site: Site) -> None:
    process = site.start()
    process.kill()
    (site.directory / "run" / "flows-0.map").write_bytes(b"\xffnot what it was" * 100)
    again = site.start()

    assert again.event("return-paths-ignored")["reason"] == "not a file of this version of quiclb"
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_balancer_on_the_same_runtime_directory_is_refused_before_it_gets_a_packet(
    site: Site, workers: int
) -> None:
    """Started by mistake, its workers could share the addresses, and take clients away that it leaves in a moment."""
    site.options = f"workers: {workers}"
    site.write()
    first = site.start()
    second = site.start(ready=False)
    assert "run: in use by another quiclb" in second.event("failed")["reason"]
    assert second.wait() == 1
    assert second.events("started") == []
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)
    assert first.events("worker-died") == []


def test_workers_share_the_work_and_one_that_dies_comes_back(site: Site) -> None:
    site.options = "workers: 2"
    site.write()
    process = site.start()
    clients = [udp_socket() for _ in range(24)]
    cids = [site.cid(i % 2) for i in range(24)]
    for i, (client, cid) in enumerate(zip(clients, cids, strict=True)):
        site.round_trip(client, cid, i % 2)
    assert site.metric("quiclb_flows") == 24
    assert site.metric("quiclb_flows_limit") == 200_000
    spawned = children(process.process.pid)
    workers = [pid for pid in spawned if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    process.event("worker-started")

    for i, (client, cid) in enumerate(zip(clients, cids, strict=True)):
        site.round_trip(client, cid, i % 2)
    # Some clients reach the other worker now: they have a flow in each until the old one expires.
    assert 24 <= site.metric("quiclb_flows") <= 48
    assert site.metric("quiclb_datagrams_total") >= 24
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []
    for client in clients:
        client.close()


def test_workers_do_not_outlive_a_parent_that_is_killed(site: Site) -> None:
    site.options = "workers: 2"
    site.write()
    process = site.start()
    workers = children(process.process.pid)
    assert len(workers) >= 2
    process.kill()

    eventually(lambda: not [pid for pid in workers if alive(pid)])
    with udp_socket() as client:
        again = site.start()
        site.round_trip(client, site.cid(1), 1)
        assert not again.events("no-return-paths")


def test_a_reload_reaches_every_worker(site: Site) -> None:
    site.options = "workers: 2"
    site.write(backends=[0])
    process = site.start()
    site.write()
    process.send(signal.SIGHUP)
    process.event("reloaded")

    for _ in range(12):
        with udp_socket() as client:
            site.round_trip(client, site.cid(1), 1)


def test_a_reload_that_is_asked_for_too_early_comes_a_little_later(site: Site) -> None:
    process = site.start(ready=False)

    def holds_hangups_back() -> bool:
        status = Path(f"/proc/{process.process.pid}/status").read_text()
        return bool(int(status.partition("SigBlk:")[2].split()[0], 16) & 1 << signal.SIGHUP - 1)

    eventually(holds_hangups_back)
    process.send(signal.SIGHUP)

    assert process.event("reloaded")


def test_metrics_show_the_tables_in_force_and_not_those_that_were_refused(site: Site) -> None:
    site.write(backends=[0])
    process = site.start()
    with udp_socket() as taken:
        site.vip = Address(*taken.getsockname())
        site.write()
        process.send(signal.SIGHUP)
        assert "cannot listen" in process.event("reload-refused")["reason"]

        assert site.metric("quiclb_backend_state") == 1


def test_what_the_engine_did_not_take_it_is_given_again(site: Site) -> None:
    """An error of one moment must not be the last that the engine hears of health checks."""

    class Engine:
        def __init__(self) -> None:
            self.asked = 0

        async def apply(self, _tables: object) -> None:
            self.asked += 1
            if self.asked == 1:
                raise OSError(errno.ENOMEM, "not now")

    async def story() -> None:
        balancer = Balancer(site.directory / "lb.yaml", load_config(site.directory / "lb.yaml"))
        await balancer._engine.stop()
        engine = Engine()
        balancer._engine = engine  # type: ignore[assignment]
        refreshing = asyncio.create_task(balancer._keep_fresh())
        balancer._stale.set()
        async with asyncio.timeout(PATIENCE):
            while engine.asked < 2:  # noqa: ASYNC110 - nobody would set an event
                await asyncio.sleep(0.01)
        refreshing.cancel()

    asyncio.run(story())


class FakeServer(threading.Thread):
    """A backend that negotiates versions, as every QUIC server must, until it is told to be silent."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.silent = threading.Event()
        self.start()

    def run(self) -> None:
        while True:
            try:
                datagram, client = self.sock.recvfrom(2000)
            except TimeoutError:
                continue
            except OSError:
                return
            header = parse_header(datagram)
            if header is None or header.scid is None or self.silent.is_set():
                continue
            cids = bytes([len(header.scid)]) + header.scid + bytes([len(header.dcid)]) + header.dcid
            self.sock.sendto(b"\xc0" + bytes(4) + cids + b"\0\0\0\1", client)


def watched(site: Site, *, interval: str, hold_off: str) -> tuple[Process, list[FakeServer]]:
    """A balancer that probes its backends, and those, which answer."""
    health = f"health: {{interval: {interval}, timeout: 100ms, fall: 2}}"
    site.service_options = f"{health}\n    resets: {{hold-off: {hold_off}}}"
    site.write()
    servers = [FakeServer(sock) for sock in site.backends]
    return site.start(), servers


def test_a_silent_backend_goes_down_then_dead_and_its_client_is_told(site: Site) -> None:
    process, servers = watched(site, interval="100ms", hold_off="300ms")
    with udp_socket() as client:
        client.sendto(short(site.cid(1)), site.vip)
        servers[1].silent.set()
        down = process.event("backend-down")
        dead = process.event("backend-dead")
        reset = client.recv(2000)

        assert (down["backend"], dead["backend"]) == ("b1", "b1")
        assert dead["time"] - down["time"] >= 0.29  # by the log's clock, which is not the one that the hold-off runs by
        assert len(reset) >= 42
        servers[1].silent.clear()
        process.event("backend-up")
    assert site.metric("quiclb_resets_total") == 1


def test_with_every_backend_down_it_fails_open_says_so_loudly_and_resets_nobody(site: Site) -> None:
    process, servers = watched(site, interval="100ms", hold_off="200ms")
    for server in servers:
        server.silent.set()
    loud = process.event("fail-open")
    process.event("backend-dead", count=2)

    assert (loud["level"], loud["service"]) == ("error", "web")
    with udp_socket() as client:
        client.sendto(short(site.cid(1)), site.vip)
        eventually(lambda: site.metric('quiclb_backend_datagrams_total{backend="b1",direction="to",service="web"}'))
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(2000)
    assert site.metric("quiclb_fail_open") == 1
    assert site.metric("quiclb_resets_total") == 0
    for server in servers:
        server.silent.clear()
    process.event("fail-open-over")


def test_when_fail_open_is_over_nobody_is_dead_who_has_not_been_asked_since(site: Site) -> None:
    """It may have been our own network that was down. That one answers first must not cost the others' clients."""
    process, servers = watched(site, interval="300ms", hold_off="900ms")
    with udp_socket() as client:
        client.sendto(short(site.cid(1)), site.vip)
        for server in servers:
            server.silent.set()
        process.event("backend-dead", count=2)
        servers[0].silent.clear()
        process.event("fail-open-over")
        servers[1].silent.clear()
        process.event("backend-up", count=2)

        assert site.metric("quiclb_resets_total") == 0
    servers[0].silent.set()
    process.event("backend-dead", count=3)  # and it is over


def test_no_secret_ever_leaves_it(site: Site) -> None:
    """Not in the log, the metrics, the command line, the environment or the words for a mistake."""
    site.options = "workers: 2"
    site.write()
    process = site.start()
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)
    pids = [process.process.pid, *children(process.process.pid)]
    seen = b"".join(Path(f"/proc/{pid}/{f}").read_bytes() for pid in pids for f in ("cmdline", "environ"))
    with urllib.request.urlopen(f"http://{site.admin}/metrics", timeout=PATIENCE) as page:
        seen += page.read()
    site.write(key_file="other.key")
    process.send(signal.SIGHUP)
    process.event("reload-refused")
    process.send(signal.SIGTERM)
    process.wait()
    seen += "".join(process.lines).encode()

    for secret in (KEY, KEY[::-1], RESET_KEY):
        assert secret not in seen
        assert secret.hex().encode() not in seen.lower()
    assert b"not for everybody" not in seen


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
