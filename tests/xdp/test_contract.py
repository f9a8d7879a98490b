"""One contract, two engines: what a payload and a 4-tuple become does not depend on who moves the packets."""

from __future__ import annotations

import pytest

from lb.forward import Forward
from lb.router import Router
from lb.routing import RoutingTable
from tests.builders import deterministic_random
from tests.xdp.cases import (
    DECISIONS,
    RING,
    STORIES,
    WAYS,
    WEB,
    Decision,
    Story,
    Way,
    moment,
    tables,
)

by_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.service)
TABLES = {table.service.name: table for table in tables(Forward.NAT)}


def router_for(table: RoutingTable) -> Router:
    return Router(table, random=deterministic_random())


@by_way
@pytest.mark.parametrize("decision", DECISIONS, ids=lambda decision: decision.name)
def test_the_router_decides(decision: Decision, way: Way) -> None:
    service = decision.service or WEB[way]
    table = TABLES[service.name]
    flow = way.flow()._replace(local=service.listen[0].host, local_port=service.listen[0].port)
    expected = decision.route
    if expected.backend == RING:
        expected = expected._replace(backend=table.fallback(flow))

    assert router_for(table).route(decision.payload, flow, 0.0)._replace(reply=None) == expected


@by_way
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_the_router_remembers(story: Story, way: Way) -> None:
    moments = [moment(WEB[way], step, way) for step in story.steps]
    router = router_for(moments[0].table)
    told = []
    for step, now in zip(story.steps, moments, strict=True):
        router.table = now.table
        seen = router.route(step.payload, now.flow, 0.0)
        told.append((seen.verdict, None if seen.backend is None else now.table.backends[seen.backend].name))

    assert told == [
        (step.udp[0] if step.udp else step.verdict, now.udp_backend)
        for step, now in zip(story.steps, moments, strict=True)
    ]
