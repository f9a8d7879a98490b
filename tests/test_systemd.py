"""What a service manager hears from us and what we take from it: over real sockets, in real processes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb import systemd


class Manager:
    """The manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(10)
        self.socket.bind(address)

    def hear(self) -> tuple[list[str], list[int]]:
        message, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 16)
        return message.decode().split("\n"), descriptors


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    name = f"quiclb-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    manager = Manager(f"\0{name}" if request.param == "abstract" else name)
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if request.param == "abstract" else name)
    yield manager
    manager.socket.close()


def test_a_message_arrives_whole(manager: Manager) -> None:
    systemd.notify("READY=1", "MAINPID=42")
    assert manager.hear() == (["READY=1", "MAINPID=42"], [])


def test_a_stored_descriptor_is_the_same_socket(manager: Manager) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        ours.bind(("127.0.0.1", 0))
        systemd.store("listen", ours.fileno())
        said, [descriptor] = manager.hear()
        assert said == ["FDSTORE=1", "FDNAME=listen", "FDPOLL=0"]
        with socket.socket(fileno=descriptor) as theirs:
            assert theirs.getsockname() == ours.getsockname()
    systemd.unstore("listen")
    assert manager.hear() == (["FDSTOREREMOVE=1", "FDNAME=listen"], [])


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "@nobody-is-there"])
def test_without_a_manager_nothing_happens(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1")


def test_a_manager_that_does_not_read_stops_nobody(manager: Manager) -> None:
    for _ in range(10_000):  # more than any queue of datagrams holds
        systemd.notify("WATCHDOG=1")
    assert manager.hear() == (["WATCHDOG=1"], [])


def test_the_watchdog_is_fed_twice_as_often_as_it_asks(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")

    async def feed() -> None:
        task = asyncio.create_task(systemd.keep_watchdog_fed())
        loop = asyncio.get_running_loop()
        heard = [await loop.run_in_executor(None, manager.hear) for _ in range(3)]
        assert heard == [(["WATCHDOG=1"], [])] * 3
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(feed())
    assert systemd.watchdog_interval() == 0.02


@pytest.mark.parametrize("asked", ["", "no", "0", "-5"])
def test_without_a_watchdog_nobody_is_fed(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", asked)
    asyncio.run(systemd.keep_watchdog_fed())


SHOW = """
import os, sys
from lb import systemd
if sys.argv[1] == "ours":
    os.environ["LISTEN_PID"] = str(os.getpid())
print([sock.getsockname()[1] for sock in systemd.inherited()], systemd.inherited(), "LISTEN_FDS" in os.environ)
"""


@pytest.mark.parametrize("whose", ["ours", "somebody else's"])
def test_sockets_are_taken_by_whom_they_are_for_and_once(whose: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as first, open(os.devnull, "rb") as no_socket:
        first.bind(("127.0.0.1", 0))

        def place() -> None:  # as a manager does: from descriptor 3 on
            os.dup2(first.fileno(), 3)
            os.dup2(no_socket.fileno(), 4)

        done = subprocess.run(
            [sys.executable, "-c", SHOW, whose],
            env=os.environ | {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
            pass_fds=[3, 4],
            preexec_fn=place,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        port = first.getsockname()[1]
    assert done.stdout == f"{[port] if whose == 'ours' else []} [] False\n"
