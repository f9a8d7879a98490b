"""Signs of trouble with backends, read from what was counted: silence under traffic, and ICMP errors. No clock here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lb.silence import SilenceWatch


class Watch:
    """Looks at the counters of all backends, again and again."""

    def __init__(self) -> None:
        self._silent: dict[int, SilenceWatch] = {}
        self._unreachable: dict[int, int] = {}

    def look(
        self,
        silences: Mapping[int, float],
        sent: Sequence[int],
        received: Sequence[int],
        unreachable: Sequence[int],
        now: float,
    ) -> list[int]:
        """The slots of backends that something seems wrong with, at `now` seconds.

        `silences` says for each slot how long, in seconds, it may be silent under traffic; 0: for ever. The
        others are indexed by slot: datagrams to it, datagrams from it, ICMP errors.
        """
        for slot in self._unreachable.keys() - silences.keys():
            del self._unreachable[slot]
            self._silent.pop(slot, None)
        suspects = []
        for slot, silence in silences.items():
            silent = self._silent.setdefault(slot, SilenceWatch())
            is_silent = bool(silence) and silent.suspicious(sent[slot], received[slot], now, silence)
            if is_silent or unreachable[slot] != self._unreachable.get(slot, unreachable[slot]):
                suspects.append(slot)
            self._unreachable[slot] = unreachable[slot]
        return suspects
