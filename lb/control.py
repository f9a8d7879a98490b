"""The running balancer: it starts an engine, tells it what health checks and the operator say, and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import uvloop

from lb import log, rewrite, systemd, upgrade, watching
from lb.activity import INTERVAL, Activity
from lb.admin.server import AdminServer
from lb.changes import changes
from lb.config import LbConfig, ServiceConfig, load_config, refuse_reload
from lb.describe import describe
from lb.engine import Counters
from lb.engines import make_engine, missing, missing_for_probes, policies
from lb.errors import ConfigError, ConfigErrors, QuicLbError
from lb.fleet import Fleet
from lb.health import HealthMonitor
from lb.log import event
from lb.operations import Refused, RotationStep
from lb.overrides import MAX_WEIGHT, Change
from lb.places import DOWN, OVERRIDES, admin_addresses, runtime_directory
from lb.rotation import Rotation
from lb.routing import BackendState, RoutingTable
from lb.runtimefile import Place, read_down, read_overrides, write_down, write_overrides
from lb.snapshot import Snapshot, XdpInfo

if TYPE_CHECKING:
    from lb.engines import Running
    from lb.xdp.engine import XdpEngine

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2

# Ours.
APPLY_AGAIN = 1.0  # seconds from tables that the engine did not take to the next attempt
SNAPSHOT_PATIENCE = 2.0  # seconds that the engine may take to tell its counters

logger = logging.getLogger(__name__)


def run(path: Path, *, watch: bool = False, take_over: bool = False) -> int:
    """Balance as the configuration at `path` says until SIGTERM or SIGINT. Returns an exit status.

    With `watch` the file is read again whenever it changes. With `take_over` whatever the balancer of the same
    runtime directory has is taken over from it, and it ends.
    """
    try:
        config = load_config(path)
    except ConfigErrors as errors:
        for error in errors.exceptions:
            print(error, file=sys.stderr)
        return EXIT_CONFIG
    log.configure(config.log.format, config.log.level)
    lacks = missing(config)
    for reason in lacks:
        event(logger, logging.ERROR, "unavailable", engine=config.engine, reason=reason)
    if lacks:
        return EXIT_FAILED
    # Whoever asks for a reload before there is anything to reload is to wait, and not to end us.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR2})
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Balancer(path, config, watch=watch, take_over=take_over).run())
    except (OSError, QuicLbError) as error:
        event(logger, logging.ERROR, "failed", reason=_reason(error))
        return EXIT_FAILED
    return EXIT_OK


class Balancer:
    """One balancer: the file it was configured from, an engine, health checks, and whoever asks about them.

    It is the `Operations` of the API.
    """

    def __init__(self, path: Path, config: LbConfig, *, watch: bool = False, take_over: bool = False) -> None:
        self._path = path
        self._config = config
        self._watch = watch
        self._as_read = watching.signature(self._files()) if watch else None
        self._directory = runtime_directory(config)
        self._started_at = time.time()
        self._reloaded_at = self._started_at
        self._reloads = {"ok": 0, "refused": 0}
        self._reload_errors: tuple[str, ...] = ()
        # Hardly the number that the process before had: somebody may hold that.
        self._generation = 100 + secrets.randbelow(900)
        self._stop = asyncio.Event()
        self._is_upgrading = self._has_handed_over = False
        self._asked: set[asyncio.Future[None]] = set()  # by signals, and not done yet
        self._stale = asyncio.Event()
        self._changing = asyncio.Lock()
        self._overrides = read_overrides(self._directory / OVERRIDES).only(_names(config))
        self._activity = Activity()
        self._rotation = Rotation(config.services, time.monotonic(), rewrite.key_age)
        self._health = HealthMonitor(config.services, self._on_health)
        self._fleet = Fleet(self._health)
        self._down = read_down(self._directory / DOWN)  # as the file has it
        for service, backend, _ in self._down & _places(config):
            self._health.begin_down(service, backend)
        self._engine = self._new_engine(take_over=take_over)
        self._admin: AdminServer | None = None

    async def run(self) -> None:
        """Raises OSError if an address cannot be listened on."""
        tables = await self._build(self._config.services)
        await self._engine.start(list(tables.values()))
        self._fleet.took(tables)
        try:
            await self._serve()
        finally:
            if not self._has_handed_over:  # whoever manages us would take the successor to be stopping too
                systemd.notify("STOPPING=1")
            self._health.stop()
            if self._admin is not None:
                await self._admin.stop()
            await self._engine.stop()
        event(logger, logging.INFO, "stopped", **self._what_stays())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        addresses = admin_addresses(self._config)
        self._admin = AdminServer(self._config.admin, self._config.metrics, addresses, operations=self, loop=loop)
        await self._admin.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._in_background, "SIGHUP", self.reload)
        loop.add_signal_handler(signal.SIGUSR2, self._in_background, "SIGUSR2", self.upgrade)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP, signal.SIGUSR2})
        self._health.start()
        event(
            logger,
            logging.INFO,
            "started",
            config=self._path,
            engine=self._config.engine,
            **self._where(),
            listen=",".join(str(a) for s in self._config.services for a in s.service.listen),
        )
        systemd.notify("READY=1", f"MAINPID={os.getpid()}")
        upgrade.say_ready()
        chores = [self._keep_fresh(), self._keep_counting(), systemd.keep_watchdog_fed()]
        if self._watch:
            reload = functools.partial(self._reload_quietly, "watch")
            chores.append(watching.watch(self._files, reload, known=self._as_read))
        async with _background(*chores):
            await self._stop.wait()

    # Operations.

    async def snapshot(self) -> Snapshot:
        async with asyncio.timeout(SNAPSHOT_PATIENCE):
            counters: Counters = await self._engine.counters()
        now = time.monotonic()
        return Snapshot(
            config=self._config,
            counters=counters,
            health=self._health.snapshot(),
            tables=dict(self._fleet.tables),
            engine=self._config.engine,
            workers=self._config.workers,
            started_at=self._started_at,
            now=now,
            reloads=dict(self._reloads),
            reloaded_at=self._reloaded_at,
            reload_errors=self._reload_errors,
            generation=self._generation,
            overrides=self._overrides,
            activity=self._activity.copy(),
            rotation=self._rotation.views(now),
            weights={service: dict(weights) for service, weights in self._fleet.weights.items()},
            xdp=self._xdp_info(),
        )

    async def change(
        self, service: str, backend: str, change: Change, *, who: str, generation: int | None = None
    ) -> int:
        async with self._only_one(generation):
            self._refuse_change(service, backend, change)
            before, self._overrides = self._overrides, self._overrides.changed(service, backend, change)
            if self._overrides != before:
                try:
                    await self._apply(self._config.services)
                except OSError as error:
                    self._overrides = before
                    raise Refused("failed", _reason(error)) from error
                self._generation += 1
                await self._keep_overrides()
            event(logger, logging.WARNING, "changed", who=who, service=service, backend=backend, **change)
            return self._generation

    async def reload(self, *, who: str, generation: int | None = None) -> tuple[str, ...]:
        async with self._only_one(generation):
            return await self._reload(who)

    async def rotate(
        self, service: str, step: RotationStep, *, who: str, generation: int | None = None
    ) -> tuple[str, ...]:
        async with self._only_one(generation):
            await self._count_now()
            views = self._rotation.views(time.monotonic())
            loop = asyncio.get_running_loop()
            said = await loop.run_in_executor(None, rewrite.rotate, self._path, service, step, views.get(service, {}))
            event(
                logger, logging.WARNING, "changed", who=who, service=service, rotation=step.do, config_id=step.config_id
            )
            try:
                return (*said, *await self._reload(who, force=step.force))
            except (ConfigErrors, OSError) as error:
                reason = "the file has this step now, but the balancer did not take it"
                raise Refused("failed", reason, *self._reload_errors) from error

    async def upgrade(self, *, who: str) -> int:
        async with self._only_one(None):
            event(logger, logging.WARNING, "changed", who=who, upgrade=True)
            systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                return await self._hand_over()
            except Exception as error:
                systemd.notify("READY=1")
                event(logger, logging.ERROR, "upgrade-failed", reason=_reason(error))
                raise Refused("failed", _reason(error)) from error

    # Changing.

    @asynccontextmanager
    async def _only_one(self, generation: int | None) -> AsyncIterator[None]:
        """One change at a time, and none by those who have not seen the latest."""
        async with self._changing:
            if self._has_handed_over:
                raise Refused("failed", "another process has taken over from this one: ask again")
            if generation is not None and generation != self._generation:
                reason = f"generation {generation}: it is {self._generation} by now: look again"
                raise Refused("stale", reason)
            yield

    async def _reload(self, who: str, *, force: bool = False) -> tuple[str, ...]:
        """Read the configuration again. Raises ConfigErrors or OSError, and then the one in force stays."""
        loop = asyncio.get_running_loop()
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        before, overrides = self._config, self._overrides
        try:
            config = await loop.run_in_executor(None, load_config, self._path)
            await self._count_now()
            refused = refuse_reload(before, config)
            lack = await loop.run_in_executor(None, missing_for_probes, config)
            refused += [ConfigError("services[].health.probe", lack)] if lack is not None else []
            refused += [] if force else self._rotation.refuse(config.services, time.monotonic())
            if refused:
                raise ConfigErrors("reload", refused)
            self._engine.set_policies(policies(config))
            self._overrides = overrides.only(_names(config))
            await self._apply(config.services)
        except (ConfigErrors, OSError) as error:
            self._engine.set_policies(policies(before))
            self._overrides = overrides
            self._reloads["refused"] += 1
            reasons = error.exceptions if isinstance(error, ConfigErrors) else (error,)
            self._reload_errors = tuple(_reason(reason) for reason in reasons)
            for reason in self._reload_errors:
                event(logger, logging.ERROR, "reload-refused", who=who, config=self._path, reason=reason)
            raise
        finally:
            systemd.notify("READY=1")
        self._config = config
        self._health.update(config.services)
        self._rotation.adopt(config.services, time.monotonic())
        self._reloads["ok"] += 1
        self._reload_errors = ()
        self._reloaded_at = time.time()
        self._generation += 1
        if self._overrides != overrides:
            await self._keep_overrides()
        said = await loop.run_in_executor(None, lambda: changes(describe(before), describe(config)))
        event(logger, logging.INFO, "reloaded", who=who, config=self._path, changes=len(said))
        self._stale.set()
        return said

    async def _reload_quietly(self, who: str) -> None:
        try:
            await self.reload(who=who)
        except (ConfigErrors, OSError, Refused):
            pass  # logged already, and metrics say so
        except Exception:  # whatever it is, it must not be the last time that somebody looks
            logger.exception("%s", who)

    def _refuse_change(self, service: str, backend: str, change: Change) -> None:
        section = next((s for s in self._config.services if s.service.name == service), None)
        if section is None:
            raise Refused("unknown", f"{service}: expected a service")
        if backend not in (b.name for b in section.service.backends):
            raise Refused("unknown", f"{backend}: expected a backend of {service}")
        weight = change.get("weight")
        if weight is not None and not 0 <= weight <= MAX_WEIGHT:
            raise Refused("invalid", f"weight: {weight}: expected 0 to {MAX_WEIGHT}")
        said = self._overrides.changed(service, backend, change)
        weights = (
            w if (w := said.of(service, b.name).weight) is not None else b.weight for b in section.service.backends
        )
        if not any(weights):
            raise Refused("conflict", f"every weight of {service} would be 0: nobody would take new connections")

    async def _keep_overrides(self) -> None:
        """What the operator said outlives the process. If it cannot, it is in force all the same."""
        path = self._directory / OVERRIDES
        try:
            await asyncio.get_running_loop().run_in_executor(None, write_overrides, path, self._overrides)
        except OSError as error:
            event(
                logger,
                logging.ERROR,
                "overrides-not-kept",
                file=path,
                reason=_reason(error),
                meaning="what was changed is in force, and forgotten with this process",
            )

    async def _keep_down(self, services: Sequence[ServiceConfig]) -> None:
        """Who is DOWN is known to the next process at its first datagram, and not some probes later."""
        down = frozenset(
            (s.service.name, b.name, str(b.address))
            for s, states in ((s, self._health.states(s.service.name)) for s in services)
            for b in s.service.backends
            if states.get(b.name) is BackendState.DOWN
        )
        if down == self._down:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(None, write_down, self._directory / DOWN, down)
            self._down = down
        except OSError as error:  # the next process will find out by itself
            event(logger, logging.WARNING, "down-not-kept", file=self._directory / DOWN, reason=_reason(error))

    async def _hand_over(self) -> int:
        """Start a successor, and end once it has everything. Raises OSError if it did not come about."""
        assert self._admin is not None  # noqa: S101 - changes are asked for while it runs
        self._is_upgrading = True
        if self._config.engine == "xdp":
            await self._engine.stop()  # the program stays, and with it all flows
        await self._admin.release()
        try:
            successor = await upgrade.start_successor(self._path, watch=self._watch)
        except Exception:
            self._is_upgrading = False
            try:
                if self._config.engine == "xdp":
                    self._engine = self._new_engine()
                    await self._engine.start(list(self._fleet.tables.values()))
                await self._admin.start()
            except (OSError, QuicLbError) as error:  # there is no way back: whoever manages us will start us again
                event(logger, logging.ERROR, "failed", reason=_reason(error))
                self._stop.set()
            raise
        event(logger, logging.INFO, "handed-over", successor=successor)
        systemd.notify(f"MAINPID={successor}", "READY=1")
        self._has_handed_over = True
        self._stop.set()
        return successor

    def _on_handed_over(self) -> None:
        """A successor has the sockets: nothing comes here any more."""
        if not self._is_upgrading:  # by somebody's hand; otherwise it will say when it is ready
            self._has_handed_over = True
            self._stop.set()

    # Tables.

    async def _apply(self, services: tuple[ServiceConfig, ...]) -> None:
        """Have the engine obey what configuration, operator and health say now. Raises OSError: nothing has changed."""
        tables = await self._build(services)
        await self._engine.apply(list(tables.values()))
        self._fleet.took(tables)
        await self._keep_down(services)

    async def _build(self, services: tuple[ServiceConfig, ...]) -> dict[str, RoutingTable]:
        if self._config.engine == "xdp":
            hosts = {(s.service.name, b.name): b.address.host for s in services for b in s.service.backends}
            self._fleet.look_around(hosts, await self._xdp_engine.unreachable(hosts))
        return await self._fleet.build(services, self._overrides)

    def _new_engine(self, *, take_over: bool = False) -> Running:
        return make_engine(
            self._config,
            self._directory,
            suspect=self._health.suspect,
            on_reachable=self._on_reachable,
            take_over=take_over,
            on_handed_over=self._on_handed_over,
        )

    def _on_reachable(self, _service: str, _backend: str, _is_reachable: bool) -> None:
        self._stale.set()

    def _on_health(self, _service: str) -> None:
        self._stale.set()

    def _in_background(self, who: str, do: Callable[..., Coroutine[None, None, object]]) -> None:
        """What a signal asks for. Whoever sent it hears of what went wrong in the log."""

        async def call() -> None:
            try:
                await do(who=who)
            except (ConfigErrors, OSError, Refused):
                pass  # logged where it happened
            except Exception:  # a signal must not end a balancer
                logger.exception("%s", who)

        task = asyncio.ensure_future(call())
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    # Chores.

    async def _keep_fresh(self) -> None:
        """Turn what the health checks say into tables, as often as they say something new."""
        while True:
            await self._stale.wait()
            self._stale.clear()
            try:
                async with self._changing:
                    if not self._has_handed_over:
                        await self._apply(self._config.services)
            except Exception:  # whatever it is, it must not be the last that the engine hears of the health checks
                logger.exception("the tables stay as they are, for now")
                self._stale.set()
                await asyncio.sleep(APPLY_AGAIN)

    async def _keep_counting(self) -> None:
        """Look at the counters, and at what time alone changes, every INTERVAL."""
        while True:
            try:
                if not self._is_upgrading:
                    await self._count()
            except Exception:  # an engine that does not answer now may do so in a moment
                logger.exception("the counters were not to be had")
            await asyncio.sleep(INTERVAL)

    async def _count(self) -> None:
        async with asyncio.timeout(SNAPSHOT_PATIENCE):
            counters = await self._engine.counters()
        self._activity.observe(counters, time.monotonic())
        self._note_config_ids(counters)
        if self._fleet.is_due():
            self._stale.set()

    async def _count_now(self) -> None:
        """Not even the last second's packets are to be missed when it is asked whether a config ID is in use."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SNAPSHOT_PATIENCE):
                self._note_config_ids(await self._engine.counters())

    def _note_config_ids(self, counters: Counters) -> None:
        counts = {name: service.config_ids for name, service in counters.services.items()}
        self._rotation.observe(counts, time.monotonic())

    def _files(self) -> list[Path]:
        """The files that the configuration was read from."""
        admin = self._config.admin
        keys = (path for s in self._config.services for path in (*s.key_files.values(), *s.reset_key_files.values()))
        tokens = (path for path in (admin.read_token_file, admin.write_token_file) if path is not None)
        return [self._path, *keys, *tokens]

    # What is said about the engine.

    @property
    def _xdp_engine(self) -> XdpEngine:
        return cast("XdpEngine", self._engine)

    def _xdp_info(self) -> XdpInfo | None:
        config = self._config
        if config.interface is None:
            return None
        return XdpInfo(config.interface, self._xdp_engine.attach_mode, config.forward.name.lower())

    def _where(self) -> dict[str, object]:
        """What the log says about the engine that was started."""
        info = self._xdp_info()
        return {"workers": self._config.workers} if info is None else info._asdict()

    def _what_stays(self) -> dict[str, object]:
        """What the log says about an engine that was stopped."""
        if self._config.engine != "xdp" or self._has_handed_over:
            return {}
        command = f"quiclb xdp detach --interface {self._config.interface}"
        return {"meaning": f"packets keep flowing, by the last tables; {command} ends that"}


@asynccontextmanager
async def _background(*chores: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Do chores until the end of the block."""
    tasks = [asyncio.create_task(chore) for chore in chores]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _places(config: LbConfig) -> frozenset[Place]:
    return frozenset((s.service.name, b.name, str(b.address)) for s in config.services for b in s.service.backends)


def _names(config: LbConfig) -> set[tuple[str, str]]:
    return {(s.service.name, b.name) for s in config.services for b in s.service.backends}


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
