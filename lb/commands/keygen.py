"""`quiclb keygen`: new keys and server IDs."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lb import keygen
from lb.cid import ConfigId, ServerId
from lb.commands.arguments import OK, ArgumentError, add, file, key_from, octets
from lb.reset import RESET_KEY_LENGTH, server_reset_key


def add_to(commands: Any) -> None:
    parser = add(
        commands,
        "keygen",
        "make keys and server IDs",
        """Make new keys and server IDs, at random. Without -o they go to standard output;
a file must not exist yet, and nobody but its owner can read it.""",
        """examples:
  quiclb keygen cid -o secrets/cid-0.key
  quiclb keygen reset -o secrets/reset-0.key
  quiclb keygen server-id --length 4 --count 3
  quiclb keygen server-reset --master secrets/reset-0.key --config-id 0 \\
      --server-id 3fa91c02 -o secrets/reset-a.key

Exit status: 0 done, 1 cannot write (the file exists, say), 2 wrong arguments.""",
    )
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    output = argparse.ArgumentParser(add_help=False)
    file(output, "-o", "--output", help="a new file (standard output)")

    cid = kinds.add_parser(
        "cid", parents=[output], help="a key for CIDs", description="A key for CIDs (key-file): 32 hex digits."
    )
    cid.set_defaults(command=functools.partial(_key, keygen.cid_key))
    reset = kinds.add_parser(
        "reset",
        parents=[output],
        help="a master key for resets",
        description="A master key for stateless resets (a balancer's reset-key-file): 64 hex digits.",
    )
    reset.set_defaults(command=functools.partial(_key, keygen.reset_key))
    server_reset = kinds.add_parser(
        "server-reset",
        parents=[output],
        help="one server's own reset key",
        description="The reset key of one server ID (a server's reset-key-file), which follows from the master key.",
    )
    file(server_reset, "--master", required=True, help="the master key's file")
    server_reset.add_argument("--config-id", type=int, choices=range(7), required=True, help="its config ID")
    server_reset.add_argument("--server-id", type=octets, required=True, metavar="HEX", help="its server ID")
    server_reset.set_defaults(command=_server_reset)
    server_id = kinds.add_parser(
        "server-id",
        parents=[output],
        help="server IDs",
        description="Different random server IDs, one per line. Random ones tell nobody how many servers there are.",
    )
    server_id.add_argument("--length", type=int, required=True, metavar="N", help="octets of each, 1 to 15")
    server_id.add_argument("--count", type=int, default=1, metavar="K", help="how many (1)")
    server_id.set_defaults(command=_server_id)


def _key(make: Callable[[], str], args: argparse.Namespace) -> int:
    return _write(make(), args.output)


def _server_reset(args: argparse.Namespace) -> int:
    if not 1 <= len(args.server_id) <= keygen.MAX_SERVER_ID_LENGTH:
        raise ArgumentError(f"--server-id: {len(args.server_id)} octets: expected 1 to 15")
    master = key_from(args.master, RESET_KEY_LENGTH)
    key = server_reset_key(master, ConfigId(args.config_id), ServerId(args.server_id))
    return _write(key.hex(), args.output)


def _server_id(args: argparse.Namespace) -> int:
    try:
        ids = keygen.server_ids(args.length, args.count)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return _write("\n".join(server_id.hex() for server_id in ids), args.output)


def _write(text: str, path: Path | None) -> int:
    keygen.write(text, path)
    return OK
