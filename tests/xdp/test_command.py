"""`quiclb xdp` and `quiclb decap` on interfaces of network namespaces: what they show, change and say."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lb.forward import Attach, Forward
from lb.router import Verdict
from lb.xdp.attachment import Attachment
from lb.xdp.layout import SAMPLING, U32_KEY
from tests import namespaces
from tests.builders import short
from tests.fleet import eventually
from tests.namespaces import inside, ip
from tests.xdp import bpf
from tests.xdp.cases import UNROUTABLE, A, Way, cid, tables
from tests.xdp.command import begin, command, quiclb
from tests.xdp.forwarding import datagram

HERE = ("10.66.0.1", "fd66::1")  # addresses of eth0
WEB = Way(4, 4)


class Machine(NamedTuple):
    """A namespace with eth0, and a directory to pin in."""

    namespace: str
    pins: Path

    def run(self, *argv: object) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        done = quiclb(self.namespace, *argv)
        return done.returncode, done.stdout, done.stderr

    def pinning(self, *argv: object) -> tuple[int, str, str]:
        return self.run(*argv, "--pin-directory", self.pins)

    def status(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.pinning("xdp", "status", "--json")[1])
        return found


@pytest.fixture
def machine() -> Iterator[Machine]:
    reason = namespaces.missing() or bpf.missing()
    if reason:
        pytest.skip(reason)
    pins = Path(f"/sys/fs/bpf/quiclb-test-{os.getpid()}-command")
    with namespaces.namespaces("here", "there") as (here, there):
        ip(here, f"link add eth0 type veth peer name eth0 netns {there}", f"addr add {HERE[0]}/24 dev eth0")
        ip(here, f"addr add {HERE[1]}/64 dev eth0 nodad", "link set eth0 up")
        ip(there, "link set eth0 up")
        yield Machine(here, pins)
    for directory in (pins / "decap", pins):
        for pin in directory.glob("*"):
            pin.unlink()
        if directory.exists():
            directory.rmdir()


@contextlib.contextmanager
def balancer(machine: Machine, how: Attach = Attach.GENERIC) -> Iterator[bpf.Balancer]:
    """The program on eth0, filled, pinned, and nobody's."""
    made = bpf.Balancer(Forward.L2)
    try:
        made.apply(tables(Forward.L2))
        with inside(machine.namespace):
            place = Attachment("eth0", socket.if_nametoindex("eth0"), machine.pins)
            with contextlib.closing(place):
                place.attach(made.loaded.program, how)
        yield made
    finally:
        made.close()


def test_status_says_what_is_loaded_and_how_full_its_maps_are(machine: Machine) -> None:
    with balancer(machine) as made:
        (found,) = machine.status()
        info = made.loaded.program.info
        assert (found["interface"], found["program"], found["mode"]) == ("eth0", "quiclb", "generic")
        assert (found["forward"], found["constant-time"], found["sampling"]) == ("l2", False, 0)
        assert (found["id"], found["tag"]) == (info.id, info.tag)
        assert (found["verified-instructions"], found["jited-octets"]) == (info.verified_insns, info.jited_octets)
        assert found["pin"] == str(machine.pins / "eth0")
        maps = {use["name"]: use for use in found["maps"]}
        # Eight services of five backends, seven with six configurations and one with one.
        assert maps["backends"]["entries"] == 8 * 5
        assert maps["cid_configs"]["entries"] == 7 * 6 + 1
        assert maps["servers"]["entries"] == 5 * (7 * 6 + 1)
        assert maps["service_names"] == {
            "name": "service_names", "type": "hash", "entries": 8, "max-entries": 256,
            "octets": maps["service_names"]["octets"],
        }  # fmt: skip
        assert maps["rings"]["entries"] >= 8
        assert maps["rings"]["octets"] > 8 * 2 * 65537
        assert maps["flows"]["entries"] == 0
        assert maps["service_count"]["entries"] is None
        made.run(bytes(datagram(WEB, UNROUTABLE)))
        (found,) = machine.status()
        assert next(use["entries"] for use in found["maps"] if use["name"] == "flows") == 1

        status, text, err = machine.pinning("xdp", "status", "--interface", "eth0")
        assert (status, err) == (0, "")
        assert text.startswith(f"eth0: quiclb, generic, forward l2\n  program {info.id}, tag {info.tag}, loaded ")
        assert f"\n  {info.verified_insns} instructions verified, {info.jited_octets} octets of machine code\n" in text
        assert re.search(r"\n  servers +hash +215 +262144 +0% +[0-9.]+ [KM]iB\n", text)


def test_status_without_anything_to_show_is_status_1(machine: Machine) -> None:
    assert machine.pinning("xdp", "status") == (1, "", "quiclb: nothing of quiclb's is on any interface\n")
    assert machine.pinning("xdp", "status", "--interface", "eth0") == (
        1, "", "quiclb: nothing of quiclb's is on eth0\n",
    )  # fmt: skip
    assert machine.pinning("xdp", "status", "--json") == (
        1,
        "[]\n",
        "quiclb: nothing of quiclb's is on any interface\n",
    )


