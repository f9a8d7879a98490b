"""Values become octets and come back. That the C structs are the same is the compiler's to say: tests/xdp/native."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from lb.address import packed, unpacked
from lb.engine import Drop
from lb.forward import Forward
from lb.router import Verdict
from lb.routing import Unroutable
from lb.xdp import layout
from lb.xdp.layout import LAYOUTS, Layout

SHAPES = {
    "settings": 240,
    "endpoint": 24,
    "service": 32,
    "cid_config": 608,
    "server_key": 20,
    "server": 4,
    "reset_key": 168,
    "backend": 64,
    "ring": 131080,
    "flow": 40,
    "choice": 8,
    "nat_key": 40,
    "nat_flow": 40,
    "return_key": 24,
    "nat_return": 56,
    "dnat_return": 24,
    "cached": 32,
    "service_counters": 240,
    "backend_counters": 64,
    "total_counters": 96,
    "sampling": 8,
    "sample": 144,
    "slot_name": 136,
}


def test_sizes_are_those_of_the_header_file() -> None:
    assert {one.c_name: one.size for one in LAYOUTS} == SHAPES


@pytest.mark.parametrize("one", LAYOUTS, ids=lambda one: one.c_name)
def test_what_is_unpacked_packs_to_the_same_octets(one: Layout[Any]) -> None:
    octets = bytes(at % 251 for at in range(one.size))
    value = one.unpack(octets)
    assert one.pack(value) == octets
    assert list(value._fields) == list(one.offsets)


@pytest.mark.parametrize("one", LAYOUTS, ids=lambda one: one.c_name)
def test_every_field_is_where_its_offset_says(one: Layout[Any]) -> None:
    octets = bytes(at % 251 for at in range(one.size))
    ends = [*list(one.offsets.values())[1:], one.size]
    for (name, start), end in zip(one.offsets.items(), ends, strict=True):
        value = getattr(one.unpack(octets), name)
        if isinstance(value, int):
            value = value.to_bytes(end - start, "little")
        elif isinstance(value, tuple):
            value = struct.pack(f"<{len(value)}Q", *value)
        assert (name, value) == (name, octets[start:end])


def test_counters_have_a_place_for_everything_that_is_counted() -> None:
    services = layout.SERVICE_COUNTERS.unpack(bytes(layout.SERVICE_COUNTERS.size))
    totals = layout.TOTAL_COUNTERS.unpack(bytes(layout.TOTAL_COUNTERS.size))
    assert len(services.verdicts) == len(Verdict)
    assert len(services.unroutable) == len(Unroutable)
    assert len(totals.failures) == len(Drop.ALL)
    assert list(Forward) == list(range(5))


def test_values_of_all_cpus_add_up() -> None:
    one = layout.BACKEND_COUNTERS.pack(layout.BackendCounters(1, 2, 3, 4, 5, (0, 0, 0)))
    other = layout.BACKEND_COUNTERS.pack(layout.BackendCounters(10, 20, 30, 40, 50, (0, 0, 0)))
    assert layout.sum_u64(one + other, 8) == [11, 22, 33, 44, 55, 0, 0, 0]
    assert [value.octets_to for value in layout.per_cpu(layout.BACKEND_COUNTERS, one + other)] == [2, 20]


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "0.0.0.0", "::"])
def test_addresses_come_back(host: str) -> None:
    assert unpacked(packed(host)) == host
