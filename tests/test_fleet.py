"""Tables from the file, the operator, the health checks and the network: who has the last word about a backend."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from lb.config import HealthConfig, ServiceConfig
from lb.fleet import Fleet
from lb.health import HealthMonitor
from lb.overrides import Override, Overrides
from lb.routing import BackendState, RoutingTable
from tests.builders import service

ACTIVE, DRAINING, DOWN = BackendState
SAID = ("web", "b0")


class Health:
    """What the health checks would say."""

    def __init__(self) -> None:
        self.found: dict[str, BackendState] = {}
        self.gone: frozenset[str] = frozenset()
        self.doubted = 0

    def states(self, _service: str) -> dict[str, BackendState]:
        return self.found

    def dead(self, _service: str) -> frozenset[str]:
        return self.gone

    def doubt(self, _service: str) -> None:
        self.doubted += 1


class Site:
    def __init__(self, count: int = 3, *, slow_start: float = 0.0, drained: tuple[str, ...] = ()) -> None:
        self.now = 100.0
        self.health = Health()
        self.fleet = Fleet(cast(HealthMonitor, self.health), clock=lambda: self.now)
        self.config = ServiceConfig(
            service=service(count), health=HealthConfig(slow_start=slow_start), draining=frozenset(drained)
        )
        self.said = Overrides()

    def build(self) -> RoutingTable:
        tables = asyncio.run(self.fleet.build([self.config], self.said))
        self.fleet.took(tables)
        return tables["web"]

    def say(self, **override: object) -> None:
        self.said = Overrides({SAID: Override(**override)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("in_the_file", "said", "found", "state"),
    [
        (False, None, ACTIVE, ACTIVE),
        (True, None, ACTIVE, DRAINING),
        (False, True, ACTIVE, DRAINING),
        (True, False, ACTIVE, ACTIVE),
        (True, True, DOWN, DOWN),
        (False, True, DOWN, DOWN),
    ],
)
def test_the_operator_is_stronger_than_the_file_and_health_than_both(
    in_the_file: bool, said: bool | None, found: BackendState, state: BackendState
) -> None:
    site = Site(drained=("b0",) if in_the_file else ())
    site.say(drain=said)
    site.health.found = {"b0": found}
    assert site.build().states[0] is state


def test_a_fence_is_believed_at_once_and_can_be_taken_back() -> None:
    site = Site()
    site.say(fence=True)
    table = site.build()
    assert (table.states[0], table.dead, table.fenced) == (DOWN, frozenset({"b0"}), frozenset({"b0"}))
    site.say()
    table = site.build()
    assert (table.states[0], table.dead, table.fenced) == (ACTIVE, frozenset(), frozenset())


def test_an_operators_weight_stands_in_for_the_files() -> None:
    site = Site(2)
    site.say(weight=3)
    assert site.build().shares == pytest.approx((0.75, 0.25), abs=0.01)
    assert site.fleet.weights == {"web": {"b0": 3.0, "b1": 1.0}}


def test_whom_no_packet_can_be_sent_to_is_down_whatever_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    site = Site()
    site.health.found = dict.fromkeys(("b0", "b1", "b2"), ACTIVE)
    everybody = [("web", f"b{i}") for i in range(3)]
    caplog.set_level("INFO")
    site.fleet.look_around(everybody, {("web", "b1"): "no neighbour"})
    assert site.build().states == (ACTIVE, DOWN, ACTIVE)
    site.fleet.look_around(everybody, {})
    assert site.build().states == (ACTIVE, ACTIVE, ACTIVE)
    assert [record.message for record in caplog.records] == ["backend-unreachable", "backend-reachable"]


def test_whoever_rises_gets_its_share_in_steps_and_the_others_what_is_left() -> None:
    site = Site(2, slow_start=9.0)
    assert site.build().shares == pytest.approx((0.5, 0.5), abs=0.01)  # nobody begins slowly when the balancer begins
    assert not site.fleet.is_due()
    site.health.found = {"b0": DOWN}
    assert site.build().shares == (0.0, 1.0)
    site.health.found = {}
    shares = []
    for _ in range(10):
        shares.append(site.build().shares[0])
        assert not site.fleet.is_due()
        site.now += 1.0
    assert shares == pytest.approx([n / (n + 10) for n in range(1, 11)], abs=0.01)
    assert not site.fleet.is_due()
    assert site.fleet.weights == {"web": {"b0": 1.0, "b1": 1.0}}


@pytest.mark.parametrize("how", ["undrained", "unfenced", "added"])
def test_it_is_the_same_for_whoever_takes_connections_again(how: str) -> None:
    site = Site(2, slow_start=9.0)
    whole = site.config
    if how == "added":
        site.config = ServiceConfig(service=service(1), health=whole.health)
    elif how == "undrained":
        site.say(drain=True)
    else:
        site.say(fence=True)
    site.build()
    site.config, site.said = whole, Overrides()
    newcomer = 1 if how == "added" else 0
    assert site.build().shares[newcomer] == pytest.approx(1 / 11, abs=0.01)


def test_down_again_it_begins_anew() -> None:
    site = Site(2, slow_start=9.0)
    for found, passed in (({"b0": DOWN}, 0.0), ({}, 5.0), ({"b0": DOWN}, 1.0), ({}, 0.0)):
        site.health.found = found
        table = site.build()
        site.now += passed
    assert table.shares[0] == pytest.approx(1 / 11, abs=0.01)


def test_a_service_that_failed_open_and_has_somebody_again_doubts_the_rest() -> None:
    site = Site(2)
    site.health.found = {"b0": DOWN, "b1": DOWN}
    assert site.build().fail_open
    assert site.health.doubted == 0
    site.health.found = {"b0": ACTIVE, "b1": DOWN}
    assert not site.build().fail_open
    assert site.health.doubted == 1


def test_when_everybody_is_fenced_the_log_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    site = Site(1)
    caplog.set_level("INFO")
    site.build()
    site.say(fence=True)
    site.build()
    site.build()
    site.say()
    site.build()
    assert [record.message for record in caplog.records] == ["no-backend", "no-backend-over"]


def test_weights_are_those_of_the_tables_that_were_taken() -> None:
    site = Site(2)
    site.build()
    site.say(weight=7)
    asyncio.run(site.fleet.build([site.config], site.said))  # and the engine could not have them
    assert site.fleet.weights == {"web": {"b0": 1.0, "b1": 1.0}}
    site.build()
    assert site.fleet.weights == {"web": {"b0": 7.0, "b1": 1.0}}
