"""Memory: what was used once is not taken again, within a bound of time and of space."""

from __future__ import annotations

import math
from enum import Enum, auto

# Ours.
_EPOCHS = 8  # that a lifetime is divided into; what is over is forgotten by the epoch


class Recall(Enum):
    """What the memory says about something that may be used once."""

    NEW = auto()
    USED = auto()
    FORGOTTEN = auto()  # made so early that a use of it would be remembered no more


class Memory:
    """Marks of what was used, each until `lifetime` seconds after it was made; never more than `capacity` of them.

    When it is full it forgets those that were made first, and from then on calls everything FORGOTTEN that was made
    no later than they were: it never takes a used thing for a new one. `since` is the moment before which it knows
    nothing either.
    """

    def __init__(self, lifetime: float, capacity: int, since: float = -math.inf) -> None:
        self.forgotten_until = since
        self._epoch_length = lifetime / _EPOCHS
        self._lifetime = lifetime
        self._capacity = capacity
        self._epochs: dict[int, _Epoch] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def recall(self, mark: bytes, made_at: float) -> Recall:
        """Whether the thing with this mark may be used. Times are the wall clock's, in seconds."""
        if made_at <= self.forgotten_until:
            return Recall.FORGOTTEN
        epoch = self._epochs.get(self._epoch_of(made_at))
        return Recall.USED if epoch and mark in epoch.marks else Recall.NEW

    def add(self, mark: bytes, made_at: float, now: float) -> None:
        """It is used now."""
        oldest = self._epoch_of(now - self._lifetime)
        for number in [number for number in self._epochs if number < oldest]:
            self._forget(number)
        if self._count >= self._capacity:
            self._forget(min(self._epochs))
        if made_at <= self.forgotten_until:
            return
        epoch = self._epochs.setdefault(self._epoch_of(made_at), _Epoch())
        if mark not in epoch.marks:
            epoch.marks.add(mark)
            epoch.latest = max(epoch.latest, made_at)
            self._count += 1

    def _forget(self, number: int) -> None:
        forgotten = self._epochs.pop(number)
        self._count -= len(forgotten.marks)
        self.forgotten_until = max(self.forgotten_until, forgotten.latest)

    def _epoch_of(self, at: float) -> int:
        return math.floor(at / self._epoch_length)


class _Epoch:
    """Marks of what was made in one epoch, and when the last of it was."""

    __slots__ = ("latest", "marks")

    def __init__(self) -> None:
        self.marks: set[bytes] = set()
        self.latest = -math.inf
