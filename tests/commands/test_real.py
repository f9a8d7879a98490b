"""The commands and a real balancer, with packets of real sockets."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb import cid_tool
from tests.builders import short
from tests.commands.conftest import Quiclb
from tests.files import CID_KEY, write_keys
from tests.fleet import eventually, free_port, udp_socket

PATIENCE = 60.0
SERVER_IDS = {"a": "3fa91c02", "b": "81d5e47a"}


class Place:
    """A balancer that runs, its file, and the sockets around it."""

    def __init__(self, directory: Path) -> None:
        write_keys(directory)
        self.port = free_port()
        self.backends = {name: udp_socket() for name in SERVER_IDS}
        self.config = directory / "quiclb.yaml"
        self.directory = directory
        self.write()
        command = [sys.executable, "-m", "lb", "run", "-c", str(self.config)]
        self.log = (directory / "log").open("wb")
        self.process = subprocess.Popen(command, stderr=self.log, cwd=directory)

    def write(self, weight: int = 1) -> None:
        lines = [
            f'- {{name: {name}, address: "127.0.0.1:{sock.getsockname()[1]}", '
            f'server-ids: {{0: ["{SERVER_IDS[name]}"]}}, weight: {weight if name == "b" else 1}}}'
            for name, sock in self.backends.items()
        ]
        self.config.write_text(
            f"runtime-directory: run\nservices:\n- name: web\n  listen: ['127.0.0.1:{self.port}']\n"
            "  health: {probe: none}\n  cid-configs:\n  - {config-id: 0, server-id-length: 4, nonce-length: 12, "
            "key-file: secrets/cid-0.key, reset-key-file: secrets/reset-0.key}\n"
            "  backends:\n  " + "\n  ".join(lines) + "\n"
        )

    @property
    def at(self) -> tuple[str, Path]:
        return "-c", self.config

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        for sock in self.backends.values():
            sock.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    try:
        eventually(lambda: (tmp_path / "run" / "admin.sock").exists() or made.process.poll() is not None, PATIENCE)
        yield made
    finally:
        made.close()


def cid(name: str, nonce: int) -> str:
    fields = {"config_id": 0, "key": CID_KEY, "server_id": SERVER_IDS[name], "nonce": f"{nonce:024x}"}
    made: str = cid_tool.encode(fields)["cid"]
    return made


def test_a_drain_lasts_as_long_as_its_connections(quiclb: Quiclb, place: Place) -> None:
    """Packets of a connection come while it is waited for; it moves, too. When they end, so does the waiting."""
    eventually(lambda: quiclb("status", *place.at)[0] == 0, PATIENCE)
    ended = threading.Event()
    went = 0

    def connection() -> None:
        nonlocal went
        while not ended.wait(0.1):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:  # another port each time
                client.sendto(short(bytes.fromhex(cid("a", went))), ("127.0.0.1", place.port))
            assert place.backends["a"].recv(2048)
            went += 1

    client = threading.Thread(target=connection)
    client.start()
    try:
        assert quiclb("drain", "a", *place.at)[0] == 0
        status, _, err = quiclb("drain", "a", *place.at, "--wait", "--quiet", "4s", "--timeout", "6s")
        assert (status, "still not quiet" in err) == (1, True)
    finally:
        ended.set()
        client.join()
    status, out, err = quiclb("drain", "web/a", *place.at, "--wait", "--quiet", "2s", "--timeout", "60s", "--json")
    last = json.loads(out.splitlines()[-1])
    assert (status, err) == (0, "")
    assert (last["quiet"], last["datagrams-to"], last["state"], last["ring-share"]) == (True, went, "draining", 0.0)
    assert last["last-packet"] >= 2.0


def test_what_is_said_is_what_is_done(quiclb: Quiclb, place: Place) -> None:
    """Weights, fences, a reload with its difference, an explanation by the running balancer, and status of it all."""
    eventually(lambda: quiclb("status", *place.at)[0] == 0, PATIENCE)
    asked = ["explain", "--admin", f"unix:{place.directory}/run/admin.sock", "--json", cid("b", 1)]
    (service,) = json.loads(quiclb(*asked)[1])["services"]
    assert (service["backend"], service["state"], service["verdict"]) == ("b", "active", "cid")
    assert quiclb("fence", "b", *place.at)[0] == 0
    (service,) = json.loads(quiclb(*asked)[1])["services"]
    assert (service["issued-by"], service["verdict"]) == ("b", "reset")
    assert quiclb("unfence", "b", *place.at)[0] == 0
    assert quiclb("weight", "a", "0", *place.at)[0] == 0
    assert re.search(r"  a +active +0 +0\.0%", quiclb("status", *place.at)[1])
    assert quiclb("weight", "a", "file", *place.at)[0] == 0

    place.write(weight=3)
    status, out, err = quiclb("reload", *place.at)
    assert (status, err) == (0, "")
    assert "weight" in out
    assert "1 -> 3" in out
    place.config.write_text(place.config.read_text().replace("weight: 3", "weight: 1001"))
    where = ["--admin", f"unix:{place.directory}/run/admin.sock"]
    status, out, err = quiclb("reload", *where)
    assert (status, out) == (2, "")
    assert "services[0].backends[1].weight: 1001: expected an integer, 0 to 1000\n" in err
    status, out, _ = quiclb("status", *where)
    assert "last reload refused: services[0].backends[1].weight: 1001" in out
    assert re.search(r"  b +active +3 +75\.0%", out)
    assert quiclb("status", *place.at)[0] == 2  # this file has mistakes, whatever runs


def test_a_rotation_of_a_file_reaches_the_balancer_that_runs_with_it(quiclb: Quiclb, place: Place) -> None:
    """By the command, which asks what packets still come and has it read the file; and by the balancer itself."""
    eventually(lambda: quiclb("status", *place.at)[0] == 0, PATIENCE)
    where = ["--admin", f"unix:{place.directory}/run/admin.sock"]

    def phases() -> dict[int, str]:
        (slots,) = json.loads(quiclb("rotation", "status", "--json", *where)[1]).values()
        return {slot["config-id"]: slot["phase"] for slot in slots if slot["phase"] != "free"}

    status, out, err = quiclb("rotation", "prepare", "1", *place.at)
    assert (status, err) == (0, "")
    assert out
    assert phases() == {0: "active", 1: "prepared"}
    assert quiclb("rotation", "activate", "1", *where)[::2] == (0, "")
    assert phases() == {0: "retiring", 1: "active"}
    status, out, err = quiclb("rotation", "retire", "0", *where)  # the guard time is not over
    assert (status, out) == (1, "")
    assert "config ID 0" in err
    assert quiclb("rotation", "retire", "0", "--force", *place.at)[::2] == (0, "")
    assert phases() == {1: "active"}
    status, out, err = quiclb("server-config", "a", *place.at)
    assert (status, err) == (0, "")
    assert "config-id: 1" in out


def test_a_file_that_is_changed_and_not_taken_is_told(quiclb: Quiclb, place: Place) -> None:
    eventually(lambda: quiclb("status", *place.at)[0] == 0, PATIENCE)
    place.config.write_text(f"workers: 2\n{place.config.read_text()}")  # which takes a restart
    status, out, err = quiclb("rotation", "prepare", "1", *place.at)
    assert (status, out) == (2, "")
    assert err.startswith(f"quiclb: {place.config} is changed, and the balancer does not take it:\nquiclb: ")
    assert "workers: 2: this process runs with 1; a restart changes it" in err
