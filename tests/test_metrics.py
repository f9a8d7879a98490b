"""lb/metrics.py and docs/metrics.md: what is counted is shown, and what is shown is explained."""

from __future__ import annotations

import itertools
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from lb.activity import Activity
from lb.cid import ConfigId
from lb.config import LbConfig
from lb.engine import BackendCounters, Counters, Drop, ServiceCounters
from lb.healthcheck import RESULTS, BackendHealth
from lb.metrics import OVERRIDES, PHASES, STATES, BalancerCollector, scrape
from lb.overrides import Override, Overrides
from lb.rotation import SlotView
from lb.router import Verdict
from lb.routing import BackendState, RoutingTable, Unroutable
from lb.snapshot import Snapshot, XdpInfo
from tests.builders import service
from tests.observe.prometheus import promtool

DOCUMENT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
AT = 5000.0  # when the snapshot was taken, in seconds since 1970
STATE_OF = {
    "b0": BackendState.ACTIVE,
    "b1": BackendState.DRAINING,
    "b2": BackendState.DOWN,
    "b3": BackendState.DOWN,
    "b4": BackendState.ACTIVE,
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
    activity = Activity()
    for now, datagrams in ((17.0, 1), (18.0, 2), (20.0, 2)):
        seen = ServiceCounters(backends={"b0": BackendCounters(datagrams_to=datagrams)})
        activity.observe(Counters(services={"web": seen}), now)
    return Snapshot(
        config=LbConfig(services=()),
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
        tables={"web": RoutingTable.build(service(5), STATE_OF, ["b3"], fenced=["b4"])},
        engine="udp",
        workers=2,
        started_at=1000.0,
        now=20.0,
        overrides=Overrides({("web", "b1"): Override(drain=True), ("web", "b4"): Override(weight=7, fence=True)}),
        activity=activity,
        rotation={
            "web": {
                ConfigId(0): slot("active", last_packet=2.4, key_age=400.4),
                ConfigId(1): slot("free", last_packet=None, key_age=None),
            }
        },
        weights={"web": {"b0": 0.5}},
        reloads={"ok": 160, "refused": 161},
        reloaded_at=2000.0,
    )


def slot(phase: str, *, last_packet: float | None, key_age: float | None) -> SlotView:
    return SlotView(phase, 3, last_packet, 300.0, None, False, "single-pass", key_age)


def xdp_snapshot() -> Snapshot:
    return replace(snapshot(), engine="xdp", xdp=XdpInfo("eth0", "native", "l2"))


def collect(now: Snapshot | None = None) -> list[Metric]:
    return list(BalancerCollector(now or snapshot(), AT).collect())


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
        "quiclb_backend_weight": {(f"b{i}", "web"): 0.5 if i == 0 else 1 for i in range(5)},
        "quiclb_backend_ring_share_ratio": {(f"b{i}", "web"): float(i == 0) for i in range(5)},
        "quiclb_backend_overridden": {
            (f"b{i}", key, "web"): float((i, key) in {(1, "drain"), (4, "weight"), (4, "fence")})
            for i in range(5)
            for key in OVERRIDES
        },
        "quiclb_backend_last_datagram_timestamp_seconds": {("b0", "web"): AT - 2},
        "quiclb_config_id_phase": {
            (config_id, phase, "web"): float(phase == current)
            for config_id, current in (("0", "active"), ("1", "free"))
            for phase in PHASES
        },
        "quiclb_config_id_last_datagram_timestamp_seconds": {("0", "web"): AT - 2},
        "quiclb_cid_key_timestamp_seconds": {("0", "web"): AT - 400},
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
        "quiclb_config_last_reload_successful": one([()], 1),
        "quiclb_config_last_reload_success_timestamp_seconds": one([()], 2000),
        "quiclb_start_time_seconds": one([()], 1000),
        "quiclb_workers": one([()], 2),
    }


def test_the_xdp_engine_shows_the_same_and_a_little_more() -> None:
    shown, usual = samples(collect(xdp_snapshot())), samples(collect())
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
    table = RoutingTable.build(service(5), everybody, ["b3"])
    shown = samples(collect(replace(snapshot(), tables={"web": table})))
    assert shown["quiclb_fail_open"] == {("web",): 1}
    states = shown["quiclb_backend_state"]
    assert {key for key, value in states.items() if value} == {(b, "web", "down") for b in STATE_OF}


def test_a_file_that_was_refused_is_shown_until_one_is_taken() -> None:
    shown = samples(collect(replace(snapshot(), reload_errors=("services: missing",))))
    assert shown["quiclb_config_last_reload_successful"] == {(): 0}


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels of every metric in the document, by name."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (counter|gauge) \|([^|]*)\| [^|]+\. \|$", DOCUMENT, re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows), "a metric is documented twice"
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_document_lists_exactly_the_metrics_there_are() -> None:
    shown = {}
    for metric in [*collect(xdp_snapshot()), *ProcessCollector(registry=None).collect()]:
        for sample in metric.samples:
            shown[sample.name] = (metric.type, frozenset(sample.labels))
    assert documented() == shown


# Labels with a list of values: the heading of the list, and the values.
LISTS = {
    "Verdicts": [v.name.lower() for v in Verdict],
    "Why a connection ID is unroutable": [u.name.lower() for u in Unroutable],
    "Kinds of resets": ["answered", "pushed"],
    "Phases": list(PHASES),
    "States": list(STATES),
    "Keys that the operator may override": list(OVERRIDES),
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
    for metric in collect(xdp_snapshot()):
        assert metric.name.startswith("quiclb_")
        assert re.fullmatch(r"[A-Z1].*\.", metric.documentation), metric.documentation


def test_a_scrape_is_what_the_collector_says() -> None:
    body, content_type = scrape(snapshot())
    assert content_type.split(";")[0] == "text/plain"
    scraped = samples([m for m in parse_text(body.decode()) if m.name.startswith("quiclb_")])
    assert scraped.keys() == samples(collect()).keys()
    assert scraped["quiclb_datagrams_total"] == samples(collect())["quiclb_datagrams_total"]
    assert b"process_open_fds" in body

    body, content_type = scrape(snapshot(), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    parsed = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]
    assert samples([m for m in parsed if m.name.startswith("quiclb_")]).keys() == scraped.keys()


def test_what_happened_some_seconds_ago_has_the_time_of_the_wall_clock() -> None:
    began = time.time()
    shown = samples(list(parse_text(scrape(snapshot())[0].decode())))
    (at,) = shown["quiclb_config_id_last_datagram_timestamp_seconds"].values()
    assert began - 3 <= at <= time.time() - 1


def test_promtool_has_nothing_to_say() -> None:
    text = scrape(xdp_snapshot())[0].decode()
    done = subprocess.run([promtool(), "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
