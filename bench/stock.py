"""`python -m bench.stock`: aioquic's own server, with the reference backend's application, loop and certificate.

What it differs in is what makes the reference backend routable: that is what the comparison is to cost.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import logging
from functools import partial
from pathlib import Path
from typing import Any, cast

import aioquic.quic.connection
import uvloop
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from backend import certificate
from backend.app import Http3Protocol, Site
from backend.options import IDLE_TIMEOUT
from backend.routable import RoutableConnection


class StockProtocol(Http3Protocol):
    """The application, on a connection of aioquic's own."""

    def __init__(self, quic: QuicConnection, stream_handler: Any = None) -> None:
        connection = cast(RoutableConnection, quic)
        # The one thing of ours that a download needs: it waits until the client has taken what was sent.
        connection.unacknowledged = partial(RoutableConnection.unacknowledged, connection)  # type: ignore[method-assign]
        super().__init__(connection, Site("stock", None))


# aioquic as it comes: the reference backend has it make these sets once and not for each connection.
aioquic.quic.connection.EPOCHS = inspect.unwrap(aioquic.quic.connection.EPOCHS)


async def _serve(port: int, cert: Path, key: Path, idle_timeout: float) -> None:
    tls = certificate.load(cert, key)
    configuration = QuicConfiguration(
        is_client=False,
        alpn_protocols=["h3"],
        idle_timeout=idle_timeout,
        certificate=tls.chain[0],
        certificate_chain=tls.chain[1:],
        private_key=tls.key,
    )
    await serve("127.0.0.1", port, configuration=configuration, create_protocol=StockProtocol)
    print(f"ready 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stock")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cert", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--idle-timeout", type=float, default=IDLE_TIMEOUT)
    args = parser.parse_args()
    logging.getLogger("quic").setLevel(logging.ERROR)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(args.port, args.cert, args.key, args.idle_timeout))


if __name__ == "__main__":
    main()
