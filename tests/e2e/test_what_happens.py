"""The rows of docs/operations.md, "What happens when", that no other test is about: `quiclb run`, and trouble."""

from __future__ import annotations

import ast
import os
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId
from tests.builders import KEY, server_id, short
from tests.fleet import eventually, free_port, udp_socket
from tests.test_control import FakeServer, Process, Site

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


class Wire(threading.Thread):
    """A way to a backend that one balancer takes, and that can be cut. Each of its peers has a port of its own."""

    def __init__(self, backend: Address) -> None:
        super().__init__(daemon=True)
        self.cut = threading.Event()
        self.front = udp_socket()
        self.address = Address(*self.front.getsockname())
        self._backend = backend
        self._peers: dict[tuple[str, int], socket.socket] = {}
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.is_set():
            readable, _, _ = select.select([self.front, *self._peers.values()], [], [], 0.05)
            for sock in readable:
                datagram, sender = sock.recvfrom(2000)
                if self.cut.is_set():
                    continue
                if sock is self.front:
                    if sender not in self._peers:
                        self._peers[sender] = udp_socket()
                    self._peers[sender].sendto(datagram, self._backend)
                else:
                    peer = next(peer for peer, socket_of in self._peers.items() if socket_of is sock)
                    self.front.sendto(datagram, peer)

    def end(self) -> None:
        self._ended.set()
        self.join()
        for sock in (self.front, *self._peers.values()):
            sock.close()


def second(site: Site, **replacements: str) -> tuple[Process, Address]:
    """Another balancer of the fleet: the same file, but for its own addresses and what is replaced in it."""
    vip, metrics = Address("127.0.0.1", free_port()), Address("127.0.0.1", free_port())
    text = (site.directory / "lb.yaml").read_text()
    replacements |= {
        str(site.vip): str(vip),
        str(site.admin): str(metrics),
        f"{site.directory}/run": f"{site.directory}/run2",
    }
    for old, new in replacements.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = site.directory / "lb2.yaml"
    path.write_text(text)
    process = Process(path)
    site.processes.append(process)
    process.event("started")
    return process, vip


def watch_closely(site: Site, hold_off: str = "300ms") -> None:
    site.service_options = f"health: {{interval: 100ms, timeout: 100ms, fall: 2}}\n    resets: {{hold-off: {hold_off}}}"
    site.write()


def test_a_backend_that_answers_too_slowly_gets_nobody_new_and_loses_nobody(site: Site) -> None:
    """Each answer comes after the probe has timed out: it is DOWN, but whoever answers at all is not dead."""
    watch_closely(site)
    FakeServer(site.backends[0])
    slow = SlowServer(site.backends[1], delay=0.15)
    process = site.start()
    process.event("backend-down")
    # Three hold-offs and more of probes, all of them answered too late.
    late = 'quiclb_probes_total{backend="b1",result="timeout",service="web"}'
    eventually(lambda: site.metric(late) >= 12, patience=20)

    assert process.events("backend-dead") == []
    with udp_socket() as client:
        client.sendto(short(site.cid(1)), site.vip)
        eventually(lambda: slow.others)
    assert site.metric("quiclb_resets_total") == 0


class SlowServer(FakeServer):
    """It negotiates versions, a while after it was asked. What is no probe is kept in `others`."""

    def __init__(self, sock: socket.socket, delay: float) -> None:
        self.others: list[bytes] = []
        self._delay = delay
        super().__init__(sock)

    def run(self) -> None:
        while True:
            try:
                datagram, client = self.sock.recvfrom(2000)
            except TimeoutError:
                continue
            except OSError:
                return
            if not datagram[0] & 0x80:
                self.others.append(datagram)
                continue
            at = 6 + datagram[5]
            dcid, scid = datagram[6:at], datagram[at + 1 : at + 1 + datagram[at]]
            answer = b"\xc0" + bytes(4) + bytes([len(scid)]) + scid + bytes([len(dcid)]) + dcid + b"\0\0\0\1"
            threading.Timer(self._delay, self._answer, (answer, client)).start()

    def _answer(self, answer: bytes, client: tuple[str, int]) -> None:
        try:
            self.sock.sendto(answer, client)
        except OSError:
            return  # the test is over


def test_a_backend_that_one_balancer_cannot_reach_is_dead_there_and_nowhere_else(site: Site) -> None:
    watch_closely(site)
    for sock in site.backends:
        FakeServer(sock)
    real = Address(*site.backends[1].getsockname())
    wire = Wire(real)
    try:
        there = site.start()
        here, vip = second(site, **{str(real): str(wire.address)})
        wire.cut.set()
        assert here.event("backend-dead")["backend"] == "b1"
        with udp_socket() as client:
            client.sendto(short(site.cid(1)), vip)
            assert len(client.recv(2000)) >= 21  # told to begin anew, which is what helps on this way
        assert there.events("backend-down") == []
        wire.cut.clear()
        here.event("backend-up")
    finally:
        wire.end()


