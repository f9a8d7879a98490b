"""The report: the same tables as text for a terminal and as Markdown for docs/performance.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench import dataplane, memory
from bench.dataplane import Cell, Offer, Plan
from bench.decision import Cost
from bench.memory import Footprint

DISTURBED = 0.05  # of the core's work done by others: the figures are noise


class Section(NamedTuple):
    """One part's table, its remarks below, and whether something was wrong (not: slow)."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str]
    wrong: bool = False


def machine_section(machine: Mapping[str, str]) -> Section:
    return Section("Machine", ("what", "is"), list(machine.items()), ())


def decision_section(costs: Sequence[Cost]) -> Section:
    plain = costs[0]
    rows = [
        (
            cost.case,
            f"{cost.by_cid:.0f} ns" if cost.by_cid else "-",
            f"{cost.by_cid / plain.by_cid:.2f}" if cost.by_cid and plain.by_cid else "-",
            f"{cost.route:.0f} ns",
            f"{cost.route / plain.route:.2f}",
        )
        for cost in costs
    ]
    return Section(
        "One routing decision",
        ("decision", "RoutingTable.by_cid", "to plaintext", "Router.route", "to plaintext"),
        rows,
        ("Medians of interleaved rounds; datagrams of 1200 octets, 256 flows, 16 backends.",),
    )


def dataplane_section(cells: Sequence[Cell], offer: Offer, plan: Plan) -> Section:
    """One offer's table, of the cells of all."""
    cells = [cell for cell in cells if cell.offer == offer]
    rows = [
        (
            dataplane.TITLES[cell.load],
            cell.balancer,
            f"{cell.microseconds:.2f}",
            f"{cell.ratio:.2f}" if cell.ratio else "-",
            f"{min(cell.ratios):.2f} to {max(cell.ratios):.2f}" if cell.ratios else "-",
            f"{cell.lost:.2%}",
            str(cell.misrouted),
        )
        for cell in cells
    ]
    remarks = [
        f"{plan.rounds} interleaved rounds of {plan.seconds:g} s, datagrams of 1200 octets, 256 flows, 16 backends.",
        "CPU-seconds of the balancer's core per million delivered packets; the ratio is default nginx's over this "
        "one's, paired within each round: above 1 is cheaper.",
    ]
    ours = [cell for cell in cells if not cell.balancer.startswith("nginx")]
    remarks += [_target(cell) for cell in ours if cell.load in dataplane.TARGETS]
    disturbance = max(cell.disturbance for cell in cells)
    if disturbance > DISTURBED:
        remarks.append(
            f"NOISE: up to {disturbance:.0%} of the balancer core's time went to other programs. Repeat on a quiet "
            "machine before believing any figure above."
        )
    if overrun := sum(cell.overrun for cell in cells):
        remarks.append(f"NOISE: {overrun} packets were lost at the load's own sockets, not by a balancer.")
    misrouted = sum(cell.misrouted for cell in ours)
    remarks.append(f"quiclb misrouted {misrouted} packets{': WRONG, it must be 0.' if misrouted else '.'}")
    return Section(
        f"CPU time per packet: {offer.name}",
        ("load", "balancer", "µs per packet", "ratio", "spread", "lost", "misrouted"),
        rows,
        remarks,
        misrouted > 0,
    )


def memory_section(footprints: Sequence[Footprint]) -> Section:
    rows = [
        (
            str(f.result.flows),
            f"{f.per_flow:.0f}",
            f"{f.whole_per_flow:.0f}",
            f"{f.after['total'] / 1e6:.1f} ({f.after['anonymous'] / 1e6:.1f} + {f.after['file'] / 1e6:.1f})",
            f"{f.slab / 1e6:.1f}",
            str(f.descriptors),
            str(f.lost_flows),
            f"{f.result.delivered} of {f.result.sent}",
        )
        for f in footprints
    ]
    most = max(footprints, key=lambda f: f.result.flows)
    per_flow = max(f.per_flow for f in footprints)
    remarks = [
        f"Every flow is a client address and port of its own and sends twice, at {memory.RATE} datagrams per second; "
        "every datagram is answered by its backend.",
        "Memory is proportional set size: pages shared by the balancer's processes count once. `grown` is since "
        "before the first flow; `whole` is everything, the interpreter included.",
        f"target, memory per flow under {memory.TARGET} octets: {per_flow:.0f}, {reached(per_flow < memory.TARGET)}",
        _set_up_target(most),
    ]
    return Section(
        "Memory per flow",
        (
            "flows",
            "octets per flow, grown",
            "whole",
            "MB (anonymous + file)",
            "kernel slab, MB",
            "descriptors",
            "flows lost",
            "answered",
        ),
        rows,
        remarks,
        any(f.result.misrouted for f in footprints),
    )


def skipped(title: str, why: str) -> Section:
    return Section(title, (), (), (f"skipped: {why}",))


def failed(title: str, why: str) -> Section:
    return Section(title, (), (), (f"DID NOT WORK: {why}",), wrong=True)


def as_text(section: Section) -> str:
    """The section for a terminal, its columns aligned."""
    lines = [section.title, "=" * len(section.title), ""]
    table = [section.header, *section.rows] if section.rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    if table:
        lines.insert(4, "  ".join("-" * w for w in widths))
        lines.append("")
    return "\n".join([*lines, *section.remarks, ""])


def as_markdown(section: Section) -> str:
    lines = [f"### {section.title}", ""]
    if section.rows:
        lines += [_row(section.header), _row(["---"] * len(section.header)), *map(_row, section.rows), ""]
    return "\n".join([*lines, *(f"{remark}  " for remark in section.remarks)]).rstrip() + "\n"


def as_data(value: object) -> object:
    """Dataclasses and named tuples as JSON objects, properties that sum them up included."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict() | _properties(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(item) for item in value]
    return value


def _properties(value: object) -> dict[str, object]:
    return {name: getattr(value, name) for name, member in vars(type(value)).items() if isinstance(member, property)}


def _target(cell: Cell) -> str:
    target = dataplane.TARGETS[cell.load]
    title = dataplane.TITLES[cell.load]
    if cell.ratio is None:
        return f"target, {title} at least {target:g}: not measured, there is no nginx"
    return f"target, {title} at least {target:g}: {cell.ratio:.2f}, {reached(cell.ratio >= target)}"


def _set_up_target(footprint: Footprint) -> str:
    target = f"target, {max(memory.FLOW_COUNTS)} flows and no set-up loss under {memory.DESCRIPTORS} descriptors"
    result = footprint.result
    if result.flows < max(memory.FLOW_COUNTS):
        return f"{target}: not measured, {result.flows} were asked for"
    return (
        f"{target}: {footprint.lost_flows} flows lost, {result.sent - result.delivered} datagrams unanswered, "
        f"{result.moved} flows given up and begun anew, {reached(footprint.complete)}"
    )


def reached(is_reached: bool) -> str:
    return "reached" if is_reached else "NOT reached"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
