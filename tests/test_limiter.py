"""RateLimiter: a bucket for all and one for each prefix, in bounded memory."""

from __future__ import annotations

import pytest

from lb.limiter import PREFIXES, RateLimiter


def allowed(limiter: RateLimiter, host: str, now: float, tries: int) -> int:
    return sum(limiter.allow(host, now) for _ in range(tries))


def test_a_prefix_gets_its_rate_and_a_burst_of_one_second() -> None:
    limiter = RateLimiter(rate=0, prefix_rate=10)

    assert [allowed(limiter, "192.0.2.1", now, 100) for now in (0.0, 0.5, 10.0)] == [10, 5, 10]


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("192.0.2.1", "192.0.2.254", True),
        ("192.0.2.1", "192.0.3.1", False),
        ("2001:db8::1", "2001:db8:0:ff::1", True),
        ("2001:db8::1", "2001:db8:0:100::1", False),
    ],
)
def test_a_prefix_is_an_ipv4_24_or_an_ipv6_56(one: str, other: str, shared: bool) -> None:
    limiter = RateLimiter(rate=0, prefix_rate=5)
    allowed(limiter, one, 0, 5)

    assert allowed(limiter, other, 0, 5) == (0 if shared else 5)


def test_all_prefixes_together_get_the_common_rate() -> None:
    limiter = RateLimiter(rate=20, prefix_rate=10)

    assert sum(allowed(limiter, f"10.0.{i}.1", 0.0, 10) for i in range(10)) == 20


def test_a_refusal_by_the_common_bucket_costs_the_prefix_nothing() -> None:
    limiter = RateLimiter(rate=1, prefix_rate=1)
    assert [limiter.allow("10.0.0.1", 0), limiter.allow("10.0.1.1", 0)] == [True, False]

    assert limiter.allow("10.0.1.1", 1.0)


def test_zero_is_no_limit() -> None:
    assert allowed(RateLimiter(0, 0), "192.0.2.1", 0, 10_000) == 10_000


def test_a_rate_below_one_still_allows_one_now_and_then() -> None:
    limiter = RateLimiter(rate=0, prefix_rate=0.1)

    assert [limiter.allow("192.0.2.1", now) for now in (0, 1, 10.1)] == [True, False, True]


def test_a_clock_that_stands_still_or_goes_back_gives_nothing_away() -> None:
    limiter = RateLimiter(rate=0, prefix_rate=1)
    limiter.allow("192.0.2.1", 100)

    assert [limiter.allow("192.0.2.1", now) for now in (100, 50, 100)] == [False, False, False]


def test_memory_is_bounded_whatever_the_sources() -> None:
    limiter = RateLimiter(rate=0, prefix_rate=1)
    for i in range(3 * PREFIXES):
        limiter.allow(f"{10 + (i >> 16)}.{i >> 8 & 255}.{i & 255}.1", 0)

    assert len(limiter._buckets) == PREFIXES
