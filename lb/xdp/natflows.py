"""The flows of the nat mode, as the program keeps them: who has been idle for too long, and who talked to whom.

The program has no clock for them. Each half of a flow counts its datagrams, and a flow whose counts have not changed
from one look to the next has been idle in between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from lb.xdp.layout import FLOW, NAT_FLOW, NAT_KEY, NAT_RETURN, RETURN_KEY, U32_KEY, NatFlow, NatKey, NatReturn
from lb.xdp.libbpf import Map

_FOUR_TUPLE = FLOW.offsets["zero"]  # octets of a 4-tuple, in a flow and in the key of `nat_out`
_PORT = slice(RETURN_KEY.offsets["port"], RETURN_KEY.offsets["zero"])  # ours, in the key of `nat_in`


class _Look(NamedTuple):
    """What was counted of a flow, and when that was new."""

    counts: tuple[int, int]
    since: float


class NatFlows:
    """Both halves of all flows. Methods block, and are for one thread at a time.

    Times are in seconds, of any clock that only goes forward.
    """

    def __init__(self, *, idle_timeout: float, new_flow_timeout: float) -> None:
        self._idle_timeout = idle_timeout
        self._new_flow_timeout = new_flow_timeout
        self._looks: dict[bytes, _Look] = {}  # by key of `nat_out`
        self._sweep: Iterator[None] | None = None
        self.count = 0  # flows, at the last whole sweep
        self.expired = 0
        self.orphans = 0  # halves whose other half was evicted

    def move_to(self, out: Map, back: Map) -> None:
        """Look into these maps from now on: before anything else, and when another program has taken the flows over."""
        self._out, self._back = out, back
        self._sweep = None

    def step(self, now: float) -> None:
        """Look at some thousand entries, and after the last one begin again."""
        if self._sweep is None:
            self._sweep = self._sweeping()
            next(self._sweep)
        try:
            self._now = now
            next(self._sweep)
        except StopIteration:
            self._sweep = None

    @property
    def is_sweeping(self) -> bool:
        """Whether a look at all flows has begun and not ended."""
        return self._sweep is not None

    def of_backends(self, slots: Collection[int]) -> Iterator[tuple[NatKey, NatFlow]]:
        """The flows of some backends."""
        wanted = {U32_KEY.pack(slot) for slot in slots}
        for key, value in self._out.items():
            if key[_FOUR_TUPLE:] in wanted:
                yield NAT_KEY.unpack(key), NAT_FLOW.unpack(value)

    def _sweeping(self) -> Iterator[None]:
        yield
        # Backs first: a flow that begins meanwhile then has its way out, and does not look like an orphan.
        backs: dict[bytes, tuple[bytes, NatReturn]] = {}
        for entries in _batches(self._back):
            for key, value in entries.items():
                back = NAT_RETURN.unpack(value)
                backs[back.flow[:_FOUR_TUPLE] + U32_KEY.pack(back.backend)] = key, back
            yield
        outs: set[bytes] = set()
        for entries in _batches(self._out):
            self._look(entries, backs)
            outs |= entries.keys()
            yield
        lost = [key for flow, (key, _) in backs.items() if flow not in outs]
        # One that has begun its way out anew since then has another port, or is found in its old one.
        lost = [key for key in lost if self._is_orphan(key)]
        self.orphans += self._back.delete_batch(lost)
        for flow in self._looks.keys() - outs:
            del self._looks[flow]
        self.count = len(self._looks)

    def _look(self, entries: Mapping[bytes, bytes], backs: Mapping[bytes, tuple[bytes, NatReturn]]) -> None:
        ended: list[bytes] = []
        ended_backs: list[bytes] = []
        for key, value in entries.items():
            flow = NAT_FLOW.unpack(value)
            there = backs.get(key)
            counts = flow.datagrams_to, there[1].datagrams_from if there else 0
            look = self._looks.get(key)
            if look is None or look.counts != counts:
                self._looks[key] = _Look(counts, self._now)
                continue
            is_established = flow.short_header_seen and counts[1]
            if self._now - look.since >= (self._idle_timeout if is_established else self._new_flow_timeout):
                ended.append(key)
                if there is not None:
                    ended_backs.append(there[0])
        for key in ended:
            del self._looks[key]
        self.expired += self._out.delete_batch(ended)
        self._back.delete_batch(ended_backs)

    def _is_orphan(self, key: bytes) -> bool:
        value = self._back.lookup(key)
        if value is None:
            return False
        back = NAT_RETURN.unpack(value)
        out = self._out.lookup(back.flow[:_FOUR_TUPLE] + U32_KEY.pack(back.backend))
        return out is None or NAT_FLOW.unpack(out).port != key[_PORT]


def _batches(one: Map) -> Iterator[dict[bytes, bytes]]:
    token: bytes | None = None
    while True:
        entries, token = one.lookup_batch(token)
        yield entries
        if token is None:
            return
