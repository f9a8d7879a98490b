"""`quiclb status` and `quiclb top`: a running balancer, looked at once or all the time."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from lb import terminal
from lb.admin.client import Client, UnreachableError
from lb.commands.arguments import OK, ArgumentError, add, duration, json_flag, positive
from lb.commands.balancer import FINDING, add_admin, client, service
from lb.commands.screen import is_there, paint, show, whole, width

# Ours.
EVERY = 1.0  # seconds
HINT = "q: quit"


def add_to(commands: Any) -> None:
    status = add(
        commands,
        "status",
        "a running balancer: backends, connection IDs, counters",
        f"""Show a running balancer: its backends with their states, weights, shares of new
connections (SHARE), flows, packets per second (PPS), time since the last packet
(LAST) and round trip of a health probe (RTT); its config IDs; what it counted.
In a narrow terminal some columns are left out. --json has everything.

{FINDING}""",
        """examples:
  quiclb status
  quiclb status --service web
  quiclb status --json | jq '.services[].backends[] | select(.state != "active")'
  quiclb status --names

Exit status: 0 done, 1 no answer, 2 wrong arguments.""",
    )
    status.add_argument("--service", metavar="NAME", help="this service only")
    status.add_argument("--names", action="store_true", help="names of backends only, one per line")
    json_flag(status, "all that the API says, as JSON")
    add_admin(status)
    status.set_defaults(command=_status)

    top = add(
        commands,
        "top",
        "the same, live",
        f"""Show which backends get the most packets, anew every second, until q or an
interrupt. It takes the whole terminal and leaves it as it was.

{FINDING}""",
        """examples:
  quiclb top
  quiclb top --every 5s --admin 127.0.0.1:9101
  quiclb top --json --count 10 | jq -c '.services[].verdicts'

Exit status: 0 ended by q or --count, 1 no answer, 2 wrong arguments, 130 interrupted, 143 terminated.""",
    )
    top.add_argument("--every", type=duration, default=EVERY, metavar="TIME", help="time from look to look (1s)")
    top.add_argument("--count", type=positive, metavar="K", help="end after K looks")
    json_flag(top, "a line of JSON for each look, and no screen")
    add_admin(top)
    top.set_defaults(command=_top)


def _status(args: argparse.Namespace) -> int:
    state = client(args).state()
    if args.service is not None:
        wanted = service([one["name"] for one in state["services"]], args.service)
        state["services"] = [one for one in state["services"] if one["name"] == wanted]
    if args.names:
        names = [(one["name"], shown["name"]) for one in state["services"] for shown in one["backends"]]
        bare = [name for _, name in names]
        print("\n".join(name if bare.count(name) == 1 else f"{of}/{name}" for of, name in names))
    elif args.json:
        print(json.dumps(state))
    else:
        print("\n".join(terminal.status(state, width(), paint())))
    return OK


def _top(args: argparse.Namespace) -> int:
    balancer = client(args)
    if args.json:
        return _lines(balancer, args)
    if not is_there():
        raise ArgumentError("top: expected a terminal; `quiclb status` and `quiclb top --json` need none")
    state = balancer.state()  # if there is none, that is said on the screen that was
    with whole() as wait:
        return _live(balancer, state, args, wait)


def _lines(balancer: Client, args: argparse.Namespace) -> int:
    looks = 0
    while True:
        print(json.dumps(balancer.state()), flush=True)
        looks += 1
        if looks == args.count:
            return OK
        time.sleep(args.every)


def _live(
    balancer: Client, state: Mapping[str, Any], args: argparse.Namespace, wait: Callable[[float], bytes | None]
) -> int:
    """`wait` waits for so many seconds, or for a key, which it returns, or until the terminal has another size."""
    before: Mapping[str, Any] | None = None
    looks, trouble = 1, ""
    look_at = time.monotonic() + args.every
    while True:
        _draw(state, before, trouble)
        key = wait(max(0.0, look_at - time.monotonic()))
        if key is not None and (not key or key in b"qQ\x04"):
            return OK
        if time.monotonic() < look_at:
            continue
        if looks == args.count:
            return OK
        look_at = time.monotonic() + args.every
        looks += 1
        try:
            state, before, trouble = balancer.state(), state, ""
        except UnreachableError as error:
            trouble = str(error)


def _draw(state: Mapping[str, Any], before: Mapping[str, Any] | None, trouble: str) -> None:
    colours = paint()
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    lines = terminal.top(state, before, (columns, rows), colours)
    # The end of what is wrong says why.
    last = colours("31", terminal.plain(trouble)[-columns:]) if trouble else HINT[:columns]
    show([*lines, *[""] * (rows - 1 - len(lines)), last])
