"""The xdp part: all that is measured of the engine in the kernel, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.report import Section
from bench.xdp import compiler, nanoseconds, report, throughput, updates
from bench.xdp.paths import PATHS
from bench.xdp.prototype import Prototype
from lb.xdp.libbpf import LIBRARY, has_library, supports_program
from lb.xdp.program import OBJECT


class Plan(NamedTuple):
    """How much to measure. The programs are loaded `loads` times; packets over veth and changes are timed in rounds."""

    loads: int
    packets: int
    rounds: int


def obstacle() -> str | None:
    """Why programs cannot be measured here; None if they can."""
    if not has_library():
        return f"it needs {LIBRARY}"
    if not compiler.is_there():
        return "it needs clang, or the package ziglang"
    if not supports_program():
        return "this machine, or container, does not let root load XDP programs"
    if not OBJECT.exists():
        return "the program is not built: make build"
    return None


def measure(
    plan: Plan, prototype: Path | None, picture: Path | None, place: Path, say: Callable[[str], None]
) -> tuple[list[Section], object]:
    """The tables, and everything that was measured. `place` is an empty folder."""
    harness = compiler.harness()
    compared = Prototype(prototype, place) if prototype else None
    say(f"xdp: about {len(PATHS) * plan.loads * 1.5 / 60:.0f} min")
    costs = nanoseconds.measure(harness, compared, say, loads=plan.loads, packets=plan.packets)
    floods = throughput.measure(harness, say, rounds=plan.rounds, packets=4 * plan.packets)
    pins = place / "pins"
    pins.mkdir()
    changes = updates.measure(pins, say, rounds=plan.rounds)
    if picture:
        picture.write_text(report.chart(costs))
        say(f"the picture is in {picture}")
    sections = [
        report.paths_section(costs, plan.loads, plan.packets),
        report.throughput_section(floods, plan.rounds),
        report.updates_section(changes),
    ]
    return sections, {"paths": costs, "throughput": floods, "updates": changes}
