"""deploy/systemd: what the units say, what systemd makes of them, and that quiclb works with what they leave to it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import short
from tests.deploy import confined, units
from tests.deploy.units import FOR_XDP, SOCKET, SYSTEMD, UNIT, analyze, settings, words
from tests.fleet import eventually, udp_socket
from tests.test_control import Process
from tests.test_control import Site as UdpSite
from tests.test_control import site as udp_site
from tests.test_systemd import Manager
from tests.xdp.test_running import VIP
from tests.xdp.test_running import Site as XdpSite
from tests.xdp.test_running import site as xdp_site

__all__ = ["udp_site", "xdp_site"]

# systemd-analyze's figures, 0 to 10: 2.0 and less is as good as it calls anything.
UDP_EXPOSURE, XDP_EXPOSURE = 2.0, 2.3

needs_systemd = pytest.mark.skipif(bool(units.missing()), reason=str(units.missing()))
needs_confinement = pytest.mark.skipif(bool(confined.missing()), reason=str(confined.missing()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with the unit in it."""
    directory = tmp_path / "etc" / "systemd" / "system"
    directory.mkdir(parents=True)
    shutil.copy(UNIT, directory)
    return tmp_path


def exposure(root: Path) -> float:
    done = analyze("security", "--offline=true", UNIT.name, root=root)
    found = re.search(r"exposure level for \S+: (\d+\.\d)", done.stdout)
    assert found, done.stdout + done.stderr
    return float(found[1])


@needs_systemd
def test_the_unit_is_hardly_exposed(root: Path) -> None:
    assert exposure(root) <= UDP_EXPOSURE


@needs_systemd
def test_with_xdp_it_is_exposed_by_what_the_kernel_asks_for_and_no_more(root: Path) -> None:
    drop_in = root / "etc" / "systemd" / "system" / f"{UNIT.name}.d"
    drop_in.mkdir()
    shutil.copy(FOR_XDP, drop_in)

    assert exposure(root) <= XDP_EXPOSURE


@needs_systemd
@pytest.mark.parametrize("with_xdp", [False, True])
def test_systemd_understands_every_line(tmp_path: Path, with_xdp: bool) -> None:
    shutil.copy(UNIT, tmp_path)
    shutil.copy(SOCKET, tmp_path)
    if with_xdp:
        (tmp_path / f"{UNIT.name}.d").mkdir()
        shutil.copy(FOR_XDP, tmp_path / f"{UNIT.name}.d")
    done = analyze("verify", "--man=no", tmp_path / UNIT.name, tmp_path / SOCKET.name)

    said = [line for line in done.stderr.splitlines() if "quiclb" in line or str(tmp_path) in line]
    assert (done.returncode, said) == (0, [])


@needs_systemd
def test_a_line_that_systemd_does_not_know_is_noticed(tmp_path: Path) -> None:
    (tmp_path / UNIT.name).write_text(UNIT.read_text().replace("WatchdogSec=", "WatchDog="))
    done = analyze("verify", "--man=no", tmp_path / UNIT.name)

    assert "WatchDog" in done.stderr


def test_each_engine_has_the_capabilities_that_it_needs() -> None:
    assert words(UNIT, of="CapabilityBoundingSet") == words(UNIT, of="AmbientCapabilities") == ["CAP_NET_BIND_SERVICE"]
    assert set(words(UNIT, FOR_XDP, of="CapabilityBoundingSet")) == {
        "CAP_BPF",
        "CAP_NET_ADMIN",
        "CAP_SYS_ADMIN",
        "CAP_NET_BIND_SERVICE",
    }
    assert words(UNIT, FOR_XDP, of="AmbientCapabilities") == []  # root has them anyway
    assert settings(UNIT, FOR_XDP)["User"][-1] == "root"


