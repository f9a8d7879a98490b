"""`quiclb run` with engine: xdp, as a process: what it says, what it leaves running, what it takes over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lb.address import Address
from lb.admin.client import Client, RefusedError, Where
from lb.cid import CidConfig, Codec, ConfigId
from tests import namespaces
from tests.builders import KEY, RESET_KEY, server_id, short
from tests.fleet import PATIENCE, eventually, udp_socket
from tests.namespaces import inside, ip
from tests.test_control import FakeServer, Process
from tests.test_deploy import FOR_XDP, directives
from tests.xdp import bpf
from tests.xdp.command import quiclb

CONFIG = CidConfig(ConfigId(0), 4, 12, KEY)
VIP = Address("10.88.0.100", 443)
BALANCER = "10.88.0.1"
BACKENDS = ("10.88.0.11", "10.88.0.12")
CLIENT = "10.88.0.200"
ADMIN = Address("127.0.0.1", 9100)


class Site:
    """A balancer's namespace, everybody else's at the other end of a cable, and a configuration."""

    def __init__(self, directory: Path, pins: Path, balancer: str, others: str) -> None:
        self.pins = pins
        self.balancer, self.others = balancer, others
        self.file = directory / "lb.yaml"
        self.processes: list[Process] = []
        for name, octets in (("cid.key", KEY), ("reset.key", RESET_KEY)):
            (directory / name).write_text(octets.hex() + "\n")
            (directory / name).chmod(0o600)
        with inside(others):
            self.backends = [udp_socket(host, 443) for host in BACKENDS]
        self.write()

    def write(
        self,
        *,
        interface: str = "lb0",
        health: str = "probe: none",
        extra: str = "",
        backends: Sequence[int] = (0, 1),
    ) -> None:
        members = "\n".join(
            f'      - {{name: b{i}, address: "{BACKENDS[i]}:443", server-ids: {{0: ["{server_id(i).hex()}"]}}}}'
            for i in backends
        )
        self.file.write_text(
            f"""\
engine: xdp
interface: {interface}
forward: nat
xdp: {{attach: generic, pin-directory: {self.pins}}}
metrics: "{ADMIN}"
runtime-directory: {self.file.parent}/run
log: {{format: json}}
{extra}
services:
  - name: web
    listen: ["{VIP}"]
    seed: not for everybody
    cid-configs:
      - {{config-id: 0, server-id-length: 4, nonce-length: 12, key-file: cid.key, reset-key-file: reset.key}}
    backends:
{members}
    health: {{{health}}}
    resets: {{hold-off: 1s}}
