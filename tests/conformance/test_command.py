"""`quiclb conformance`, with real processes and files."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from backend.adapters.registry import ADAPTERS, Adapter, Feature
from lb.cli import main
from lb.config import load_config
from lb.conformance.judgement import CHECKS
from lb.server_half import server_half
from tests.conformance.servers import CERTIFICATE, ROOT
from tests.files import write_key, write_keys
from tests.fleet import eventually, free_port

pytestmark = pytest.mark.e2e

CONFORMANCE = [sys.executable, "-m", "lb", "conformance"]


REFERENCE = ADAPTERS["aioquic"]
# What other people's servers do not do, and their pages in docs/servers say so.
KNOWN = {
    # A client that takes two connection IDs gets none for the first.
    "quic-go": {"cid-pool"},
}


class Place:
    """A balancer with one server, and the files of both."""

    def __init__(self, directory: Path, adapter: Adapter = REFERENCE) -> None:
        self.directory = directory
        self.front, self.back = free_port(), free_port()
        write_keys(directory)
        self.config = directory / "quiclb.yaml"
        self.config.write_text(f"""
runtime-directory: run
services:
- name: web
  listen: ["127.0.0.1:{self.front}"]
  health: {{probe: none}}
  cid-configs:
  - {{config-id: 0, server-id-length: 4, nonce-length: 12, key-file: secrets/cid-0.key,
      reset-key-file: secrets/reset-0.key}}
  - {{config-id: 1, server-id-length: 3, nonce-length: 13, key-file: secrets/cid-1.key,
      reset-key-file: secrets/reset-1.key, phase: prepared}}
  backends:
  - {{name: a, address: "127.0.0.1:{self.back}", server-ids: {{0: [3fa91c02], 1: [81d5e4]}}}}
