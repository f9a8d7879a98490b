"""A token bucket for everybody, and one for each source prefix. It has no clock: `now` is an argument."""

from __future__ import annotations

from lb.address import packed

# Ours. What one attacker can be assumed to own: an IPv4 /24, an IPv6 /56. As octets of the packed address.
IPV4_PREFIX = 15
IPV6_PREFIX = 7
PREFIXES = 4096  # buckets kept; at the limit the oldest is forgotten, and the common bucket still holds
BURST_SECONDS = 1.0


class _Bucket:
    """Fills at `rate` tokens per second up to `burst` of them."""

    __slots__ = ("_filled_at", "_tokens")

    def __init__(self, now: float, burst: float) -> None:
        self._tokens = burst
        self._filled_at = now

    def level(self, rate: float, burst: float, now: float) -> float:
        if now > self._filled_at:
            self._tokens = min(burst, self._tokens + (now - self._filled_at) * rate)
            self._filled_at = now
        return self._tokens

    def take(self) -> None:
        self._tokens -= 1.0


class RateLimiter:
    """Says yes at most `rate` times per second in all and `prefix_rate` times per source prefix. 0 is no limit.

    A bucket holds what comes in `burst_seconds`, and at least one token.
    """

    def __init__(self, rate: float, prefix_rate: float, burst_seconds: float = BURST_SECONDS) -> None:
        self._rate = rate
        self._burst = max(1.0, rate * burst_seconds)
        self._prefix_rate = prefix_rate
        self._prefix_burst = max(1.0, prefix_rate * burst_seconds)
        self._common: _Bucket | None = None
        self._buckets: dict[bytes, _Bucket] = {}

    def allow(self, host: str, now: float) -> bool:
        """Take a token for a source address, at `now` seconds, if both buckets have one."""
        common = prefixed = None
        if self._prefix_rate:
            octets = packed(host)
            prefix = octets[: IPV6_PREFIX if ":" in host else IPV4_PREFIX]
            prefixed = self._buckets.get(prefix)
            if prefixed is None:
                if len(self._buckets) >= PREFIXES:
                    del self._buckets[next(iter(self._buckets))]
                prefixed = self._buckets[prefix] = _Bucket(now, self._prefix_burst)
            if prefixed.level(self._prefix_rate, self._prefix_burst, now) < 1.0:
                return False
        if self._rate:
            common = self._common = self._common or _Bucket(now, self._burst)
            if common.level(self._rate, self._burst, now) < 1.0:
                return False
            common.take()
        if prefixed:
            prefixed.take()
        return True
