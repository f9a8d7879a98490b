"""Backends are suspected for silence under traffic and for ICMP errors, and for nothing else."""

from __future__ import annotations

import pytest

from lb.silence import SILENT_DATAGRAMS
from lb.xdp.watch import Watch

SILENCE = {0: 0.5, 1: 0.5}


def test_silence_under_traffic_is_suspicious() -> None:
    watch = Watch()
    assert watch.look(SILENCE, [0, 0], [0, 0], [0, 0], 0.0) == []
    assert watch.look(SILENCE, [100, 100], [0, 90], [0, 0], 0.1) == []
    assert watch.look(SILENCE, [200, 200], [0, 190], [0, 0], 0.4) == []
    assert watch.look(SILENCE, [300, 300], [0, 290], [0, 0], 0.5) == [0]


@pytest.mark.parametrize("silence", [0.0, 0.5])
def test_silence_is_allowed_where_the_policy_says_so(silence: float) -> None:
    watch = Watch()
    found = [watch.look({0: silence}, [n * 100], [0], [0], float(n)) for n in range(3)]
    assert found == ([[], [0], [0]] if silence else [[], [], []])


def test_few_datagrams_prove_nothing() -> None:
    watch = Watch()
    watch.look({0: 0.5}, [0], [0], [0], 0.0)
    for second in range(1, 100):
        assert watch.look({0: 0.5}, [SILENT_DATAGRAMS - 1], [0], [0], float(second)) == []


def test_an_answer_ends_the_suspicion() -> None:
    watch = Watch()
    watch.look({0: 0.5}, [0], [0], [0], 0.0)
    watch.look({0: 0.5}, [50], [0], [0], 1.0)
    assert watch.look({0: 0.5}, [51], [1], [0], 2.0) == []
    assert watch.look({0: 0.5}, [52], [1], [0], 3.0) == []


def test_an_icmp_error_is_suspicious_at_once_and_once() -> None:
    watch = Watch()
    watch.look(SILENCE, [0, 0], [0, 0], [0, 7], 0.0)
    assert watch.look(SILENCE, [0, 0], [0, 0], [0, 8], 0.1) == [1]
    assert watch.look(SILENCE, [0, 0], [0, 0], [0, 8], 0.2) == []


def test_whoever_is_put_into_a_slot_begins_without_a_past() -> None:
    watch = Watch()
    watch.look({0: 0.5}, [0], [0], [0], 0.0)
    watch.look({0: 0.5}, [100], [0], [0], 1.0)
    watch.look({}, [100], [0], [0], 1.1)
    assert watch.look({0: 0.5}, [100], [0], [3], 2.0) == []
    assert watch.look({0: 0.5}, [107], [0], [3], 3.0) == []
