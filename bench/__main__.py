"""`python -m bench`: run all parts, or those that are named, and print one report."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench import backend, dataplane, decision, memory, report, restart
from bench.balancers import BenchError, NginxError, find_nginx
from bench.load import pinned_to_load_core
from bench.machine import RESULTS, describe, obstacle
from bench.report import Section
from bench.xdp import part as xdp
from bench.xdp.compiler import CompilerError

PARTS = ("decision", "dataplane", "memory", "xdp", "restart", "backend")
EXIT_OK, EXIT_WRONG, EXIT_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns an exit status: 1 if a packet was misrouted or a part did not work; never for being slow."""
    options = _parser().parse_args(arguments)
    parts = options.parts or list(PARTS)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        print(f"bench: no part {', '.join(unknown)}: expected {', '.join(PARTS)}", file=sys.stderr)
        return EXIT_USAGE
    signal.signal(signal.SIGTERM, _leave)  # so that namespaces and processes go, as on Ctrl-C

    given = shlex.join(["python", "-m", "bench", *(arguments or sys.argv[1:])])
    machine = describe() | {"command": given.replace(shlex.quote(str(options.prototype)), "DIR")}
    sections = [report.machine_section(machine)]
    data: dict[str, object] = {"machine": machine}
    with tempfile.TemporaryDirectory(prefix="quiclb-bench-") as directory:
        for part in parts:
            part_sections, data[part] = _PARTS[part](options, Path(directory))
            sections += part_sections

    write = report.as_markdown if options.markdown else report.as_text
    print()
    print("\n".join(map(write, sections)))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(report.as_data(data), indent=2) + "\n")
    _say(f"everything measured is in {path}")
    return EXIT_WRONG if any(section.wrong for section in sections) else EXIT_OK


def _decision(options: argparse.Namespace, _directory: Path) -> tuple[list[Section], object]:
    _say("decision: half a minute")
    costs = decision.measure(rounds=3 * options.rounds, calls=options.calls)
    return [report.decision_section(costs)], costs


def _dataplane(options: argparse.Namespace, directory: Path) -> tuple[list[Section], object]:
    title = "CPU time per packet"
    if why := obstacle():
        return [report.skipped(title, why)], None
    offers = {"busy": dataplane.busy(options.window), "paced": dataplane.paced(options.rate)}
    plan = dataplane.Plan(
        tuple(offers[name] for name in options.offers), tuple(options.loads), options.rounds, options.seconds
    )
    try:
        nginx = find_nginx()
    except NginxError as error:
        _say(f"no nginx to compare with: {error}")
        nginx = None
    runs = plan.rounds * len(plan.offers) * len(plan.loads) * 3
    _say(f"dataplane: about {runs * (plan.seconds + 1) / 60:.0f} min")
    place = directory / "dataplane"
    place.mkdir()
    try:
        with pinned_to_load_core():
            cells = dataplane.measure(plan, nginx, options.quiclb, place, _say)
    except BenchError as error:
        return [report.failed(title, str(error))], None
    return [report.dataplane_section(cells, offer, plan) for offer in plan.offers], cells


def _memory(options: argparse.Namespace, directory: Path) -> tuple[list[Section], object]:
    title = "Memory per flow"
    if why := obstacle():
        return [report.skipped(title, why)], None
    _say("memory: half a minute")
    place = directory / "memory"
    place.mkdir()
    try:
        with pinned_to_load_core():
            footprints = memory.measure(options.quiclb, place, _say, options.flows)
    except BenchError as error:
        return [report.failed(title, str(error))], None
    return [report.memory_section(footprints)], footprints


def _xdp(options: argparse.Namespace, directory: Path) -> tuple[list[Section], object]:
    title = "xdp engine"
    if why := obstacle() or xdp.obstacle():
        return [report.skipped(title, why)], None
    place = directory / "xdp"
    place.mkdir()
    plan = xdp.Plan(2 * options.rounds - 1, options.packets, options.rounds)
    try:
        with pinned_to_load_core():
            return xdp.measure(plan, options.prototype, options.picture, place, _say)
    except (BenchError, CompilerError, OSError) as error:
        return [report.failed(title, str(error))], None


def _restart(options: argparse.Namespace, directory: Path) -> tuple[list[Section], object]:
    if why := obstacle():
        return [report.skipped(restart.TITLE, why)], None
    without = xdp.obstacle()
    engines = restart.ENGINES if without is None else ("udp",)
    _say(f"restart: {'' if without is None else f'without xdp: {without}; '}about {10 * len(engines)} s a round")
    place = directory / "restart"
    place.mkdir()
    try:
        found = restart.measure(engines, options.restart_rate, options.rounds, options.quiclb, place, _say)
    except (BenchError, OSError) as error:
        return [report.failed(restart.TITLE, str(error))], None
    return [restart.section(found, options.restart_rate)], found


def _backend(options: argparse.Namespace, directory: Path) -> tuple[list[Section], object]:
    _say(f"backend: about {(15 * options.rounds + 60) / 60:.0f} min")
    place = directory / "backend"
    place.mkdir()
    try:
        found = backend.measure(backend.Plan(options.rounds, options.connections), place, _say)
    except (BenchError, OSError) as error:
        return [report.failed(backend.TITLE, str(error))], None
    return [backend.section(found)], found


_PARTS = {
    "decision": _decision,
    "dataplane": _dataplane,
    "memory": _memory,
    "xdp": _xdp,
    "restart": _restart,
    "backend": _backend,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="What quiclb costs: per routing decision, per packet beside nginx, per flow, in the kernel, at a "
        "restart, and in a server. All but the first and the last need root and two cores; without, they say so and "
        "are skipped.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none is named")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/performance.md has them")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one data plane run (default: 1.5)")
    parser.add_argument(
        "--offers",
        nargs="+",
        choices=["busy", "paced"],
        default=["busy", "paced"],
        help="how data plane loads are offered: enough to keep the balancer busy, at a rate (default: both)",
    )
    parser.add_argument("--window", type=int, default=64, help="busy: datagrams under way; 0: no bound (default: 64)")
    parser.add_argument("--rate", type=int, default=100_000, help="paced: datagrams per second (default: 100000)")
    parser.add_argument("--calls", type=int, default=20_000, help="decisions per round (default: 20000)")
    parser.add_argument(
        *("--loads", "-l"),
        nargs="+",
        choices=list(dataplane.TITLES),
        default=list(dataplane.TITLES),
        help="data plane loads (default: all)",
    )
    parser.add_argument(
        "--flows", type=int, nargs="+", default=list(memory.FLOW_COUNTS), help="flow counts of the memory part"
    )
    parser.add_argument(
        "--packets", type=int, default=300_000, help="packets of one timing of the xdp part (default: 300000)"
    )
    parser.add_argument(
        "--prototype",
        type=Path,
        metavar="DIR",
        help="sources of the prototype that the xdp part compares with (default: nothing is compared)",
    )
    parser.add_argument(
        "--restart-rate",
        type=int,
        default=restart.RATE,
        help=f"datagrams per second of the restart part, both directions together (default: {restart.RATE})",
    )
    parser.add_argument(
        "--connections",
        type=int,
        default=backend.CONNECTIONS,
        help=f"idle connections of the backend part, and rotated ones (default: {backend.CONNECTIONS})",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the xdp part's picture, an SVG document")
    parser.add_argument(
        "--quiclb",
        type=shlex.split,
        metavar="COMMAND",
        help="what to start, as in COMMAND run -c FILE (default: the quiclb beside this Python)",
    )
    return parser


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
