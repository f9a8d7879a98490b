"""Whether octet strings look as if they were drawn at random: tests whose false alarms are bounded, not estimated.

Every bound is Chernoff's for a binomial count, or a union bound over coincidences, and is divided by the number of
counts that are looked at. So a good server fails one run in 1 / `false_alarms`, or less often; a bad one may pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise

FALSE_ALARMS = 1e-6  # of each test, for values that are uniform and independent
PART = 1 << 12  # strings that are turned into columns together: each bit is a character meanwhile


def is_unlikely(count: int, draws: int, share: float, probability: float) -> bool:
    """Whether so few or so many of `draws` independent draws have less than `probability`, if each counts with a
    chance of `share` (Chernoff: exp(-draws * KL(count / draws || share)), for each of the two tails)."""
    found = count / draws
    return 2 * math.exp(-draws * _divergence(found, share)) < probability


def uneven(values: Sequence[int], size: int, probability: float = FALSE_ALARMS) -> str | None:
    """What is wrong with draws from 0 .. size - 1; None if nothing. `values` in the order in which they came."""
    steps = [(after - before) % size for before, after in pairwise(values)]
    for what, draws in (("value", values), ("step from one to the next", steps)):
        if not draws:
            continue
        counts = Counter(draws)
        for number in range(size):
            if is_unlikely(counts[number], len(draws), 1 / size, probability / (2 * size)):
                expected = len(draws) / size
                return f"the {what} {number} came {counts[number]} times in {len(draws)}, expected about {expected:.0f}"
    return None


def pattern(values: Sequence[bytes], probability: float = FALSE_ALARMS) -> str | None:
    """What is wrong with different octet strings of one length, in the order in which they came; None if nothing."""
    share = probability / 4
    return (
        _biased_bits(values, share)
        or _bound_bits(values, share)
        or _repeated_bits(values, share)
        or _constant_differences(values, share)
    )


def near_zero(value: bytes, probability: float = FALSE_ALARMS) -> bool:
    """Whether a number, of either octet order, is so small that a random one hardly ever is."""
    bound = probability / 2 * (1 << 8 * len(value))
    return min(int.from_bytes(value), int.from_bytes(value, "little")) < bound


def _biased_bits(values: Sequence[bytes], probability: float) -> str | None:
    """A bit that is set too often or too seldom."""
    columns = _columns(values)
    for position, column in enumerate(columns):
        if values and is_unlikely(column.bit_count(), len(values), 0.5, probability / len(columns)):
            return f"bit {position} is set in {column.bit_count()} of {len(values)}"
    return None


def _bound_bits(values: Sequence[bytes], probability: float) -> str | None:
    """Two bits of one string that agree, or differ, too often."""
    columns = _columns(values)
    pairs = math.comb(len(columns), 2)
    for (one, left), (other, right) in combinations(enumerate(columns), 2):
        differing = (left ^ right).bit_count()
        if is_unlikely(differing, len(values), 0.5, probability / pairs):
            return f"bits {one} and {other} differ in {differing} of {len(values)}"
    return None


def _repeated_bits(values: Sequence[bytes], probability: float) -> str | None:
    """A bit that is too often what it was in the string before, or too seldom."""
    changes = [bytes(a ^ b for a, b in zip(before, after, strict=True)) for before, after in pairwise(values)]
    if (found := _biased_bits(changes, probability)) is None:
        return None
    return f"from one to the next: {found.replace('is set', 'changes')}"


def _constant_differences(values: Sequence[bytes], probability: float) -> str | None:
    """A difference between neighbours, as numbers, that comes again and again, as a counter's does."""
    if len(values) < 2:
        return None
    bits = 8 * len(values[0])
    draws = len(values) - 1
    # Of so many equal ones there are comb(draws, times) choices, each with 2 ** -(bits * (times - 1)).
    times = next(n for n in range(2, draws + 2) if _log_choices(draws, n, bits) <= math.log(probability / 2))
    for order in ("big", "little"):
        numbers = [int.from_bytes(value, order) for value in values]
        (step, count), *_ = Counter((b - a) % (1 << bits) for a, b in pairwise(numbers)).most_common(1)
        if count >= times:
            signed = step - (1 << bits) if step >> bits - 1 else step
            return f"as {order}-endian numbers, {count} of {draws} differ from the one before by {signed}"
    return None


def _log_choices(draws: int, times: int, bits: int) -> float:
    if times > draws:
        return -math.inf
    return math.log(math.comb(draws, times)) - bits * (times - 1) * math.log(2)


def _columns(values: Sequence[bytes]) -> list[int]:
    """One number for each bit position, whose bits are those of all strings there."""
    if not values:
        return []
    width = 8 * len(values[0])
    columns = [0] * width
    for begin in range(0, len(values), PART):
        part = values[begin : begin + PART]
        rows = [f"{int.from_bytes(value):0{width}b}" for value in part]
        for position, column in enumerate(zip(*rows, strict=True)):
            columns[position] = columns[position] << len(part) | int("".join(column), 2)
    return columns


def _divergence(found: float, share: float) -> float:
    """Kullback and Leibler's, of two coins."""
    total = 0.0
    if found > 0:
        total += found * math.log(found / share)
    if found < 1:
        total += (1 - found) * math.log((1 - found) / (1 - share))
    return total
