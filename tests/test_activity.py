"""Rates, histories and last signs of life, made from counters."""

from __future__ import annotations

from lb.activity import HISTORY, Activity
from lb.engine import BackendCounters, Counters, ServiceCounters
from lb.router import Verdict


def counters(to: int, *, config_0: int = 0, fallback: int = 0, pushed: int = 0, backend: str = "a") -> Counters:
    service = ServiceCounters(backends={backend: BackendCounters(datagrams_to=to)}, resets_pushed=pushed)
    service.config_ids[0] = config_0
    service.verdicts[Verdict.FALLBACK] = fallback
    return Counters(services={"web": service})


def test_a_rate_is_taken_over_the_last_seconds() -> None:
    activity = Activity()
    for second, to in enumerate([1000, 1000, 1030, 1090, 1180]):
        activity.observe(counters(to), float(second))
    gauge = activity.backend("web", "a")
    assert gauge.series() == [0, 30, 60, 90]
    assert gauge.rate == 60
    assert gauge.last_seen == 4


def test_what_was_counted_before_anybody_looked_is_no_sign_of_life() -> None:
    activity = Activity()
    activity.observe(counters(1000), 10.0)
    assert activity.backend("web", "a").last_seen is None
    assert activity.backend("web", "a").rate == 0
    activity.observe(counters(1000), 11.0)
    assert activity.backend("web", "a").last_seen is None
    activity.observe(counters(1001), 12.5)
    assert activity.backend("web", "a").last_seen == 12.5


def test_a_counter_that_begins_anew_makes_no_negative_rate() -> None:
    activity = Activity()
    for second, to in enumerate([500, 510, 3, 8]):
        activity.observe(counters(to), float(second))
    assert activity.backend("web", "a").series() == [10, 0, 5]


def test_history_is_bounded_and_the_newest_is_last() -> None:
    activity = Activity()
    for second in range(HISTORY + 50):
        activity.observe(counters(second * second), float(second))
    series = activity.backend("web", "a").series()
    assert len(series) == HISTORY
    last = HISTORY + 49
    assert series[-1] == last**2 - (last - 1) ** 2


def test_everything_has_a_gauge() -> None:
    activity = Activity()
    activity.observe(counters(0), 0.0)
    activity.observe(counters(5, config_0=4, fallback=2, pushed=1), 1.0)
    service = activity.services["web"]
    assert activity.config_id("web", 0).rate == 4
    assert service.verdicts[Verdict.FALLBACK].rate == 2
    assert service.resets.rate == 1
    assert service.moves.rate == service.rescued.rate == 0


def test_who_is_gone_is_forgotten() -> None:
    activity = Activity()
    activity.observe(counters(0), 0.0)
    activity.observe(counters(5, backend="b"), 1.0)
    assert set(activity.services["web"].backends) == {"b"}
    assert activity.backend("web", "a").series() == []
    activity.observe(Counters(), 2.0)
    assert activity.services == {}
    assert activity.config_id("web", 0).rate == 0


def test_a_copy_stands_still() -> None:
    activity = Activity()
    activity.observe(counters(0), 0.0)
    activity.observe(counters(5), 1.0)
    copy = activity.copy()
    activity.observe(counters(50), 2.0)
    assert copy.backend("web", "a").series() == [5]
    assert copy.backend("web", "a").last_seen == 1.0
