"""Activity: what the counters did lately. Rates, short histories, and when something was last seen."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lb.cid import CONFIG_IDS
from lb.engine import Counters, ServiceCounters
from lb.router import Verdict

# Ours.
INTERVAL = 1.0  # seconds between observations
HISTORY = 300  # observations that are remembered
RATE_OVER = 3  # observations that a rate is taken over


class Gauge:
    """One counter's recent past. A counter that is smaller than before has begun anew."""

    __slots__ = ("_differences", "_seconds", "_total", "last_seen")

    def __init__(self) -> None:
        self.last_seen: float | None = None  # when it last grew while it was watched
        self._total: int | None = None
        self._differences = array("Q")
        self._seconds = array("f")  # that they took

    def observe(self, total: int, passed: float, now: float) -> None:
        """`passed` is how many seconds ago the observation before was."""
        if self._total is not None and passed > 0:
            grown = max(0, total - self._total)
            if grown:
                self.last_seen = now
            self._differences.append(grown)
            self._seconds.append(passed)
            if len(self._seconds) > HISTORY:
                del self._differences[0], self._seconds[0]
        self._total = total

    @property
    def rate(self) -> float:
        """Per second, lately; 0 until there is something to compare with."""
        seconds = sum(self._seconds[-RATE_OVER:])
        return sum(self._differences[-RATE_OVER:]) / seconds if seconds else 0.0

    def series(self) -> list[float]:
        """Per second between each two observations, newest last."""
        return [grown / seconds for grown, seconds in zip(self._differences, self._seconds, strict=True)]

    def copy(self) -> Gauge:
        gauge = Gauge()
        gauge.last_seen, gauge._total = self.last_seen, self._total
        gauge._differences, gauge._seconds = self._differences[:], self._seconds[:]
        return gauge


class ServiceActivity(NamedTuple):
    """One service's gauges. Lists are indexed by the enums that they are named for."""

    verdicts: Sequence[Gauge]
    config_ids: Sequence[Gauge]
    moves: Gauge
    rescued: Gauge
    resets: Gauge  # answered and pushed
    backends: dict[str, Gauge]  # datagrams to each

    @classmethod
    def new(cls) -> ServiceActivity:
        return cls([Gauge() for _ in Verdict], [Gauge() for _ in CONFIG_IDS], Gauge(), Gauge(), Gauge(), {})

    def copy(self) -> ServiceActivity:
        return ServiceActivity(
            [gauge.copy() for gauge in self.verdicts],
            [gauge.copy() for gauge in self.config_ids],
            self.moves.copy(),
            self.rescued.copy(),
            self.resets.copy(),
            {name: gauge.copy() for name, gauge in self.backends.items()},
        )


class Activity:
    """What an engine's counters did lately. `observe` is to be called every `INTERVAL`, on any clock."""

    def __init__(self) -> None:
        self.services: dict[str, ServiceActivity] = {}
        self._observed_at: float | None = None

    def observe(self, counters: Counters, now: float) -> None:
        passed = 0.0 if self._observed_at is None else now - self._observed_at
        self._observed_at = now
        for name, counted in counters.services.items():
            _observe(self.services.setdefault(name, ServiceActivity.new()), counted, passed, now)
        for name in self.services.keys() - counters.services.keys():
            del self.services[name]

    def copy(self) -> Activity:
        """This moment's, for whoever looks at it elsewhere."""
        activity = Activity()
        activity.services = {name: service.copy() for name, service in self.services.items()}
        return activity

    def backend(self, service: str, backend: str) -> Gauge:
        """Datagrams to a backend; one that never counted anything for names that are not known."""
        known = self.services.get(service)
        return known.backends.get(backend, _NEVER) if known is not None else _NEVER

    def config_id(self, service: str, config_id: int) -> Gauge:
        """Datagrams routed by a config ID."""
        known = self.services.get(service)
        return known.config_ids[config_id] if known is not None else _NEVER


_NEVER = Gauge()


def _observe(activity: ServiceActivity, counted: ServiceCounters, passed: float, now: float) -> None:
    _each(activity.verdicts, counted.verdicts, passed, now)
    _each(activity.config_ids, counted.config_ids, passed, now)
    activity.moves.observe(counted.moves, passed, now)
    activity.rescued.observe(counted.rescued, passed, now)
    activity.resets.observe(counted.verdicts[Verdict.RESET] + counted.resets_pushed, passed, now)
    for name, sums in counted.backends.items():
        activity.backends.setdefault(name, Gauge()).observe(sums.datagrams_to, passed, now)
    for name in activity.backends.keys() - counted.backends.keys():
        del activity.backends[name]


def _each(gauges: Sequence[Gauge], totals: Iterable[int], passed: float, now: float) -> None:
    for gauge, total in zip(gauges, totals, strict=True):
        gauge.observe(total, passed, now)
