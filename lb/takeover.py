"""Takeover: the successor's side of a handover. Sockets and flows of predecessors, while they still forward."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lb.address import Address
from lb.handover import Sockets, Taking
from lb.log import event
from lb.nat import Followed, Nat
from lb.returnpath import LivePaths, ReturnPath, ReturnPaths
from lb.sockets import BoundSockets, adopted
from lb.upstream import Listener

# Ours.
CATCH_UP = 512  # flows of a predecessor that may change while it is stopped; more are followed before
ROUNDS = 8  # attempts at that
PIECE = 2000  # flows that are followed before the loop turns

Changes = list[tuple[int, ReturnPath | None]]

logger = logging.getLogger(__name__)


class Takeover:
    """What `nat` gets from predecessors. `bound` gets the sockets that clients send to; `clock()` gives seconds.

    In this order: `begin`, `follow`, `finish`, and `close_files` whatever happens. All raise OSError, with a reason, if
    it does not come about; `close` then lets the predecessors go on.
    """

    def __init__(self, nat: Nat, bound: BoundSockets, clock: Callable[[], float]) -> None:
        self._nat = nat
        self._bound = bound
        self._clock = clock
        self._predecessors: list[_Predecessor] = []

    @property
    def lock(self) -> int | None:
        """The lock of the first predecessor's return path file; None if there is no predecessor."""
        return self._predecessors[0].taking.lock if self._predecessors else None

    async def begin(self, paths: Sequence[Path]) -> None:
        """Ask those who serve `paths`, and get their sockets."""
        for path in paths:
            taking = await Taking.connect(path)
            if taking is not None:
                self._predecessors.append(_Predecessor(taking))
        for predecessor in self._predecessors:
            sockets = await predecessor.taking.sockets()
            self._bound.add(sockets.listening)
            self._nat.adopt_ports(map(adopted, sockets.upstream), self._clock())

    async def follow(self, listeners: Mapping[Address, Listener], paths: ReturnPaths | None) -> None:
        """Begin with their flows, and do as they do until there is little left to do. `paths` is our own file."""
        for predecessor in self._predecessors:
            predecessor.live = LivePaths(predecessor.taking.map_descriptor)
            if paths is not None and predecessor.taking.file != paths.path:
                paths.take_orphan(predecessor.taking.file, predecessor.taking.lock)
        for _ in range(ROUNDS):
            changed = 0
            for predecessor in self._predecessors:
                self._adopt(await predecessor.taking.sockets())
                changes = predecessor.changes()
                changed += len(changes)
                for at in range(0, len(changes), PIECE):
                    self._do(predecessor, changes[at : at + PIECE], listeners)
                    await asyncio.sleep(0)
            if changed <= CATCH_UP:
                break

    async def finish(self, listeners: Mapping[Address, Listener]) -> None:
        """Have them stop, catch up, and tell them that we read: which whoever calls does next, without waiting."""
        stopped = await asyncio.gather(*(predecessor.taking.ready() for predecessor in self._predecessors))
        for predecessor, (records, sockets) in zip(self._predecessors, stopped, strict=True):
            self._adopt(sockets)
            self._do(predecessor, predecessor.changes(records), listeners)
        for predecessor in self._predecessors:
            await predecessor.taking.mine()

    def finished(self, milliseconds: float) -> int:
        """Say so. Returns how many flows there are of theirs."""
        flows = sum(len(predecessor.followed) for predecessor in self._predecessors)
        sockets = self._nat.sockets
        event(logger, logging.INFO, "taken-over", flows=flows, sockets=sockets, milliseconds=round(milliseconds, 1))
        for predecessor in self._predecessors:
            predecessor.followed.clear()
        self._nat.forget_ports()
        return flows

    def close_files(self) -> None:
        for predecessor in self._predecessors:
            predecessor.taking.close_files()
            if predecessor.live is not None:
                predecessor.live.close()

    def close(self) -> None:
        """End the connections: predecessors that live read on."""
        for predecessor in self._predecessors:
            predecessor.taking.close()

    def _adopt(self, sockets: Sockets) -> None:
        """Sockets that were opened meanwhile."""
        for sock in sockets.listening:
            sock.close()  # whoever opened it just now did not know of our configuration
        self._nat.adopt_ports(map(adopted, sockets.upstream), self._clock())

    def _do(self, predecessor: _Predecessor, changes: Changes, listeners: Mapping[Address, Listener]) -> None:
        predecessor.early += self._nat.follow(changes, predecessor.followed, listeners, self._clock())


class _Predecessor:
    """One that is being followed: its connection, its file, and its flows."""

    def __init__(self, taking: Taking) -> None:
        self.taking = taking
        self.live: LivePaths | None = None
        self.followed: dict[int, Followed] = {}
        self.early: Changes = []  # flows that were known before their sockets

    def changes(self, records: int | None = None) -> Changes:
        assert self.live is not None  # noqa: S101 - followed first
        early, self.early = self.early, []
        return [*early, *self.live.changes(self.live.capacity if records is None else records)]
