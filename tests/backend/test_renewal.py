"""Connections are renewed a few at a time, and clients that do not answer hold up nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from backend.renewal import AT_ONCE, PATIENCE, Renewals
from backend.routable import RoutableConnection


class Connection:
    is_renewing = True


class Clock:
    """Calls back when it is told that time has passed."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self._due.append((self.now + seconds, act))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due, self._due = (
            [each for each in self._due if each[0] <= self.now],
            [each for each in self._due if each[0] > self.now],
        )
        for _, act in due:
            act()


class Server:
    """Renews, and says whom."""

    def __init__(self, count: int) -> None:
        self.connections = [cast(RoutableConnection, Connection()) for _ in range(count)]
        self.renewed: list[RoutableConnection] = []
        self.clock = Clock()
        self.renewals = Renewals(self.renewed.append, self.clock.later)

    def answers(self, connection: RoutableConnection) -> None:
        cast(Connection, connection).is_renewing = False
        self.renewals.heard(connection)


def test_each_answer_makes_room_for_another() -> None:
    server = Server(1000)
    server.renewals.begin(server.connections)
    for i, connection in enumerate(server.connections):
        assert len(server.renewed) == min(AT_ONCE + i, 1000)
        server.renewals.heard(connection)  # it has retired one of several
        assert len(server.renewed) == min(AT_ONCE + i, 1000)
        server.answers(connection)
    assert server.renewed == server.connections
    server.clock.advance(PATIENCE)
    assert len(server.renewed) == 1000


def test_a_thousand_silent_clients_take_less_than_two_seconds() -> None:
    server = Server(1000)
    server.renewals.begin(server.connections)
    while len(server.renewed) < 1000:
        server.clock.advance(PATIENCE)
    assert server.clock.now < 2.0
    assert server.renewed == server.connections


def test_who_is_gone_makes_room_too() -> None:
    server = Server(AT_ONCE + 2)
    server.renewals.begin(server.connections)
    server.renewals.gone(server.connections[0])
    server.renewals.gone(server.connections[0])
    assert len(server.renewed) == AT_ONCE + 1


def test_another_switch_begins_anew() -> None:
    server = Server(2 * AT_ONCE)
    server.renewals.begin(server.connections)
    server.renewals.begin(server.connections)
    server.clock.advance(PATIENCE)
    assert server.renewed == [*server.connections[:AT_ONCE], *server.connections]
    server.clock.advance(PATIENCE)
    assert len(server.renewed) == 3 * AT_ONCE
