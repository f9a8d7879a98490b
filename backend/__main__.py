"""`python -m backend`: an HTTP/3 server that a QUIC-LB balancer can route to."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from aioquic.quic.configuration import QuicConfiguration

from backend import certificate
from backend.app import Http3Protocol, Site
from backend.certificate import Certificate
from backend.routable import Identity
from backend.server import MAX_CONNECTIONS, TOKEN_KEY_LENGTH, RetryTokens, Server
from lb.address import Address
from lb.cid import Codec
from lb.errors import ConfigErrors, QuicLbError
from lb.generator import MIN_UNROUTABLE_LENGTH, CidGenerator
from lb.highwater import HighWaterFile
from lb.keyfile import read_key
from lb.limiter import RateLimiter
from lb.log import FORMATS, LEVELS, configure, event
from lb.server_config import ServerConfig, load_server_config

log = logging.getLogger("backend")

# Ours.
IDLE_TIMEOUT = 30.0  # seconds
RESETS_PER_SECOND = 200.0  # in all; behind a balancer every client has one address, so none per source
EXIT_FAILED = 1
EXIT_USAGE = 2  # as argparse has it


def main() -> int:
    """Run until SIGTERM or SIGINT. 0 when told to stop, 2 for a mistake in options or files, 1 if it cannot listen."""
    args = _arguments()
    configure(args.log_format, args.log_level)
    logging.getLogger("quic").setLevel(logging.DEBUG if args.log_level == "debug" else logging.ERROR)

    mistakes: list[str] = []
    config = tls = token_key = None
    try:
        config = load_server_config(args.server_config)
        cid_config = config.cid_config
        if cid_config and cid_config.cid_length < MIN_UNROUTABLE_LENGTH:
            # All CIDs of this server have one length, those that it issues when its nonces run out too.
            shortest = f"expected at least {MIN_UNROUTABLE_LENGTH}"
            mistakes.append(f"cid-config: connection IDs of {cid_config.cid_length} octets: {shortest}")
    except ConfigErrors as errors:
        mistakes += [str(error) for error in errors.exceptions]
    try:
        tls = certificate.load(args.cert, args.key) if args.cert else certificate.self_signed(datetime.now(UTC))
    except (OSError, ValueError) as error:
        mistakes.append(str(error))
    try:
        token_key = read_key(args.token_key_file, TOKEN_KEY_LENGTH) if args.token_key_file else os.urandom(16)
    except ValueError as error:
        mistakes.append(str(error))

    with contextlib.ExitStack() as files:
        identity = None
        if config and not mistakes:
            try:
                nonce_file = config.nonce_file
                marks = files.enter_context(HighWaterFile(nonce_file)) if nonce_file else None
                identity = _identity(config, marks)
            except QuicLbError as error:
                mistakes.append(str(error))
        if config is None or identity is None or tls is None or token_key is None:
            for mistake in mistakes:
                print(f"backend: {mistake}", file=sys.stderr)
            return EXIT_USAGE
        retry = RetryTokens(token_key) if args.retry else None
        try:
            if args.write_cert:
                args.write_cert.write_bytes(tls.pem())
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(args, config, identity, tls, retry))
        except OSError as error:
            print(f"backend: {error}", file=sys.stderr)
            return EXIT_FAILED
    return 0


async def _serve(
    args: argparse.Namespace, config: ServerConfig, identity: Identity, tls: Certificate, retry: RetryTokens | None
) -> None:
    configuration = quic_configuration(identity, tls)
    name = args.name or config.name
    server = Server(
        identity,
        configuration,
        lambda connection: Http3Protocol(connection, Site(name, identity.server_id)),
        RateLimiter(args.reset_rate, 0),
        os.urandom,
        retry=retry,
        max_connections=args.max_connections,
    )
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, args.server_config, config.nonce_file, identity, server)
    try:
        bound = " ".join(map(str, await server.listen(args.listen)))
        print(f"ready {bound}", flush=True)
        event(log, logging.INFO, "ready", name=name, listen=bound, retry=retry is not None)
        await stopping.wait()
    finally:
        connections = len(server.connections)
        await server.stop()
    outcomes = {outcome.name.lower(): count for outcome, count in server.outcomes.items()}
    event(log, logging.INFO, "stopped", name=name, connections=connections, **outcomes)


def _reload(path: Path, nonce_file: Path | None, identity: Identity, server: Server) -> None:
    """Issue connection IDs as the file says now, and have clients move to them; with a mistake in it, go on as before.

    It takes effect between two datagrams: whoever changes the file replaces it as a whole.
    """
    try:
        config = load_server_config(path)
        if config.nonce_file != nonce_file:
            raise ValueError(f"nonce-file: {config.nonce_file}: this process has {nonce_file}; a restart changes it")
        cid_config = config.cid_config
        identity.switch(
            Codec(cid_config) if cid_config else None, config.server_id if cid_config else None, config.reset_key
        )
    except (ConfigErrors, QuicLbError, ValueError) as error:
        reasons = error.exceptions if isinstance(error, ConfigErrors) else (error,)
        for reason in reasons:
            event(log, logging.ERROR, "reload-refused", reason=str(reason))
        return
    server.renew_cids()
    config_id = cid_config.config_id if cid_config else None
    event(log, logging.INFO, "reloaded", config_id=config_id, connections=len(server.connections))


def quic_configuration(identity: Identity, tls: Certificate) -> QuicConfiguration:
    """aioquic's configuration for a server with this identity and certificate."""
    return QuicConfiguration(
        is_client=False,
        alpn_protocols=["h3"],
        connection_id_length=identity.cid_length,
        idle_timeout=IDLE_TIMEOUT,
        certificate=tls.chain[0],
        certificate_chain=tls.chain[1:],
        private_key=tls.key,
    )


