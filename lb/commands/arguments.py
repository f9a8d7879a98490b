"""What the commands' arguments have in common: their kinds, how a command is added, and exit statuses."""

from __future__ import annotations

import argparse
import ipaddress
import re
import sys
from pathlib import Path
from typing import Any

from lb.address import Address
from lb.keyfile import read_key
from lb.kinds import Duration, ServerIdText, server_id_octets

OK, FAILED, MISTAKEN = 0, 1, 2
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # as a shell reports SIGINT, SIGPIPE and SIGTERM

MAX_COUNT = (1 << 32) - 1
LONGEST = 168 * 3600.0  # seconds that any argument may ask for


class ArgumentError(Exception):
    """An argument that parses and makes no sense all the same."""


def add(commands: Any, name: str, help: str, details: str, epilog: str) -> argparse.ArgumentParser:  # noqa: A002
    """A parser for the command `name`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=details,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def file(parser: Any, *names: str, **how: Any) -> None:
    """An argument that names a file, which shells complete."""
    action = parser.add_argument(*names, type=Path, metavar=how.pop("metavar", "FILE"), **how)
    action.complete = FILES


# As shtab wants it; here, so that nobody needs shtab to run a command.
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
DIRECTORIES = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}


def json_flag(parser: Any, help: str = "the same as JSON") -> None:  # noqa: A002
    """--json."""
    parser.add_argument("--json", action="store_true", help=help)


def terminate(*_: object) -> None:
    """What SIGTERM does where it must not leave something behind, or where we are process 1."""
    sys.exit(TERMINATED)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(MAX_COUNT)) or not 0 < int(text) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer, 1 to {MAX_COUNT}")
    return int(text)


def duration(text: str) -> float:
    """Seconds, written as in the configuration."""
    kind = Duration(0.1, LONGEST)
    unit = text.lstrip("0123456789.")
    seconds = float(text.removesuffix(unit)) * kind.units[unit] if re.fullmatch(kind.pattern or "", text) else 0.0
    if not kind.low <= seconds <= kind.high:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {kind.words}, as in 30s")
    return seconds


def ip_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an IP address") from None


def udp_address(text: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def octets(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected hex digits, two for each octet") from None


def server_id(text: str) -> bytes:
    try:
        return server_id_octets(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error) or f"{text!r}: expected {ServerIdText.words}") from None


def key_from(path: Path, length: int) -> bytes:
    """The key in a file. Raises ArgumentError."""
    try:
        return read_key(path, length)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
