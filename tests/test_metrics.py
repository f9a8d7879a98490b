"""lb/metrics.py and docs/metrics.md: what is counted is shown, and what is shown is explained."""

from __future__ import annotations

import http.client
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from lb.address import Address
from lb.engine import BackendCounters, Counters, Drop, ServiceCounters
from lb.healthcheck import RESULTS, BackendHealth
from lb.metrics import STATES, BalancerCollector, MetricsServer, Snapshot, XdpInfo
from lb.router import Verdict
from lb.routing import BackendState, RoutingTable, Unroutable
from tests.builders import service

DOCUMENT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
LOOPBACK = Address("127.0.0.1", 0)
STATE_OF = {
    "b0": BackendState.ACTIVE,
    "b1": BackendState.DRAINING,
    "b2": BackendState.DOWN,
    "b3": BackendState.DOWN,
}

Samples = dict[str, dict[tuple[str, ...], float]]  # by sample name, then label values in alphabetic order of labels


def snapshot() -> Snapshot:
    """Every counter with a value of its own, so that a mix-up shows."""
    numbers = itertools.count(1)

    def some(count: int) -> list[int]:
        return list(itertools.islice(numbers, count))

    web = ServiceCounters(
        verdicts=some(len(Verdict)),
        unroutable=some(len(Unroutable)),
        config_ids=some(7),
        moves=101,
        rescued=102,
        resets_pushed=103,
        backends={"b0": BackendCounters(111, 112, 113, 114, 115, 116)},
    )
    return Snapshot(
        counters=Counters(
            services={"web": web},
            failures={reason: 120 + i for i, reason in enumerate(Drop.ALL)},
            flows=130,
            flow_limit=131,
            flows_evicted=132,
            flows_expired=133,
            flows_restored=134,
            sockets=135,
            socket_limit=136,
            icmp_forwarded=137,
            too_big_sent=138,
            too_big_limited=139,
            samples_lost=170,
        ),
        health={
            "web": {
                "b0": BackendHealth(
                    changes=140,
                    results={result: 141 + i for i, result in enumerate(RESULTS)},
                    ignored=150,
                    round_trip=0.25,
                ),
                "b1": BackendHealth(),
            }
        },
        tables={"web": RoutingTable.build(service(4), STATE_OF, ["b3"])},
        engine="udp",
        workers=2,
        started_at=1000.0,
        reloads={"ok": 160, "refused": 161},
        reloaded_at=2000.0,
    )


def xdp_snapshot() -> Snapshot:
    return replace(snapshot(), engine="xdp", xdp=XdpInfo("eth0", "native", "l2"))


def collect(now: Callable[[], Snapshot] = snapshot) -> list[Metric]:
    return list(BalancerCollector(now).collect())


def samples(metrics: list[Metric]) -> Samples:
    found: Samples = {}
    for metric in metrics:
        for sample in metric.samples:
            key = tuple(sample.labels[label] for label in sorted(sample.labels))
            assert key not in found.setdefault(sample.name, {}), "twice"
            found[sample.name][key] = sample.value
    return found


