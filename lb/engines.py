"""Which engine a configuration means, what the machine lacks for it, and what it is told."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lb import systemd
from lb.address import Address
from lb.config import LbConfig, Probe
from lb.engine import Suspect
from lb.log import event
from lb.nat import UdpLimits
from lb.places import admin_addresses
from lb.returnpath import ReturnPaths
from lb.router import RouterLimits
from lb.udp import UdpEngine
from lb.upstream import ServicePolicy
from lb.workers import WorkerPool, WorkerSettings, make_worker

if TYPE_CHECKING:
    from lb.xdp.engine import XdpEngine
    from lb.xdp.plane import XdpSettings

    Running = UdpEngine | WorkerPool | XdpEngine

# Ours.
SPARE_DESCRIPTORS = 96  # for the event loop, metrics and files
ADMIN_DESCRIPTORS = 33  # per address of the API, at most
PROBE_DESCRIPTORS = 6  # per backend, at most

logger = logging.getLogger(__name__)


def missing_for_probes(config: LbConfig) -> str | None:
    """What this machine lacks for the probes that are configured; None if it has everything."""
    if all(section.health.probe is not Probe.HTTP3 for section in config.services):
        return None
    from lb import http3  # noqa: PLC0415 - takes 0.1 s and 15 MB that only this probe needs

    return http3.missing()


def missing(config: LbConfig) -> list[str]:
    """What this machine lacks for what is configured; empty if it has everything."""
    lack = missing_for_probes(config)
    lacks = [lack] if lack is not None else []
    if config.engine == "xdp":
        from lb.xdp import requirements  # noqa: PLC0415 - the udp engine needs no libbpf

        hosts = {backend.address.host for section in config.services for backend in section.service.backends}
        lacks += requirements.missing(xdp_settings(config), hosts)
    return lacks


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


def make_engine(
    config: LbConfig,
    directory: Path,
    *,
    suspect: Suspect,
    on_reachable: Callable[[str, str, bool], None],
    take_over: bool,
    on_handed_over: Callable[[], None],
) -> Running:
    """The engine of a configuration, which keeps its files in `directory`.

    With `take_over` it begins with what the engine of another process has, which calls its `on_handed_over` then.
    """
    if config.engine == "xdp":
        from lb.xdp.engine import XdpEngine  # noqa: PLC0415 - the udp engine needs no libbpf

        return XdpEngine(xdp_settings(config), policies(config), suspect=suspect, on_reachable=on_reachable)
    limits = config.limits
    udp_limits = UdpLimits(
        flows=limits.flows,
        sockets=limits.sockets or _socket_limit(config),
        idle_timeout=limits.idle_timeout,
        new_flow_timeout=limits.new_flow_timeout,
        socket_buffer=limits.socket_buffer,
    )
    settings = WorkerSettings(
        udp_limits,
        policies(config),
        directory,
        config.workers,
        config.log.format,
        config.log.level,
        log_flows=config.log.flows,
        take_over=take_over,
        return_paths=open_return_paths,
    )
    inherited = systemd.inherited()
    if config.workers > 1:
        return WorkerPool(settings, suspect=suspect, on_handed_over=on_handed_over, inherited=inherited)
    return make_worker(settings, 0, suspect=suspect, on_handed_over=on_handed_over, inherited=inherited, keep=_keep)


def _keep(address: Address, descriptor: int | None) -> None:
    """Have the service manager keep a listening socket: should we be killed, datagrams wait in it."""
    name = f"udp-{address.host.replace(':', '.')}-{address.port}"  # colons separate names
    if descriptor is None:
        systemd.unstore(name)
    else:
        systemd.store(name, descriptor)


def open_return_paths(
    directory: Path, flows: int, worker: int, workers: int = 1, lock: int | None = None
) -> ReturnPaths | None:
    """The return path file of one worker of so many; None, and a word in the log, if there can be none.

    Raises OSError if another process has it: that one balances, and would have to share its clients with us. What
    processes left whose numbers nobody has any more is remembered too, each by one worker.
    """
    found = ((path, re.fullmatch(r"flows-(\d{1,6})\.map", path.name)) for path in directory.glob("flows-*.map"))
    numbered = ((path, int(match[1])) for path, match in found if match)
    orphans = sorted(path for path, number in numbered if number >= workers and number % workers == worker)
    try:
        return ReturnPaths(directory / f"flows-{worker}.map", flows, orphans=orphans, lock=lock)
    except BlockingIOError:
        reason = "in use by another quiclb: `quiclb upgrade` replaces it; two of them need two runtime directories"
        raise OSError(errno.EBUSY, f"{directory}: {reason}") from None
    except OSError as error:
        event(
            logger,
            logging.WARNING,
            "no-return-paths",
            directory=directory,
            reason=error.strerror or str(error),
            meaning="flows of this process will not survive a crash",
        )
        return None


def policies(config: LbConfig) -> dict[str, ServicePolicy]:
    """What an engine must know about each service beyond its table."""
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


def _socket_limit(config: LbConfig) -> int:
    """As many sockets as the descriptor limit allows, raised to what we may raise it to."""
    spare = SPARE_DESCRIPTORS + ADMIN_DESCRIPTORS * len(admin_addresses(config))
    spare += sum(len(s.service.listen) + PROBE_DESCRIPTORS * len(s.service.backends) for s in config.services)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    unlimited = 1 << 20
    return max(1, (unlimited if soft == resource.RLIM_INFINITY else soft) - spare)
