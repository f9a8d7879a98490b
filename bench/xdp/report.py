"""The tables and the picture of the xdp part."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby

from bench.report import Section, reached
from bench.xdp import paths, picture, updates
from bench.xdp.nanoseconds import Cost
from bench.xdp.throughput import Flood
from bench.xdp.updates import Update

DISTURBED = 1.5  # times the quickest floor: somebody else had the core

PATHS_TITLE = "xdp: one packet"
THROUGHPUT_TITLE = "xdp: packets per second over veth"
UPDATES_TITLE = "xdp: changes of the table"


def paths_section(costs: Sequence[Cost], loads: int, packets: int) -> Section:
    rows = [
        (
            cost.group,
            cost.path,
            f"{cost.nanoseconds:.0f}",
            f"{cost.prototype_nanoseconds:.0f}" if cost.prototype_nanoseconds is not None else "-",
            f"{cost.ratio:.2f}" if cost.ratio is not None else "-",
            f"{min(cost.ratios):.2f} to {max(cost.ratios):.2f}" if cost.ratios else "-",
            reached(cost.ratio <= paths.RATIO) if cost.ratio is not None and cost.is_promised else "-",
        )
        for cost in costs
    ]
    floors = [sample.floor for cost in costs for sample in cost.ours]
    floor = statistics.median(floors)
    passing = statistics.median(sample.passing for cost in costs for sample in cost.ours)
    remarks = [
        f"Nanoseconds beyond a program that only transmits, which takes {floor:.0f} in the same wrapper; one that only "
        f"passes takes {passing:.0f}. Medians of {loads} fresh loads, each of three turns of {packets} packets.",
        "The ratio is ours over the prototype's, paired within each load: below 1 is cheaper.",
        _ratio_target(costs),
        _reset_target(costs),
    ]
    disturbed = sum(each > DISTURBED * min(floors) for each in floors)
    if disturbed > len(floors) / 10:
        remarks.append(
            f"NOISE: the program that only transmits was slower by half in {disturbed} of {len(floors)} loads: others "
            "had the core too. Repeat on a quiet machine before believing any figure above."
        )
    return Section(
        PATHS_TITLE,
        ("group", "path", "ns per packet", "prototype", "ratio", "spread", f"at most {paths.RATIO:g}"),
        rows,
        remarks,
    )


def throughput_section(floods: Sequence[Flood], rounds: int) -> Section:
    rows = [(flood.forwarder, f"{flood.mpps:.2f}", f"{flood.ratio:.2f}") for flood in floods]
    remarks = [
        f"Medians of {rounds} interleaved rounds. Generator, both ends of the cable, program and sink share one core; "
        "the ratio is to the null forwarder's rate in the same round.",
    ]
    return Section(THROUGHPUT_TITLE, ("forwarder", "Mpps", "ratio"), rows, remarks)


def updates_section(measured: Sequence[Update]) -> Section:
    rows = [
        (update.change, f"{update.seconds * 1e3:.1f}", f"{min(update.all) * 1e3:.1f} to {max(update.all) * 1e3:.1f}")
        for update in measured
    ]
    remarks = [
        f"One service, {updates.BACKENDS} backends, {updates.SERVER_IDS} server IDs. Times are those of `apply` alone: "
        "the table is built before.",
        *(
            f"target, {update.change} in less than {update.target * 1e3:g} ms: {update.seconds * 1e3:.1f} ms, "
            f"{reached(update.seconds < update.target)}"
            for update in measured
        ),
    ]
    return Section(UPDATES_TITLE, ("change", "ms", "spread"), rows, remarks)


def chart(costs: Sequence[Cost]) -> str:
    """The picture: an SVG document."""
    compared = any(cost.prototype for cost in costs)
    groups = [
        (
            group,
            [
                picture.Row(cost.path, [cost.nanoseconds, *([cost.prototype_nanoseconds] if compared else [])])
                for cost in members
            ],
        )
        for group, members in groupby(costs, key=lambda cost: cost.group)
    ]
    return picture.bars(
        "xdp engine: nanoseconds per packet, by path",
        "ns beyond a program that only transmits",
        ("quiclb", "prototype") if compared else ("quiclb",),
        groups,
    )


def _ratio_target(costs: Sequence[Cost]) -> str:
    target = f"target, no path dearer than {paths.RATIO:g} times the prototype's"
    compared = [(cost, cost.ratio) for cost in costs if cost.is_promised and cost.ratio is not None]
    if not compared:
        return f"{target}: not measured, there is no prototype"
    within = sum(ratio <= paths.RATIO for _, ratio in compared)
    worst, ratio = max(compared, key=lambda pair: pair[1])
    return (
        f"{target}: {within} of {len(compared)}, the worst is {worst.path} at {ratio:.2f}, "
        f"{reached(within == len(compared))}"
    )


def _reset_target(costs: Sequence[Cost]) -> str:
    target = f"target, {paths.RESETS:,} stateless resets per second and core"
    measured = [cost.nanoseconds for cost in costs if cost.path == paths.RESET]
    if not measured:
        return f"{target}: not measured"
    per_second = 1e9 / measured[0]
    return f"{target}: {per_second:,.0f}, {reached(per_second >= paths.RESETS)}"
