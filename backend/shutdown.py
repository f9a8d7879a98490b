"""The end of a server: nobody new, what was asked for is answered, then every connection is closed.

A balancer that drains this server first sends it nobody new anyway. Without that, new clients are refused by a word
(CONNECTION_REFUSED) and not by silence; whoever asks for versions gets an answer until the end, since the server is
there.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from backend.app import Http3Protocol
from backend.routable import RoutableConnection
from backend.server import Server
from lb.log import event

log = logging.getLogger(__name__)


async def shut_down(server: Server, grace: float, hurry: asyncio.Event) -> int:
    """Let requests finish, for `grace` seconds or until there is a `hurry`; then close everything and stop listening.

    Returns how many connections were closed before they had all answers.
    """
    server.is_accepting = False
    event(log, logging.INFO, "draining", connections=len(server.connections), grace=grace)
    busy = server.connections.copy()
    all_over = asyncio.Event()

    def over(connection: RoutableConnection) -> None:
        busy.discard(connection)
        if not busy:
            all_over.set()

    for connection in server.connections.copy():
        if isinstance(connection.protocol, Http3Protocol):
            server.guard(connection, partial(connection.protocol.go_away, partial(over, connection)))
    if busy:
        waiting = {asyncio.create_task(_until(all_over)), asyncio.create_task(_until(hurry))}
        _, late = await asyncio.wait(waiting, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for task in late:
            task.cancel()
    unfinished = len(busy)
    await server.stop()
    return unfinished


async def _until(happening: asyncio.Event) -> None:
    await happening.wait()
