"""Flows of the nat mode end when they are idle, and never when they are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lb.address import packed
from lb.xdp.layout import NAT_FLOW, NAT_KEY, NAT_RETURN, RETURN_KEY, NatFlow, NatKey, NatReturn, ReturnKey
from lb.xdp.libbpf import Map, MapType
from lb.xdp.natflows import NatFlows
from tests.xdp import bpf

IDLE, NEW = 120.0, 10.0
CLIENT, VIP, BACKEND = packed("198.51.100.7"), packed("192.0.2.1"), packed("10.0.0.1")


class Flows:
    """Both maps, and flows that a test puts there as the program would."""

    def __init__(self) -> None:
        self.out = Map.create(MapType.LRU_HASH, "nat_out", NAT_KEY.size, NAT_FLOW.size, 16384)
        self.back = Map.create(MapType.LRU_HASH, "nat_in", RETURN_KEY.size, NAT_RETURN.size, 16384)
        self.flows = NatFlows(idle_timeout=IDLE, new_flow_timeout=NEW)
        self.flows.move_to(self.out, self.back)

    def key(self, number: int, backend: int = 3) -> NatKey:
        return NatKey(CLIENT, VIP, number.to_bytes(2), (443).to_bytes(2), backend)

    def begin(self, number: int, *, to: int = 1, back: int = 1, short: bool = True, backend: int = 3) -> None:
        key, port = self.key(number, backend), (1024 + number).to_bytes(2)
        there = NatFlow(port, bytes(6), bytes(20), 20, short, bytes(2), 1, to)
        came = NatReturn(NAT_KEY.pack(key)[:36] + bytes(4), backend, bytes(6), 0, back)
        self.out.update(NAT_KEY.pack(key), NAT_FLOW.pack(there))
        self.back.update(RETURN_KEY.pack(ReturnKey(BACKEND, (443).to_bytes(2), port)), NAT_RETURN.pack(came))

    def sweep(self, now: float) -> None:
        """One whole pass, of as many steps as it takes."""
        self.flows.step(now)
        while self.flows.is_sweeping:
            self.flows.step(now)

    def left(self) -> list[int]:
        """The flows that are there, each in both maps."""
        out = sorted(int.from_bytes(NAT_KEY.unpack(key).client_port) for key, _ in self.out.items())
        back = sorted(int.from_bytes(RETURN_KEY.unpack(key).port) - 1024 for key, _ in self.back.items())
        assert out == back
        return out


@pytest.fixture
def flows() -> Iterator[Flows]:
    reason = bpf.missing()
    if reason:
        pytest.skip(reason)
    made = Flows()
    yield made
    made.out.close()
    made.back.close()


def test_an_idle_flow_ends_after_its_time_and_not_before(flows: Flows) -> None:
    flows.begin(1)
    flows.begin(2, short=False)
    flows.begin(3, back=0)
    flows.sweep(0.0)
    flows.sweep(NEW - 0.1)
    assert flows.left() == [1, 2, 3]
    flows.sweep(NEW)
    assert flows.left() == [1]
    flows.sweep(IDLE)
    assert flows.left() == []
    assert flows.flows.expired == 3
    assert flows.flows.count == 0


@pytest.mark.parametrize("moving", ["to", "back"])
def test_traffic_of_either_way_keeps_a_flow(flows: Flows, moving: str) -> None:
    for number in range(1, 30):
        flows.begin(1, **{moving: number})  # type: ignore[arg-type]
        flows.sweep(number * (IDLE - 1))
    assert flows.left() == [1]
    assert flows.flows.count == 1


def test_a_half_without_its_other_half_goes(flows: Flows) -> None:
    for number in (1, 2):
        flows.begin(number)
    flows.out.delete(NAT_KEY.pack(flows.key(1)))
    flows.sweep(0.0)
    assert flows.left() == [2]
    assert flows.flows.orphans == 1


def test_thousands_are_looked_at_in_steps(flows: Flows) -> None:
    for number in range(9000):
        flows.begin(number)
    steps = 0
    flows.flows.step(0.0)
    while flows.flows.is_sweeping:
        flows.flows.step(0.0)
        steps += 1
    assert steps >= 4
    assert flows.flows.count == 9000


def test_the_flows_of_a_backend_are_found(flows: Flows) -> None:
    flows.begin(1, backend=3)
    flows.begin(2, backend=4)
    flows.begin(3, backend=3)
    found = sorted(int.from_bytes(key.client_port) for key, _ in flows.flows.of_backends({3}))
    assert found == [1, 3]
