"""The tests of randomness find what they are for, and raise false alarms no more often than they say."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lb.conformance import randomness

SEED = 5
VALUES = 400


def drawn(source: random.Random, length: int = 12, count: int = VALUES) -> list[bytes]:
    return [source.randbytes(length) for _ in range(count)]


@pytest.mark.parametrize("length", [4, 12, 19])
@pytest.mark.parametrize("count", [30, 400, 3000])
def test_random_strings_show_no_pattern(length: int, count: int) -> None:
    source = random.Random(SEED)
    assert [randomness.pattern(drawn(source, length, count)) for _ in range(3)] == [None] * 3


def test_false_alarms_are_no_more_often_than_the_bound() -> None:
    """With a bound of one in ten, four hundred good servers have forty alarms at most."""
    source = random.Random(SEED)
    alarms = sum(randomness.pattern(drawn(source, 4, 60), 0.1) is not None for _ in range(400))
    assert alarms <= 40
    alarms = sum(randomness.uneven([source.randrange(32) for _ in range(60)], 32, 0.1) is not None for _ in range(400))
    assert 0 < alarms <= 40, "a bound that nothing ever comes near tests nothing"


def test_chernoffs_bound_is_one() -> None:
    """Against the binomial distribution itself."""
    draws, share = 40, 0.25
    source = random.Random(SEED)
    heads = [sum(source.random() < share for _ in range(draws)) for _ in range(4000)]
    for probability in (0.5, 0.1, 0.01):
        unlikely = sum(randomness.is_unlikely(count, draws, share, probability) for count in heads)
        assert unlikely / len(heads) <= probability


def counter(step: int, order: str) -> Callable[[random.Random], list[bytes]]:
    def make(source: random.Random) -> list[bytes]:
        start = source.getrandbits(96)
        return [((start + step * i) % (1 << 96)).to_bytes(12, order) for i in range(VALUES)]  # type: ignore[arg-type]

    return make


def shuffled(source: random.Random) -> list[bytes]:
    """A counter as many connections at a time show it."""
    values = counter(1, "big")(source)
    for i in range(0, VALUES, 16):
        part = values[i : i + 16]
        source.shuffle(part)
        values[i : i + 16] = part
    return values


def sometimes_next(source: random.Random) -> list[bytes]:
    """Each fifth is its neighbour's successor, and all others are random."""
    values = drawn(source)
    for i in range(1, VALUES, 5):
        values[i] = ((int.from_bytes(values[i - 1]) + 1) % (1 << 96)).to_bytes(12)
    return values


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (counter(1, "big"), "bit 0 is set"),
        (counter(1, "little"), "is set in"),
        (counter(0x9E3779B97F4A7C15F39CC061, "big"), "differ in"),
        (sometimes_next, "as big-endian numbers, 80 of 399 differ from the one before by 1"),
        (shuffled, "is set in"),
        (lambda source: [each[:11] + b"\x07" for each in drawn(source)], "bit 88 is set in 0 of 400"),
        (lambda source: [each[:6] + each[:6] for each in drawn(source)], "bits 0 and 48 differ in 0 of 400"),
        (
            lambda source: [bytes((0xFF * (i % 2),)) + each[1:] for i, each in enumerate(drawn(source))],
            "bits 0 and 1 differ in 0",
        ),
        (
            lambda source: [bytes((0x80 * (i % 2) | each[0] >> 1,)) + each[1:] for i, each in enumerate(drawn(source))],
            "from one to the next: bit 0 changes in 399 of 399",
        ),
    ],
)
def test_patterns_are_found(make: Callable[[random.Random], list[bytes]], found: str) -> None:
    reason = randomness.pattern(make(random.Random(SEED)))
    assert reason is not None
    assert found in reason


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ([16] * 40, "the value 16 came 40 times in 40"),
        ([i % 32 for i in range(320)], "the step from one to the next 1 came 319 times in 319"),
        ([i % 16 for i in range(3200)], "the value 0 came 200 times in 3200, expected about 100"),
    ],
)
def test_uneven_draws_are_found(numbers: list[int], found: str) -> None:
    reason = randomness.uneven(numbers, 32)
    assert reason is not None
    assert reason.startswith(found)


def test_nothing_and_little_say_nothing() -> None:
    assert randomness.pattern([]) is None
    assert randomness.pattern([b"\0\0\0\0"]) is None
    assert randomness.uneven([], 32) is None
    assert randomness.uneven([3], 32) is None


def test_small_numbers_are_near_zero_in_either_order() -> None:
    assert randomness.near_zero(bytes(11) + b"\x01")
    assert randomness.near_zero(b"\x01" + bytes(11))
    assert randomness.near_zero((2000).to_bytes(4))
    assert not randomness.near_zero((3000).to_bytes(4))
    source = random.Random(SEED)
    assert not any(randomness.near_zero(each) for each in drawn(source, 8))
