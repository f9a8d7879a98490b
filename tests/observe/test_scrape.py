"""A real Prometheus scrapes a real balancer, with the rules and for the dashboards of the project."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.prometheus import Prometheus, prometheus
from lb.admin.client import Client, Where
from tests.builders import short
from tests.fleet import eventually, udp_socket
from tests.observe.dashboards import documented, queries, rules
from tests.observe.prometheus import program
from tests.test_control import FakeServer, Process, Site

pytestmark = pytest.mark.e2e

PATIENCE = 30.0  # seconds, for a scrape and an evaluation on a busy machine
# There only with the xdp engine.
XDP_ONLY = {name for name in documented() if "xdp" in name or "icmp" in name or "samples_lost" in name}


class Fleet:
    """A balancer, two backends that answer probes, and Prometheus."""

    def __init__(self, site: Site, process: Process, servers: list[FakeServer], prometheus: Prometheus) -> None:
        self.site = site
        self.process = process
        self.servers = servers
        self.prometheus = prometheus

    def sees(self, expression: str, value: float) -> bool:
        """Prometheus has, sooner or later, one series with that value."""
        return eventually(lambda: self.prometheus.value(expression) == value, PATIENCE)

    def is_pending_or_firing(self, alert: str) -> bool:
        """Its expression says so to Prometheus, and its words have no gaps."""
        eventually(lambda: self.prometheus.query(f'ALERTS{{alertname="{alert}"}}'), PATIENCE)
        (rule,) = (rule for rule in self.prometheus.rules() if rule["name"] == alert)
        words = " ".join(word for found in rule["alerts"] for word in found["annotations"].values())
        return bool(words) and "<no value>" not in words and "error" not in words


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    program("prometheus")
    site = Site(tmp_path)
    try:
        site.service_options = "health: {interval: 100ms, timeout: 100ms, fall: 2}\n    resets: {hold-off: 300ms}"
        site.write()
        servers = [FakeServer(sock) for sock in site.backends]
        process = site.start()
        with prometheus(tmp_path, site.admin) as scraping:
            yield Fleet(site, process, servers, scraping)
    finally:
        site.close()


def test_what_the_balancer_counts_arrives_and_rules_and_dashboards_make_something_of_it(fleet: Fleet) -> None:
    assert fleet.sees('up{job="quiclb"}', 1)
    with udp_socket() as client:
        for number in range(20):
            client.sendto(short(fleet.site.cid(number % 2)), fleet.site.vip)
        client.sendto(short(bytes([5 << 5, *range(19)])), fleet.site.vip)  # a config ID that nobody configured
    assert fleet.sees('quiclb_unroutable_datagrams_total{reason="no_config"}', 1)
    assert fleet.sees('sum(quiclb_datagrams_total{verdict="cid"})', 20)
    assert fleet.sees("service:quiclb_backends_active:sum", 2)
    assert fleet.sees('sum(quiclb_config_id_phase{phase="active"})', 1)

    def missing() -> set[str]:
        return documented() - {found["metric"]["__name__"] for found in fleet.prometheus.query('{job="quiclb"}')}

    # When something was last seen is known a second later.
    eventually(lambda: missing() == XDP_ONLY, PATIENCE)

    # Rates want two scrapes, and a ratio of them an evaluation.
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    eventually(lambda: all(fleet.prometheus.query(name) for name in recorded), PATIENCE)
    assert [rule["lastError"] for rule in fleet.prometheus.rules() if rule["health"] == "err"] == []

    def silent() -> set[str]:
        """Panels that show nothing. An expression that Prometheus does not understand raises."""
        panels: dict[str, bool] = {}
        for query in queries():
            found = fleet.prometheus.query(query.with_values("10s", "1m", str(fleet.site.admin), "web"))
            panels[query.panel] = panels.get(query.panel, False) or bool(found)
        return {panel for panel, has_shown in panels.items() if not has_shown}

    # Nothing retires, is dropped or fails here.
    quiet = {"Traffic that retires", "Datagrams dropped", "Probes that were not answered"}
    eventually(lambda: silent() <= quiet, PATIENCE)


def test_a_backend_that_dies_and_all_of_them_make_their_alerts_speak(fleet: Fleet) -> None:
    assert fleet.sees("service:quiclb_backends_active:sum", 2)
    fleet.servers[1].silent.set()
    assert fleet.sees('quiclb_backend_state{backend="b1", state="dead"}', 1)
    assert fleet.is_pending_or_firing("QuiclbBackendDown")
    assert not fleet.prometheus.query('ALERTS{alertname=~"QuiclbNoHealthyBackend|QuiclbFailOpen"}')

    fleet.servers[0].silent.set()
    assert fleet.is_pending_or_firing("QuiclbNoHealthyBackend")
    assert fleet.is_pending_or_firing("QuiclbFailOpen")


def test_a_file_with_a_mistake_and_a_balancer_that_is_gone_make_their_alerts_speak(fleet: Fleet) -> None:
    assert fleet.sees("quiclb_config_last_reload_successful", 1)
    good = (fleet.site.directory / "lb.yaml").read_text()
    (fleet.site.directory / "lb.yaml").write_text("nonsense: true\n")
    fleet.process.send(signal.SIGHUP)
    assert fleet.is_pending_or_firing("QuiclbReloadFailed")

    (fleet.site.directory / "lb.yaml").write_text(good)
    fleet.process.send(signal.SIGHUP)
    assert fleet.sees("quiclb_config_last_reload_successful", 1)
    eventually(lambda: not fleet.prometheus.query('ALERTS{alertname="QuiclbReloadFailed"}'), PATIENCE)

    fleet.process.kill()
    assert fleet.is_pending_or_firing("QuiclbBalancerDown")


def test_a_config_id_that_is_freed_by_force_while_it_is_used_makes_its_alert_speak(fleet: Fleet) -> None:
    operator = Client(Where(fleet.site.directory / "run" / "admin.sock"))
    with udp_socket() as client:
        for count in (1, 2):  # an increase is seen between two scrapes
            client.sendto(short(fleet.site.cid(0)), fleet.site.vip)
            assert fleet.sees('quiclb_config_id_datagrams_total{config_id="0"}', count)
    operator.rotate("web", {"do": "prepare", "config-id": 1})
    assert fleet.sees('quiclb_config_id_phase{config_id="1", phase="prepared"}', 1)
    operator.rotate("web", {"do": "activate", "config-id": 1})
    assert fleet.sees('quiclb_config_id_phase{config_id="0", phase="retiring"}', 1)
    operator.rotate("web", {"do": "retire", "config-id": 0, "force": True})
    assert fleet.sees('quiclb_config_id_phase{config_id="0", phase="free"}', 1)
    assert fleet.is_pending_or_firing("QuiclbConfigIdFreedWhileInUse")
