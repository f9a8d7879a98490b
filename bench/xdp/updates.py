"""How long the engine takes to obey another table: all of a large one, and one backend's change in it.

What is timed is the engine's `apply`, the work of its thread: next hops, images of the maps, writing what differs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.network import FIRST_BACKEND, Network, inside
from bench.xdp import frames
from lb.address import Address
from lb.forward import Forward
from lb.router import RouterLimits
from lb.routing import Backend, BackendState, CidSlot, RoutingTable, Service
from lb.upstream import ServicePolicy
from lb.xdp.abi import mount_bpf, unmount
from lb.xdp.plane import Plane, XdpSettings

BACKENDS = 4096
SERVER_IDS = 65536

WHOLE = f"{BACKENDS} backends and {SERVER_IDS} server IDs, where nothing was"
DOWN = "one backend goes DOWN"
DEAD = "it is declared dead"
ACTIVE = "it is ACTIVE again"
TARGETS = {WHOLE: 0.1, DOWN: 0.005, DEAD: 0.005, ACTIVE: 0.005}  # ours, in seconds

_CONFIG = frames.SINGLE_PASS
_RESET_KEY = bytes(range(32))
_NAME, _ONE = "bench", "b7"


class Update(NamedTuple):
    """One kind of change, in seconds, round by round."""

    change: str
    all: list[float]

    @property
    def seconds(self) -> float:
        return statistics.median(self.all)

    @property
    def target(self) -> float:
        return TARGETS[self.change]


def measure(place: Path, say: Callable[[str], None], *, rounds: int) -> list[Update]:
    """Every change, once per round, each round on an interface that had nothing. `place` is an empty folder."""
    service = _service()
    tables = {
        WHOLE: RoutingTable.build(service),
        DOWN: RoutingTable.build(service, {_ONE: BackendState.DOWN}),
        DEAD: RoutingTable.build(service, {_ONE: BackendState.DOWN}, [_ONE]),
        ACTIVE: RoutingTable.build(service),
    }
    policies = {_NAME: ServicePolicy(router=RouterLimits(), push_rate=0, silence=0)}
    times: dict[str, list[float]] = {change: [] for change in tables}
    for number in range(rounds):
        with Network() as network, inside(network.balancer), _plane(place) as plane:
            plane.start([], policies, time.monotonic())
            for change, table in tables.items():
                gc.collect()
                start = time.perf_counter()
                plane.apply([table], policies, time.monotonic())
                times[change].append(time.perf_counter() - start)
                say(f"round {number + 1}, {change}: {times[change][-1] * 1e3:.1f} ms")
    return [Update(change, seconds) for change, seconds in times.items()]


@contextlib.contextmanager
def _plane(place: Path) -> Iterator[Plane]:
    """The engine on the interface of this namespace. Its pin goes, and with the namespace the rest."""
    mount_bpf(str(place))
    settings = XdpSettings(
        interface="eth0",
        forward=Forward.IPIP,
        pin_directory=place,
        flows=65536,
        table_entries=65536,
        idle_timeout=120.0,
        new_flow_timeout=10.0,
    )
    try:
        with contextlib.closing(Plane(settings, os.urandom)) as plane:
            yield plane
    finally:
        unmount(str(place))


def _service() -> Service:
    each = SERVER_IDS // BACKENDS
    backends = tuple(
        Backend(
            f"b{number}",
            Address(str(FIRST_BACKEND + number), frames.PORT),
            {_CONFIG.config_id: frozenset(frames.server_id(number * each + i, _CONFIG) for i in range(each))},
        )
        for number in range(BACKENDS)
    )
    return Service(_NAME, (Address(str(frames.VIP), frames.PORT),), (CidSlot(_CONFIG, _RESET_KEY),), backends)
