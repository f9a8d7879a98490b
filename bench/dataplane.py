"""CPU time per packet, quiclb beside nginx: they take turns on the same core, in every round of the same run."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from bench.balancers import Balancer, Nginx, Quiclb, started
from bench.load import Load, Result, run, server_id, write_cids
from bench.network import BACKENDS, Network
from lb.cid import CidConfig, ConfigId

# Our targets: CPU time per packet of default nginx over ours, so that more is cheaper.
TARGETS = {"single": 0.95, "train": 4.0, "download": 4.0}

TITLES = {
    "single": "single datagrams",
    "burst": "bursts of 8, not coalesced",
    "train": "GRO trains of 8",
    "echo": "echo, round trip",
    "download": "downloads, trains of 8",
}


UNBOUNDED = 10_000_000  # datagrams per second: more than any core here sends


class Offer(NamedTuple):
    """How a load is offered: at a rate, in datagrams per second, or by keeping so many under way at all times."""

    name: str
    rate: int
    window: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure; `seconds` per run."""

    offers: tuple[Offer, ...]
    loads: tuple[str, ...] = tuple(TITLES)
    rounds: int = 5
    seconds: float = 1.5


def busy(window: int) -> Offer:
    """The balancer never runs dry, and nothing that it has no time for is thrown at it: what its core can do.

    With a window of 0, though, everything is thrown at it, and most is lost.
    """
    name = f"kept busy, {window} datagrams under way" if window else "overrun, as many as the load's core can send"
    return Offer(name, UNBOUNDED, window)


def paced(rate: int) -> Offer:
    """The same work for all, less than a core's: here each waking up counts."""
    return Offer(f"paced, {rate} datagrams per second", rate, 0)


class Cell(NamedTuple):
    """One balancer under one load, offered in one way."""

    offer: Offer
    load: str
    balancer: str
    results: list[Result]
    ratios: list[float]  # default nginx's CPU time over this one's, round by round

    @property
    def microseconds(self) -> float:
        return statistics.median(r.microseconds for r in self.results)

    @property
    def ratio(self) -> float | None:
        """Above 1 = cheaper than default nginx; None without it."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def lost(self) -> float:
        return statistics.median(r.lost for r in self.results)

    @property
    def misrouted(self) -> int:
        return sum(r.misrouted + r.alien for r in self.results)

    @property
    def overrun(self) -> int:
        return sum(r.overrun for r in self.results)

    @property
    def disturbance(self) -> float:
        return max(r.disturbance for r in self.results)


def measure(
    plan: Plan,
    nginx: tuple[Path, Path] | None,
    quiclb_program: Sequence[str] | None,
    directory: Path,
    say: Callable[[str], None],
) -> list[Cell]:
    """Run the plan and return a cell per load and balancer, loads in the plan's order.

    `nginx` is its program and its modules' folder; without it there are figures and no ratios. `directory` is an
    empty one for configurations and logs. Raises BenchError if one does not work at all.
    """
    config = bench_config()
    balancers = contestants(config, nginx, quiclb_program)
    cids = directory / "cids"
    write_cids(cids, config, Load("single", 1, 1).flows)

    results: dict[tuple[Offer, str, str], list[Result]] = {}
    with Network() as network:
        for number, offer, kind in product(range(plan.rounds), plan.offers, plan.loads):
            # An echo is two packets for a balancer.
            rate = offer.rate // 2 if kind == "echo" else offer.rate
            load = Load(kind, rate, plan.seconds, window=offer.window)
            # Who goes first changes, so that nobody always gets the warm machine.
            shift = number % len(balancers)
            for balancer in balancers[shift:] + balancers[:shift]:
                with (
                    tempfile.TemporaryDirectory(dir=directory) as place,
                    started(balancer, network, Path(place)) as running,
                ):
                    result = run(load, running, network, cids, config)
                results.setdefault((offer, kind, balancer.name), []).append(result)
                say(f"round {number + 1}, {offer.name}: {TITLES[kind]}, {balancer.name}: {_line(result)}")

    reference = balancers[0].name
    return [
        Cell(
            offer,
            kind,
            balancer.name,
            mine := results[offer, kind, balancer.name],
            _ratios(results[offer, kind, reference], mine) if nginx else [],
        )
        for offer, kind, balancer in product(plan.offers, plan.loads, balancers)
    ]


def contestants(
    config: CidConfig, nginx: tuple[Path, Path] | None, quiclb_program: Sequence[str] | None
) -> list[Balancer]:
    """Default nginx first, if there is one: the others are compared with it."""
    server_ids = [server_id(i, config).hex() for i in range(BACKENDS)]
    ours = Quiclb(config, server_ids, quiclb_program) if quiclb_program else Quiclb(config, server_ids)
    return [*((Nginx(*nginx), Nginx(*nginx, multi_accept=True)) if nginx else ()), ours]


def bench_config() -> CidConfig:
    """What docs/configuration.md recommends: 4 + 12 octets, encrypted in one AES block. The key is this run's own."""
    return CidConfig(ConfigId(0), server_id_length=4, nonce_length=12, key=os.urandom(16))


def _ratios(reference: list[Result], mine: list[Result]) -> list[float]:
    return [a.microseconds / b.microseconds for a, b in zip(reference, mine, strict=True)]


def _line(result: Result) -> str:
    return (
        f"{result.microseconds:.2f} µs, {result.delivered / result.seconds / 1000:.0f} kpps, "
        f"{result.lost:.1%} lost, core shared {result.disturbance:.0%}"
    )
