"""SlowStart: how much of its share of new connections a backend gets while it is warming up. No clock here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Ours.
STEPS = 10  # tenths of a share: a change of weights is a new ring, and that is work


class SlowStart:
    """The backends that have risen a short while ago, by service and name. Times are seconds of one clock.

    A share begins at one tenth and grows by tenths, at equal intervals, until after `duration` it is whole.
    """

    def __init__(self) -> None:
        self._rises: dict[tuple[str, str], _Rise] = {}

    def rose(self, service: str, backend: str, now: float, duration: float) -> None:
        """A backend came back; with a duration of 0 to its whole share at once."""
        self._rises[service, backend] = _Rise(now, duration)
        self._tidy(now)

    def forget(self, service: str, backend: str) -> None:
        """A backend is gone, or DOWN again."""
        self._rises.pop((service, backend), None)

    def factor(self, service: str, backend: str, now: float) -> float:
        """The part of its share that a backend gets: a number of tenths, 1.0 for those that are not warming up."""
        rise = self._rises.get((service, backend))
        return 1.0 if rise is None else rise.tenths(now) / STEPS

    def next_change(self, now: float) -> float | None:
        """When `factor` will next be another one for some backend; None if never."""
        self._tidy(now)
        return min((rise.next_step(now) for rise in self._rises.values()), default=None)

    def _tidy(self, now: float) -> None:
        for key in [key for key, rise in self._rises.items() if rise.tenths(now) == STEPS]:
            del self._rises[key]


class _Rise(NamedTuple):
    since: float
    duration: float

    def tenths(self, now: float) -> int:
        return 1 + sum(1 for step in self._steps() if step <= now)

    def next_step(self, now: float) -> float:
        return next(step for step in self._steps() if step > now)

    def _steps(self) -> list[float]:
        """When each tenth but the first is added."""
        return [self.since + self.duration * (i / (STEPS - 1)) for i in range(1, STEPS)]


def scaled(weights: Mapping[str, int], factors: Mapping[str, float]) -> Mapping[str, int]:
    """Weights in proportion to `factors`, by backend; who is in none has a factor of 1.

    They are whole numbers, ten times the configured ones, and nobody who has a weight is left without one. With
    every factor 1 they are the configured ones: then the ring is the one that every other balancer has.
    """
    if all(factors.get(name, 1.0) == 1.0 for name in weights):
        return weights
    return {
        name: max(1, round(weight * STEPS * factors.get(name, 1.0))) if weight else 0
        for name, weight in weights.items()
    }
