"""Fleet: what file, operator, health checks and network say about the backends, as tables."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from lb.config import ServiceConfig
from lb.health import HealthMonitor
from lb.log import event
from lb.overrides import Overrides
from lb.routing import BackendState, RoutingTable
from lb.slowstart import SlowStart, scaled

logger = logging.getLogger(__name__)

Unreachable = Mapping[tuple[str, str], str]  # service and backend to the reason


class Fleet:
    """The backends of all services. `tables` are those that were built last and that the engine took.

    What is said about the operator's overrides is in force with the next `build`.
    """

    def __init__(self, health: HealthMonitor, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.tables: dict[str, RoutingTable] = {}
        self.unreachable: Unreachable = {}
        self._health = health
        self._clock = clock
        self._slow_start = SlowStart()
        self._weights: dict[str, dict[str, float]] = {}  # of the tables that were built last
        self.weights: Mapping[str, Mapping[str, float]] = {}  # of those that the engine took: less while they rise
        self._due: float | None = None  # when somebody's share grows next

    async def build(self, services: Sequence[ServiceConfig], overrides: Overrides) -> dict[str, RoutingTable]:
        """Tables of what is known now. A new ring takes a while: not on the loop that moves packets."""
        loop, now = asyncio.get_running_loop(), self._clock()
        tables = {}
        for config in services:
            service, before = config.service, self.tables.get(config.service.name)
            fenced = frozenset(b.name for b in service.backends if overrides.of(service.name, b.name).fence)
            found = self._found(config)
            if before is not None and before.fail_open and BackendState.ACTIVE in found.values():
                # One backend is back, the others will be asked in a moment. Nobody is dead until they have been.
                self._health.doubt(service.name)
            states = _with_drains(found, _draining(config, overrides))
            self._note_rises(config, before, states, fenced, now)
            tables[service.name] = await loop.run_in_executor(
                None,
                _build,
                config,
                states,
                self._health.dead(service.name),
                fenced,
                self._weights_of(config, overrides, now),
            )
        self._due = self._slow_start.next_change(now)
        return tables

    def took(self, tables: Mapping[str, RoutingTable]) -> None:
        """The engine obeys these now."""
        before, self.tables = self.tables, dict(tables)
        self.weights = {name: dict(self._weights.get(name, {})) for name in tables}
        for name, table in tables.items():
            _say_if_failing_open(name, before.get(name), table)
            _say_if_nobody_is_left(name, before.get(name), table)

    def look_around(self, hosts: Iterable[tuple[str, str]], unreachable: Unreachable) -> None:
        """The engine was asked whom of these backends it cannot send to: they are DOWN, whatever they answer."""
        before, self.unreachable = self.unreachable, unreachable
        for (service, backend), reason in unreachable.items():
            if (service, backend) not in before:
                event(logger, logging.WARNING, "backend-unreachable", service=service, backend=backend, reason=reason)
        for service, backend in set(hosts) & before.keys() - unreachable.keys():
            event(logger, logging.INFO, "backend-reachable", service=service, backend=backend)

    def is_due(self) -> bool:
        """Whether time alone makes other tables than those that were built last."""
        return self._due is not None and self._due <= self._clock()

    def _found(self, config: ServiceConfig) -> dict[str, BackendState]:
        name = config.service.name
        lost = (backend for service, backend in self.unreachable if service == name)
        return self._health.states(name) | dict.fromkeys(lost, BackendState.DOWN)

    def _note_rises(
        self,
        config: ServiceConfig,
        before: RoutingTable | None,
        states: Mapping[str, BackendState],
        fenced: frozenset[str],
        now: float,
    ) -> None:
        """Whoever takes connections and did not before begins slowly. Nobody does when the balancer itself begins."""
        if before is None:
            return
        name = config.service.name
        for backend in config.service.backends:
            takes = backend.name not in fenced and states.get(backend.name) is not BackendState.DOWN
            takes = takes and states.get(backend.name) is not BackendState.DRAINING
            place = before.index.get(backend.name)
            took = place is not None and before.states[place] is BackendState.ACTIVE
            if takes and not took and config.health.slow_start:
                self._slow_start.rose(name, backend.name, now, config.health.slow_start)
            elif not takes:
                self._slow_start.forget(name, backend.name)

    def _weights_of(self, config: ServiceConfig, overrides: Overrides, now: float) -> Mapping[str, int]:
        name = config.service.name
        said = {b.name: overrides.of(name, b.name).weight for b in config.service.backends}
        weights = {b.name: b.weight if (weight := said[b.name]) is None else weight for b in config.service.backends}
        factors = {backend: self._slow_start.factor(name, backend, now) for backend in weights}
        self._weights[name] = {backend: weight * factors[backend] for backend, weight in weights.items()}
        return scaled(weights, factors)


def _build(
    config: ServiceConfig,
    states: Mapping[str, BackendState],
    dead: frozenset[str],
    fenced: frozenset[str],
    weights: Mapping[str, int],
) -> RoutingTable:
    return RoutingTable.build(config.service, states, dead, fenced=fenced, weights=weights)


def _draining(config: ServiceConfig, overrides: Overrides) -> frozenset[str]:
    """Whom the operator drains, or else the file."""
    name = config.service.name
    said = {b.name: overrides.of(name, b.name).drain for b in config.service.backends}
    return frozenset(b for b, drain in said.items() if (b in config.draining if drain is None else drain))


def _with_drains(states: Mapping[str, BackendState], draining: frozenset[str]) -> dict[str, BackendState]:
    """Health has the last word: a backend that is drained may still die."""
    drained = dict.fromkeys(draining, BackendState.DRAINING)  # those too that nobody has probed yet
    return drained | {
        name: drained.get(name, state) if state is BackendState.ACTIVE else state for name, state in states.items()
    }


def _say_if_failing_open(name: str, before: RoutingTable | None, table: RoutingTable) -> None:
    was_open = before is not None and before.fail_open
    if table.fail_open and not was_open:
        down = sum(state is BackendState.DOWN for state in table.states)
        event(
            logger,
            logging.ERROR,
            "fail-open",
            service=name,
            down=down,
            backends=len(table.states),
            meaning="so many backends fail their health checks that those are not believed; "
            "forwarding to all of them all the same, resets off",
        )
    elif was_open and not table.fail_open:
        event(logger, logging.INFO, "fail-open-over", service=name)


def _say_if_nobody_is_left(name: str, before: RoutingTable | None, table: RoutingTable) -> None:
    had_somebody = before is None or bool(before.ring)
    if had_somebody and not table.ring:
        meaning = "every backend is fenced, or has a weight of 0: nobody takes new connections, and they are dropped"
        event(logger, logging.ERROR, "no-backend", service=name, fenced=len(table.fenced), meaning=meaning)
    elif table.ring and not had_somebody:
        event(logger, logging.INFO, "no-backend-over", service=name)