def test_status_finds_the_pin_among_other_things(machine: Machine) -> None:
    """What else may be in the pin directory."""
    with balancer(machine):
        (machine.pins / "dangling").symlink_to("nowhere")
        (machine.pins / "decap").mkdir()
        (found,) = machine.status()
        assert found["pin"] == str(machine.pins / "eth0")


@pytest.mark.parametrize("action", [("status",), ("sample", "--every", "1"), ("detach",)], ids=lambda action: action[0])
def test_an_interface_that_is_not_there_is_named(machine: Machine, action: Sequence[str]) -> None:
    assert machine.run("xdp", *action, "--interface", "eth9") == (
        1, "", "quiclb: eth9: no such network interface\n",
    )  # fmt: skip


def test_detach_takes_the_program_off_and_the_pin_away(machine: Machine) -> None:
    with balancer(machine):
        pass
    assert len(machine.status()) == 1
    assert machine.pinning("xdp", "detach", "--interface", "eth0") == (
        0, "eth0: the balancer's program (generic) is off; what it knew is forgotten\n", "",
    )  # fmt: skip
    assert not (machine.pins / "eth0").exists()
    assert machine.status() == []
    assert machine.pinning("xdp", "detach", "--interface", "eth0") == (
        1, "", f"quiclb: eth0 has no program of quiclb that is pinned at {machine.pins}/eth0\n",
    )  # fmt: skip


class Sampler:
    """`quiclb xdp sample`, and what it has printed."""

    def __init__(self, machine: Machine, made: bpf.Balancer, *argv: object) -> None:
        self._made = made
        self._process = begin(machine.namespace, "xdp", "sample", "--interface", "eth0", *argv)
        eventually(lambda: self.sampling() != (0, 0), patience=15)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def sampling(self) -> tuple[int, int]:
        """What the program is told now: one in how many, of which verdicts."""
        octets = self._made.maps["sampling"].lookup(U32_KEY.pack(0))
        assert octets is not None
        sampling = SAMPLING.unpack(octets)
        return sampling.every, sampling.verdicts

    def line(self) -> str:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], 15)[0], "it says nothing"
        return self._process.stdout.readline().decode()

    def end(self, number: signal.Signals | None = None) -> tuple[int, str, str]:
        """Exit status, and the rest of what it says."""
        if number is not None:
            self._process.send_signal(number)
        out, err = self._process.communicate(timeout=15)
        return self._process.returncode, out.decode(), err.decode()


