"""The program, loaded and at hand: tables in, packets through it one by one, and exactly what was counted meanwhile."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from lb.address import packed
from lb.cid import CONFIG_IDS
from lb.engine import Drop
from lb.forward import Forward
from lb.router import RouterLimits, Verdict
from lb.routing import FourTuple, RoutingTable, Unroutable
from lb.upstream import ServicePolicy
from lb.xdp import aes128
from lb.xdp.difference import difference
from lb.xdp.image import BACKENDS, Image, NextHop, Surroundings, render
from lb.xdp.layout import (
    BACKEND_COUNTERS,
    NAT_FLOW,
    NAT_KEY,
    SETTINGS,
    TOTAL_COUNTERS,
    U32_KEY,
    NatFlow,
    NatKey,
    Settings,
    sum_u64,
)
from lb.xdp.libbpf import LIBRARY, Map, MapType, Object, has_library, possible_cpus, supports_program
from lb.xdp.program import CACHE, OBJECT, PROGRAM, SETTINGS_SECTION, LoadedProgram, load_program
from lb.xdp.slots import Allocation
from lb.xdp.tables import Tables
from tests.xdp.cases import INTERFACE, MTU, SOURCES, next_hop
from tests.xdp.frames import octets_of_mac

ROOT = Path(__file__).parents[2]
NO_LIMITS = RouterLimits(new_flows_rate=0, reset_rate=0, reset_prefix_rate=0)
NAT_PORTS = range(20000, 30000)
RANDOM_KEY = bytes(range(16))
FILLED = ("flows", "nat_out", "nat_in")  # by the program
BUCKETS = ("too_big_bucket", "reset_buckets", "reset_prefixes", "flow_prefixes")


class Action(IntEnum):
    """`enum xdp_action`."""

    ABORTED = 0
    DROP = 1
    PASS = 2
    TX = 3
    REDIRECT = 4


class Outcome(NamedTuple):
    """What became of a frame: octets that left, or that are left, and what was counted, zeros left out."""

    action: Action
    frame: bytes
    counted: dict[str, int]


@functools.cache
def missing() -> str | None:
    """Why no program can run here; None if one can. A program that is wrong is not missing."""
    if os.geteuid() != 0:
        return "loading a BPF program needs root"
    if not has_library():
        return f"{LIBRARY} is not installed (Debian: apt-get install libbpf1)"
    if not supports_program():
        return "may not load a BPF program"
    return not_built()


def not_built() -> str | None:
    """Build the programs if their sources are newer. Why nobody can; None if they are built."""
    build = subprocess.run(["sh", ROOT / ".ci/build-bpf"], capture_output=True, text=True, check=False)
    if build.stderr.startswith("build-bpf:"):
        return build.stderr.strip()
    assert not build.returncode, build.stderr
    return None


def settings(
    forward: Forward, *, constant_time: bool = False, nat_ports: range = NAT_PORTS, **changes: Any
) -> Settings:
    return Settings(
        forward_mode=forward,
        constant_time=constant_time,
        interface_mac=octets_of_mac(INTERFACE),
        zero=bytes(5),
        source_ipv4=packed(SOURCES[4]),
        source_ipv6=packed(SOURCES[6]),
        nat_port_first=nat_ports.start,
        nat_port_count=len(nat_ports),
        interface_mtu=MTU,
        hash_seed=0x0123456789ABCDEF,
        random_key=aes128.encrypt_schedule(RANDOM_KEY),
    )._replace(**changes)


def load_with_other_maps(chosen: Settings, sizes: Mapping[str, int], kinds: Mapping[str, MapType]) -> LoadedProgram:
    """The program with maps of other kinds than it asks for."""
    with Object(OBJECT) as compiled:
        compiled.section(SETTINGS_SECTION)[:] = SETTINGS.pack(chosen)
        compiled.section(".rodata.aes")[:] = aes128.tables()
        compiled.set_max_entries(CACHE, compiled.definitions()[CACHE].max_entries * possible_cpus())
        for name, entries in sizes.items():
            compiled.set_max_entries(name, entries)
        definitions = compiled.definitions()
        for name, kind in kinds.items():
            like = definitions[name]
            with Map.create(kind, name, like.key_size, like.value_size, sizes[name]) as instead:
                compiled.reuse_map(name, instead)
        compiled.load()
        return LoadedProgram(compiled.program(PROGRAM), compiled.maps(), frozenset(), "")


class Balancer:
    """A loaded program and the image that its maps hold."""

    def __init__(
        self,
        forward: Forward,
        *,
        sizes: Mapping[str, int] | None = None,
        kinds: Mapping[str, MapType] | None = None,
        **options: Any,
    ) -> None:
        """`sizes` and `kinds` are of maps that shall not be what they usually are."""
        self.forward = forward
        sizes = {"nat_out": 1024, "nat_in": 1024, **(sizes or {})}
        if kinds:
            self.loaded = load_with_other_maps(settings(forward, **options), sizes, kinds)
        else:
            self.loaded = load_program(settings(forward, **options), sizes, statistics=True)
        self.maps = self.loaded.maps
        self._tables = Tables(self.maps)
        self._image = Image(Allocation(self.maps[BACKENDS].max_entries))
        self._applied: Sequence[RoutingTable] = ()
        self._limits = NO_LIMITS
        self._hops: Mapping[str, NextHop | None] = {}
        self._seen: dict[tuple[str, int], bytes] = {}

    def close(self) -> None:
        self._tables.close()
        self.loaded.close()

    def apply(
        self,
        tables: Sequence[RoutingTable],
        limits: RouterLimits = NO_LIMITS,
        hops: Mapping[str, NextHop | None] | None = None,
    ) -> None:
        """Make the maps hold these tables, by the writes that the engine would do.

        `hops` are next hops of hosts that have another one than `next_hop` says, or none.
        """
        if (tables, limits, hops or {}) == (self._applied, self._limits, self._hops):
            return
        self._applied, self._limits, self._hops = tables, limits, hops or {}
        hosts = [backend.address.host for table in tables for backend in table.backends]
        known = {host: self._hops.get(host, hop(host)) for host in hosts}
        around = Surroundings(
            forward=self.forward,
            policies={table.service.name: ServicePolicy(router=limits, push_rate=0.0, silence=0.0) for table in tables},
            addresses=(),
            hops={host: where for host, where in known.items() if where},
            cpus=1,
        )
        after = render(tables, around, self._image)
        self._tables.write(difference(self._image, after))
        self._image = after
        self.counted()  # numbers may have changed hands

    def run(self, frame: bytes, context: bytes | None = None) -> Outcome:
        """One frame through the program."""
        result = self.loaded.program.test_run(frame, context=context)
        assert result.retval != Action.ABORTED
        return Outcome(Action(result.retval), result.data, self.counted())

    def counted(self) -> dict[str, int]:
        """What was counted since somebody last asked: what grew, and by how much."""
        grown: dict[str, int] = {}
        for name, index, names in self._counters():
            octets = self.maps[name].lookup(U32_KEY.pack(index))
            assert octets is not None
            before = self._seen.get((name, index), bytes(len(octets)))
            if octets != before:
                words = self.maps[name].definition.value_size // 8
                growth = zip(names, sum_u64(octets, words), sum_u64(before, words), strict=False)
                grown |= {what: now - then for what, now, then in growth if now != then}
                self._seen[name, index] = octets
        return grown

    def forget(self) -> None:
        """Empty the maps that the program fills, and begin to count anew."""
        for name in FILLED:
            self.maps[name].delete_batch([key for key, _ in self.maps[name].items()])
        self.counted()

    def refill(self) -> None:
        """Fill all token buckets: what is all zeros was last filled in 1970."""
        for name in BUCKETS:
            bucket = self.maps[name]
            keys = map(U32_KEY.pack, range(bucket.max_entries))
            bucket.update_batch(dict.fromkeys(keys, bytes(bucket.value_size)))

    def index(self, service: str) -> int:
        """The number of a service."""
        return self._image.parts[service].index

    def slot(self, service: str, backend: int) -> int:
        """The number of a backend's slot."""
        return self._image.parts[service].slots[backend].number

    def nat_flow(self, flow: FourTuple, slot: int) -> NatFlow | None:
        """What is known of a client and a backend in nat mode."""
        ports = flow.client_port.to_bytes(2), flow.local_port.to_bytes(2)
        found = self.maps["nat_out"].lookup(NAT_KEY.pack(NatKey(packed(flow.client), packed(flow.local), *ports, slot)))
        return None if found is None else NAT_FLOW.unpack(found)

    def _counters(self) -> Iterator[tuple[str, int, Sequence[str]]]:
        """Every element of a map of counters that there is, and the names of its counters."""
        for service, part in self._image.parts.items():
            yield "service_count", part.index, service_counters(service)
            for backend, slot in zip(part.table.backends, part.slots, strict=True):
                yield "backend_count", slot.number, backend_counters(f"{service}/{backend.name}")
        yield "total_count", 0, (*Drop.ALL, *list(TOTAL_COUNTERS.offsets)[1:])


@functools.cache
def service_counters(service: str) -> tuple[str, ...]:
    return (
        *(f"{service} {verdict.name}" for verdict in Verdict),
        *(f"{service} unroutable {reason.name}" for reason in Unroutable),
        *(f"{service} config {config_id}" for config_id in CONFIG_IDS),
        f"{service} moves",
        f"{service} rescued",
    )


@functools.cache
def backend_counters(backend: str) -> tuple[str, ...]:
    return tuple(f"{backend} {name}" for name in BACKEND_COUNTERS.offsets if name != "zero")


def hop(host: str, mtu: int = MTU) -> NextHop:
    """How packets get to a backend in these tests."""
    return NextHop(octets_of_mac(next_hop(host)), mtu)