def _identity(config: ServerConfig, marks: HighWaterFile | None) -> Identity:
    """What a server's file makes of it. Raises QuicLbError for a nonce file that cannot be used."""
    cid_config = config.cid_config
    cid_length = cid_config.cid_length if cid_config else MIN_UNROUTABLE_LENGTH
    generator = CidGenerator(
        cid_config,
        config.server_id,
        random=os.urandom,
        marks=marks,
        unroutable_length=cid_length,
        on_low=lambda remaining: event(log, logging.WARNING, "nonces-low", remaining=remaining),
    )
    return Identity(
        generator,
        Codec(cid_config) if cid_config else None,
        config.server_id if cid_config else None,
        config.reset_key,
        cid_length=cid_length,
        random=os.urandom,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m backend",
        description="An HTTP/3 server whose connection IDs say which server they belong to.",
        epilog="Prints one line, `ready ADDRESS:PORT`, when it listens. SIGHUP has it read its file "
        "again and its clients move to new connection IDs. SIGTERM closes all connections and ends it.",
    )
    parser.add_argument(
        "--listen",
        action="append",
        type=_listen_address,
        metavar="ADDRESS:PORT",
        help="where to listen, as often as there are addresses; port 0 is any (default: 127.0.0.1:4433)",
    )
    parser.add_argument(
        "--server-config",
        type=Path,
        required=True,
        metavar="FILE",
        help="YAML with this server's name, CID configuration, server ID and reset key",
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
        help="32 hex digits, the key of Retry tokens, where several processes share it (default: random)",
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
        type=float,
        default=RESETS_PER_SECOND,
        metavar="N",
        help="Stateless Resets per second (%(default)g); 0 is no limit",
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
    args = parser.parse_args()
    args.listen = args.listen or [Address("127.0.0.1", 4433)]
    if (args.cert is None) != (args.key is None):
        parser.error("--cert and --key go together")
    return args


def _listen_address(written: str) -> Address:
    host, _, port = written.rpartition(":")
    try:
        # Port 0 is no address to send to, but one to listen on.
        return Address.parse(f"{host}:1")._replace(port=0) if port == "0" else Address.parse(written)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