def test_the_sockets_unit_opens_each_address_family_for_itself() -> None:
    found = settings(SOCKET)
    assert found["ListenDatagram"] == ["0.0.0.0:443", "[::]:443"]
    assert (found["BindIPv6Only"], found["Service"]) == (["ipv6-only"], [UNIT.name])


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers: install systemd")
def test_the_account_is_made_and_is_the_units(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (tmp_path / "etc").mkdir()
    subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", SYSTEMD / "quiclb.sysusers"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    account = next(
        line.split(":")
        for line in (tmp_path / "etc" / "passwd").read_text().splitlines()
        if line.startswith(f"{settings(UNIT)['User'][-1]}:")
    )
    assert account[-1] == "/usr/sbin/nologin"


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Somebody who listens as systemd would, to whatever is started meanwhile."""
    made = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    yield made
    made.socket.close()


def hear(manager: Manager, wanted: str, never: str = "") -> dict[str, str]:
    """Wait for a message that says so, and hear none that says the other."""
    while True:
        said, descriptors = manager.hear()
        assert never not in said
        for descriptor in descriptors:
            os.close(descriptor)
        if wanted in said:
            return dict(line.split("=", 1) for line in said)


@needs_confinement
@pytest.mark.parametrize("workers", [1, 2])
def test_the_udp_engine_works_with_what_its_unit_leaves_to_it(
    udp_site: UdpSite, manager: Manager, workers: int
) -> None:
    """It starts, forwards, feeds the watchdog, reloads, refuses, is replaced, and the successor stops when told to."""
    by = confined.command(UNIT)
    udp_site.options = f"workers: {workers}\nlimits: {{idle-timeout: 1m}}"
    udp_site.service_options = "health: {interval: 100ms, timeout: 100ms}"
    udp_site.write()
    process = Process(udp_site.directory / "lb.yaml", by)
    udp_site.processes.append(process)
    main = process.process.pid
    assert hear(manager, "READY=1")["MAINPID"] == str(main)
    hear(manager, "WATCHDOG=1")
    with udp_socket() as client:
        seen_as = round_trip(udp_site, client)

        udp_site.service_options = "health: {probe: none}"
        udp_site.write()
        assert reload(by).returncode == 0
        udp_site.write(extra="    colour: blue")
        refused = reload(by)
        assert refused.returncode != 0
        assert "colour: unknown key" in refused.stderr
        udp_site.write()

        process.send(signal.SIGUSR2)
        while (successor := int(hear(manager, "READY=1").get("MAINPID", main))) == main:
            pass
        try:
            assert process.wait() == 0
            # systemd would take the predecessor's word for the whole service's.
            hear(manager, "WATCHDOG=1", never="STOPPING=1")
            hear(manager, "WATCHDOG=1", never="STOPPING=1")
            assert round_trip(udp_site, client) == seen_as
        finally:
            os.kill(successor, signal.SIGTERM)
    hear(manager, "STOPPING=1")
    eventually(lambda: not alive(successor), patience=15)


def round_trip(site: UdpSite, client: socket.socket) -> tuple[str, int]:
    """As Site's, but probes may come in between."""
    cid = site.cid(1)
    client.sendto(short(cid), site.vip)
    while True:
        got, seen_as = site.backends[1].recvfrom(2000)
        if got == short(cid):
            break
    site.backends[1].sendto(b"reply", seen_as)
    assert client.recvfrom(2000) == (b"reply", tuple(site.vip))
    return str(seen_as[0]), int(seen_as[1])


def reload(by: list[str]) -> subprocess.CompletedProcess[str]:
    """ExecReload=, confined like all that the unit starts."""
    command = settings(UNIT)["ExecReload"][-1].split()
    assert command == ["/usr/bin/env", "quiclb", "reload"]
    return subprocess.run(
        [*by, sys.executable, "-m", "lb", "reload"], capture_output=True, text=True, timeout=60, check=False
    )


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    try:  # nobody may have waited for it yet
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@needs_confinement
def test_the_xdp_engine_works_with_what_its_units_leave_to_it(xdp_site: XdpSite, manager: Manager) -> None:
    """It loads, attaches and forwards; killed and started again it takes over what is pinned."""
    by = confined.command(UNIT, FOR_XDP)
    xdp_site.write(health="interval: 50ms, timeout: 50ms, fall: 2, silence: 0s")
    xdp_site.start(by=by)
    hear(manager, "READY=1")
    with xdp_site.client() as client:
        client.sendto(short(xdp_site.cid(1)), VIP)
        eventually(lambda: xdp_site.metric("quiclb_flows") == 1)
        xdp_site.processes[-1].kill()
        again = xdp_site.start(by=by)

        assert again.event("attached")["taken_over"] == "yes"
        eventually(lambda: xdp_site.metric("quiclb_flows") == 1)
    again.send(signal.SIGTERM)
    assert again.wait() == 0


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="no systemd-socket-activate")
def test_a_datagram_that_came_before_the_balancer_waits_for_it_in_systemds_socket(udp_site: UdpSite) -> None:
    """What quiclb.socket is for, by the program that systemd has for trying it out: the datagram starts quiclb."""
    activate = ["systemd-socket-activate", "--datagram", f"--listen={udp_site.vip}"]
    process = Process(udp_site.directory / "lb.yaml", activate)
    udp_site.processes.append(process)
    eventually(lambda: any("Listening on" in line for line in process.lines), patience=15)
    with udp_socket() as client:
        early = short(udp_site.cid(1))
        client.sendto(early, udp_site.vip)
        udp_site.backends[1].settimeout(15)

        assert udp_site.backends[1].recv(2000) == early
        round_trip(udp_site, client)
