"""lb/slowstart.py: the share of a backend that has come back. Virtual time throughout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.slowstart import STEPS, SlowStart, scaled


def test_a_share_grows_by_tenths_at_equal_intervals() -> None:
    slow = SlowStart()
    slow.rose("web", "a", 100.0, 9.0)
    seen = [slow.factor("web", "a", 100.0 + t) for t in range(11)]
    assert seen == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0]
    assert slow.factor("web", "a", 100.99) == 0.1
    assert (slow.factor("web", "b", 100.0), slow.factor("api", "a", 100.0)) == (1.0, 1.0)


def test_whoever_follows_next_change_sees_every_step_and_then_rests() -> None:
    slow = SlowStart()
    slow.rose("web", "a", 0.0, 30.0)
    slow.rose("web", "b", 10.0, 61.0)
    now, changes = 10.0, 0
    while (at := slow.next_change(now)) is not None:
        before = [slow.factor("web", name, now) for name in "ab"]
        assert at > now
        just_before = at - (at - now) / 1000
        assert [slow.factor("web", name, just_before) for name in "ab"] == before
        now, changes = at, changes + 1
        assert [slow.factor("web", name, now) for name in "ab"] != before
    assert changes <= 2 * (STEPS - 1)
    assert (now, slow.factor("web", "a", now), slow.factor("web", "b", now)) == (71.0, 1.0, 1.0)


def test_who_is_forgotten_or_takes_no_time_has_its_whole_share() -> None:
    slow = SlowStart()
    slow.rose("web", "a", 0.0, 30.0)
    slow.rose("web", "b", 0.0, 0.0)
    assert (slow.factor("web", "a", 0.0), slow.factor("web", "b", 0.0)) == (0.1, 1.0)
    slow.forget("web", "a")
    slow.forget("web", "nobody")
    assert (slow.factor("web", "a", 0.0), slow.next_change(0.0)) == (1.0, None)


def test_a_second_rise_begins_at_the_bottom() -> None:
    slow = SlowStart()
    slow.rose("web", "a", 0.0, 9.0)
    assert slow.factor("web", "a", 5.0) == 0.6
    slow.rose("web", "a", 5.0, 9.0)
    assert slow.factor("web", "a", 5.0) == 0.1


@given(since=st.floats(0, 1e9), duration=st.floats(0, 3600), waits=st.lists(st.floats(0, 2000), max_size=20))
def test_a_share_never_shrinks_and_is_always_between_a_tenth_and_one(
    since: float, duration: float, waits: list[float]
) -> None:
    slow = SlowStart()
    slow.rose("web", "a", since, duration)
    factors = [slow.factor("web", "a", since + wait) for wait in sorted(waits)]
    assert factors == sorted(factors)
    assert set(factors) <= {tenths / 10 for tenths in range(1, 11)}
    assert slow.factor("web", "a", since + duration) == 1.0


@pytest.mark.parametrize(
    ("weights", "factors", "expected"),
    [
        ({"a": 1, "b": 3}, {}, {"a": 1, "b": 3}),
        ({"a": 1, "b": 3}, {"a": 1.0}, {"a": 1, "b": 3}),
        ({"a": 1, "b": 3}, {"a": 0.1}, {"a": 1, "b": 30}),
        ({"a": 1, "b": 3}, {"a": 0.3, "b": 0.7}, {"a": 3, "b": 21}),
        ({"a": 0, "b": 1000}, {"a": 0.5, "b": 0.1}, {"a": 0, "b": 1000}),
        ({"a": 2}, {"another": 0.1}, {"a": 2}),
        ({}, {"a": 0.1}, {}),
    ],
)
def test_scaled_weights(weights: dict[str, int], factors: dict[str, float], expected: dict[str, int]) -> None:
    assert scaled(weights, factors) == expected


def test_weights_that_nothing_scales_are_the_very_same() -> None:
    weights = {"a": 1, "b": 2}
    assert scaled(weights, {"a": 1.0}) is weights


@given(
    weights=st.dictionaries(st.sampled_from("abcde"), st.integers(0, 1000)),
    tenths=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 10)),
)
def test_scaled_weights_are_in_the_exact_proportion(weights: dict[str, int], tenths: dict[str, int]) -> None:
    factors = {name: each / 10 for name, each in tenths.items()}
    times = {name: tenths.get(name, 10) for name in weights}
    unit = 1 if all(each == 10 for each in times.values()) else 10
    assert {name: weight * 10 for name, weight in scaled(weights, factors).items()} == {
        name: weight * times[name] * unit for name, weight in weights.items()
    }
