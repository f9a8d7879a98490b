"""The options of `python -m backend`. docs/servers/aioquic.md explains them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from backend.paths import VALIDATIONS_PER_SOURCE, PreferredAddress
from backend.server import MAX_CONNECTIONS
from backend.tokens import Binding
from lb.address import Address
from lb.log import FORMATS, LEVELS

# Ours.
IDLE_TIMEOUT = 30.0  # seconds
GRACE = 5.0  # seconds
RESETS_PER_SECOND = 200.0  # in all; behind a balancer every client has one address, so none per source
MAX_SECONDS = 86_400.0


def arguments() -> argparse.Namespace:
    """The options that the program was given. Does not return if there is a mistake in them."""
    parser = parser_of_options()
    args = parser.parse_args()
    args.listen = args.listen or [Address("127.0.0.1", 4433)]
    if (args.cert is None) != (args.key is None):
        parser.error("--cert and --key go together")
    preferred = PreferredAddress()
    for address in args.preferred_address:
        try:
            preferred.add(address, None)
        except ValueError as error:
            parser.error(f"--preferred-address: {error}")
    return args


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m backend",
        description="An HTTP/3 server whose connection IDs say which server they belong to.",
        epilog="Prints one line, `ready ADDRESS:PORT`, when it listens. SIGHUP has it read its files "
        "again and its clients move to new connection IDs. SIGTERM has it accept nobody new, finish what was asked for "
        "and end; a second one, end at once.",
    )
    parser.add_argument(
        "--listen",
        action="append",
        type=listen_address,
        metavar="ADDRESS:PORT",
        help="where to listen, as often as there are addresses; port 0 is any (default: 127.0.0.1:4433)",
    )
    parser.add_argument(
        "--preferred-address",
        action="append",
        default=[],
        type=listen_address,
        metavar="ADDRESS:PORT",
        help="an address of this server's own, where clients are asked to go on and where it listens too; once for "
        "each family",
    )
    parser.add_argument(
        "--server-config",
        type=Path,
        required=True,
        metavar="FILE",
        help="YAML with this server's name, CID configuration, server ID and reset key",
    )
    parser.add_argument(
        "--watch", action="store_true", help="read the files again whenever one of them, or of their keys, changes"
    )
    parser.add_argument("--name", help="what it calls itself, instead of the name in the file")
    parser.add_argument("--cert", type=Path, metavar="FILE", help="PEM chain (default: a self-signed one)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="PEM key of the certificate")
    parser.add_argument("--write-cert", type=Path, metavar="FILE", help="write the certificate there, for clients")
    parser.add_argument("--retry", action="store_true", help="have clients prove their address by a Retry")
    parser.add_argument(
        "--token-key-file",
        type=Path,
        metavar="FILE",
        help="the keys of tokens and session tickets that all servers share, newest first (default: a random one)",
    )
    parser.add_argument(
        "--token-binding",
        type=Binding,
        choices=list(Binding),
        default=Binding.PORT,
        help="what a client must keep from its Retry to its next Initial (default: %(default)s)",
    )
    parser.add_argument(
        "--no-new-tokens",
        dest="new_tokens",
        action="store_false",
        help="neither give clients tokens for their next connections, nor accept any",
    )
    parser.add_argument(
        "--early-data", action="store_true", help="answer GET and HEAD in 0-RTT, which somebody may replay"
    )
    parser.add_argument(
        "--idle-timeout",
        type=_seconds,
        default=IDLE_TIMEOUT,
        metavar="SECONDS",
        help="how long a connection may be silent (default: %(default)g)",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=GRACE,
        metavar="SECONDS",
        help="how long requests may take to finish after SIGTERM (default: %(default)g)",
    )
    parser.add_argument(
        "--max-connections",
        type=int,
        default=MAX_CONNECTIONS,
        metavar="N",
        help="connections at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--reset-rate",
        type=_rate,
        default=RESETS_PER_SECOND,
        metavar="N",
        help="Stateless Resets per second (%(default)g); 0 is no limit",
    )
    parser.add_argument(
        "--path-rate",
        type=_rate,
        default=VALIDATIONS_PER_SOURCE,
        metavar="N",
        help="addresses per second that clients from one /24 or /56 may move to (%(default)g); 0 is no limit. Behind a "
        "balancer they may all come from one address",
    )
    parser.add_argument(
        "--metrics", type=listen_address, metavar="ADDRESS:PORT", help="serve metrics for Prometheus there, over HTTP"
    )
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default="info",
        help="the least important level that is logged (default: %(default)s)",
    )
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="lines of key=value, or of JSON (default: %(default)s)"
    )
    return parser


def listen_address(written: str) -> Address:
    host, _, port = written.rpartition(":")
    try:
        # Port 0 is no address to send to, but one to listen on.
        return Address.parse(f"{host}:1")._replace(port=0) if port == "0" else Address.parse(written)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(written: str) -> float:
    try:
        rate = float(written)
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:  # false for a NaN too
        raise argparse.ArgumentTypeError(f"{written}: expected a number of times per second")
    return rate


def _seconds(written: str) -> float:
    try:
        seconds = float(written)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_SECONDS:  # false for a NaN too
        raise argparse.ArgumentTypeError(f"{written}: expected 0 to {MAX_SECONDS:g} seconds")
    return seconds