"""
        )

    def start(self, *, ready: bool = True, by: Sequence[str] = ()) -> Process:
        with inside(self.balancer):
            process = Process(self.file, by)
        self.processes.append(process)
        if ready:
            process.event("started")
        return process

    def cid(self, backend: int) -> bytes:
        return Codec(CONFIG).encode(server_id(backend), os.urandom(12))

    def client(self) -> socket.socket:
        with inside(self.others):
            return udp_socket(CLIENT)

    def round_trip(self, client: socket.socket, backend: int) -> Any:
        """A datagram to a backend and one back. Returns the address that the backend saw."""
        datagram = short(self.cid(backend))
        client.sendto(datagram, VIP)
        got, seen_as = self.backends[backend].recvfrom(2000)
        assert got == datagram
        self.backends[backend].sendto(b"reply", seen_as)
        assert client.recvfrom(2000) == (b"reply", tuple(VIP))
        return seen_as

    def metrics(self, name: str) -> dict[str, float]:
        """A metric's samples, by their labels as they are written."""
        with inside(self.balancer), urllib.request.urlopen(f"http://{ADMIN}/metrics", timeout=PATIENCE) as page:
            lines = page.read().decode().splitlines()
        return {
            line.removeprefix(name).rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith((f"{name} ", f"{name}{{"))
        }

    def metric(self, name: str) -> float:
        return sum(self.metrics(name).values())

    def state(self, backend: str) -> str:
        states = self.metrics("quiclb_backend_state")
        (now,) = (labels for labels, value in states.items() if f'backend="{backend}"' in labels and value)
        return now.partition('state="')[2].rstrip('"}')

    def api(self) -> Client:
        return Client(Where(self.file.parent / "run" / "admin.sock"))

    def quiclb(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return quiclb(self.balancer, *argv)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for sock in self.backends:
            sock.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    reason = namespaces.missing() or bpf.missing()
    if reason:
        pytest.skip(reason)
    pins = Path(f"/sys/fs/bpf/quiclb-test-{os.getpid()}-running")
    with namespaces.namespaces("lb", "others") as (balancer, others):
        ip(balancer, f"link add lb0 type veth peer name far0 netns {others}", f"addr add {BALANCER}/24 dev lb0")
        ip(balancer, f"addr add {VIP.host}/24 dev lb0", "link set lb0 up")
        ip(others, *(f"addr add {host}/24 dev far0" for host in (CLIENT, *BACKENDS)), "link set far0 up")
        made = Site(tmp_path, pins, balancer, others)
        yield made
        made.close()
        for pin in pins.glob("*"):
            pin.unlink()
        if pins.exists():
            pins.rmdir()


def test_it_forwards_and_says_where(site: Site) -> None:
    process = site.start()
    with site.client() as client:
        seen_as = site.round_trip(client, 1)

    assert seen_as[0] == BALANCER
    assert process.event("started").items() >= {
        ("engine", "xdp"),
        ("interface", "lb0"),
        ("mode", "generic"),
        ("forward", "nat"),
        ("listen", str(VIP)),
    }
    assert site.metrics("quiclb_xdp_info") == {'{forward="nat",interface="lb0",mode="generic"}': 1}
    assert site.metrics("quiclb_datagrams_total")['{service="web",verdict="cid"}'] == 1
    assert site.metric("quiclb_backend_datagrams_total") == 2


def test_stopped_it_leaves_packets_flowing_and_says_how_to_end_that(site: Site) -> None:
    process = site.start()
    with site.client() as client:
        seen_as = site.round_trip(client, 1)
        process.send(signal.SIGTERM)
        assert process.wait() == 0
        assert "quiclb xdp detach --interface lb0" in process.event("stopped")["meaning"]
        assert site.round_trip(client, 1) == seen_as

    pins = ("--pin-directory", str(site.pins))
    done = site.quiclb("xdp", "detach", "--interface", "lb0", *pins)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "lb0: the balancer's program (generic) is off; what it knew is forgotten\n"
    done = site.quiclb("xdp", "status", *pins)
    assert (done.returncode, done.stderr) == (1, "quiclb: nothing of quiclb's is on any interface\n")


def test_the_program_of_a_running_balancer_is_not_detached(site: Site) -> None:
    process = site.start()
    done = site.quiclb("xdp", "detach", "--interface", "lb0", "--pin-directory", str(site.pins))

    assert (done.returncode, done.stderr) == (1, "quiclb: another quiclb runs on lb0\n")
    with site.client() as client:
        site.round_trip(client, 0)
    assert not process.events("stopped")


def test_killed_and_started_again_it_takes_flows_and_counters_over(site: Site) -> None:
    process = site.start()
    with site.client() as client:
        seen_as = site.round_trip(client, 1)
        process.kill()
        site.backends[1].sendto(b"the rest of a download", seen_as)
        assert client.recvfrom(2000) == (b"the rest of a download", tuple(VIP))
        site.start()

        assert site.round_trip(client, 1) == seen_as
    assert site.metrics("quiclb_datagrams_total")['{service="web",verdict="cid"}'] == 2


def test_a_backend_that_packets_cannot_be_sent_to_is_down_until_they_can(site: Site) -> None:
    """However its health checks go: here there are none."""
    ip(site.others, f"addr del {BACKENDS[0]}/24 dev far0")
    process = site.start()
    unreachable = process.event("backend-unreachable")
    assert (unreachable["service"], unreachable["backend"]) == ("web", "b0")
    assert unreachable["reason"] == f"nobody answers for {BACKENDS[0]} on lb0"

    eventually(lambda: site.state("b0") == "down")
    assert site.state("b1") == "active"
    with site.client() as client:
        for _ in range(8):
            client.sendto(short(b"\xe0" + os.urandom(16)), VIP)  # a server without a configuration: the ring decides
            site.backends[1].recv(2000)
    ip(site.others, f"addr add {BACKENDS[0]}/24 dev far0")
    assert process.event("backend-reachable")["backend"] == "b0"
    eventually(lambda: site.state("b0") == "active")


def test_a_backend_that_is_added_and_cannot_be_sent_to_gets_nobody(site: Site) -> None:
    """Not even for a moment: whoever came to it then would be kept by the table of 4-tuples."""
    ip(site.others, f"addr del {BACKENDS[0]}/24 dev far0")
    site.write(backends=(1,))
    process = site.start()
    site.write()
    process.send(signal.SIGHUP)
    process.event("reloaded")
    clients = [site.client() for _ in range(32)]
    for client in clients:
        client.sendto(short(b"\xe0" + os.urandom(16)), VIP)
    for _ in clients:
        site.backends[1].recv(2000)

    assert site.metrics("quiclb_send_failures_total")['{reason="unreachable"}'] == 0
    assert len(process.events("backend-unreachable")) == 1
    for client in clients:
        client.close()


def test_a_dead_servers_client_is_told_by_the_kernel(site: Site) -> None:
    servers = [FakeServer(sock) for sock in site.backends]
    site.write(health="interval: 50ms, timeout: 50ms, fall: 2, silence: 0s")
    site.start()
    eventually(lambda: site.metric("quiclb_probes_total") > 2)
    servers[1].silent.set()
    eventually(lambda: site.state("b1") == "dead")
    with site.client() as client:
        client.sendto(short(site.cid(1)), VIP)
        reset, sender = client.recvfrom(2000)

    assert sender == tuple(VIP)
    assert 21 <= len(reset) < len(short(site.cid(1)))
    assert site.metrics("quiclb_resets_total")['{kind="answered",service="web"}'] == 1


def test_a_reload_reaches_the_kernel_and_cannot_move_the_program(site: Site) -> None:
    process = site.start()
    site.write(extra="limits: {new-flows-rate: 1}")
    process.send(signal.SIGHUP)
    process.event("reloaded")
    site.write(interface="lo")
    process.send(signal.SIGHUP)

    assert process.event("reload-refused")["reason"].startswith("interface: lo: this process runs with lb0")
    with site.client() as client:
        site.round_trip(client, 0)


def test_what_a_machine_lacks_ends_it_with_every_reason_and_status_1(site: Site) -> None:
    site.write(interface="eth77")
    process = site.start(ready=False)

    assert process.wait() == 1
    assert "eth77" in process.event("unavailable")["reason"]


def test_the_units_capabilities_are_enough_to_start_to_take_over_and_to_tell_clients(site: Site) -> None:
    capabilities = directives(FOR_XDP)["CapabilityBoundingSet"].lower().replace("cap_", "+").split()
    unit = ["setpriv", "--no-new-privs", "--inh-caps", "-all", "--bounding-set", ",".join(["-all", *capabilities])]
    servers = [FakeServer(sock) for sock in site.backends]
    site.write(health="interval: 50ms, timeout: 50ms, fall: 2, silence: 0s")
    site.start(by=unit).kill()
    process = site.start(by=unit)
    assert process.event("attached")["taken_over"] == "yes"
    eventually(lambda: site.metric("quiclb_probes_total") > 2)
    with site.client() as client:
        client.sendto(short(site.cid(1)), VIP)
        eventually(lambda: site.metric("quiclb_flows") == 1)
        servers[1].silent.set()

        assert 21 <= len(client.recv(2000)) < 100
    assert site.metrics("quiclb_resets_total")['{kind="pushed",service="web"}'] == 1


def test_a_second_balancer_on_the_interface_is_refused(site: Site) -> None:
    first = site.start()
    second = site.start(ready=False)

    assert second.wait() == 1
    assert "another quiclb" in second.event("failed")["reason"]
    assert not first.events("stopped")
    with site.client() as client:
        site.round_trip(client, 0)


def test_the_operator_drains_weighs_and_fences_in_the_kernel(site: Site) -> None:
    site.start()
    with site.client() as client:
        seen_as = site.round_trip(client, 1)
        assert site.api().change("web", "b1", {"drain": True})["state"] == "draining"
        assert site.round_trip(client, 1) == seen_as
        assert site.api().change("web", "b1", {"fence": True})["state"] == "fenced"
        assert len(client.recv(2000)) >= 21  # pushed: it said nothing
        assert site.api().change("web", "b1", {"fence": False, "drain": None})["state"] == "active"
        site.round_trip(client, 1)
        site.api().change("web", "b0", {"weight": 0})
        client.sendto(short(b"\xff" + os.urandom(19)), VIP)
        assert site.backends[1].recv(2000)


def test_an_upgrade_loses_no_packet_and_no_flow(site: Site) -> None:
    process = site.start()
    with site.client() as client:
        seen_as = site.round_trip(client, 1)
        successor = site.api().upgrade()["pid"]
        try:
            assert process.wait() == 0
            assert successor != process.process.pid
            assert "meaning" not in process.event("stopped")  # nothing is left to its own
            assert site.round_trip(client, 1) == seen_as
            assert site.metrics("quiclb_datagrams_total")['{service="web",verdict="cid"}'] == 2
        finally:
            os.kill(successor, signal.SIGTERM)
            eventually(lambda: not Path(f"/proc/{successor}").exists() or _is_over(successor))


def test_an_upgrade_that_does_not_come_about_changes_nothing(site: Site) -> None:
    process = site.start()
    with site.client() as client:
        seen_as = site.round_trip(client, 1)
        good = site.file.read_text()
        site.file.write_text("nonsense")
        with pytest.raises(RefusedError, match="status 2"):
            site.api().upgrade()
        site.file.write_text(good)
        assert site.round_trip(client, 1) == seen_as
        assert site.api().change("web", "b1", {"drain": True})["state"] == "draining"  # the old one is in charge
    assert process.process.poll() is None


def _is_over(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