def test_every_counter_is_shown_where_it_belongs() -> None:
    shown = samples(collect())
    build = shown.pop("quiclb_build_info")
    assert [(key[0], value) for key, value in build.items()] == [("udp", 1)]
    verdicts = {verdict.name.lower(): 1 + i for i, verdict in enumerate(Verdict)}
    reasons = {reason.name.lower(): 1 + len(Verdict) + i for i, reason in enumerate(Unroutable)}
    first_config_id = 1 + len(Verdict) + len(Unroutable)
    one = dict.fromkeys
    assert shown == {
        "quiclb_datagrams_total": {("web", name): n for name, n in verdicts.items()},
        "quiclb_unroutable_datagrams_total": {(name, "web"): n for name, n in reasons.items()},
        "quiclb_config_id_datagrams_total": {(str(i), "web"): first_config_id + i for i in range(7)},
        "quiclb_moves_total": {("web",): 101},
        "quiclb_rescued_total": {("web",): 102},
        "quiclb_resets_total": {("answered", "web"): verdicts["reset"], ("pushed", "web"): 103},
        "quiclb_backend_datagrams_total": {("b0", "to", "web"): 111, ("b0", "from", "web"): 113},
        "quiclb_backend_bytes_total": {("b0", "to", "web"): 112, ("b0", "from", "web"): 114},
        "quiclb_backend_flows": {("b0", "web"): 115},
        "quiclb_backend_unreachable_total": {("b0", "web"): 116},
        "quiclb_backend_state": {
            (backend, "web", state): float(state == current)
            for backend, current in zip(STATE_OF, STATES, strict=True)
            for state in STATES
        },
        "quiclb_fail_open": {("web",): 0},
        "quiclb_backend_state_changes_total": {("b0", "web"): 140, ("b1", "web"): 0},
        "quiclb_probes_total": {
            **{("b0", result, "web"): 141 + i for i, result in enumerate(RESULTS)},
            **{("b1", result, "web"): 0 for result in RESULTS},
        },
        "quiclb_probe_ignored_datagrams_total": {("b0", "web"): 150, ("b1", "web"): 0},
        "quiclb_probe_round_trip_seconds": {("b0", "web"): 0.25},
        "quiclb_send_failures_total": {(reason,): 120 + i for i, reason in enumerate(Drop.ALL)},
        "quiclb_flows": one([()], 130),
        "quiclb_flows_limit": one([()], 131),
        "quiclb_flows_evicted_total": one([()], 132),
        "quiclb_flows_expired_total": one([()], 133),
        "quiclb_flows_restored_total": one([()], 134),
        "quiclb_sockets": one([()], 135),
        "quiclb_sockets_limit": one([()], 136),
        "quiclb_reloads_total": {("ok",): 160, ("refused",): 161},
        "quiclb_config_last_reload_success_timestamp_seconds": one([()], 2000),
        "quiclb_start_time_seconds": one([()], 1000),
        "quiclb_workers": one([()], 2),
    }


def test_the_xdp_engine_shows_the_same_and_a_little_more() -> None:
    shown, usual = samples(collect(xdp_snapshot)), samples(collect())
    assert [key[0] for key in shown.pop("quiclb_build_info")] == ["xdp"]
    del usual["quiclb_build_info"]
    assert {name: values for name, values in shown.items() if name in usual} == usual
    assert {name: values for name, values in shown.items() if name not in usual} == {
        "quiclb_xdp_info": {("l2", "eth0", "native"): 1},
        "quiclb_icmp_forwarded_total": {(): 137},
        "quiclb_icmp_too_big_total": {("sent",): 138, ("limited",): 139},
        "quiclb_samples_lost_total": {(): 170},
    }


def test_failing_open_is_shown_and_nobody_is_dead_then() -> None:
    everybody = dict.fromkeys(STATE_OF, BackendState.DOWN)
    now = snapshot()
    table = RoutingTable.build(service(4), everybody, ["b3"])
    shown = samples(
        collect(lambda: Snapshot(now.counters, {}, {"web": table}, "udp", 1, 0, now.reloads, 0)),
    )
    assert shown["quiclb_fail_open"] == {("web",): 1}
    states = shown["quiclb_backend_state"]
    assert {key for key, value in states.items() if value} == {(b, "web", "down") for b in STATE_OF}


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels of every metric in the document, by name."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (counter|gauge) \|([^|]*)\| [^|]+\. \|$", DOCUMENT, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows), "a metric is documented twice"
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_document_lists_exactly_the_metrics_there_are() -> None:
    shown = {}
    for metric in [*collect(xdp_snapshot), *ProcessCollector(registry=None).collect()]:
        for sample in metric.samples:
            shown[sample.name] = (metric.type, frozenset(sample.labels))
    assert documented() == shown


# Labels with a list of values: the heading of the list, and the values.
LISTS = {
    "Verdicts": [v.name.lower() for v in Verdict],
    "Why a connection ID is unroutable": [u.name.lower() for u in Unroutable],
    "Kinds of resets": ["answered", "pushed"],
    "States": list(STATES),
    "Directions": ["to", "from"],
    "Results": list(RESULTS),
    "Why a datagram could not be sent": list(Drop.ALL),
    "What became of ICMP answers": ["sent", "limited"],
    "Reloads": ["ok", "refused"],
}


