"""`quiclb keygen`: new keys and server IDs."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lb import keygen
from lb.cid import ConfigId, ServerId
from lb.commands.arguments import OK, ArgumentError, add, file, key_from, server_id
from lb.reset import RESET_KEY_LENGTH
from lb.reset_scheme import USUAL_RULE, Keys, ResetRule, Scheme


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
  quiclb keygen token-key -o secrets/token.keys
  quiclb keygen token-key --add secrets/token.keys
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
        description="A master key for stateless resets (a balancer's reset-key-file): 64 hex digits. With --shared a "
        "key that all servers of this make have, as their scheme needs it.",
    )
    reset.add_argument(
        "--shared",
        choices=[str(scheme) for scheme in Scheme],
        metavar="SCHEME",
        help="for `keys: shared` and this scheme",
    )
    reset.set_defaults(command=_reset)
    server_reset = kinds.add_parser(
        "server-reset",
        parents=[output],
        help="one server's own reset key",
        description="The reset key of one server ID (a server's reset-key-file), which follows from the master key.",
    )
    file(server_reset, "--master", required=True, help="the master key's file")
    server_reset.add_argument("--config-id", type=int, choices=range(7), required=True, help="its config ID")
    server_reset.add_argument("--server-id", type=server_id, required=True, metavar="HEX", help="its server ID")
    server_reset.add_argument(
        "--scheme",
        choices=[str(scheme) for scheme in Scheme],
        default=str(Scheme.HMAC_SHA256),
        metavar="SCHEME",
        help="of which make the server is (%(default)s)",
    )
    server_reset.set_defaults(command=_server_reset)
    token_key = kinds.add_parser(
        "token-key",
        parents=[output],
        help="a key for servers' tokens and session tickets",
        description="""A key for the tokens and session tickets that all servers of a fleet accept (a server's
--token-key-file): 64 hex digits. The file holds up to 8, one per line: the first makes tokens, all are accepted.
A key is rolled in three steps, each on every server: add it second, make it first, remove the old one when what it
has made is over (3 days).""",
    )
    file(token_key, "--add", help="put it second into this file, which exists")
    token_key.set_defaults(command=_token_key)
    new_ids = kinds.add_parser(
        "server-id",
        parents=[output],
        help="server IDs",
        description="Different random server IDs, one per line. Random ones tell nobody how many servers there are.",
    )
    new_ids.add_argument("--length", type=int, required=True, metavar="N", help="octets of each, 1 to 15")
    new_ids.add_argument("--count", type=int, default=1, metavar="K", help="how many (1)")
    new_ids.set_defaults(command=_server_id)


def _key(make: Callable[[], str], args: argparse.Namespace) -> int:
    return _write(make(), args.output)


def _reset(args: argparse.Namespace) -> int:
    rule = ResetRule(Scheme(args.shared), Keys.SHARED) if args.shared else USUAL_RULE
    return _write(keygen.reset_key(rule), args.output)


def _token_key(args: argparse.Namespace) -> int:
    if args.add is None:
        return _write(keygen.token_key(), args.output)
    if args.output is not None:
        raise ArgumentError("--add: expected no -o, since the file exists")
    try:
        keygen.add_token_key(args.add)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return OK


def _server_reset(args: argparse.Namespace) -> int:
    rule = ResetRule(Scheme(args.scheme))
    master = key_from(args.master, RESET_KEY_LENGTH)
    return _write(rule.secret(master, ConfigId(args.config_id), ServerId(args.server_id)).hex(), args.output)


def _server_id(args: argparse.Namespace) -> int:
    try:
        ids = keygen.server_ids(args.length, args.count)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return _write("\n".join(one.hex() for one in ids), args.output)


def _write(text: str, path: Path | None) -> int:
    keygen.write(text, path)
    return OK
