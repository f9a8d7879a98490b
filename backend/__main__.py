"""`python -m backend`: an HTTP/3 server that a QUIC-LB balancer can route to."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import uvloop
from aioquic.quic.configuration import QuicConfiguration

from backend import certificate
from backend.app import SETTINGS, Http3Protocol, Site
from backend.certificate import Certificate
from backend.metrics import BackendCollector, Scrapes
from backend.options import IDLE_TIMEOUT, arguments
from backend.paths import Paths
from backend.reload import ServerFile, identity_of, obstacles
from backend.routable import Identity
from backend.seal import Seal
from backend.server import Server
from backend.shutdown import shut_down
from backend.tickets import Tickets
from backend.tokens import Tokens
from lb.errors import ConfigErrors, QuicLbError
from lb.highwater import HighWaterFile
from lb.keyfile import TOKEN_KEY_LENGTH, read_token_keys
from lb.limiter import RateLimiter
from lb.log import configure, event
from lb.server_config import load_server_config
from lb.watching import signature, watch

log = logging.getLogger("backend")

EXIT_FAILED = 1
EXIT_USAGE = 2  # as argparse has it


class Material(NamedTuple):
    """What was read from files at the start."""

    file: ServerFile
    identity: Identity
    tls: Certificate
    seal: Seal


def main() -> int:
    """Run until SIGTERM or SIGINT. 0 when told to stop, 2 for a mistake in options or files, 1 if it cannot listen."""
    args = arguments()
    configure(args.log_format, args.log_level)
    logging.getLogger("quic").setLevel(logging.DEBUG if args.log_level == "debug" else logging.ERROR)

    with contextlib.ExitStack() as files:
        material = _read(args, files)
        if not isinstance(material, Material):
            for mistake in material:
                print(f"backend: {mistake}", file=sys.stderr)
            return EXIT_USAGE
        try:
            if args.write_cert:
                args.write_cert.write_bytes(material.tls.pem())
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(args, *material))
        except OSError as error:
            print(f"backend: {error}", file=sys.stderr)
            return EXIT_FAILED
    return 0


def _read(args: argparse.Namespace, files: contextlib.ExitStack) -> Material | list[str]:
    """What the options name, or everything that is wrong with it. `files` holds what has to be closed in the end."""
    mistakes: list[str] = []
    config = tls = seal = identity = None
    try:
        config = load_server_config(args.server_config)
        mistakes += obstacles(config)
    except ConfigErrors as errors:
        mistakes += [str(error) for error in errors.exceptions]
    try:
        tls = certificate.load(args.cert, args.key) if args.cert else certificate.self_signed(datetime.now(UTC))
    except (OSError, ValueError) as error:
        mistakes.append(str(error))
    try:
        seal = Seal(_token_keys(args.token_key_file), os.urandom)
    except ValueError as error:
        mistakes.append(str(error))
    if config and not mistakes:
        try:
            marks = files.enter_context(HighWaterFile(config.nonce_file)) if config.nonce_file else None
            identity = identity_of(config, marks)
        except QuicLbError as error:
            mistakes.append(str(error))
    if config is None or identity is None or tls is None or seal is None:
        return mistakes
    return Material(ServerFile(args.server_config, config, identity), identity, tls, seal)


async def _serve(args: argparse.Namespace, file: ServerFile, identity: Identity, tls: Certificate, seal: Seal) -> None:
    name = args.name or file.config.name
    server = Server(
        identity,
        quic_configuration(identity, tls, args.idle_timeout),
        lambda connection: Http3Protocol(connection, Site(name, identity.server_id)),
        RateLimiter(args.reset_rate, 0),
        os.urandom,
        tokens=Tokens(seal, time.time, binding=args.token_binding, offers_new_tokens=args.new_tokens),
        tickets=Tickets(seal, time.time, early_data=args.early_data, application=SETTINGS),
        retry=args.retry,
        paths=Paths(args.path_rate),
        max_connections=args.max_connections,
    )
    stopping, hurry = asyncio.Event(), asyncio.Event()
    reload = functools.partial(_reload, file, server, seal, args.token_key_file)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurry.set() if stopping.is_set() else stopping.set())
    loop.add_signal_handler(signal.SIGHUP, reload)
    async with contextlib.AsyncExitStack() as chores:
        try:
            bound = " ".join(map(str, await server.listen(args.listen)))
            if preferred := await server.prefer(args.preferred_address):
                event(log, logging.INFO, "preferred-address", listen=" ".join(map(str, preferred)))
            if args.metrics:
                scrapes = await chores.enter_async_context(Scrapes(args.metrics, BackendCollector(server, file)))
                event(log, logging.INFO, "metrics", listen=str(scrapes.address))
            if args.watch:
                chores.enter_context(_watching(file, args.token_key_file, reload))
            print(f"ready {bound}", flush=True)
            event(log, logging.INFO, "ready", name=name, listen=bound, retry=args.retry)
            await stopping.wait()
        finally:
            connections = len(server.connections)
            unfinished = await shut_down(server, args.grace, hurry)
    outcomes = {outcome.name.lower(): count for outcome, count in server.outcomes.items()}
    event(log, logging.INFO, "stopped", name=name, connections=connections, **outcomes, unfinished=unfinished)


def _reload(file: ServerFile, server: Server, seal: Seal, token_key_file: Path | None) -> None:
    """Read the files again. Clients move to connection IDs of another configuration if the server's file has one."""
    if token_key_file is not None:
        try:
            keys = _token_keys(token_key_file)
            seal.switch(keys)
            event(log, logging.INFO, "token-keys", keys=len(keys))
        except ValueError as error:
            event(log, logging.ERROR, "reload-refused", reason=str(error))
    if file.reload():
        cid_config = file.config.cid_config
        config_id = cid_config.config_id if cid_config else None
        old_cids = sum(server.ledger.live)
        event(
            log, logging.INFO, "reloaded", config_id=config_id, connections=len(server.connections), old_cids=old_cids
        )
        server.renew_cids()


@contextlib.contextmanager
def _watching(file: ServerFile, token_key_file: Path | None, reload: Callable[[], None]) -> Iterator[None]:
    """Read the files again whenever one of them changes."""

    def files() -> list[Path]:
        return [*file.files, *([token_key_file] if token_key_file else [])]

    async def changed() -> None:
        reload()

    task = asyncio.create_task(watch(files, changed, known=signature(files())))
    try:
        yield
    finally:
        task.cancel()


def quic_configuration(identity: Identity, tls: Certificate, idle_timeout: float = IDLE_TIMEOUT) -> QuicConfiguration:
    """aioquic's configuration for a server with this identity and certificate; the timeout is in seconds."""
    return QuicConfiguration(
        is_client=False,
        alpn_protocols=["h3"],
        connection_id_length=identity.cid_length,
        idle_timeout=idle_timeout,
        certificate=tls.chain[0],
        certificate_chain=tls.chain[1:],
        private_key=tls.key,
    )


def _token_keys(path: Path | None) -> list[bytes]:
    """The keys in a file, or a new one without a file. Raises ValueError."""
    return read_token_keys(path) if path else [os.urandom(TOKEN_KEY_LENGTH)]


if __name__ == "__main__":
    sys.exit(main())
