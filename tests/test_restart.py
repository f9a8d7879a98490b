"""A balancer that is killed, started and upgraded under a service manager: here one that only holds descriptors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb.address import Address
from tests.builders import short
from tests.fleet import PATIENCE, eventually
from tests.test_control import Process, Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What systemd would listen at."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(15)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def hear(manager: socket.socket, wanted: str) -> tuple[list[str], list[int]]:
    """The next message with that line."""
    while True:
        octets, descriptors, _, _ = socket.recv_fds(manager, 4096, 8)
        lines = octets.decode().splitlines()
        if wanted in lines:
            return lines, descriptors
        for descriptor in descriptors:
            os.close(descriptor)


class Activated(Process):
    """`quiclb run` with these sockets as its descriptors 3 and following."""

    def __init__(self, config: Path, *sockets: socket.socket) -> None:
        script = (
            "import os, sys; count = int(sys.argv[1]); numbers = [os.dup(int(n)) for n in sys.argv[2 : 2 + count]];"
            "numbers = [fcntl.fcntl(n, fcntl.F_DUPFD, 100) for n in numbers];"
            "[os.dup2(n, 3 + i) for i, n in enumerate(numbers)];"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES='x:y');"
            "os.execv(sys.executable, [sys.executable, '-m', 'lb', 'run', '-c', sys.argv[-1]])"
        )
        numbers = [sock.fileno() for sock in sockets]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import fcntl; {script}", str(len(numbers)), *map(str, numbers), str(config)],
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=numbers,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()


def test_datagrams_wait_in_the_stored_socket_until_the_killed_balancer_is_started_again(
    site: Site, manager: socket.socket
) -> None:
    process = site.start()
    said, (descriptor,) = hear(manager, "FDSTORE=1")
    assert said[:2] == ["FDSTORE=1", f"FDNAME=udp-127.0.0.1-{site.vip.port}"]
    lines, _ = hear(manager, "READY=1")
    assert f"MAINPID={process.process.pid}" in lines
    with (
        socket.socket(fileno=descriptor) as stored,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unwanted,
    ):
        client.settimeout(PATIENCE)
        unwanted.bind(("127.0.0.1", 0))
        assert Address(*stored.getsockname()) == site.vip
        cid = site.cid(0)
        seen_as = site.round_trip(client, cid, 0)
        process.kill()
        client.sendto(short(cid), site.vip)  # nobody is there
        successor = Activated(site.directory / "lb.yaml", stored, unwanted)
        site.processes.append(successor)
        successor.event("started")

        assert site.backends[0].recvfrom(2000) == (short(cid), seen_as)
        assert successor.event("socket-unused")["address"] == "{}:{}".format(*unwanted.getsockname())
        assert site.round_trip(client, cid, 0) == seen_as


def test_an_upgrade_makes_the_successor_the_main_process(site: Site, manager: socket.socket) -> None:
    process = site.start()
    hear(manager, "READY=1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        cid = site.cid(0)
        seen_as = site.round_trip(client, cid, 0)
        process.send(signal.SIGUSR2)
        assert hear(manager, "RELOADING=1")[0][1].startswith("MONOTONIC_USEC=")
        successor = process.event("handed-over")["successor"]
        try:
            assert f"MAINPID={successor}" in hear(manager, "READY=1")[0]
            assert process.wait() == 0
            assert site.round_trip(client, cid, 0) == seen_as
        finally:
            os.kill(successor, signal.SIGTERM)
            eventually(lambda: "State:\tZ" in _status(successor) or not _status(successor), patience=15)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