""")
        config = load_config(self.config)
        for config_id, names in ((0, ("now", "old")), (1, ("new",))):
            for name in names:
                server_half(config, "a", config_id=config_id, nonce_file="nonces").write(directory / name)
        self.pid_file = directory / "pid"
        key = CERTIFICATE.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (directory / "cert.pem").write_bytes(CERTIFICATE.pem())
        write_key(directory / "key.pem", key.decode())
        retry = [] if Feature.RETRY in adapter.cannot or adapter is REFERENCE else ["--retry"]
        files = {"--server-config": "now/server.yaml", "--cert": "cert.pem", "--key": "key.pem"}
        options = [word for name, file in files.items() for word in (name, str(directory / file))]
        command = shlex.join([*adapter.command, "--listen", f"127.0.0.1:{self.back}", *options, *retry])
        self.start = f"cd {ROOT}; {command} >> {directory}/log 2>&1 & echo $! > {self.pid_file}"
        self.restart = f"kill -9 $(cat {self.pid_file}); {self.start}"
        self.rotate = f"cp -p {directory}/new/* {directory}/now; kill -HUP $(cat {self.pid_file})"

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())

    def is_ready(self) -> bool:
        log = self.directory / "log"
        return log.exists() and f"ready 127.0.0.1:{self.back}" in log.read_text()


@contextlib.contextmanager
def started(place: Place) -> Iterator[Place]:
    """A place whose server runs, until the end, whoever has started it last."""
    subprocess.run(["/bin/sh", "-c", place.start], check=True)
    try:
        eventually(place.is_ready)
        yield place
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(place.pid, signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with started(Place(tmp_path)) as place:
        yield place


@pytest.mark.parametrize("adapter", [a for a in ADAPTERS.values() if a is not REFERENCE], ids=lambda a: a.name)
def test_servers_of_other_makes_are_fit(adapter: Adapter, tmp_path: Path) -> None:
    if adapter.missing is not None:
        pytest.skip(adapter.missing)
    with started(Place(tmp_path, adapter)) as place:
        options = ["--server-config", f"{tmp_path}/old/server.yaml", "--restart", place.restart]
        if Feature.ROTATION not in adapter.cannot:
            options += ["--rotate", place.rotate, "--rotated-config", f"{tmp_path}/new/server.yaml"]
        command = [*CONFORMANCE, f"127.0.0.1:{place.back}", *options, "--connections", "60", "--format", "json"]
        done = subprocess.run(command, check=False, capture_output=True, timeout=90)
    failed = {check["name"]: check for check in json.loads(done.stdout)["checks"] if check["status"] == "failed"}
    assert set(failed) == KNOWN.get(adapter.name, set()), failed


def test_the_reference_server_is_fit_through_a_balancer_a_restart_and_a_rotation(place: Place) -> None:
    with (place.directory / "balancer.log").open("wb") as log:
        run = [sys.executable, "-m", "lb", "run", "-c", str(place.config)]
        balancer = subprocess.Popen(run, stderr=log, cwd=place.directory)
    try:
        eventually(lambda: b"event=started" in (place.directory / "balancer.log").read_bytes())
        files = ["--server-config", str(place.directory / "old/server.yaml")]
        files += ["--rotated-config", str(place.directory / "new/server.yaml")]
        commands = ["--restart", place.restart, "--rotate", place.rotate, "--connections", "100"]
        target = f"127.0.0.1:{place.front}"
        done = subprocess.run(
            [*CONFORMANCE, target, *files, *commands, "--format", "json"], check=False, capture_output=True, timeout=90
        )
    finally:
        balancer.terminate()
        balancer.wait(timeout=15)
    assert done.stderr == b""
    report = json.loads(done.stdout)
    assert [check for check in report["checks"] if check["status"] == "failed"] == []
    assert [check["name"] for check in report["checks"] if check["status"] == "skipped"] == ["retry"]
    assert done.returncode == 0


def test_a_server_with_another_file_is_not_fit(place: Place, tmp_path: Path) -> None:
    """The right server, and the file of its next configuration."""
    file = str(place.directory / "new/server.yaml")
    written = tmp_path / "report.xml"
    arguments = ["--server-config", file, "--connections", "40", "--format", "junit", "-o", str(written)]
    done = subprocess.run(
        [*CONFORMANCE, f"127.0.0.1:{place.back}", *arguments], check=False, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    root = ElementTree.fromstring(written.read_text())  # noqa: S314 - our own
    cases = root.iterfind(".//testcase")
    assert {case.get("name") for case in cases if case.find("failure") is not None} == {"routable", "reset"}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that wrong arguments get."""
    with contextlib.suppress(SystemExit):
        assert main(["conformance", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("localhost",), "'localhost': expected HOST:PORT, as in 192.0.2.1:443, [2001:db8::1]:443 or name:443"),
        (("localhost:0",), "'localhost:0': expected HOST:PORT"),
        ((":443",), "':443': expected HOST:PORT"),
        (("localhost:99999",), "'localhost:99999': expected HOST:PORT"),
        (("localhost:443", "--rotate", "true"), "--rotate and --rotated-config: expected both or neither"),
        (("localhost:443", "--connections", "1000001"), "--connections 1000001: expected at most 1000000"),
        (("localhost:443", "--connections", "0"), "'0': expected an integer, 1 to 4294967295"),
        (("localhost:443", "--within", "5"), "'5': expected"),
        (("localhost:443", "--format", "xml"), "invalid choice: 'xml'"),
        (("localhost:443", "--reset-scheme", "md5"), "invalid"),
        (("localhost:443", "--reset-scheme", "nginx"), "--reset-scheme nginx: expected --reset-key-file as well"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: tuple[str, ...], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    assert line in refused(capsys, *arguments, "--server-config", str(place.directory / "old/server.yaml"))


def test_wrong_files_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    old = place.directory / "old/server.yaml"
    bare = place.directory / "bare.yaml"
    bare.write_text("name: a\n")
    nowhere = f"127.0.0.1:{place.back}"
    assert "no cid-config" in refused(capsys, nowhere, "--server-config", str(bare))
    assert "No such file" in refused(capsys, nowhere, "--server-config", str(place.directory / "none.yaml"))
    again = ("--rotate", "true", "--rotated-config", str(old))
    assert "the same configuration" in refused(capsys, nowhere, "--server-config", str(old), *again)
    [key] = old.parent.glob("cid-*.key")
    key.chmod(0o644)
    line = refused(capsys, nowhere, "--server-config", str(old))
    assert "mode 0644" in line
    assert key.read_text().strip() not in line


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    arguments = ["conformance", f"127.0.0.1:{place.back}", "--server-config", str(place.directory / "old/server.yaml")]
    assert main(arguments) == 1
    assert capsys.readouterr() == ("", f"quiclb: 127.0.0.1:{place.back}: no handshake: Connection refused\n")
    assert main([*arguments, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert report["counts"] == {"passed": 0, "failed": 1, "skipped": len(CHECKS) - 1}


def test_without_the_extra_it_says_so_in_one_line(tmp_path: Path) -> None:
    place = Place(tmp_path)
    code = "import sys; sys.modules['aioquic'] = None; from lb.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["conformance", "127.0.0.1:443", "--server-config", str(place.directory / "old/server.yaml")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, cwd=ROOT
    )
    wanted = "quiclb: conformance needs aioquic, which is not installed: pip install 'quiclb[conformance]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)


def test_a_command_that_fails_is_a_failure_with_its_words(place: Place) -> None:
    file = str(place.directory / "old/server.yaml")
    command = ["--restart", "echo no such unit >&2; exit 5", "--connections", "1"]
    done = subprocess.run(
        [*CONFORMANCE, f"127.0.0.1:{place.back}", "--server-config", file, *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert line == "FAILED   reset-after-restart  --restart: exit status 5: no such unit"
    assert done.returncode == 1