def test_two_generations_of_a_configuration_agree_on_what_both_know(site: Site) -> None:
    """What only the new one knows, the old one balances by address: prepare everywhere before you activate."""
    old = site.start()
    cids = "cid-configs:\n      - {config-id: 1, server-id-length: 4, nonce-length: 12, key-file: other.key}"
    ids = {
        f'{{0: ["{server_id(i).hex()}"]}}': f'{{0: ["{server_id(i).hex()}"], 1: ["{server_id(i).hex()}"]}}'
        for i in (0, 1)
    }
    new, vip = second(site, **{"cid-configs:": cids, **ids})
    assert old.events("reload-refused") == new.events("reload-refused") == []
    with udp_socket() as client:
        for backend in (0, 1):
            cid = site.cid(backend)
            for balancer in (site.vip, vip):
                client.sendto(short(cid), balancer)
                assert site.backends[backend].recv(2000) == short(cid)
        cid = Codec(CidConfig(ConfigId(1), 4, 12, KEY[::-1])).encode(server_id(1), os.urandom(12))
        client.sendto(short(cid), vip)
        assert site.backends[1].recv(2000) == short(cid)
        client.sendto(short(cid), site.vip)
        [somebody], _, _ = select.select(site.backends, [], [], 5)
        assert somebody.recv(2000) == short(cid)
    assert site.metric('quiclb_unroutable_datagrams_total{reason="no_config",service="web"}') == 1


def test_with_a_wrong_key_connections_are_balanced_by_address_and_the_metrics_cry_out(site: Site) -> None:
    site.write(key_file="other.key")
    site.start()
    with udp_socket() as client:
        for _ in range(50):
            client.sendto(short(site.cid(1)), site.vip)
        unknown = 'quiclb_unroutable_datagrams_total{reason="unknown_server",service="web"}'
        eventually(lambda: site.metric(unknown) == 50)
        heard, _, _ = select.select(site.backends, [], [], 5)
        assert len(heard) == 1  # one 4-tuple, one backend, if not the right one
    assert site.metric("quiclb_config_id_datagrams_total") == 0


WALL_CLOCK = {  # modules that look at it, and what for: to show it, never to decide by it
    "lb/control.py": "when it was started and reloaded, for people",
    "lb/metrics.py": "timestamps of things that happened on the other clock",
    "lb/admin/api.py": "the same",
    "lb/rewrite.py": "how old a key file is, for people",
    "lb/xdp/status.py": "how old what is attached is, for people",
    "lb/commands/xdp.py": "how old what it shows is, for people",
    "lb/commands/conformance.py": "when an examination began, for people",
    "lb/commands/rotation.py": "when a server's file was made: servers compare it with another file's",
}


def test_no_decision_is_made_by_a_clock_that_can_jump() -> None:
    """Whoever asks for the time of day is in the list. All that waits, ages or expires goes by the monotonic clock."""
    clocks = {("time", "time"), ("time", "time_ns"), ("datetime", "now")}
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lb").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in clocks
    }
    assert found == WALL_CLOCK.keys()


def test_a_full_flow_table_gives_up_the_idlest_and_serves_whoever_comes(site: Site) -> None:
    site.options = "limits: {flows: 20}"
    site.write()
    site.start()
    clients = [udp_socket() for _ in range(60)]
    try:
        for client in clients:
            site.round_trip(client, site.cid(1), 1)
        assert site.metric("quiclb_flows") <= 20
        assert site.metric("quiclb_flows_evicted_total") == 40
        site.round_trip(clients[0], site.cid(1), 1)  # it was given up, and comes back like a client that moved
    finally:
        for client in clients:
            client.close()


def test_out_of_descriptors_flows_share_what_there_is(site: Site) -> None:
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        pytest.skip("no prlimit (Debian's util-linux)")
    process = Process(site.directory / "lb.yaml", by=[prlimit, "--nofile=180:180"])
    site.processes.append(process)
    process.event("started")
    clients = [udp_socket() for _ in range(120)]
    try:
        for client in clients:
            site.round_trip(client, site.cid(1), 1)
    finally:
        for client in clients:
            client.close()
    assert site.metric("quiclb_sockets") < 120
    assert site.metric("quiclb_flows_evicted_total") > 0
    assert site.metric("process_max_fds") == 180
    process.send(signal.SIGTERM)
    assert process.wait() == 0


def test_a_full_disk_costs_what_would_have_been_kept_and_nothing_else(site: Site) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a small file system takes root and unshare")
    run = site.directory / "run"
    run.mkdir(mode=0o700)
    script = 'mount -t tmpfs -o size=64k,mode=700 tmpfs "$0" && exec "$@"'
    process = Process(site.directory / "lb.yaml", by=["unshare", "--mount", "sh", "-c", script, str(run)])
    site.processes.append(process)
    process.event("started")
    assert process.event("no-return-paths")["reason"] == "No space left on device"
    with udp_socket() as client:
        site.round_trip(client, site.cid(1), 1)


def test_a_balancer_that_was_stopped_itself_blames_nobody(site: Site) -> None:
    """Frozen for longer than every hold-off: what it did not hear meanwhile is no evidence."""
    watch_closely(site)
    for sock in site.backends:
        FakeServer(sock)
    process = site.start()
    answered = 'quiclb_probes_total{backend="b1",result="answered",service="web"}'
    eventually(lambda: site.metric(answered) >= 3)
    process.send(signal.SIGSTOP)
    time.sleep(1.0)  # this is the time that passes, and not something that is waited for
    process.send(signal.SIGCONT)
    before = site.metric(answered)
    eventually(lambda: site.metric(answered) >= before + 5)
    assert process.events("backend-dead") == []
    assert site.metric("quiclb_resets_total") == 0
