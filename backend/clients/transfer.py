"""A request and what has come of its response so far; how a connection fails under it, and how it moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import Enum, auto


class Move(Enum):
    """What a client may do to its own address."""

    NAT_REBINDING = auto()  # another port, and it behaves as if it did not know
    MIGRATION = auto()  # another port and another connection ID (RFC 9000, section 9)


class ConnectionEndedError(ConnectionError):
    """The connection is over, and it was not us who closed it."""


class StatelessResetError(ConnectionEndedError):
    """The connection was ended by a Stateless Reset (RFC 9000, section 10.3). `at` is the wall clock's time."""

    def __init__(self, at: float) -> None:
        super().__init__("ended by a Stateless Reset")
        self.at = at


class Transfer:
    """One request. Times are the wall clock's, in seconds, so that they compare with other processes' logs."""

    def __init__(self, path: str, progress: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.status: int | None = None  # None where a client does not say
        self.body = bytearray()
        self.begun_at = time.time()
        self.last_at = self.begun_at  # when the last octets came
        self.longest_pause = 0.0
        self._progress = progress
        self._is_complete = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def reached(self, octets: int) -> None:
        """Wait until that much of the body has come. Raises ConnectionEndedError if it never will."""
        await self._until(lambda: len(self.body) >= octets)

    async def complete(self) -> bytes:
        """The whole body. Raises ConnectionEndedError, or ValueError for a status that is not 200."""
        await self._until(lambda: self._is_complete)
        if self.status not in (None, 200):
            raise ValueError(f"{self.path}: status {self.status}")
        return bytes(self.body)

    @property
    def is_over(self) -> bool:
        return self._is_complete or self._error is not None

    def feed(self, data: bytes, *, is_last: bool = False) -> None:
        """Add what has come."""
        if data:
            now = time.time()
            self.longest_pause = max(self.longest_pause, now - self.last_at)
            self.last_at = now
            self.body += data
            if self._progress is not None:
                self._progress(len(self.body))
        self._is_complete |= is_last
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """There will be no more."""
        self._error = error
        self._changed.set()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            if self._error is not None:
                raise self._error
            if self._is_complete:
                raise ConnectionEndedError(f"{self.path}: complete with {len(self.body)} octets only")
            self._changed.clear()
            await self._changed.wait()


def slow_body(seconds: float) -> bytes:
    """What the backend's `/slow/SECONDS` sends: a numbered line every 50 ms."""
    return b"".join(b"%d\n" % tick for tick in range(round(seconds / 0.05))) + b"end\n"
