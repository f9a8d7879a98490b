"""Which balancer a command speaks to, and which of its backends it means."""

from __future__ import annotations

import argparse
import difflib
import os
import ssl
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lb.admin.client import Client, RefusedError, Where
from lb.commands.arguments import ArgumentError, file
from lb.config import LbConfig, load_config
from lb.keyfile import read_token
from lb.places import ADMIN_SOCKET, admin_addresses, default_runtime_directory
from lb.terminal import plain

# Ours.
MAX_SHOWN = 200  # letters of an argument that is told of
VARIABLE = "QUICLB_ADMIN"
FINDING = f"""The balancer is the one at --admin, or where -c FILE says that its API is, or at
${VARIABLE}, or at {ADMIN_SOCKET} in the default runtime directory."""


class Member(NamedTuple):
    """A backend of a service, as the API shows it."""

    service: str
    shown: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.service}/{self.shown['name']}"


def add_admin(parser: Any, *, has_config: bool = True) -> None:
    """The arguments that name a balancer."""
    group = parser.add_argument_group("the balancer")
    group.add_argument(
        "--admin", metavar="ADDRESS", type=_where, help=f"unix:PATH, HOST:PORT or https://HOST:PORT (${VARIABLE})"
    )
    if has_config:
        file(group, "-c", "--config", help="the balancer's configuration, which says where its API is")
    file(group, "--token-file", help="a bearer token that its API takes")
    file(group, "--ca-file", help="with https: who signed its certificate, in PEM (the system's)")
    file(group, "--certificate-file", help="with https: a client certificate, in PEM")
    file(group, "--key-file", help="its private key, in PEM")


def client(args: argparse.Namespace) -> Client:
    """The balancer that the arguments mean. Raises ArgumentError, and ConfigErrors for a file that is given."""
    where, token_file = args.admin, args.token_file
    path = getattr(args, "config", None)
    if where is None and path is None and os.environ.get(VARIABLE):  # what is typed is stronger
        try:
            where = Where.parse(os.environ[VARIABLE])
        except ValueError as error:
            raise ArgumentError(f"${VARIABLE}: {error}") from None
    if where is None and path is not None:
        loaded = load_config(path)
        where = _configured(loaded, path)
        if where.path is None:  # unix sockets take no token
            token_file = token_file or loaded.admin.write_token_file or loaded.admin.read_token_file
    if where is None:
        where = Where(default_runtime_directory() / ADMIN_SOCKET)
    return Client(where, token=_token(token_file), tls=_tls(args, where))


def member(state: dict[str, Any], name: str) -> Member:
    """The backend NAME or SERVICE/NAME. Raises ArgumentError if there is none, or more than one."""
    there = [Member(service["name"], shown) for service in state["services"] for shown in service["backends"]]
    found = [one for one in there if name in (one.name, one.shown["name"])]
    if len(found) == 1:
        return found[0]
    if found:
        raise ArgumentError(f"{name}: backend of more than one service: expected {_words([m.name for m in found])}")
    names = [one.name for one in there]
    near = difflib.get_close_matches(name, [*names, *(one.shown["name"] for one in there)], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ArgumentError(f"{plain(name[:MAX_SHOWN])}: no such backend{hint}")


def service(names: list[str], wanted: str | None) -> str:
    """The service of that name, or the only one. Raises ArgumentError."""
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None or wanted not in names:
        said = "--service" if wanted is None else f"--service {wanted}"
        raise ArgumentError(f"{said}: expected {_words(names)}")
    return wanted


def say_refusal(error: RefusedError) -> None:
    """Tell, on standard error, what the balancer would not do and all the reasons."""
    print(f"quiclb: {plain(error.error)}{_HINTS.get(error.status, '')}", file=sys.stderr)
    for reason in error.reasons:
        if reason != error.error:
            print(plain(reason), file=sys.stderr)


_HINTS = {401: "; --token-file names a token", 403: "; the token or the certificate is one of those that may only look"}


def _words(names: list[str]) -> str:
    return f"one of {', '.join(names)}" if len(names) > 1 else "".join(names)


def _where(text: str) -> Where:
    try:
        return Where.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _configured(loaded: LbConfig, path: Path) -> Where:
    """The first address of a configuration's, unix sockets first: they take no token."""
    addresses = admin_addresses(loaded)
    if not addresses:
        raise ArgumentError(f"{path}: admin.listen is empty: this balancer serves no API")
    for address in addresses:
        if isinstance(address, Path):
            return Where(address)
    first = addresses[0]
    assert not isinstance(first, Path)  # noqa: S101 - or it would have been found
    host = ("::1" if first.is_ipv6 else "127.0.0.1") if first.is_wildcard else first.host
    return Where(None, host, first.port, loaded.admin.certificate_file is not None)


def _token(path: Path | None) -> str | None:
    try:
        return None if path is None else read_token(path)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def _tls(args: argparse.Namespace, where: Where) -> ssl.SSLContext | None:
    given = [
        name
        for name, value in (
            ("--ca-file", args.ca_file),
            ("--certificate-file", args.certificate_file),
            ("--key-file", args.key_file),
        )
        if value is not None
    ]
    if not where.is_tls:
        if given:
            raise ArgumentError(f"{given[0]}: of no use without https: {where} is not")
        return None
    if args.key_file is not None and args.certificate_file is None:
        raise ArgumentError("--key-file: expected --certificate-file as well")
    try:
        context = ssl.create_default_context(cafile=args.ca_file)
        if args.certificate_file is not None:
            context.load_cert_chain(args.certificate_file, args.key_file, password=_no_password)
    except OSError as error:  # ssl.SSLError is one; it does not say which file
        raise ArgumentError(f"{', '.join(given)}: {error.strerror or error}") from None
    return context


def _no_password() -> str:
    raise ArgumentError("--key-file: encrypted: expected a key without a password")