def test_the_document_explains_every_value_of_a_label() -> None:
    found = {}
    for heading, text in re.findall(r"^### (.+)\n((?:(?!^#).*\n)*)", DOCUMENT, re.MULTILINE):
        found[heading] = re.findall(r"^\| `([a-z0-9_-]+)` \| [^|]+\. \|$", text, re.MULTILINE)
    assert found == LISTS


def test_every_help_text_is_a_sentence_and_every_name_has_our_prefix() -> None:
    for metric in collect(xdp_snapshot):
        assert metric.name.startswith("quiclb_")
        assert re.fullmatch(r"[A-Z1].*\.", metric.documentation), metric.documentation


class Scrape:
    """One answer of a metrics server."""

    def __init__(self, address: Address, method: str = "GET", path: str = "/metrics", accept: str = "") -> None:
        client = http.client.HTTPConnection(address.host, address.port, timeout=20)
        client.request(method, path, headers={"Accept": accept} if accept else {})
        response = client.getresponse()
        self.status = response.status
        self.content_type = response.getheader("Content-Type", "")
        self.length = int(response.getheader("Content-Length", "0"))
        self.text = response.read().decode()
        client.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_scrape_is_what_the_collector_says(host: str) -> None:
    server = MetricsServer(Address(host, 0), snapshot)
    server.start()
    try:
        scrape = Scrape(server.address)
        assert (scrape.status, scrape.content_type.split(";")[0]) == (200, "text/plain")
        scraped = samples([m for m in parse_text(scrape.text) if m.name.startswith("quiclb_")])
        assert scraped == samples(collect())
        assert "process_open_fds" in scrape.text

        accept = "application/openmetrics-text; version=1.0.0"
        scrape = Scrape(server.address, accept=accept)
        assert scrape.content_type.startswith("application/openmetrics-text")
        parsed = parse_openmetrics(scrape.text)  # type: ignore[no-untyped-call]
        openmetrics = samples([m for m in parsed if m.name.startswith("quiclb_")])
        assert openmetrics == samples(collect())

        head = Scrape(server.address, "HEAD")
        assert (head.status, head.text) == (200, "")
        assert head.length > 1000
        assert [Scrape(server.address, path=path).status for path in ("/", "/metric", "/metrics/")] == [200, 404, 404]
        assert Scrape(server.address, "POST").status == 405
    finally:
        server.stop()
    with pytest.raises(ConnectionRefusedError):
        Scrape(server.address)


def test_an_engine_that_is_late_costs_the_scrape_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    problems: list[Exception] = [TimeoutError("2 s"), TimeoutError("2 s"), KeyError("web")]

    def troubled() -> Snapshot:
        if problems:
            raise problems.pop(0)
        return snapshot()

    server = MetricsServer(LOOPBACK, troubled)
    server.start()
    try:
        seen = [Scrape(server.address) for _ in range(4)]
    finally:
        server.stop()
    assert [s.status for s in seen] == [503, 503, 503, 200]
    assert [s.text for s in seen[:3]] == ["the engine did not answer in time\n"] * 2 + ["see the log\n"]
    logged = [(r.levelno, r.msg, r.fields) for r in caplog.records if hasattr(r, "fields")]
    assert logged == [
        (logging.ERROR, "metrics-error", {"error": "TimeoutError: 2 s"}),
        (logging.ERROR, "metrics-error", {"error": "KeyError: 'web'"}),
    ]


def test_an_address_that_is_taken_is_named() -> None:
    first = MetricsServer(LOOPBACK, snapshot)
    first.start()
    try:
        with pytest.raises(OSError, match=re.escape(str(first.address))):
            MetricsServer(first.address, snapshot).start()
    finally:
        first.stop()


def test_two_servers_of_one_process_do_not_share_a_registry() -> None:
    servers = [MetricsServer(LOOPBACK, snapshot) for _ in range(2)]
    assert len(servers) == 2
    registry = CollectorRegistry()
    registry.register(BalancerCollector(snapshot))
    assert registry.get_sample_value("quiclb_workers") == 2


def test_promtool_has_nothing_to_say() -> None:
    promtool = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if promtool is None:
        pytest.skip("promtool (of Debian's prometheus) is not installed")
    server = MetricsServer(LOOPBACK, xdp_snapshot)
    server.start()
    try:
        text = Scrape(server.address).text
    finally:
        server.stop()
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
