"""`quiclb completion`: what shells need to know to complete our commands."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from lb.commands.arguments import OK, add

SHELLS = ("bash", "zsh", "tcsh")
# Names of backends come from the balancer that runs; without one there are none.
PREAMBLE = {
    "bash": """_quiclb_backends() {
  compgen -W "$("${COMP_WORDS[0]}" status --names 2>/dev/null)" -- "$1"
}""",
    "zsh": """_quiclb_backends() {
  compadd -- ${(f)"$(${words[1]} status --names 2>/dev/null)"}
}""",
}


def add_to(commands: Any, root: argparse.ArgumentParser) -> None:
    """`root` is the parser of all that can be completed."""
    parser = add(
        commands,
        "completion",
        "print a script that completes commands in a shell",
        """Print what a shell needs to complete commands, options, files and, from a running
balancer, names of backends.""",
        """examples:
  quiclb completion bash > /etc/bash_completion.d/quiclb
  quiclb completion zsh > "${fpath[1]}/_quiclb"
  source <(quiclb completion bash)

Exit status: 0 done, 2 wrong arguments.""",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    parser.set_defaults(command=functools.partial(_completion, root))


def _completion(root: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    import shtab  # noqa: PLC0415 - the other commands have no use for it

    print(shtab.complete(root, args.shell, preamble=PREAMBLE.get(args.shell, "")))
    return OK
