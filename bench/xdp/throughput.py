"""Packets per second through a veth pair: a generator of live frames, the program in native mode, a sink.

All of it shares one core, so a packet's time is that of everything: generator, both ends of the cable, sink. What the
program adds is what a null forwarder, which only transmits, has more packets per second.
"""

from __future__ import annotations

import socket
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path as File
from typing import NamedTuple

from bench.balancers import BenchError
from bench.network import Network, inside
from bench.xdp.harness import Restoring
from bench.xdp.ours import Ours
from bench.xdp.paths import PATHS, Path
from lb.xdp.layout import sum_u64
from lb.xdp.libbpf import BPF_F_TEST_XDP_LIVE_FRAMES, XDP_FLAGS_DRV_MODE, Link, Object, Program

NULL = "null forwarder"
NAMES = (
    "plaintext",
    "single-pass",
    "four-pass, decrypted",
    "four-pass, cached, 1024 flows",
    "in the table",
    "nat, plaintext",
)
BATCH = 64  # frames at a time: as many as a network card hands over
_INTERFACE = "eth0"
_ZERO = bytes(4)


class Flood(NamedTuple):
    """One forwarder's millions of packets per second that arrived, round by round."""

    forwarder: str
    rates: list[float]
    nulls: list[float]  # the null forwarder's, of the same round

    @property
    def mpps(self) -> float:
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """To the null forwarder's rate."""
        return statistics.median(rate / null for rate, null in zip(self.rates, self.nulls, strict=True))


def measure(harness: File, say: Callable[[str], None], *, rounds: int, packets: int) -> list[Flood]:
    """Every forwarder in turns. Raises BenchError if nothing arrives."""
    paths = [path for name in NAMES for path in PATHS if path.name == name]
    rates: dict[str, list[float]] = {name: [] for name in (NULL, *NAMES)}
    with Network() as network:
        for number in range(rounds):
            for path in (None, *paths):
                name = path.name if path else NULL
                rates[name].append(_flood(harness, network, path, packets))
                say(f"round {number + 1}, {name}: {rates[name][-1]:.2f} Mpps")
    return [Flood(name, rates[name], rates[NULL]) for name in rates]


def _flood(harness: File, network: Network, path: Path | None, packets: int) -> float:
    """Millions of packets per second."""
    frames = (path or PATHS[0]).frames()
    with ExitStack() as stack:
        ours = stack.enter_context(Ours(path)) if path else None
        renewed = ours.generation if path and ours and path.decodes else None
        loaded = stack.enter_context(Object(harness))
        loaded.section(".rodata.bench")[:] = Restoring(frames, generation=renewed).pack()
        if renewed is not None:
            loaded.reuse_map("generations", renewed)
        loaded.load()
        Restoring(frames).fill(loaded)
        forwarder = ours.program if ours else stack.enter_context(loaded.program("null_tx"))
        with inside(network.balancer):
            stack.enter_context(_attached(forwarder))
        with inside(network.load):
            stack.enter_context(_attached(stack.enter_context(loaded.program("sink"))))
            with loaded.map("interface") as interface:
                interface.update(_ZERO, struct.pack("<I", socket.if_nametoindex(_INTERFACE)))
            arrived = stack.enter_context(loaded.map("arrived"))
            generator = stack.enter_context(loaded.program("generate"))

            def send(count: int) -> float:
                start = time.perf_counter()
                generator.test_run(frames[0], repeat=count, flags=BPF_F_TEST_XDP_LIVE_FRAMES, batch_size=BATCH)
                return time.perf_counter() - start

            send(max(packets // 10, 2 * len(frames)))
            before = arrived.lookup(_ZERO)
            seconds = send(packets)
            after = arrived.lookup(_ZERO)
    assert before is not None
    assert after is not None
    count = sum_u64(after, 1)[0] - sum_u64(before, 1)[0]
    if not count:
        raise BenchError(f"{path.name if path else NULL}: nothing arrived")
    return count / seconds / 1e6


def _attached(program: Program) -> Link:
    return Link.create(program, socket.if_nametoindex(_INTERFACE), XDP_FLAGS_DRV_MODE)
