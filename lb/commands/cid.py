"""`quiclb cid`: connection IDs made and taken apart by hand."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from lb import cid_tool
from lb.cid import KEY_LENGTH
from lb.commands.arguments import FAILED, OK, add, file, json_flag, key_from


def add_to(commands: Any) -> None:
    parser = add(
        commands,
        "cid",
        "encode and decode connection IDs",
        """Make connection IDs and take them apart. `quiclb explain` says where they lead.

Without a CID among the arguments (or with --json-lines) each takes JSON objects
on standard input, one per line, and answers each with one line, at once. Fields:
config_id, server_id_length, nonce_length are integers; key, server_id, nonce, cid
are octets as hex digits, and key may be null (plaintext). Arguments fill in what
a line leaves out. A line that cannot be answered gets {"error": "..."}.""",
        """examples:
  quiclb cid encode --config-id 0 --key-file cid-0.key --server-id 3fa91c02 --nonce 000102030405060708090a0b
  quiclb cid decode 07c4605e4504cc4f --server-id-length 3 --nonce-length 4
  quiclb cid decode --json-lines < cids.jsonl

Exit status: 0 done, 1 something could not be answered, 2 wrong arguments.""",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json-lines", action="store_true", help="JSON objects on standard input, one per line")
    json_flag(common, "answer in JSON")
    common.add_argument("--config-id", type=int, metavar="N", help="the config ID, 0 to 6")
    file(common, "--key-file", help="the key, 32 hex digits (none: plaintext)")

    encode = actions.add_parser(
        "encode",
        parents=[common],
        help="server ID and nonce to CID",
        description="Print the CID that carries a server ID and a nonce. A nonce must never serve twice.",
    )
    encode.add_argument("--server-id", metavar="HEX", help="the server ID")
    encode.add_argument("--nonce", metavar="HEX", help="the nonce")
    encode.add_argument("--appended", metavar="HEX", help="octets after the routing block")
    encode.add_argument("--no-length", action="store_true", help="do not put the length into the first octet")
    encode.add_argument("--low-bits", type=int, metavar="N", help="what to put there instead, 0 to 31 (0)")
    encode.set_defaults(command=_encode)

    decode = actions.add_parser(
        "decode",
        parents=[common],
        help="CID to server ID and nonce",
        description="Print the server ID and the nonce that a CID carries, if it was made with this key and lengths.",
    )
    decode.add_argument("cid", nargs="?", metavar="CID", help="the CID, as hex digits")
    decode.add_argument("--server-id-length", type=int, metavar="N", help="octets of the server ID")
    decode.add_argument("--nonce-length", type=int, metavar="N", help="octets of the nonce")
    decode.set_defaults(command=_decode)


def _encode(args: argparse.Namespace) -> int:
    given = _given(args, "config_id", "server_id", "nonce", "appended", "low_bits")
    if args.no_length:
        given["encodes_length"] = False
    if args.json_lines or args.server_id is None:
        return _json_lines(cid_tool.encode, given)
    return _answer(cid_tool.encode, given, lambda answer: answer["cid"], args)


def _decode(args: argparse.Namespace) -> int:
    given = _given(args, "config_id", "server_id_length", "nonce_length")
    if args.json_lines or args.cid in (None, "-"):
        return _json_lines(cid_tool.decode, given)
    return _answer(cid_tool.decode, given | {"cid": args.cid}, _lines, args)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those arguments that were given, as the fields of the same names."""
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.key_file is not None:
        given["key"] = key_from(args.key_file, KEY_LENGTH).hex()
    return given


def _answer(
    answer: Callable[[cid_tool.Fields], dict[str, Any]],
    given: cid_tool.Fields,
    as_text: Callable[[dict[str, Any]], str],
    args: argparse.Namespace,
) -> int:
    try:
        answered = answer(given)
    except ValueError as error:
        print(f"quiclb: {error}", file=sys.stderr)
        return FAILED
    print(json.dumps(answered) if args.json else as_text(answered))
    return OK


def _json_lines(answer: Callable[[cid_tool.Fields], cid_tool.Fields], given: cid_tool.Fields) -> int:
    return cid_tool.json_lines(answer, given, sys.stdin.buffer, sys.stdout)


def _lines(answered: dict[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', '-')}: {value}" for name, value in answered.items())
