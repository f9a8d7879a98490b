"""A balancer that is none: Operations over a little fleet in memory, so that API and page have something to show.

`python -m tests.admin.fake PORT` serves it at 127.0.0.1:PORT, with numbers that move.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from lb.activity import Activity
from lb.address import Address
from lb.admin.server import CLIENT_PATIENCE, AdminServer
from lb.cid import CidConfig, ConfigId, ServerId
from lb.config import LbConfig, ServiceConfig
from lb.engine import BackendCounters, Counters, ServiceCounters
from lb.errors import ConfigError, ConfigErrors
from lb.healthcheck import BackendHealth
from lb.keys import AdminConfig, Phase
from lb.operations import Refused, RotationStep
from lb.overrides import Change, Overrides
from lb.rotation import SlotView
from lb.router import Verdict
from lb.routing import Backend, BackendState, CidSlot, RoutingTable, Service, Unroutable
from lb.snapshot import Snapshot
from tests.builders import KEY, RESET_KEY

LOOPBACK = Address("127.0.0.1", 0)
SEED = 4


def fleet() -> tuple[ServiceConfig, ...]:
    """Two services, one of them in the middle of a rotation."""
    slots = (
        CidSlot(CidConfig(ConfigId(0), 4, 12, KEY), RESET_KEY),
        CidSlot(CidConfig(ConfigId(1), 3, 5, KEY[::-1]), RESET_KEY[::-1]),
        CidSlot(CidConfig(ConfigId(2), 2, 4)),
    )
    web = Service("web", (Address("192.0.2.1", 443), Address("2001:db8::1", 443)), slots, _members(5, slots), "a seed")
    only = (CidSlot(CidConfig(ConfigId(3), 4, 12, KEY[:8] * 2), RESET_KEY),)
    video = Service("video", (Address("192.0.2.2", 443),), only, _members(3, only), "another")
    return (
        ServiceConfig(
            service=web,
            draining=frozenset(["b3"]),
            phases={ConfigId(0): Phase.RETIRING, ConfigId(1): Phase.ACTIVE, ConfigId(2): Phase.PREPARED},
        ),
        ServiceConfig(service=video, phases={ConfigId(3): Phase.ACTIVE}),
    )


def _members(count: int, slots: Sequence[CidSlot]) -> tuple[Backend, ...]:
    return tuple(
        Backend(
            f"b{i}",
            Address(f"10.0.{slots[0].config.config_id}.{i + 1}", 443),
            {
                slot.config.config_id: frozenset(
                    [ServerId((0xA5A0 + slot.config.config_id * 16 + i).to_bytes(slot.config.server_id_length))]
                )
                for slot in slots
            },
            weight=1 + i % 2,
        )
        for i in range(count)
    )


class FakeBalancer:
    """What Operations promises, and what a real one does, as far as it shows: one change at a time, and overrides.

    `changes` are those that were made: who and what. `reload_errors` are what the next reload meets.
    """

    def __init__(self, *, seed: int = SEED) -> None:
        self.config = LbConfig(services=fleet())
        self.states = {
            "web": {"b3": BackendState.DRAINING, "b4": BackendState.DOWN},
            "video": dict.fromkeys(("b0", "b1", "b2"), BackendState.ACTIVE),
        }
        self.counters = Counters(flow_limit=100_000, socket_limit=20_000)
        for section in self.config.services:
            counted = self.counters.services.setdefault(section.service.name, ServiceCounters())
            counted.backends = {backend.name: BackendCounters() for backend in section.service.backends}
        self.activity = Activity()
        self.overrides = Overrides()
        self.generation = 1
        self.changes: list[tuple[str, str]] = []
        self.reload_errors: tuple[str, ...] = ()
        self.reloads = {"ok": 0, "refused": 0}
        self.now = 1000.0
        self.hold = asyncio.Event()  # while it is not set nothing is answered
        self.hold.set()
        self.waiting = 0  # who is kept from an answer
        self.called_on: set[asyncio.AbstractEventLoop] = set()
        self.let_go = threading.Event()
        self.snapshots = 0  # that were taken
        self.trouble: Exception | None = None  # that the next upgrade meets
        self._started_at = time.time() - 300
        self._reloaded_at = self._started_at
        self._random = random.Random(seed)
        self._lock = asyncio.Lock()
        self.tables = self._build()

    def tick(self, seconds: float = 1.0) -> None:
        """Time passes, and packets with it."""
        for name, counted in self.counters.services.items():
            table = self.tables[name]
            for verdict, rate in ((Verdict.CID, 900), (Verdict.FALLBACK, 40), (Verdict.TABLE_FLOW, 60)):
                counted.verdicts[verdict] += self._some(rate * seconds)
            counted.unroutable[Unroutable.CODEPOINT_7] += self._some(5 * seconds)
            slots = table.service.cid_slots
            for slot, rate in zip(slots, (100, 800, 0), strict=False):
                counted.config_ids[slot.config.config_id] += self._some(rate * seconds)
            counted.moves += self._some(6 * seconds)
            counted.rescued += self._some(4 * seconds)
            counted.verdicts[Verdict.RESET] += self._some(0.2 * seconds)
            for place, backend in enumerate(table.backends):
                sums = counted.backends[backend.name]
                to = self._some((1200 * table.shares[place] + 20 * (backend.name not in table.dead)) * seconds)
                sums.datagrams_to += to
                sums.octets_to += to * 90
                sums.datagrams_from += to * 4
                sums.octets_from += to * 4 * 1200
                sums.flows = int(2000 * table.shares[place]) + self._random.randrange(20)
        self.counters.flows = sum(b.flows for s in self.counters.services.values() for b in s.backends.values())
        self.counters.sockets = self.counters.flows // 4
        self.now += seconds
        self.activity.observe(self.counters, self.now)

    async def snapshot(self) -> Snapshot:
        await self._answering()
        self.snapshots += 1
        return Snapshot(
            config=self.config,
            counters=self.counters,
            health={name: self._health(name) for name in self.tables},
            tables=dict(self.tables),
            engine="udp",
            workers=2,
            started_at=self._started_at,
            now=self.now,
            reloads=dict(self.reloads),
            reloaded_at=self._reloaded_at,
            reload_errors=self.reload_errors,
            generation=self.generation,
            overrides=self.overrides,
            activity=self.activity.copy(),
            rotation={section.service.name: self._slots(section) for section in self.config.services},
            weights={
                name: {b.name: float(self._weights(name)[b.name]) for b in table.backends}
                for name, table in self.tables.items()
            },
        )

    async def change(
        self, service: str, backend: str, change: Change, *, who: str, generation: int | None = None
    ) -> int:
        async with self._changing(generation):
            if backend not in (self.tables[service].index if service in self.tables else ()):
                raise Refused("unknown", f"{service}, {backend}: there is no such backend")
            self.overrides = self.overrides.changed(service, backend, change)
            self.changes.append((who, f"{service}.{backend} {change}"))
        return self.generation

    async def reload(self, *, who: str, generation: int | None = None) -> tuple[str, ...]:
        async with self._changing(generation):
            if self.reload_errors:
                self.reloads["refused"] += 1
                raise ConfigErrors("lb.yaml", [ConfigError("", error) for error in self.reload_errors])
            self.reloads["ok"] += 1
            self._reloaded_at = time.time()
            self.changes.append((who, "reload"))
        return ("services.web.backends.b0.weight: 1 -> 2",)

    async def rotate(
        self, service: str, step: RotationStep, *, who: str, generation: int | None = None
    ) -> tuple[str, ...]:
        async with self._changing(generation):
            section = next((s for s in self.config.services if s.service.name == service), None)
            if section is None:
                raise Refused("unknown", f"{service}: there is no such service")
            if step.do == "prepare" and (step.config_id in section.phases and not step.force):
                raise Refused("conflict", f"config ID {step.config_id} is in use", "expected one that is free")
            if step.do != "prepare" and step.config_id not in section.phases:
                raise Refused("conflict", f"config ID {step.config_id} is free")
            self.changes.append((who, f"{service} {step.do} {step.config_id}"))
        return (f"services.{service}.cid-configs: {step.do}",)

    async def upgrade(self, *, who: str) -> int:
        await self._answering()
        if self.trouble is not None:
            raise self.trouble
        self.changes.append((who, "upgrade"))
        return 4242

    async def _answering(self) -> None:
        self.called_on.add(asyncio.get_running_loop())
        self.waiting += 1
        try:
            await self.hold.wait()
        finally:
            self.waiting -= 1

    @contextlib.asynccontextmanager
    async def _changing(self, generation: int | None) -> AsyncIterator[None]:
        async with self._lock:
            await self._answering()
            if generation is not None and generation != self.generation:
                raise Refused("stale", f"the generation is {self.generation}, and not {generation}")
            yield
            self.tables = self._build()
            self.generation += 1

    def _build(self) -> dict[str, RoutingTable]:
        tables = {}
        for section in self.config.services:
            service = section.service
            states = dict(self.states[service.name])
            for backend in service.backends:
                drain = self.overrides.of(service.name, backend.name).drain
                if drain is not None and states.get(backend.name) is not BackendState.DOWN:
                    states[backend.name] = BackendState.DRAINING if drain else BackendState.ACTIVE
            fenced = [b.name for b in service.backends if self.overrides.of(service.name, b.name).fence]
            tables[service.name] = RoutingTable.build(
                service, states, fenced=fenced, weights=self._weights(service.name)
            )
        return tables

    def _weights(self, name: str) -> dict[str, int]:
        service = next(s.service for s in self.config.services if s.service.name == name)
        said = {b.name: self.overrides.of(name, b.name).weight for b in service.backends}
        return {b.name: b.weight if (weight := said[b.name]) is None else weight for b in service.backends}

    def _health(self, name: str) -> dict[str, BackendHealth]:
        return {
            backend.name: BackendHealth(
                state=state,
                changes=int(state is BackendState.DOWN),
                round_trip=0.0004 + 0.0001 * place,
                since=self.now - 60 if state is BackendState.DOWN else None,
                reason="timeout" if state is BackendState.DOWN else "",
            )
            for place, (backend, state) in enumerate(
                zip(self.tables[name].backends, self.tables[name].states, strict=True)
            )
        }

    def _slots(self, section: ServiceConfig) -> dict[ConfigId, SlotView]:
        slots = {}
        for slot in section.service.cid_slots:
            config_id = slot.config.config_id
            phase, seen = section.phases[config_id], self.activity.config_id(section.service.name, config_id).last_seen
            slots[config_id] = SlotView(
                phase=phase,
                packets=self.counters.services[section.service.name].config_ids[config_id],
                last_packet=None if seen is None else self.now - seen,
                guard=300.0,
                free_in=300.0 if phase is Phase.RETIRING else None,
                may_be_freed=False,
                algorithm=slot.config.algorithm,
                key_age=None if slot.config.key is None else 86_400.0 * (1 + config_id),
            )
        return slots

    def _some(self, mean: float) -> int:
        return max(0, round(self._random.gauss(mean, mean / 10)))


class Running:
    """A fake balancer on an event loop of its own, and the real server in front of it."""

    def __init__(
        self,
        config: AdminConfig | None = None,
        *,
        addresses: Sequence[Path | Address] = (LOOPBACK,),
        metrics: Address | None = None,
        client_patience: float = CLIENT_PATIENCE,
        start: bool = True,
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fake balancer", daemon=True)
        self._thread.start()
        self.balancer = FakeBalancer()
        self.server = AdminServer(
            config or AdminConfig(),
            metrics,
            addresses,
            operations=self.balancer,
            loop=self.loop,
            client_patience=client_patience,
        )
        if start:
            try:
                self.start()
            except BaseException:
                self.stop()
                raise

    def start(self, patience: float = 0.0) -> None:
        asyncio.run_coroutine_threadsafe(self.server.start(patience=patience), self.loop).result(30)

    def stop(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop).result(30)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(30)
            self.loop.close()

    @property
    def address(self) -> Address:
        """The first TCP address."""
        return next(where for where in self.server.addresses if isinstance(where, Address))


@contextlib.contextmanager
def running(
    config: AdminConfig | None = None,
    *,
    addresses: Sequence[Path | Address] = (LOOPBACK,),
    metrics: Address | None = None,
    client_patience: float = CLIENT_PATIENCE,
) -> Iterator[Running]:
    """A server that runs for a while."""
    made = Running(config, addresses=addresses, metrics=metrics, client_patience=client_patience)
    try:
        yield made
    finally:
        made.stop()


async def _show(port: int) -> None:
    balancer = FakeBalancer()
    for _ in range(200):
        balancer.tick()
    with tempfile.TemporaryDirectory() as directory:
        addresses: list[Path | Address] = [Path(directory) / "admin.sock", Address("127.0.0.1", port)]
        server = AdminServer(AdminConfig(), None, addresses, operations=balancer, loop=asyncio.get_running_loop())
        await server.start()
        print("serving at", *server.addresses, flush=True)
        try:
            while True:
                await asyncio.sleep(1)
                balancer.tick()
        finally:
            await server.stop()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_show(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