def test_samples_are_printed_with_what_became_of_them(machine: Machine) -> None:
    frame = bytes(datagram(WEB, short(cid(A))))
    with balancer(machine) as made, Sampler(machine, made, "--every", 1, "--count", 2) as sampler:
        assert sampler.sampling() == (1, 0)
        made.run(frame)
        assert re.fullmatch(rf"\d\d:\d\d:\d\d web-4-4 cid, {len(frame)} octets\n", sampler.line())
        octets = "".join(sampler.line()[10:57] for _ in range(-(-min(len(frame), 128) // 16)))
        assert bytes.fromhex(octets) == frame[:128]
        made.run(bytes(datagram(WEB, UNROUTABLE)))
        status, rest, err = sampler.end()

        assert (status, err) == (0, "")
        assert re.match(r"\d\d:\d\d:\d\d web-4-4 fallback, ", rest)
        assert sampler.sampling() == (0, 0)


def test_samples_can_be_of_some_verdicts_only(machine: Machine) -> None:
    wanted = ("--verdict", "empty", "--verdict", "fallback")
    with balancer(machine) as made, Sampler(machine, made, "--every", 1, *wanted, "--count", 1) as sampler:
        assert sampler.sampling() == (1, 1 << Verdict.EMPTY | 1 << Verdict.FALLBACK)
        made.run(bytes(datagram(WEB, short(cid(A)))))
        made.run(bytes(datagram(WEB, b"")))

        assert " web-4-4 empty, " in sampler.line()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_sampling_ends_with_the_command(machine: Machine, number: signal.Signals, status: int) -> None:
    with balancer(machine) as made, Sampler(machine, made, "--every", 1000) as sampler:
        assert sampler.sampling() == (1000, 0)
        assert "one packet in 1000 is sampled" in machine.pinning("xdp", "status")[1]

        assert sampler.end(number) == (status, "", "")
        assert sampler.sampling() == (0, 0)


def test_there_are_no_samples_without_a_balancer(machine: Machine) -> None:
    machine.pinning("decap", "--interface", "eth0")
    assert machine.run("xdp", "sample", "--interface", "eth0", "--every", "1") == (
        1, "", "quiclb: eth0: no program of a balancer is here\n",
    )  # fmt: skip


def test_decap_stays_when_the_command_ends_and_shows_in_the_status(machine: Machine) -> None:
    pin = machine.pins / "decap" / "eth0"
    assert machine.pinning("decap", "--interface", "eth0") == (
        0, f"eth0: unpacks what tunnels bring to {', '.join(HERE)} (native, new, pinned at {pin})\n", "",
    )  # fmt: skip
    (found,) = machine.status()
    assert (found["program"], found["mode"], found["pin"], found["forward"]) == ("decap", "native", str(pin), None)
    assert found["counted"].keys() == {"decapsulated", "dropped-ecn", "malformed", "passed"}
    assert [use["entries"] for use in found["maps"] if use["name"] == "local"] == [2]
    assert "\n  decapsulated 0, dropped-ecn 0, malformed 0, passed " in machine.pinning("xdp", "status")[1]


def test_decap_replaces_itself(machine: Machine) -> None:
    machine.pinning("decap", "--interface", "eth0")
    before = machine.status()
    status, out, _ = machine.pinning("decap", "--interface", "eth0", "--address", "10.66.0.7", "--address", "FD66::7")
    (found,) = machine.status()

    assert (status, out.split(" (")) == (
        0, ["eth0: unpacks what tunnels bring to 10.66.0.7, fd66::7", f"native, replaced, pinned at {found['pin']})\n"],
    )  # fmt: skip
    assert found["id"] != before[0]["id"]
    assert found["pin"] == before[0]["pin"]


def test_decap_can_be_taken_off(machine: Machine) -> None:
    machine.pinning("decap", "--interface", "eth0")
    off = ("decap", "--interface", "eth0", "--detach")

    assert machine.pinning(*off) == (0, "eth0: what tunnels bring is not unpacked any more\n", "")
    assert machine.status() == []
    pin = machine.pins / "decap" / "eth0"
    assert machine.pinning(*off) == (1, "", f"quiclb: eth0 has no program of quiclb that is pinned at {pin}\n")


def test_decap_leaves_alone_who_is_there_already(machine: Machine) -> None:
    with balancer(machine) as made:
        status, out, err = machine.pinning("decap", "--interface", "eth0")
        assert (status, out) == (1, "")
        assert re.fullmatch(rf"quiclb: .*eth0.* another XDP program: quiclb, ID {made.loaded.program.info.id}\n", err)
        assert [found["program"] for found in machine.status()] == ["quiclb"]


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (("--interface", "lo"), 1, "quiclb: lo: it has no address at which a tunnel could end\n"),
        (("--interface", "eth9"), 1, "quiclb: eth9: no such network interface\n"),
        (("--interface", "eth0", "--pin-directory", "/tmp/x"), 1, "quiclb: /tmp/x/decap is not in a BPF file system\n"),
        (("--interface", "eth0", "--address", "here"), 2, "'here': expected an IP address\n"),
        (("--interface", "eth0", "--address", "::1", "--detach"), 2, "quiclb: decap: --detach takes no --address\n"),
    ],
)
def test_decap_says_what_it_cannot_do(machine: Machine, argv: Sequence[str], status: int, said: str) -> None:
    found, out, err = machine.run("decap", *argv)
    assert (found, out) == (status, "")
    assert err.endswith(said)
    assert machine.status() == []


def configuration(directory: Path) -> Path:
    path = directory / "xdp.yaml"
    path.write_text(
        "engine: xdp\ninterface: eth0\n"
        "services: [{name: web, listen: ['192.0.2.1:443'], backends: [{name: a, address: '10.66.0.11:443'}]}]\n"
    )
    return path


def test_check_takes_the_program_through_the_verifier_and_attaches_nothing(machine: Machine, tmp_path: Path) -> None:
    path = configuration(tmp_path)
    status, out, err = machine.run("check", "--engine", path)
    assert (status, err) == (0, "")
    found = re.search(r"\nthis machine: ok; the kernel's verifier took the program, after (\d+) instructions\n", out)
    assert found is not None
    described = json.loads(machine.run("check", "--engine", "--json", path)[1])
    assert described["machine"] == {"lacks": [], "verified-instructions": int(found[1])}
    assert machine.status() == []


def test_check_says_why_a_program_cannot_be_loaded(machine: Machine, tmp_path: Path) -> None:
    """Here because its maps are more than the descriptors that the process may have."""
    few = ["prlimit", "--nofile=24:24"]
    with inside(machine.namespace):
        argv = [*few, *command("check", "--engine", configuration(tmp_path))]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.match(r"this machine: cannot load \S+quiclb.bpf.o: Too many open files", done.stderr)


def test_without_privileges_the_kernel_says_no_and_that_is_what_is_said(machine: Machine) -> None:
    with balancer(machine):
        powerless = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]
        with inside(machine.namespace):
            argv = [*powerless, *command("xdp", "status")]
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"quiclb: cannot open (program \d+|/sys/\S+): Operation not permitted\n", done.stderr)
