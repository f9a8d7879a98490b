"""A session of a client library that blocks: one thread asks for one path after the other, on one connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

from backend.clients.transfer import ConnectionEndedError, Transfer

# Ours.
CONNECT_TIMEOUT = 5.0  # seconds
END_TIMEOUT = 1.0  # seconds until a thread that was told to end has ended


class CancelledInThreadError(Exception):
    """The session was closed under a request."""


class Request:
    """One transfer, as the thread sees it that makes the request."""

    def __init__(self, transfer: Transfer, loop: asyncio.AbstractEventLoop, cancelled: threading.Event) -> None:
        self.path = transfer.path
        self._transfer = transfer
        self._loop = loop
        self._cancelled = cancelled

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def status(self, code: int) -> None:
        self._call(partial(setattr, self._transfer, "status", code))

    def feed(self, data: bytes) -> None:
        """Hand over a part of the body. Raises CancelledInThreadError."""
        self._call(partial(self._transfer.feed, data))

    def finish(self) -> None:
        self._call(partial(self._transfer.feed, b"", is_last=True))

    def _call(self, done: Callable[[], object]) -> None:
        if self._cancelled.is_set():
            raise CancelledInThreadError
        self._loop.call_soon_threadsafe(done)


class ThreadedSession:
    """One connection, and one transfer for each path. It cannot be told to speak."""

    can_speak = False
    reset_at: float | None = None  # these clients do not say why a connection ended

    def __init__(self, paths: Sequence[str], get: Callable[[Request], None], forget: Callable[[], None]) -> None:
        """`get` makes a request and returns when it is answered, `forget` ends the connection: both in the thread."""
        self.transfers = [Transfer(path) for path in paths]
        self.early: bool | None = None
        self._get = get
        self._forget = forget
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        # Whoever does not end when told to must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)

    async def start(self) -> Self:
        """Connect. Raises ConnectionEndedError or TimeoutError."""
        self._thread.start()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await self.transfers[0].reached(1)
        except BaseException:
            await self.close()
            raise
        return self

    def speak(self) -> None:
        """It cannot be told to."""

    async def close(self) -> None:
        self._cancelled.set()
        try:
            async with asyncio.timeout(END_TIMEOUT):
                await self._ended.wait()
        except TimeoutError:
            return

    def _run(self) -> None:
        try:
            for transfer in self.transfers:
                request = Request(transfer, self._loop, self._cancelled)
                try:
                    self._get(request)
                    request.finish()
                except CancelledInThreadError:
                    break
                except Exception as error:
                    why = ConnectionEndedError(f"{type(error).__name__}: {error}")
                    self._loop.call_soon_threadsafe(self._fail, why)
                    break
            self._cancelled.wait()
            self._forget()
        finally:
            try:
                self._loop.call_soon_threadsafe(self._ended.set)
            except RuntimeError:  # too late: the loop is closed
                return

    def _fail(self, error: Exception) -> None:
        for transfer in self.transfers:
            if not transfer.is_over:
                transfer.fail(error)
