"""Nanoseconds per packet of every path: ours, the prototype and nothing, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path as File
from typing import NamedTuple

from bench.xdp.harness import Harness, Restoring
from bench.xdp.ours import MAP_ENTRIES, Ours
from bench.xdp.paths import PATHS, Path
from bench.xdp.prototype import Loaded, Prototype
from lb.router import Verdict
from lb.xdp.libbpf import Program

TURNS = 3  # in one load
WARM_UP = 2 * MAP_ENTRIES  # packets: every flow is known, every line in its cache, and the table of 4-tuples is full


class Sample(NamedTuple):
    """One load's figures, medians over its turns: of the program, and of two that do nothing in the same wrapper."""

    nanoseconds: float
    floor: float  # only transmits
    passing: float  # only hands packets to the stack

    @property
    def net(self) -> float:
        return self.nanoseconds - self.floor


class Cost(NamedTuple):
    """A path's figures, one sample per load, ours and the prototype's of the same load at the same place."""

    path: str
    group: str
    is_promised: bool
    ours: list[Sample]
    prototype: list[Sample]  # empty: none

    @property
    def nanoseconds(self) -> float:
        return statistics.median(sample.net for sample in self.ours)

    @property
    def prototype_nanoseconds(self) -> float | None:
        return statistics.median(sample.net for sample in self.prototype) if self.prototype else None

    @property
    def ratios(self) -> list[float]:
        """To the prototype, load by load."""
        return [a.net / b.net for a, b in zip(self.ours, self.prototype, strict=True)] if self.prototype else []

    @property
    def ratio(self) -> float | None:
        """Above 1: dearer than the prototype; None without it."""
        return statistics.median(self.ratios) if self.prototype else None


def measure(
    harness: File,
    prototype: Prototype | None,
    say: Callable[[str], None],
    *,
    loads: int,
    packets: int,
    paths: Sequence[Path] = PATHS,
) -> list[Cost]:
    """Every path, so many times freshly loaded; all paths take their turns before one is loaded again."""
    found: dict[Path, tuple[list[Sample], list[Sample]]] = {path: ([], []) for path in paths}
    for number in range(loads):
        for path in paths:
            ours, theirs = _one_load(harness, prototype, path, packets)
            found[path][0].append(ours)
            if theirs:
                found[path][1].append(theirs)
            beside = f", prototype {theirs.net:.0f}" if theirs else ""
            say(f"load {number + 1}, {path.group}: {path.name}: {ours.net:.0f} ns{beside}, floor {ours.floor:.0f}")
    return [Cost(path.name, path.group, path.is_promised, ours, theirs) for path, (ours, theirs) in found.items()]


def _one_load(harness: File, prototype: Prototype | None, path: Path, packets: int) -> tuple[Sample, Sample | None]:
    theirs: Loaded | None = None
    with ExitStack() as stack:
        ours = stack.enter_context(Ours(path))
        restoring = Restoring(
            path.frames(), path.fresh_clients, ours.generation if path.decodes else None, path.is_reset, path.long_heads
        )
        contestants = [(stack.enter_context(Harness(harness, restoring)), ours.program)]
        if prototype and path.prototype is not None:
            theirs = stack.enter_context(prototype.load(path.prototype))
            restoring = restoring._replace(generation=theirs.generation if path.decodes else None)
            contestants.append((stack.enter_context(Harness(harness, restoring)), theirs.program))
        for wrapper, program in contestants:
            wrapper.nanoseconds(program, WARM_UP, path.returns)
        before = ours.verdicts()
        turns = [[_turn(*contestant, packets, path) for contestant in contestants] for _ in range(TURNS)]
        ours.check(path, before, TURNS * packets)
        if theirs and path.verdict is not None:
            theirs.check(path.name, path.verdict is Verdict.CID)
    medians = [
        Sample(*(statistics.median(figures) for figures in zip(*samples, strict=True)))
        for samples in zip(*turns, strict=True)
    ]
    return medians[0], medians[1] if len(medians) > 1 else None


def _turn(wrapper: Harness, program: Program, packets: int, path: Path) -> Sample:
    return Sample(
        wrapper.nanoseconds(program, packets, path.returns), wrapper.floor(packets // 2), wrapper.passing(packets // 2)
    )
