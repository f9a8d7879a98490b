"""The clients as one: a session is one connection, with requests begun at once, on any of the stacks."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

from backend.clients import gtlsclient
from backend.clients.aioquic_client import AioquicClient
from backend.clients.gtlsclient import GtlsClient
from backend.clients.http3 import Http3Client
from backend.clients.qh3_client import Qh3Client
from backend.clients.transfer import Move, Transfer
from lb.address import Address

LIBRARIES: dict[str, type[Http3Client]] = {"aioquic": AioquicClient, "qh3": Qh3Client}
STACKS = (*LIBRARIES, GtlsClient.name)

# Ours.
CHATTER = 0.05  # seconds between the PINGs of a talkative client
UPLOAD = 24 << 20  # octets that keep gtlsclient, which has no PING, talking for long enough


def missing(stack: str) -> str | None:
    """Why a stack cannot be used here; None if it can."""
    if stack == GtlsClient.name and not gtlsclient.available():
        return "gtlsclient is not installed (Debian: apt-get install ngtcp2-client)"
    return None


class Session(Protocol):
    """One connection and what was requested on it.

    `reset_at`: when a Stateless Reset ended it, by the wall clock, if the client says so. `early`: whether the server
    took early data; None if there was none, or the client does not say.
    """

    transfers: list[Transfer]

    @property
    def reset_at(self) -> float | None: ...

    @property
    def early(self) -> bool | None: ...

    @property
    def can_speak(self) -> bool:
        """Whether it can send something of its own accord."""

    def speak(self) -> None:
        """Send a PING, if it can."""

    async def close(self) -> None: ...


async def open_session(
    stack: str,
    server: Address,
    *paths: str,
    move: Move | None = None,
    move_after: float = 0.4,
    is_talkative: bool = False,
) -> Session:
    """Connect, and GET all of `paths`; `move_after` seconds later, do as `move` says.

    A talkative client does not wait to be spoken to. Raises ConnectionEndedError or TimeoutError.
    """
    if stack == GtlsClient.name:
        if is_talkative:
            return await GtlsClient.start(server, "/upload", body=bytes(UPLOAD), move=move, move_after=move_after)
        return await GtlsClient.start(server, *paths, move=move, move_after=move_after)
    return await LibrarySession.start(
        LIBRARIES[stack], server, paths, move=move, move_after=move_after, is_talkative=is_talkative
    )


class LibrarySession:
    """A client of this process, and the task that moves it or has it talk."""

    def __init__(self, client: Http3Client, transfers: list[Transfer]) -> None:
        self.client = client
        self.transfers = transfers
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        library: type[Http3Client],
        server: Address,
        paths: tuple[str, ...],
        *,
        move: Move | None = None,
        move_after: float = 0.4,
        is_talkative: bool = False,
        quic_v2: bool = False,
        tickets: list[Any] | None = None,
    ) -> LibrarySession:
        """Connect, and GET all of `paths`: with a ticket as early data."""
        transfers: list[Transfer] = []

        def ask(client: Http3Client) -> None:
            transfers.extend(client.begin(path) for path in paths)

        client = await library.connect(server, quic_v2=quic_v2, tickets=tickets, at_once=ask if tickets else None)
        if not transfers:
            ask(client)
        session = cls(client, transfers)
        if move is not None:
            session._tasks.append(asyncio.create_task(session._move(move, move_after)))
        if is_talkative:
            session._tasks.append(asyncio.create_task(session._talk()))
        return session

    @property
    def reset_at(self) -> float | None:
        return self.client.reset_at

    @property
    def early(self) -> bool | None:
        return self.client.early

    can_speak = True

    def speak(self) -> None:
        self.client.ping()

    async def close(self) -> None:
        self.client.close()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _move(self, move: Move, after: float) -> None:
        await asyncio.sleep(after)
        if move is Move.NAT_REBINDING:
            await self.client.rebind()
        else:
            await self.client.migrate()

    async def _talk(self) -> None:
        while not self.client.ended.done():
            self.client.ping()
            await asyncio.sleep(CHATTER)
