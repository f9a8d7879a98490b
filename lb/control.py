"""The running balancer: it starts an engine, tells it what health checks and the operator say, and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import uvloop

from lb import log
from lb.config import LbConfig, ServiceConfig, load_config, refuse_reload
from lb.engine import Counters
from lb.errors import ConfigErrors, QuicLbError
from lb.health import HealthMonitor
from lb.log import event
from lb.metrics import MetricsServer, Snapshot, XdpInfo
from lb.nat import UdpLimits
from lb.returnpath import ReturnPaths
from lb.router import RouterLimits
from lb.routing import BackendState, RoutingTable, Service
from lb.udp import UdpEngine
from lb.upstream import ServicePolicy
from lb.workers import WorkerPool, WorkerSettings

if TYPE_CHECKING:
    from lb.xdp.engine import XdpEngine
    from lb.xdp.plane import XdpSettings

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2

# Ours.
SPARE_DESCRIPTORS = 64  # for the event loop, metrics and files
PROBE_DESCRIPTORS = 6  # per backend, at most
APPLY_AGAIN = 1.0  # seconds from tables that the engine did not take to the next attempt
SNAPSHOT_PATIENCE = 2.0  # seconds that a scrape waits for the engine

logger = logging.getLogger(__name__)


def run(path: Path) -> int:
    """Balance as the configuration at `path` says until SIGTERM or SIGINT. Returns an exit status."""
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
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Balancer(path, config).run())
    except (OSError, QuicLbError) as error:
        event(logger, logging.ERROR, "failed", reason=_reason(error))
        return EXIT_FAILED
    return EXIT_OK


def missing(config: LbConfig) -> list[str]:
    """What this machine lacks for the engine that is configured; empty if it has everything."""
    if config.engine != "xdp":
        return []
    from lb.xdp import requirements  # noqa: PLC0415 - the udp engine needs no libbpf

    hosts = {backend.address.host for section in config.services for backend in section.service.backends}
    return requirements.missing(xdp_settings(config), hosts)


def xdp_settings(config: LbConfig) -> XdpSettings:
    """What the xdp engine is told once."""
    from lb.xdp.plane import XdpSettings  # noqa: PLC0415 - the udp engine needs no libbpf

    assert config.interface is not None  # noqa: S101 - lb.checks sees to it
    xdp, limits = config.xdp, config.limits
    return XdpSettings(
        interface=config.interface,
        forward=config.forward,
        attach=xdp.attach,
        pin_directory=xdp.pin_directory,
        source=xdp.source,
        nat_ports=xdp.nat_ports,
        constant_time=xdp.constant_time,
        flows=limits.flows,
        table_entries=limits.table_entries,
        idle_timeout=limits.idle_timeout,
        new_flow_timeout=limits.new_flow_timeout,
    )


class Balancer:
    """One balancer: the file it was configured from, an engine, health checks and metrics."""

    def __init__(self, path: Path, config: LbConfig) -> None:
        self._path = path
        self._config = config
        self._started_at = time.time()
        self._reloaded_at = self._started_at
        self._reloads = {"ok": 0, "refused": 0}
        self._stop = asyncio.Event()
        self._stale = asyncio.Event()
        self._changing = asyncio.Lock()
        self._tables: dict[str, RoutingTable] = {}
        self._unreachable: dict[tuple[str, str], str] = {}  # service and backend to the reason
        self._health = HealthMonitor(config.services, self._on_health)
        self._engine = self._make_engine()

    async def run(self) -> None:
        """Raises OSError if an address cannot be listened on."""
        loop = asyncio.get_running_loop()
        tables = await self._build(self._config.services)
        await self._engine.start(list(tables.values()))
        self._tables = tables
        metrics = None
        try:
            if self._config.admin is not None:
                metrics = MetricsServer(self._config.admin, functools.partial(self._snapshot, loop))
                metrics.start()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            self._health.start()
            refreshing = asyncio.create_task(self._keep_fresh())
            event(
                logger,
                logging.INFO,
                "started",
                config=self._path,
                engine=self._config.engine,
                **self._where(),
                listen=",".join(str(a) for s in self._config.services for a in s.service.listen),
            )
            await self._stop.wait()
            refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await refreshing
        finally:
            self._health.stop()
            if metrics is not None:
                metrics.stop()
            await self._engine.stop()
        event(logger, logging.INFO, "stopped", **self._what_stays())

    async def reload(self) -> bool:
        """Read the configuration again. Any mistake, and the one in force stays. Returns whether it was taken."""
        async with self._changing:
            loop = asyncio.get_running_loop()
            try:
                config = await loop.run_in_executor(None, load_config, self._path)
                refused = refuse_reload(self._config, config)
                if refused:
                    raise ConfigErrors("reload", refused)
                self._engine.set_policies(_policies(config))
                await self._apply(config.services)
            except (ConfigErrors, OSError) as error:
                self._engine.set_policies(_policies(self._config))
                self._reloads["refused"] += 1
                for reason in error.exceptions if isinstance(error, ConfigErrors) else (error,):
                    event(logger, logging.ERROR, "reload-refused", config=self._path, reason=_reason(reason))
                return False
            self._config = config
            self._health.update(config.services)
            self._reloads["ok"] += 1
            self._reloaded_at = time.time()
            event(logger, logging.INFO, "reloaded", config=self._path)
        self._stale.set()
        return True

    def _make_engine(self) -> UdpEngine | WorkerPool | XdpEngine:
        if self._config.engine == "xdp":
            from lb.xdp.engine import XdpEngine  # noqa: PLC0415 - the udp engine needs no libbpf

            return XdpEngine(
                xdp_settings(self._config),
                _policies(self._config),
                suspect=self._health.suspect,
                on_reachable=self._on_reachable,
            )
        limits = self._config.limits
        udp_limits = UdpLimits(
            flows=limits.flows,
            sockets=limits.sockets or _socket_limit(self._config),
            idle_timeout=limits.idle_timeout,
            new_flow_timeout=limits.new_flow_timeout,
            socket_buffer=limits.socket_buffer,
        )
        directory = self._config.runtime_directory or default_runtime_directory()
        return_paths = functools.partial(open_return_paths, directory, limits.flows)
        if self._config.workers > 1:
            settings = WorkerSettings(
                udp_limits, _policies(self._config), return_paths, self._config.log.format, self._config.log.level
            )
            return WorkerPool(self._config.workers, settings, suspect=self._health.suspect)
        return UdpEngine(
            udp_limits,
            _policies(self._config),
            suspect=self._health.suspect,
            return_paths=return_paths(0),
        )

    async def _apply(self, services: Sequence[ServiceConfig]) -> None:
        """Have the engine obey what configuration and health say now. Raises OSError, with nothing changed."""
        tables = await self._build(services)
        await self._engine.apply(list(tables.values()))
        before, self._tables = self._tables, tables
        for name, table in tables.items():
            _say_if_failing_open(name, before.get(name), table)

    async def _build(self, services: Sequence[ServiceConfig]) -> dict[str, RoutingTable]:
        """Tables from configuration and health. A new ring takes a while: not on the loop that moves packets."""
        await self._look_around(services)
        loop = asyncio.get_running_loop()
        tables = {}
        for config in services:
            service = config.service
            states, before = self._states(service), self._tables.get(service.name)
            if before is not None and before.fail_open and BackendState.ACTIVE in states.values():
                # One backend is back, the others will be asked in a moment. Nobody is dead until they have been.
                self._health.doubt(service.name)
            dead = self._health.dead(service.name)
            tables[service.name] = await loop.run_in_executor(
                None, RoutingTable.build, service, _with_drains(config, states), dead
            )
        return tables

    def _states(self, service: Service) -> dict[str, BackendState]:
        """What is known of backends: those that no packet can be sent to are DOWN, whatever they answer to probes."""
        out_of_reach = (name for known, name in self._unreachable if known == service.name)
        return self._health.states(service.name) | dict.fromkeys(out_of_reach, BackendState.DOWN)

    async def _look_around(self, services: Sequence[ServiceConfig]) -> None:
        """Ask the engine whom it cannot send to, newcomers among them: they are to be DOWN from the beginning."""
        if self._config.engine != "xdp":
            return
        hosts = {(s.service.name, b.name): b.address.host for s in services for b in s.service.backends}
        before, self._unreachable = self._unreachable, await cast("XdpEngine", self._engine).unreachable(hosts)
        for (service, backend), reason in self._unreachable.items():
            if (service, backend) not in before:
                event(logger, logging.WARNING, "backend-unreachable", service=service, backend=backend, reason=reason)
        for service, backend in hosts.keys() & before.keys() - self._unreachable.keys():
            event(logger, logging.INFO, "backend-reachable", service=service, backend=backend)

    def _on_reachable(self, _service: str, _backend: str, _is_reachable: bool) -> None:
        self._stale.set()

    def _on_health(self, _service: str) -> None:
        self._stale.set()

    def _on_hangup(self) -> None:
        task = asyncio.ensure_future(self.reload())
        task.add_done_callback(_raise)

    async def _keep_fresh(self) -> None:
        """Turn what the health checks say into tables, as often as they say something new."""
        while True:
            await self._stale.wait()
            self._stale.clear()
            try:
                async with self._changing:
                    await self._apply(self._config.services)
            except Exception:  # whatever it is, it must not be the last that the engine hears of the health checks
                logger.exception("the tables stay as they are, for now")
                self._stale.set()
                await asyncio.sleep(APPLY_AGAIN)

    def _snapshot(self, loop: asyncio.AbstractEventLoop) -> Snapshot:
        """For the metrics thread. Raises TimeoutError if the engine does not answer in time."""
        return asyncio.run_coroutine_threadsafe(self._collect(), loop).result(SNAPSHOT_PATIENCE)

    async def _collect(self) -> Snapshot:
        counters: Counters = await self._engine.counters()
        return Snapshot(
            counters=counters,
            health=self._health.snapshot(),
            tables=dict(self._tables),
            engine=self._config.engine,
            workers=self._config.workers,
            xdp=self._xdp_info(),
            started_at=self._started_at,
            reloads=dict(self._reloads),
            reloaded_at=self._reloaded_at,
        )

    def _xdp_info(self) -> XdpInfo | None:
        config = self._config
        if config.interface is None:
            return None
        return XdpInfo(config.interface, cast("XdpEngine", self._engine).attach_mode, config.forward.name.lower())

    def _where(self) -> dict[str, object]:
        """What the log says about the engine that was started."""
        info = self._xdp_info()
        return {"workers": self._config.workers} if info is None else info._asdict()

    def _what_stays(self) -> dict[str, object]:
        """What the log says about an engine that was stopped."""
        if self._config.engine != "xdp":
            return {}
        command = f"quiclb xdp detach --interface {self._config.interface}"
        return {"meaning": f"packets keep flowing, by the last tables; {command} ends that"}


def _say_if_failing_open(name: str, before: RoutingTable | None, table: RoutingTable) -> None:
    was_open = before is not None and before.fail_open
    if table.fail_open and not was_open:
        event(
            logger,
            logging.ERROR,
            "fail-open",
            service=name,
            meaning="every backend fails its health checks; forwarding to all of them all the same, resets off",
        )
    elif was_open and not table.fail_open:
        event(logger, logging.INFO, "fail-open-over", service=name)


def default_runtime_directory() -> Path:
    """Where files go that should survive the process but not the machine."""
    given = os.environ.get("RUNTIME_DIRECTORY")  # systemd's
    if given:
        return Path(given.partition(":")[0])
    if os.geteuid() == 0:
        return Path("/run/quiclb")
    user = os.environ.get("XDG_RUNTIME_DIR")
    return Path(user) / "quiclb" if user else Path(tempfile.gettempdir()) / f"quiclb-{os.geteuid()}"


def open_return_paths(directory: Path, flows: int, worker: int) -> ReturnPaths | None:
    """The return path file of one worker; None, and a word in the log, if there can be none."""
    try:
        return ReturnPaths(directory / f"flows-{worker}.map", flows)
    except OSError as error:
        event(
            logger,
            logging.WARNING,
            "no-return-paths",
            directory=directory,
            reason="in use by another quiclb" if isinstance(error, BlockingIOError) else _reason(error),
            meaning="flows of this process will not survive a crash",
        )
        return None


def _policies(config: LbConfig) -> dict[str, ServicePolicy]:
    limits = config.limits
    return {
        service.service.name: ServicePolicy(
            router=RouterLimits(
                table_entries=limits.table_entries,
                idle_timeout=limits.idle_timeout,
                new_flow_timeout=limits.new_flow_timeout,
                new_flows_rate=limits.new_flows_rate,
                reset_rate=service.resets.rate,
                reset_prefix_rate=service.resets.prefix_rate,
            ),
            push_rate=service.resets.push_rate if service.resets.push else 0,
            silence=service.health.silence,
        )
        for service in config.services
    }


def _with_drains(config: ServiceConfig, states: Mapping[str, BackendState]) -> dict[str, BackendState]:
    """Health has the last word: a backend that is drained may still die."""
    drained = dict.fromkeys(config.draining, BackendState.DRAINING)  # those too that nobody has probed yet
    return drained | {
        name: drained.get(name, state) if state is BackendState.ACTIVE else state for name, state in states.items()
    }


def _socket_limit(config: LbConfig) -> int:
    """As many sockets as the descriptor limit allows, raised to what we may raise it to."""
    spare = SPARE_DESCRIPTORS + sum(
        len(s.service.listen) + PROBE_DESCRIPTORS * len(s.service.backends) for s in config.services
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    unlimited = 1 << 20
    return max(1, (unlimited if soft == resource.RLIM_INFINITY else soft) - spare)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _raise(task: asyncio.Future[bool]) -> None:
    if not task.cancelled():
        task.result()
