"""`python -m backend.demo`: watch quiclb keep connections alive."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from backend.clients.fleet import LIBRARIES, STACKS, missing
from backend.demo.lan import Xdp
from backend.demo.place import StageError
from backend.demo.report import Report
from backend.demo.scenario import Scene, closing_figures, play
from backend.demo.stage import ROOT, Play, Stage, stage

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Play the scenario. 0 if every step passed, 1 if one failed or nothing could be started, 2 for wrong options."""
    parser = argparse.ArgumentParser(
        prog="python -m backend.demo",
        description="Start balancers and three backends, and break things in front of real QUIC clients.",
        epilog="Exit status: 0 all passed, 1 a step failed, 2 wrong options.",
    )
    parser.add_argument(
        "--engine",
        choices=("udp", "xdp"),
        default="udp",
        help="what moves packets: sockets, all on loopback, or a program in the kernel, everybody in a network "
        "namespace, which takes root (default: %(default)s)",
    )
    parser.add_argument(
        "--client",
        type=_stacks,
        metavar="NAME,...",
        help=f"which clients to use, of {', '.join(STACKS)} (default: those that are installed)",
    )
    parser.add_argument("--stay", action="store_true", help="keep everything running afterwards, for clients of yours")
    args = parser.parse_args(argv)
    report = Report(sys.stdout)
    stacks = args.client or [stack for stack in STACKS if missing(stack) is None]
    try:
        return asyncio.run(_demonstrate(report, args.engine, stacks, stay=args.stay))
    except StageError as error:
        report.say(f"cannot go on: {error}")
        return EXIT_FAILED
    except BrokenPipeError:
        # Whoever watched has seen enough. The interpreter would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, asyncio.CancelledError):
        report.say("interrupted; everything that was started has been stopped")
        return EXIT_INTERRUPTED


async def _demonstrate(report: Report, engine: str, stacks: Sequence[str], *, stay: bool) -> int:
    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    where = "on loopback" if engine == "udp" else "on a switch, each in a network namespace"
    report.say(f"starting three backends and two balancers with the same configuration {where}")
    async with stage(Play(xdp=Xdp() if engine == "xdp" else None), ("one", "two")) as set_up:
        for name, balancer in set_up.balancers.items():
            family = f" and {balancer.address_v6}" if balancer.address_v6 else ""
            report.say(f"balancer {name} listens on {balancer.address}{family}")
        for server in set_up.servers.values():
            report.say(f"backend {server.name} on {server.address}, server ID {server.server_id.hex()}")
        report.say(f"clients: {', '.join(stacks)}")
        for stack in STACKS:
            if reason := missing(stack):
                report.say(f"without {stack}: {reason}")
        scene = Scene(set_up, report, stacks)
        await play(scene)
        try:
            figures = await closing_figures(scene)
        except OSError as error:  # a balancer is not there any more
            figures = [f"nothing that could be read: {error}"]
        report.table()
        report.heading("counted by the balancers")
        for figure in figures:
            report.say(figure)
        report.heading("Something FAILED." if report.failed else "All passed.")
        if stay:
            await _stay(report, set_up)
    return EXIT_FAILED if report.failed else EXIT_OK


async def _stay(report: Report, set_up: Stage) -> None:
    balancer = set_up.balancers["one"]
    address = balancer.address
    client, there = (" ".join((*set_up.place.entering(machine), "")) for machine in ("client", balancer.name))
    pids = ", ".join(f"{server.name} {server.child.pid}" for server in set_up.servers.values())
    report.heading(f"Still running at {address}. Ctrl-C ends it. In {ROOT}:")
    for line in (
        f"{client}{sys.executable} -m backend.clients {address} /whoami",
        f"{client}{sys.executable} -m backend.clients {address} /slow/30",
        f"{client}gtlsclient -q --exit-on-all-streams-close --download=/tmp {address.host} {address.port} "
        f"https://localhost:{address.port}/whoami; cat /tmp/whoami",
        f"{there}curl http://{balancer.front.admin}/metrics",
    ):
        print(f"  {line}", flush=True)
    report.say(f"process IDs of the backends: {pids}; of the balancer: {balancer.child.pid}")
    report.say(f"configuration, keys and logs: {set_up.directory}")
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


def _stacks(text: str) -> list[str]:
    stacks = text.split(",")
    for stack in stacks:
        if stack not in STACKS:
            raise argparse.ArgumentTypeError(f"{stack!r}: expected some of {', '.join(STACKS)}")
        if reason := missing(stack):
            raise argparse.ArgumentTypeError(reason)
    if not set(stacks) & set(LIBRARIES):
        raise argparse.ArgumentTypeError(f"{text}: expected {' or '.join(LIBRARIES)} among them")
    return stacks


if __name__ == "__main__":
    sys.exit(main())
