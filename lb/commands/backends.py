"""`quiclb drain`, `undrain`, `weight`, `fence` and `unfence`: what the operator says about a backend."""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from lb import terminal
from lb.admin.client import Client, RefusedError, UnreachableError
from lb.commands.arguments import FAILED, OK, ArgumentError, add, duration, json_flag, terminate
from lb.commands.balancer import FINDING, Member, add_admin, client, member
from lb.overrides import MAX_WEIGHT

# Ours; in seconds.
LOOK_EVERY = 1.0
SAY_EVERY = 10.0  # where nobody watches
QUIET = 5.0
ABSENCE = 10.0  # that a balancer may take to be replaced while somebody waits
NOT_FOUND = 404

BACKEND = "BACKEND is a name, or SERVICE/NAME where several services have a backend of that name."


def add_to(commands: Any) -> None:
    drain = _add(
        commands,
        "drain",
        "no new connections for a backend; it keeps those it has",
        """Give a backend no new connections. Those that it has stay, wherever their clients
move. The drain lasts until `quiclb undrain`, over reloads and restarts.

With --wait the command ends when the backend is quiet: when no packet went to it
for a while. Every second, or every 10 where the output is no terminal, it prints
how many flows and packets per second still go there and when the last one did.
An interrupt or SIGTERM ends the waiting (130, 143), and the drain stays. So it
does when the time of --timeout is over.

Each balancer of a fleet has to be told.""",
        """examples:
  quiclb drain a
  quiclb drain web/a --wait --timeout 10m && systemctl stop quic-server
  quiclb drain a --wait --json | jq .quiet

In a Kubernetes preStop hook, with terminationGracePeriodSeconds: 330:
  quiclb drain "$POD_NAME" --admin https://balancer:9101 --token-file /token --wait --timeout 5m

Exit status: 0 draining, and quiet with --wait; 1 failed, or not quiet in time; 2 wrong arguments.""",
        "the backend as JSON; with --wait a line for each look, and `quiet` says how it went",
    )
    drain.add_argument("--wait", action="store_true", help="until it is quiet")
    drain.add_argument("--timeout", type=duration, metavar="TIME", help="with --wait: at most for so long (for ever)")
    drain.add_argument(
        "--quiet",
        type=duration,
        default=QUIET,
        metavar="TIME",
        help="with --wait: how long no packet may have gone there (5s); a connection may be silent for longer, "
        "for as long as its idle timeout",
    )
    drain.set_defaults(command=_drain)

    undrain = _add(
        commands,
        "undrain",
        "new connections for a backend again",
        """Take a drain back. If the file says `drain: true`, that is overridden.
With `health.slow-start` the backend gets its share by and by.""",
        """examples:
  quiclb undrain a

Exit status: 0 done, 1 failed, 2 wrong arguments.""",
    )
    undrain.set_defaults(command=_undrain)

    weight = _add(
        commands,
        "weight",
        "change a backend's share of new connections",
        f"""Change a backend's weight: its share of new connections, relative to the others.
0 to {MAX_WEIGHT}; 0 is none. `file` goes back to what the file says. Connections that there
are stay where they are.""",
        """examples:
  quiclb weight a 10
  quiclb weight web/a file

Exit status: 0 done, 1 failed, 2 wrong arguments.""",
    )
    weight.add_argument("weight", type=_weight, metavar="WEIGHT", help=f"0 to {MAX_WEIGHT}, or `file`")
    weight.set_defaults(command=_change_weight)

    fence = _add(
        commands,
        "fence",
        "declare a backend dead, at once",
        """Declare a backend dead: for when you know that it is gone and do not want to wait
for the health checks. It gets no packets. Its clients are told at once by stateless
resets, if there are reset keys: they lose their connections and may make new ones.
That lasts until `quiclb unfence`, whatever the checks say. When every backend of a
service is fenced, nobody gets its packets.""",
        """examples:
  quiclb fence a

Exit status: 0 done, 1 failed, 2 wrong arguments.""",
    )
    fence.set_defaults(command=functools.partial(_change, {"fence": True}))

    unfence = _add(
        commands,
        "unfence",
        "believe the health checks of a backend again",
        "Take a fence back. The backend is what its health checks say.",
        """examples:
  quiclb unfence a

Exit status: 0 done, 1 failed, 2 wrong arguments.""",
    )
    unfence.set_defaults(command=functools.partial(_change, {"fence": False}))


def _add(
    commands: Any,
    name: str,
    help: str,  # noqa: A002
    details: str,
    epilog: str,
    as_json: str = "the backend as JSON",
) -> argparse.ArgumentParser:
    parser = add(commands, name, help, f"{details}\n\n{BACKEND}\n{FINDING}", epilog)
    action = parser.add_argument("backend", metavar="BACKEND", help="the backend")
    action.complete = COMPLETED  # type: ignore[attr-defined]
    json_flag(parser, as_json)
    add_admin(parser)
    return parser


