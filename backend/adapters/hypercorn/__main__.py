"""`python -m backend.adapters.hypercorn`: hypercorn behind a QUIC-LB balancer."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import cast

import hypercorn.asyncio
import hypercorn.config
from hypercorn.typing import ASGIFramework

from backend.adapters.hypercorn.app import Application
from backend.adapters.hypercorn.routable import RoutableProtocol, install
from backend.options import IDLE_TIMEOUT, listen_address
from backend.reload import ServerFile, identity_of, obstacles
from backend.routable import Identity
from backend.server import bound_socket
from lb.address import Address
from lb.errors import ConfigErrors, QuicLbError
from lb.highwater import HighWaterFile
from lb.log import configure
from lb.server_config import ServerConfig, load_server_config

# Ours.
GRACE = 1.0  # seconds that requests have at the end
EXIT_USAGE = 2


def main() -> int:
    """Run until SIGTERM or SIGINT. 0 when told to stop, 2 for a mistake in options or files."""
    args = _arguments()
    configure("text", "info")
    logging.getLogger("quic").setLevel(logging.ERROR)
    with contextlib.ExitStack() as files:
        try:
            config = load_server_config(args.server_config)
            if reasons := obstacles(config):
                raise QuicLbError("; ".join(reasons))
            marks = files.enter_context(HighWaterFile(config.nonce_file)) if config.nonce_file else None
            identity = identity_of(config, marks)
            sockets = [files.enter_context(bound_socket(address)) for address in args.listen]
        except (ConfigErrors, QuicLbError, OSError) as error:
            for reason in error.exceptions if isinstance(error, ConfigErrors) else (error,):
                print(f"hypercorn: {reason}", file=sys.stderr)
            return EXIT_USAGE
        asyncio.run(_serve(args, config, identity, sockets))
    return 0


async def _serve(
    args: argparse.Namespace, config: ServerConfig, identity: Identity, sockets: list[socket.socket]
) -> None:
    protocols = install(identity, idle_timeout=args.idle_timeout)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    file = ServerFile(args.server_config, config, identity)
    renewals: set[asyncio.Task[None]] = set()

    def reload() -> None:
        if file.reload():
            renewal = loop.create_task(_renew(protocols()))
            renewals.add(renewal)
            renewal.add_done_callback(renewals.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    print("ready", *(Address(*each.getsockname()[:2]) for each in sockets), flush=True)
    application = cast(ASGIFramework, Application(args.name or config.name, identity))

    async def stopped() -> None:
        await stopping.wait()
        await asyncio.sleep(GRACE)  # it does not say which requests are still being answered
        for protocol in protocols():
            await protocol.close()

    await hypercorn.asyncio.serve(application, _hypercorn(args, sockets), shutdown_trigger=stopped)


def _hypercorn(args: argparse.Namespace, sockets: list[socket.socket]) -> hypercorn.config.Config:
    config = hypercorn.config.Config()
    config.certfile, config.keyfile = str(args.cert), str(args.key)
    config.bind = []  # over QUIC only
    config.quic_bind = [f"fd://{each.detach()}" for each in sockets]  # it closes them
    config.graceful_timeout = 0.1  # all is closed already
    config.errorlog = None
    return config


async def _renew(protocols: list[RoutableProtocol]) -> None:
    for protocol in protocols:
        await protocol.renew_cids()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m backend.adapters.hypercorn", description=__doc__)
    parser.add_argument(
        "--listen", action="append", type=listen_address, required=True, metavar="ADDRESS:PORT", help="port 0 is any"
    )
    parser.add_argument("--server-config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--cert", type=Path, required=True, metavar="FILE", help="PEM chain")
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="PEM key of the certificate")
    parser.add_argument("--name", help="what it calls itself, instead of the name in the file")
    parser.add_argument("--idle-timeout", type=float, default=IDLE_TIMEOUT, metavar="SECONDS")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
