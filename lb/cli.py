"""The command line: `quiclb COMMAND`. It parses, calls and says what went wrong; `lb/commands` has a file per noun."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from lb.admin.client import RefusedError, UnreachableError
from lb.commands import backends, cid, completion, conformance, explain, keygen, reload, rotation, run, status, xdp
from lb.commands.arguments import BROKEN_PIPE, FAILED, INTERRUPTED, MISTAKEN, ArgumentError
from lb.commands.balancer import say_refusal
from lb.errors import ConfigErrors
from lb.operations import Refused
from lb.terminal import plain

STATUSES = "Exit status: 0 done, 1 failed, 2 mistakes in the configuration or the arguments."
# What the API answers to what should not have been asked: the arguments are wrong, or the file is.
MISTAKES = (400, 404, 422)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; raises SystemExit for --help and for wrong arguments."""
    try:
        args = _parser().parse_args(argv)
        done: int = args.command(args)
        sys.stdout.flush()
    except ConfigErrors as errors:
        for error in errors.exceptions:
            print(error, file=sys.stderr)
        return MISTAKEN
    except BrokenPipeError:
        # Whoever read has seen enough. The interpreter would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"quiclb: {where}{error.strerror or error}", file=sys.stderr)
        return FAILED
    except ArgumentError as error:
        print(f"quiclb: {error}", file=sys.stderr)
        return MISTAKEN
    except UnreachableError as error:
        print(f"quiclb: {plain(str(error))}", file=sys.stderr)
        return FAILED
    except RefusedError as error:
        say_refusal(error)
        return MISTAKEN if error.status in MISTAKES else FAILED
    except Refused as error:
        for reason in error.reasons:
            print(f"quiclb: {plain(reason)}", file=sys.stderr)
        return MISTAKEN if error.kind in ("unknown", "invalid") else FAILED
    return done


def _version() -> str:
    try:
        return f"quiclb {importlib.metadata.version('quiclb')}"
    except importlib.metadata.PackageNotFoundError:
        return "quiclb (not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "quiclb",
        description="A QUIC-aware UDP load balancer: it routes by what servers put into connection IDs.",
        epilog=f"`quiclb COMMAND --help` has examples. {STATUSES}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run.add_to(commands)
    for noun in (status, backends, reload, rotation, explain, cid, keygen, conformance, xdp):
        noun.add_to(commands)
    completion.add_to(commands, parser)
    return parser
