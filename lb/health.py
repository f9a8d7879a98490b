"""HealthMonitor: asks the backends whether they live, and reports to a `HealthCheck` each."""

from __future__ import annotations

import asyncio
import logging
import random as random_module
import time
from collections.abc import Callable, Sequence

from lb.address import Address
from lb.config import HealthConfig, Probe, ServiceConfig
from lb.healthcheck import BackendHealth, HealthCheck, HealthSnapshot
from lb.log import event
from lb.negotiation import NegotiationProbes
from lb.probing import Probes, Surroundings
from lb.routing import BackendState

logger = logging.getLogger(__name__)


class HealthMonitor:
    """Probes the backends of all services. To be used from its event loop only.

    `on_change(service)` is called when `states` or `dead` would answer otherwise than before, not for what
    `update` does. `random` should be unpredictable: whoever guesses a probe's CIDs can answer in its place.
    """

    def __init__(
        self,
        services: Sequence[ServiceConfig],
        on_change: Callable[[str], None],
        *,
        random: random_module.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_change = on_change
        self._random = random or random_module.SystemRandom()
        self._clock = clock
        self._probers: dict[str, dict[str, _Prober | None]] = {}
        self._running = False
        self.update(services)

    def start(self) -> None:
        """Begin to probe. Raises RuntimeError outside an event loop."""
        asyncio.get_running_loop()
        self._running = True
        for prober in self._all():
            prober.start()

    def stop(self) -> None:
        """Probe no more, and close every socket. States stay readable."""
        self._running = False
        for prober in self._all():
            prober.stop()

    def update(self, services: Sequence[ServiceConfig]) -> None:
        """Take over a new configuration. Backends that keep name and address keep their state."""
        old = self._probers
        new: dict[str, dict[str, _Prober | None]] = {}
        kept: set[_Prober] = set()
        for config in services:
            probers = new.setdefault(config.service.name, {})
            known = old.get(config.service.name, {})
            for backend in config.service.backends:
                prober = None
                if config.health.probe is not Probe.NONE:
                    prober = known.get(backend.name)
                    if prober is not None and prober.address == backend.address:
                        kept.add(prober)
                        prober.reconfigure(config.health, config.resets.hold_off)
                    else:
                        prober = self._prober(config, backend.name, backend.address)
                probers[backend.name] = prober
        gone = [prober for prober in self._all() if prober not in kept]
        self._probers = new
        for prober in gone:
            prober.stop()

    def begin_down(self, service: str, backend: str) -> None:
        """A backend was DOWN when a process before this one looked: it is until it answers. To be called at first."""
        prober = self._probers.get(service, {}).get(backend)
        if prober is not None:
            prober.begin_down()

    def suspect(self, service: str, backend: str) -> None:
        """Look at a backend more closely for a moment. Names that are not (or no longer) known are ignored."""
        prober = self._probers.get(service, {}).get(backend)
        if prober is not None:
            prober.suspect()

    def doubt(self, service: str) -> None:
        """Begin the hold-offs of a service anew: what all of its backends failed at may have been our doing."""
        for prober in self._probers.get(service, {}).values():
            if prober is not None:
                prober.doubt()

    def states(self, service: str) -> dict[str, BackendState]:
        """ACTIVE or DOWN for every backend of a service, by name; empty for a service that is not known (yet)."""
        probers = self._probers.get(service, {})
        return {name: p.check.state if p else BackendState.ACTIVE for name, p in probers.items()}

    def dead(self, service: str) -> frozenset[str]:
        """The backends that have been DOWN, and silent, for as long as the hold-off."""
        return frozenset(name for name, p in self._probers.get(service, {}).items() if p and p.check.dead)

    def snapshot(self) -> HealthSnapshot:
        """Everything that is counted. Cheap enough for every scrape."""
        return {
            service: {name: p.snapshot() if p else BackendHealth() for name, p in probers.items()}
            for service, probers in self._probers.items()
        }

    def _all(self) -> list[_Prober]:
        return [p for probers in self._probers.values() for p in probers.values() if p is not None]

    def _prober(self, config: ServiceConfig, backend: str, address: Address) -> _Prober:
        # The backends of a fleet are not all asked at the same moment, nor by all balancers.
        start = self._clock() + self._random.random() * config.health.interval * config.health.jitter
        check = HealthCheck(config.health, config.resets.hold_off, start=start, random=self._random.random)
        service = config.service.name
        prober = _Prober(
            service, backend, address, check, lambda: self._on_change(service), self._random.randbytes, self._clock
        )
        if self._running:
            prober.start()
        return prober


class _Prober:
    """One backend's check, its timer and its probes."""

    def __init__(
        self,
        service: str,
        backend: str,
        address: Address,
        check: HealthCheck,
        on_change: Callable[[], None],
        random: Callable[[int], bytes],
        clock: Callable[[], float],
    ) -> None:
        self.address = address
        self.check = check
        self._names = {"service": service, "backend": backend}
        self._on_change = on_change
        self._random = random
        self._clock = clock
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._probes = self._make_probes()
        self._told = (check.state, check.dead)

    def start(self) -> None:
        self._running = True
        self._arm()

    def stop(self) -> None:
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        self._probes.close()

    def reconfigure(self, config: HealthConfig, hold_off: float) -> None:
        """Keeps the state, also if another question is asked from now on."""
        is_other = config.probe is not self.check.config.probe
        self.check.reconfigure(config, hold_off, self._clock())
        if is_other:
            old, self._probes = self._probes, self._make_probes()
            self._probes.ignored = old.ignored
            old.close()
        self._arm()

    def suspect(self) -> None:
        if self.check.suspect(self._clock()):
            event(logger, logging.DEBUG, "backend-suspect", **self._names)
        self._arm()

    def begin_down(self) -> None:
        self.check.begin_down(self._clock())
        self._told = (self.check.state, self.check.dead)

    def doubt(self) -> None:
        self.check.doubt(self._clock())
        self._told = (self.check.state, self.check.dead)
        self._arm()

    def snapshot(self) -> BackendHealth:
        check = self.check
        return BackendHealth(
            state=check.state,
            dead=check.dead,
            changes=check.changes,
            results=dict(check.results),
            ignored=self._probes.ignored,
            round_trip=self._probes.round_trip,
            since=check.since,
            reason=check.reason,
        )

    def _make_probes(self) -> Probes:
        kind: type[Probes] = NegotiationProbes
        if self.check.config.probe is Probe.HTTP3:
            from lb.http3 import Http3Probes  # noqa: PLC0415 - aioquic need not be there, and takes a while to import

            kind = Http3Probes
        return kind(self.address, self.check, Surroundings(self._settle, self._random, self._clock, self._names))

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            delay = max(0.0, self.check.wakeup() - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        try:
            self._probes.listen()
            now = self._clock()
            self._probes.retire(now)
            for probe in self.check.overdue(now):
                self._probes.expire(probe, now)
            asked = self.check.poll(now)
            if asked is not None:
                self._probes.send(asked, now)
        finally:  # whatever a probe fails at, it must not be the last one
            self._settle()

    def _settle(self) -> None:
        """Look ahead, then tell of what has changed: whoever is told may raise, or stop us."""
        self._arm()
        (was, was_dead), (state, dead) = self._told, (self.check.state, self.check.dead)
        if (was, was_dead) == (state, dead):
            return
        self._told = (state, dead)
        if was is not state:
            if state is BackendState.DOWN:
                event(logger, logging.WARNING, "backend-down", **self._names, reason=self.check.reason)
            else:
                event(logger, logging.INFO, "backend-up", **self._names)
        if dead:
            event(logger, logging.WARNING, "backend-dead", **self._names, hold_off=self.check.hold_off)
        elif was_dead and state is BackendState.DOWN:
            event(logger, logging.INFO, "backend-answering", **self._names)
        self._on_change()
