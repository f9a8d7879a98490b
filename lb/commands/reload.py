"""`quiclb reload` and `quiclb upgrade`: another configuration, another program, the same balancer."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lb import terminal
from lb.admin.client import RefusedError
from lb.commands.arguments import FAILED, OK, add, json_flag
from lb.commands.balancer import FINDING, add_admin, client, say_refusal


def add_to(commands: Any) -> None:
    reload = add(
        commands,
        "reload",
        "have a running balancer read its file again, and say what changed",
        f"""Have a running balancer read its configuration and the key files again, and print
what changed, a line each. With any mistake in them nothing changes, and all
mistakes are told. `quiclb check` tells them before.

{FINDING}""",
        """examples:
  quiclb check /etc/quiclb/quiclb.yaml && quiclb reload

Exit status: 0 done, 1 failed, 2 mistakes in the configuration or the arguments.""",
    )
    json_flag(reload, "what changed, and the new generation, as JSON")
    add_admin(reload)
    reload.set_defaults(command=_reload)

    upgrade = add(
        commands,
        "upgrade",
        "replace a running balancer by what is installed now",
        f"""Have a running balancer start what is installed now and hand everything over to
it: listening sockets, flows, pinned state. No packet is lost. If the successor does
not come up, the old process goes on.

{FINDING}""",
        """examples:
  pip install --upgrade quiclb && quiclb upgrade

Exit status: 0 the successor has taken over, 1 it has not, 2 wrong arguments.""",
    )
    json_flag(upgrade, "the successor's process ID as JSON")
    add_admin(upgrade)
    upgrade.set_defaults(command=_upgrade)


def _reload(args: argparse.Namespace) -> int:
    answer = client(args).reload()
    if args.json:
        print(json.dumps(answer))
    else:
        print("\n".join(terminal.plain(line) for line in answer["changes"]) or "nothing changed")
    return OK


def _upgrade(args: argparse.Namespace) -> int:
    try:
        answer = client(args).upgrade()
    except RefusedError as error:
        say_refusal(error)
        return FAILED  # whatever it is, it is nothing that an argument said
    print(json.dumps(answer) if args.json else f"process {answer['pid']} has taken over")
    return OK
