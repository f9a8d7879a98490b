"""Metrics: what the engine, the health checks and the control loop count, as Prometheus sees it.

Everything is collected at the scrape. Label values are names from the configuration and from our enums, never from
the network, so that nobody outside can make the number of time series grow.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from lb.cid import CONFIG_IDS
from lb.engine import Counters, ServiceCounters
from lb.healthcheck import HealthSnapshot
from lb.router import Verdict
from lb.routing import RoutingTable, Unroutable
from lb.snapshot import Snapshot, XdpInfo

STATES = ("active", "draining", "down", "dead", "fenced")
PHASES = ("prepared", "active", "retiring", "free")
OVERRIDES = ("drain", "weight", "fence")


def scrape(now: Snapshot, accept: str = "") -> tuple[bytes, str]:
    """The answer to a scrape and its content type, in the format that the `Accept` header asks for."""
    registry = CollectorRegistry()
    registry.register(BalancerCollector(now, time.time()))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class BalancerCollector(Collector):
    """Turns a snapshot into metrics. It was taken `at` that many seconds since 1970."""

    def __init__(self, now: Snapshot, at: float) -> None:
        self._now = now
        self._at = at

    def collect(self) -> Iterator[Metric]:
        now, at = self._now, self._at
        yield from _services(now.counters.services)
        yield from _config_ids(now, at)
        yield from _backends(now)
        yield from _states(now.tables)
        yield from _shares(now, at)
        yield from _probes(now.health)
        yield from _engine(now.counters)
        if now.xdp is not None:
            yield from _xdp(now.xdp, now.counters)
        yield from _process(now)


def _services(services: Mapping[str, ServiceCounters]) -> Iterator[Metric]:
    datagrams = CounterMetricFamily(
        "quiclb_datagrams", "Datagrams from clients, by what became of them.", labels=["service", "verdict"]
    )
    unroutable = CounterMetricFamily(
        "quiclb_unroutable_datagrams",
        "Datagrams whose connection ID did not say where to go, by the reason.",
        labels=["service", "reason"],
    )
    config_ids = CounterMetricFamily(
        "quiclb_config_id_datagrams",
        "Datagrams routed by their connection ID, by its config ID.",
        labels=["service", "config_id"],
    )
    moves = CounterMetricFamily(
        "quiclb_moves",
        "Flows that began in the middle of a connection: clients that moved, or came from another balancer.",
        labels=["service"],
    )
    rescued = CounterMetricFamily(
        "quiclb_rescued", "Connections that a 4-tuple balancer would have broken.", labels=["service"]
    )
    resets = CounterMetricFamily(
        "quiclb_resets", "Stateless resets sent on behalf of dead backends.", labels=["service", "kind"]
    )
    for name, counted in services.items():
        for verdict in Verdict:
            datagrams.add_metric([name, verdict.name.lower()], counted.verdicts[verdict])
        for reason in Unroutable:
            unroutable.add_metric([name, reason.name.lower()], counted.unroutable[reason])
        for config_id in CONFIG_IDS:
            config_ids.add_metric([name, str(config_id)], counted.config_ids[config_id])
        moves.add_metric([name], counted.moves)
        rescued.add_metric([name], counted.rescued)
        resets.add_metric([name, "answered"], counted.verdicts[Verdict.RESET])
        resets.add_metric([name, "pushed"], counted.resets_pushed)
    yield from (datagrams, unroutable, config_ids, moves, rescued, resets)


def _config_ids(now: Snapshot, at: float) -> Iterator[Metric]:
    labels = ["service", "config_id"]
    phases = GaugeMetricFamily(
        "quiclb_config_id_phase",
        "1 for the phase of its rotation that a config ID is in, 0 for the others.",
        labels=[*labels, "phase"],
    )
    last = GaugeMetricFamily(
        "quiclb_config_id_last_datagram_timestamp_seconds",
        "When the latest datagram was routed by a config ID.",
        labels=labels,
    )
    keys = GaugeMetricFamily(
        "quiclb_cid_key_timestamp_seconds", "When the file of a config ID's key was last written.", labels=labels
    )
    for service, slots in now.rotation.items():
        for config_id, slot in slots.items():
            for phase in PHASES:
                phases.add_metric([service, str(config_id), phase], phase == slot.phase)
            # Whole seconds: what did not change should not look as if it had.
            if slot.last_packet is not None:
                last.add_metric([service, str(config_id)], round(at - slot.last_packet))
            if slot.key_age is not None:
                keys.add_metric([service, str(config_id)], round(at - slot.key_age))
    yield from (phases, last, keys)


def _backends(now: Snapshot) -> Iterator[Metric]:
    labels = ["service", "backend"]
    datagrams = CounterMetricFamily(
        "quiclb_backend_datagrams",
        "Datagrams forwarded to a backend and from it.",
        labels=[*labels, "direction"],
    )
    octets = CounterMetricFamily(
        "quiclb_backend_bytes",
        "Octets of UDP payload forwarded to a backend and from it.",
        labels=[*labels, "direction"],
    )
    flows = GaugeMetricFamily("quiclb_backend_flows", "Flows to a backend that are known now.", labels=labels)
    unreachable = CounterMetricFamily(
        "quiclb_backend_unreachable",
        "ICMP errors in answer to datagrams forwarded to a backend.",
        labels=labels,
    )
    for service, counted in now.counters.services.items():
        for backend, sums in counted.backends.items():
            datagrams.add_metric([service, backend, "to"], sums.datagrams_to)
            datagrams.add_metric([service, backend, "from"], sums.datagrams_from)
            octets.add_metric([service, backend, "to"], sums.octets_to)
            octets.add_metric([service, backend, "from"], sums.octets_from)
            flows.add_metric([service, backend], sums.flows)
            unreachable.add_metric([service, backend], sums.unreachable)
    yield from (datagrams, octets, flows, unreachable)


def _states(tables: Mapping[str, RoutingTable]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "quiclb_backend_state",
        "1 for the state that a backend is in, 0 for the others.",
        labels=["service", "backend", "state"],
    )
    fail_open = GaugeMetricFamily(
        "quiclb_fail_open",
        "1 while the health checks of a service are not believed, because too many of its backends fail them.",
        labels=["service"],
    )
    for service, table in tables.items():
        fail_open.add_metric([service], table.fail_open)
        for backend, routed in zip(table.backends, table.states, strict=True):
            current = routed.name.lower()
            if backend.name in table.dead:
                current = "fenced" if backend.name in table.fenced else "dead"
            for name in STATES:
                state.add_metric([service, backend.name, name], name == current)
    yield from (state, fail_open)


def _shares(now: Snapshot, at: float) -> Iterator[Metric]:
    labels = ["service", "backend"]
    weights = GaugeMetricFamily(
        "quiclb_backend_weight", "The weight that a backend has now, with slow start and the operator's.", labels=labels
    )
    shares = GaugeMetricFamily(
        "quiclb_backend_ring_share_ratio", "The share of new connections that a backend gets.", labels=labels
    )
    overridden = GaugeMetricFamily(
        "quiclb_backend_overridden",
        "1 if the operator said something about a backend that stands above the file.",
        labels=[*labels, "key"],
    )
    last = GaugeMetricFamily(
        "quiclb_backend_last_datagram_timestamp_seconds",
        "When the latest datagram was forwarded to a backend.",
        labels=labels,
    )
    for service, table in now.tables.items():
        weighed = now.weights.get(service, {})
        for backend, share in zip(table.backends, table.shares, strict=True):
            name = backend.name
            weights.add_metric([service, name], weighed.get(name, backend.weight))
            shares.add_metric([service, name], share)
            said = now.overrides.of(service, name).keys
            for key in OVERRIDES:
                overridden.add_metric([service, name, key], key in said)
            seen = now.activity.backend(service, name).last_seen
            if seen is not None:
                last.add_metric([service, name], round(at - (now.now - seen)))
    yield from (weights, shares, overridden, last)


def _probes(health: HealthSnapshot) -> Iterator[Metric]:
    labels = ["service", "backend"]
    probes = CounterMetricFamily("quiclb_probes", "Health probes, by what became of them.", labels=[*labels, "result"])
    ignored = CounterMetricFamily(
        "quiclb_probe_ignored_datagrams",
        "Datagrams from a backend's address that answer no probe.",
        labels=labels,
    )
    round_trip = GaugeMetricFamily(
        "quiclb_probe_round_trip_seconds",
        "Time from the latest answered probe to its answer.",
        labels=labels,
    )
    changes = CounterMetricFamily(
        "quiclb_backend_state_changes",
        "How often health checks took a backend from active to down or back.",
        labels=labels,
    )
    for service, backends in health.items():
        for backend, known in backends.items():
            for result, count in known.results.items():
                probes.add_metric([service, backend, result], count)
            ignored.add_metric([service, backend], known.ignored)
            changes.add_metric([service, backend], known.changes)
            if known.round_trip is not None:
                round_trip.add_metric([service, backend], known.round_trip)
    yield from (probes, ignored, round_trip, changes)


def _engine(counters: Counters) -> Iterator[Metric]:
    for name, help_text, value in (
        ("quiclb_flows", "Flows that are known now.", counters.flows),
        ("quiclb_flows_limit", "The most flows that will be known at a time.", counters.flow_limit),
        ("quiclb_sockets", "Sockets towards backends that are open now.", counters.sockets),
        (
            "quiclb_sockets_limit",
            "The most sockets towards backends that will be open at a time.",
            counters.socket_limit,
        ),
    ):
        yield GaugeMetricFamily(name, help_text, value=value)
    for name, help_text, value in (
        (
            "quiclb_flows_evicted",
            "Flows given up because a limit was reached, the oldest idle ones first.",
            counters.flows_evicted,
        ),
        (
            "quiclb_flows_expired",
            "Flows forgotten because nothing came for the idle timeout.",
            counters.flows_expired,
        ),
        ("quiclb_flows_restored", "Flows taken over from a process that died.", counters.flows_restored),
    ):
        yield CounterMetricFamily(name, help_text, value=value)
    failures = CounterMetricFamily(
        "quiclb_send_failures", "Datagrams that could not be sent on, by the reason.", labels=["reason"]
    )
    for reason, count in counters.failures.items():
        failures.add_metric([reason], count)
    yield failures


def _xdp(xdp: XdpInfo, counters: Counters) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "quiclb_xdp_info",
        "Where the xdp engine's program is attached, and how it forwards; always 1.",
        labels=["interface", "mode", "forward"],
    )
    info.add_metric(list(xdp), 1)
    yield info
    yield CounterMetricFamily(
        "quiclb_icmp_forwarded",
        "ICMP errors from clients' networks that were forwarded to the backend that they were meant for.",
        value=counters.icmp_forwarded,
    )
    too_big = CounterMetricFamily(
        "quiclb_icmp_too_big",
        "Answers to datagrams that are too long for the way to their backend, sent and held back.",
        labels=["result"],
    )
    too_big.add_metric(["sent"], counters.too_big_sent)
    too_big.add_metric(["limited"], counters.too_big_limited)
    yield too_big
    yield CounterMetricFamily(
        "quiclb_samples_lost",
        "Samples of packets that nobody took out of the ring buffer in time.",
        value=counters.samples_lost,
    )


def _process(now: Snapshot) -> Iterator[Metric]:
    reloads = CounterMetricFamily("quiclb_reloads", "Reloads of the configuration.", labels=["result"])
    for result, count in now.reloads.items():
        reloads.add_metric([result], count)
    yield reloads
    yield GaugeMetricFamily(
        "quiclb_config_last_reload_successful",
        "1 if the file was taken when it was last read, 0 if it was refused.",
        value=not now.reload_errors,
    )
    yield GaugeMetricFamily(
        "quiclb_config_last_reload_success_timestamp_seconds",
        "When the configuration in force was read.",
        value=now.reloaded_at,
    )
    yield GaugeMetricFamily("quiclb_start_time_seconds", "When the balancer was started.", value=now.started_at)
    yield GaugeMetricFamily("quiclb_workers", "Workers that move datagrams.", value=now.workers)
    build = GaugeMetricFamily("quiclb_build_info", "What is running; always 1.", labels=["version", "python", "engine"])
    build.add_metric([_version(), platform.python_version(), now.engine], 1)
    yield build


def _version() -> str:
    try:
        return version("quiclb")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
