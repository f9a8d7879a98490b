"""`quiclb run`, `check` and `schema`: a configuration obeyed, understood, described."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lb import config, describe, server_config
from lb.commands.arguments import FAILED, OK, ArgumentError, add, file, json_flag

VERIFIER_LINES = 10  # of the kernel's verifier's last words


def add_to(commands: Any) -> None:
    _add_run(commands)
    _add_check(commands)
    _add_schema(commands)


def _add_run(commands: Any) -> None:
    parser = add(
        commands,
        "run",
        "balance until told to stop",
        """Balance as a configuration file says, until SIGTERM or SIGINT.

SIGHUP, or `quiclb reload`, reads the file again. With any mistake in it, or with a
change that a running process cannot make, the old configuration stays and the log
says why. SIGUSR2, or `quiclb upgrade`, starts what is installed now in the place of
the process, and no packet is lost.

With `engine: xdp` packets keep flowing when the process ends, by the tables that
it had last; `quiclb xdp detach` ends that.""",
        """examples:
  quiclb check /etc/quiclb/quiclb.yaml && quiclb run -c /etc/quiclb/quiclb.yaml

Exit status: 0 stopped when told to, 1 failed, 2 mistakes in the configuration.""",
    )
    file(parser, "-c", "--config", required=True, help="the configuration")
    parser.add_argument(
        "--watch", action="store_true", help="read the file again whenever it, or a file that it names, changes"
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take everything over from the process that runs with the same runtime directory; it ends then",
    )
    parser.set_defaults(command=_run)


def _add_check(commands: Any) -> None:
    parser = add(
        commands,
        "check",
        "say what is wrong with a configuration, or what it means",
        """Read a configuration and the key files it names, and say what was understood:
services, CID configurations and what a packet of each costs, server IDs, shares
of new connections. Keys are shown as fingerprints of 32 bits, for comparing.
If there are mistakes, say all of them, one per line, on standard error.

With --engine and `engine: xdp` the machine is asked too: for privileges, libraries,
the interface. If it has everything, the kernel's verifier looks at the program.
Nothing is attached.""",
        """examples:
  quiclb check quiclb.yaml
  quiclb check --engine quiclb.yaml
  quiclb check --json quiclb.yaml | jq '.services[].backends'

Exit status: 0 no mistakes, 1 the machine lacks something (--engine), 2 mistakes.
Advice (`note:` lines) changes nothing.""",
    )
    file(parser, "file", nargs="?", help="the configuration")
    file(parser, "-c", "--config", help="the same")
    parser.add_argument("--engine", action="store_true", help="ask this machine as well whether it can run the engine")
    json_flag(parser, "print what was understood as JSON")
    parser.set_defaults(command=_check)


def _add_schema(commands: Any) -> None:
    parser = add(
        commands,
        "schema",
        "print the JSON Schema of the configuration",
        """Print the JSON Schema (draft 2020-12) of the configuration file, for editors.
`quiclb check` knows more: a schema sees no key files and compares no two places.""",
        """examples:
  quiclb schema > quiclb.schema.json
  quiclb schema --server

Exit status: 0.""",
    )
    parser.add_argument("--server", action="store_true", help="that of a server's file instead")
    parser.set_defaults(command=_schema)


def _run(args: argparse.Namespace) -> int:
    from lb.control import run  # noqa: PLC0415 - the other commands need no event loop

    return run(args.config, watch=args.watch, take_over=args.take_over)


def _check(args: argparse.Namespace) -> int:
    path = args.config or args.file
    if path is None or (args.config and args.file):
        raise ArgumentError("check: expected one configuration file")
    loaded = config.load_config(path)
    described = describe.describe(loaded)
    if args.engine:
        described["machine"] = _machine(loaded)
    if args.json:
        print(json.dumps(described, indent=2))
    else:
        sys.stdout.write(describe.render(str(path), described))
    lacks: list[str] = described.get("machine", {}).get("lacks", [])
    for reason in lacks:
        print(f"this machine: {reason}", file=sys.stderr)
    return FAILED if lacks else OK


def _machine(loaded: config.LbConfig) -> dict[str, Any]:
    """What the machine that we are on makes of a configuration."""
    from lb.engines import missing, xdp_settings  # noqa: PLC0415 - the other commands need no event loop

    lacks = missing(loaded)
    found: dict[str, Any] = {"lacks": lacks, "verified-instructions": None}
    if loaded.engine == "xdp" and not lacks:
        from lb.xdp import requirements  # noqa: PLC0415 - the other commands need no libbpf

        try:
            found["verified-instructions"] = requirements.load(xdp_settings(loaded)).verified_insns
        except OSError as error:
            lacks.append(error.strerror or str(error))
            lacks += getattr(error, "log", "").splitlines()[-VERIFIER_LINES:]
    return found


def _schema(args: argparse.Namespace) -> int:
    sys.stdout.write(server_config.schema() if args.server else config.schema())
    return OK
