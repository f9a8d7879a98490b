"""The load: builds generator.c, gives it connection IDs, runs it beside a balancer and reads the clocks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.balancers import BenchError, Running
from bench.machine import BUILD, LOAD_CORE, Clocks
from bench.network import BACKENDS, BALANCER, FIRST_BACKEND, FIRST_CLIENT, PORT, Network
from lb.cid import CidConfig, Codec, ServerId

SOURCE = Path(__file__).with_name("generator.c")
COMPILE = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")
TIMEOUT = 120.0  # seconds: the longest set-up run and a margin


@dataclass(frozen=True, slots=True)
class Load:
    """One run's offer. `kind` is the generator's word; `rate` is datagrams per second, `size` octets of payload.

    `window` is how many datagrams may be under way; 0: as many as the rate makes.
    """

    kind: str
    rate: int
    seconds: float
    flows: int = 256
    size: int = 1200
    burst: int = 8
    window: int = 0


class Result(NamedTuple):
    """What came of it: the generator's counts, and what they cost the balancer's core."""

    sent: int
    delivered: int
    misrouted: int
    moved: int
    alien: int
    refused: int
    overrun: int
    flows: int
    answered: int
    seconds: float
    clocks: Clocks

    @property
    def microseconds(self) -> float:
        """CPU time per delivered packet: CPU-seconds per million."""
        return self.clocks.figure() / self.delivered * 1e6 if self.delivered else float("inf")

    @property
    def lost(self) -> float:
        """The share of what was sent that did not arrive."""
        return 1 - self.delivered / self.sent if self.sent else 1.0

    @property
    def disturbance(self) -> float:
        """How much of the core's work was somebody else's, 0 to 1: above a few per cent, do not trust the figure."""
        return max(0.0, 1 - self.clocks.balancer / self.clocks.core) if self.clocks.core else 0.0


def build(directory: Path = BUILD) -> Path:
    """Compile the generator and return its path. Raises CalledProcessError if it does not compile."""
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "generator"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        subprocess.run([*COMPILE, "-o", str(program), str(SOURCE)], check=True)
    return program


def server_id(backend: int, config: CidConfig) -> ServerId:
    return ServerId((backend + 1).to_bytes(config.server_id_length))


def write_cids(path: Path, config: CidConfig, flows: int) -> None:
    """One connection ID per flow, end to end: flow f's is of backend f % BACKENDS."""
    codec = Codec(config)
    path.write_bytes(
        b"".join(
            codec.encode(server_id(flow % BACKENDS, config), flow.to_bytes(config.nonce_length))
            for flow in range(flows)
        )
    )


def run(load: Load, balancer: Running, network: Network, cids: Path, config: CidConfig) -> Result:
    """Offer a load to a balancer. Raises BenchError, with its own words, if the balancer lets nothing through."""
    command = [
        str(build()),
        *("--load", load.kind, "--rate", str(load.rate), "--seconds", str(load.seconds)),
        *("--flows", str(load.flows), "--size", str(load.size), "--burst", str(load.burst)),
        *("--window", str(load.window)),
        *("--target", BALANCER, "--port", str(PORT), "--clients", str(FIRST_CLIENT)),
        *("--backends", str(FIRST_BACKEND), "--backend-count", str(BACKENDS)),
        *("--cids", str(cids), "--cid-length", str(config.cid_length)),
    ]
    with _started(network.command(network.load, LOAD_CORE, command)) as generator:
        assert generator.stdin is not None
        assert generator.stdout is not None
        moments = []
        for moment in ("start\n", "stop\n"):
            if generator.stdout.readline() != moment:
                raise BenchError(generator.communicate(timeout=TIMEOUT)[1].strip())
            moments.append(Clocks.read(balancer.pids()))
            generator.stdin.write("\n")
            generator.stdin.flush()
        out, _ = generator.communicate(timeout=TIMEOUT)
    counts = json.loads(out)
    del counts["load"]
    return Result(**counts, clocks=moments[1] - moments[0])


@contextmanager
def pinned_to_load_core() -> Iterator[None]:
    """This process out of the balancer's way, on the core that the generator has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {LOAD_CORE})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()  # nothing, if it has ended
