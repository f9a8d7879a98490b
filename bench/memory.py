"""What a flow costs in memory, and whether 100 000 of them can be set up with 20 000 descriptors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.balancers import started
from bench.dataplane import bench_config, contestants
from bench.load import Load, Result, run, write_cids
from bench.machine import kernel_slab, memory_of
from bench.network import Network

DESCRIPTORS = 20_000
FLOW_COUNTS = (10_000, 100_000)
TARGET = 1000  # octets per flow
RATE = 20_000  # datagrams per second
WINDOW = 64  # datagrams unanswered at a time: what is lost is not lost to a burst
SIZE = 100  # octets: what counts is that there is a flow


class Footprint(NamedTuple):
    """One balancer after all its flows were set up. Memory in octets, before the first flow and after the last."""

    result: Result
    before: dict[str, int]
    after: dict[str, int]
    slab: int  # the kernel's growth, of the whole machine: an estimate of sockets and their entries
    descriptors: int

    @property
    def per_flow(self) -> float:
        """Octets of the balancer's processes' memory, what was set aside at start for flows to come not included."""
        return (self.after["total"] - self.before["total"]) / self.result.flows

    @property
    def whole_per_flow(self) -> float:
        """All of the processes' memory, interpreter included, over the flows."""
        return self.after["total"] / self.result.flows

    @property
    def lost_flows(self) -> int:
        """Flows of which not one datagram was answered."""
        return self.result.flows - self.result.answered

    @property
    def complete(self) -> bool:
        """Every datagram of every flow was answered, by the right server, over the address the flow began with."""
        r = self.result
        return r.delivered == r.sent == 2 * r.flows and r.misrouted == r.moved == r.alien == 0


def measure(
    quiclb_program: Sequence[str] | None,
    directory: Path,
    say: Callable[[str], None],
    flow_counts: Sequence[int] = FLOW_COUNTS,
    rate: int = RATE,
) -> list[Footprint]:
    """Set up so many flows, each a client address and port of its own, send on each twice, and look at the memory."""
    config = bench_config()
    (balancer,) = contestants(config, None, quiclb_program)
    cids = directory / "cids"
    write_cids(cids, config, max(flow_counts))

    footprints = []
    with Network() as network:
        for flows in flow_counts:
            place = directory / str(flows)
            place.mkdir()
            with started(balancer, network, place, DESCRIPTORS) as running:
                pids = running.pids()
                before, slab = memory_of(pids), kernel_slab()
                result = run(Load("setup", rate, 60, flows, SIZE, window=WINDOW), running, network, cids, config)
                footprint = Footprint(
                    result, before, memory_of(pids), kernel_slab() - slab, sum(map(_descriptors, pids))
                )
            footprints.append(footprint)
            say(
                f"{flows} flows: {footprint.per_flow:.0f} octets each, {footprint.lost_flows} lost, "
                f"{result.delivered} of {result.sent} datagrams answered"
            )
    return footprints


def _descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
