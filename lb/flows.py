"""FlowTable: remembers decisions for a while, in bounded memory. It has no clock: `now` is an argument."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

SECOND_CHANCES = 64  # entries that one insertion may spare before it evicts whatever comes next


class _Entry:
    __slots__ = ("expires", "used", "value")

    def __init__(self, value: str, expires: float) -> None:
        self.value = value
        self.expires = expires
        self.used = False


class FlowTable(Generic[K]):
    """Maps a key of a flow to the name of a backend, at most `capacity` of them.

    Full, it forgets the oldest entry that was not looked up since its last turn (second chance), so that a flood
    of new flows pushes out itself and not those that carry traffic.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # Not a dict: the first key of one that many were removed from is far to seek.
        self._entries: OrderedDict[K, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, now: float) -> str | None:
        """The backend remembered for `key`, if that is not longer ago than its lifetime."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires <= now:
            del self._entries[key]
            return None
        entry.used = True
        return entry.value

    def put(self, key: K, value: str, now: float, lifetime: float) -> None:
        """Remember `value` for `lifetime` seconds from `now`. The same value never for less than before."""
        if self._capacity == 0:
            return
        entry = self._entries.get(key)
        if entry is not None:
            entry.expires = max(entry.expires, now + lifetime) if entry.value == value else now + lifetime
            entry.value = value
            return
        if len(self._entries) >= self._capacity:
            self._evict(now)
        self._entries[key] = _Entry(value, now + lifetime)

    def sweep(self, now: float, steps: int) -> None:
        """Look at the `steps` oldest entries and forget those whose time is over. Call it now and then."""
        for _ in range(min(steps, len(self._entries))):
            key = next(iter(self._entries))
            if self._entries[key].expires > now:
                self._entries.move_to_end(key)
            else:
                del self._entries[key]

    def _evict(self, now: float) -> None:
        for _ in range(SECOND_CHANCES):
            key = next(iter(self._entries))
            entry = self._entries[key]
            if entry.expires <= now or not entry.used:
                break
            entry.used = False
            self._entries.move_to_end(key)
        self._entries.popitem(last=False)
