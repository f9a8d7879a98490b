"""All connections get new connection IDs, a few at a time.

All at once, the last of many clients is sent its own long after the first have answered, and nobody reads the answers
meanwhile: most of it is taken for lost and sent again, and a busy machine gets busier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from backend.routable import RoutableConnection

# Ours. By these a thousand connections take 1.6 seconds at most, if their clients are silent or far away.
AT_ONCE = 32
PATIENCE = 0.05  # seconds for clients to answer in before others are asked as well

Later = Callable[[float, Callable[[], None]], object]


class Renewals:
    """Who is still to be renewed, and who is being. `renew` begins with one; `later` calls back in so many seconds."""

    def __init__(self, renew: Callable[[RoutableConnection], None], later: Later) -> None:
        self._renew = renew
        self._later = later
        self._waiting: deque[RoutableConnection] = deque()
        self._under_way: set[RoutableConnection] = set()
        self._is_timed = False

    def begin(self, connections: Iterable[RoutableConnection]) -> None:
        """Renew these, and no others that were waiting."""
        self._waiting = deque(connections)
        self._under_way.clear()
        self._go_on()

    def heard(self, connection: RoutableConnection) -> None:
        """Its client has retired a connection ID."""
        if connection in self._under_way and not connection.is_renewing:
            self._end(connection)

    def gone(self, connection: RoutableConnection) -> None:
        """It has ended."""
        if connection in self._under_way:
            self._end(connection)

    def _end(self, connection: RoutableConnection) -> None:
        self._under_way.remove(connection)
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and len(self._under_way) < AT_ONCE:
            connection = self._waiting.popleft()
            self._under_way.add(connection)
            self._renew(connection)
        if self._waiting and not self._is_timed:
            self._is_timed = True
            self._later(PATIENCE, self._wait_no_longer)

    def _wait_no_longer(self) -> None:
        self._is_timed = False
        self._under_way.clear()
        self._go_on()
