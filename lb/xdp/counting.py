"""What the program has counted, summed over CPUs and put under the names of services and backends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import add

from lb.engine import BackendCounters, Counters, Drop, ServiceCounters
from lb.xdp.layout import BACKEND_COUNTERS, SERVICE_COUNTERS, TOTAL_COUNTERS, U32_KEY, sum_u64
from lb.xdp.libbpf import Map, possible_cpus
from lb.xdp.slots import Allocation

_WORD = 8  # octets
_BACKEND_WORDS = BACKEND_COUNTERS.size // _WORD


class BackendTotals:
    """Counters of backends, each a list that is indexed by slot."""

    def __init__(self, octets: bytes) -> None:
        self._words = memoryview(octets).cast("Q")
        self.datagrams_to = self._column("datagrams_to")
        self.octets_to = self._column("octets_to")
        self.datagrams_from = self._column("datagrams_from")
        self.octets_from = self._column("octets_from")
        self.unreachable = self._column("unreachable")

    def _column(self, name: str) -> list[int]:
        cpus = possible_cpus()
        first = BACKEND_COUNTERS.offsets[name] // _WORD
        total: Iterable[int] = self._words[first :: _BACKEND_WORDS * cpus]
        for cpu in range(1, cpus):
            total = map(add, total, self._words[first + cpu * _BACKEND_WORDS :: _BACKEND_WORDS * cpus])
        return list(total)


def read_backends(counted: Map, slots: int) -> BackendTotals:
    """The counters of the first `slots` slots, in few calls."""
    values: list[bytes] = []
    token: bytes | None = None
    while len(values) < slots:
        entries, token = counted.lookup_batch(token, slots - len(values))
        values += entries.values()
        if token is None:
            break
    return BackendTotals(b"".join(values))


def read_counters(maps: Mapping[str, Map], allocation: Allocation) -> Counters:
    """Everything but the flows, of which the program keeps no count."""
    counters = Counters()
    for name, index in allocation.services.items():
        octets = maps["service_count"].lookup(U32_KEY.pack(index)) or b""
        summed = SERVICE_COUNTERS.unpack(_summed(octets, SERVICE_COUNTERS.size))
        counters.services[name] = ServiceCounters(
            verdicts=list(summed.verdicts),
            unroutable=list(summed.unroutable),
            config_ids=list(summed.config_ids),
            moves=summed.moves,
            rescued=summed.rescued,
        )
    slots = {occupant: slot.number for occupant, slot in allocation.backends.items()}
    totals = read_backends(maps["backend_count"], max(slots.values(), default=-1) + 1)
    for occupant, slot in slots.items():
        counters.services[occupant.service].backends[occupant.backend] = BackendCounters(
            datagrams_to=totals.datagrams_to[slot],
            octets_to=totals.octets_to[slot],
            datagrams_from=totals.datagrams_from[slot],
            octets_from=totals.octets_from[slot],
            unreachable=totals.unreachable[slot],
        )
    total = TOTAL_COUNTERS.unpack(
        _summed(maps["total_count"].lookup(U32_KEY.pack(0)) or b"", TOTAL_COUNTERS.size),
    )
    counters.failures = dict(zip(Drop.ALL, total.failures, strict=True))
    counters.icmp_forwarded = total.icmp_forwarded
    counters.too_big_sent = total.too_big_sent
    counters.too_big_limited = total.too_big_limited
    counters.samples_lost = total.samples_lost
    return counters


def _summed(octets: bytes, size: int) -> bytes:
    words = sum_u64(octets, size // _WORD)
    return b"".join(word.to_bytes(_WORD, "little") for word in words)