COMPLETED = {"bash": "_quiclb_backends", "zsh": "_quiclb_backends"}


def _change(change: Mapping[str, Any], args: argparse.Namespace) -> int:
    balancer = client(args)
    _say(_changed(balancer, member(balancer.state(), args.backend), change), args)
    return OK


def _change_weight(args: argparse.Namespace) -> int:
    return _change({"weight": args.weight}, args)


def _undrain(args: argparse.Namespace) -> int:
    balancer = client(args)
    found = member(balancer.state(), args.backend)
    for said in (None, False):  # the file's word, if that will do
        if found.shown["drain"]:
            found = _changed(balancer, found, {"drain": said})
    _say(found, args)
    return OK


def _drain(args: argparse.Namespace) -> int:
    if args.timeout is not None and not args.wait:
        raise ArgumentError("--timeout: expected --wait as well")
    balancer = client(args)
    found = _changed(balancer, member(balancer.state(), args.backend), {"drain": True})
    if not args.wait:
        _say(found, args)
        return OK
    signal.signal(signal.SIGTERM, terminate)
    return _Waiting(balancer, found, args).wait()


class _Waiting:
    """Looks at a backend that drains until nothing goes there any more."""

    def __init__(self, balancer: Client, found: Member, args: argparse.Namespace) -> None:
        self._balancer = balancer
        self._found = found
        self._args = args
        self._began = self._answered = time.monotonic()
        self._said = -SAY_EVERY
        self._say_every = 0.0 if args.json or sys.stdout.isatty() else SAY_EVERY

    def wait(self) -> int:
        while True:
            waited = time.monotonic() - self._began
            last = self._found.shown["last-packet"]
            # Nothing since the balancer began says nothing if that was a moment ago.
            is_quiet = waited >= self._args.quiet if last is None else last >= self._args.quiet
            is_over = self._args.timeout is not None and waited >= self._args.timeout
            if is_quiet or is_over or not self._found.shown["drain"]:
                return self._end(waited, is_quiet=is_quiet and self._found.shown["drain"])
            if waited >= self._said + self._say_every:
                self._say(waited, is_quiet=False)
                self._said = waited
            rest = LOOK_EVERY if self._args.timeout is None else min(LOOK_EVERY, self._args.timeout - waited)
            time.sleep(rest)
            if not self._look():
                self._note(f"{self._found.name}: the configuration has no such backend any more")
                return OK

    def _look(self) -> bool:
        """Ask again. False: there is no such backend any more. A balancer may be away while it is replaced."""
        try:
            shown = self._balancer.backend(self._found.service, self._found.shown["name"])
        except UnreachableError:
            if time.monotonic() - self._answered > ABSENCE:
                raise
            return True
        except RefusedError as error:
            if error.status != NOT_FOUND:
                raise
            return False
        self._answered = time.monotonic()
        self._found = Member(self._found.service, shown)
        return True

    def _end(self, waited: float, *, is_quiet: bool) -> int:
        self._say(waited, is_quiet=is_quiet)
        if is_quiet:
            self._note(f"{self._found.name}: quiet, after {terminal.duration(waited)}")
            return OK
        why = "still not quiet" if self._found.shown["drain"] else "not draining any more: somebody took it back"
        print(f"quiclb: {self._found.name}: {why}, after {terminal.duration(waited)}", file=sys.stderr)
        return FAILED

    def _say(self, waited: float, *, is_quiet: bool) -> None:
        if self._args.json:
            print(json.dumps(_json(self._found) | {"waited": round(waited, 3), "quiet": is_quiet}), flush=True)
        else:
            print(terminal.traffic(self._found.name, self._found.shown), flush=True)

    def _note(self, text: str) -> None:
        if not self._args.json:
            print(text, flush=True)


def _changed(balancer: Client, found: Member, change: Mapping[str, Any]) -> Member:
    return Member(found.service, balancer.change(found.service, found.shown["name"], change))


def _say(found: Member, args: argparse.Namespace) -> None:
    print(json.dumps(_json(found)) if args.json else terminal.traffic(found.name, found.shown))


def _json(found: Member) -> dict[str, Any]:
    return {"service": found.service} | found.shown


def _weight(text: str) -> int | None:
    if text == "file":
        return None
    if not text.isascii() or not text.isdigit() or len(text) > len(str(MAX_WEIGHT)) or int(text) > MAX_WEIGHT:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer, 0 to {MAX_WEIGHT}, or `file`")
    return int(text)
