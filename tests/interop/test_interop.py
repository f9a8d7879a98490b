"""Some cells of the matrix: every client, every server, every scenario, and the control, each at least once.

The whole of it takes `make interop`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from backend.adapters.registry import ADAPTERS, Feature
from backend.clients.visitors import CLIENTS
from tests.interop.cells import Cell, Engine, Result, Verdict
from tests.interop.run import Wanted, play

pytestmark = pytest.mark.e2e

# Ours.
JOBS = 4
SECONDS = 110.0  # for all of them; they take half of it on two cores

SELECTION = (
    *(
        Cell(Engine.UDP, "aioquic", client, feature)
        for client, feature in (
            ("niquests", Feature.REQUEST),
            ("curl_cffi", Feature.DOWNLOAD),
            ("pycurl", Feature.NAT_REBINDING),
            ("chromium", Feature.ADDRESS_MOVE),
            ("gtlsclient", Feature.IPV6_TO_IPV4),
            ("aioquic", Feature.QUIC_V2),
            ("qh3", Feature.EARLY_DATA_ELSEWHERE),
        )
    ),
    *(
        Cell(Engine.XDP, "aioquic", client, feature)
        for client, feature in (
            ("gtlsclient", Feature.ACTIVE_MIGRATION),
            ("qh3", Feature.ROTATION),
            ("curl_cffi", Feature.BALANCER_RESTARTED),
            ("pycurl", Feature.BALANCERS_SWAP),
            ("niquests", Feature.BACKEND_KILLED),
            ("chromium", Feature.RETRY),
        )
    ),
    Cell(Engine.XDP, "hypercorn", "aioquic", Feature.ADDRESS_MOVE),
    Cell(Engine.UDP, "quic-go", "pycurl", Feature.BACKEND_KILLED),
    Cell(Engine.XDP, "quinn", "qh3", Feature.ACTIVE_MIGRATION),
    Cell(Engine.UDP, "ngtcp2", "chromium", Feature.IPV6_TO_IPV4),
    Cell(Engine.XDP, "quiche", "gtlsclient", Feature.REQUEST),
    Cell(Engine.CONTROL, "aioquic", "pycurl", Feature.REQUEST),
    Cell(Engine.CONTROL, "aioquic", "pycurl", Feature.ADDRESS_MOVE),
)


@pytest.fixture(scope="module")
def results() -> Mapping[Cell, Result]:
    """All of them, played at once."""
    return {result.cell: result for result in play(Wanted(), JOBS, SECONDS, lambda _: None, SELECTION)}


@pytest.mark.parametrize("cell", SELECTION, ids=str)
def test_a_cell_of_the_matrix(results: Mapping[Cell, Result], cell: Cell) -> None:
    result = results[cell]
    if result.verdict is Verdict.NOT_RUN:
        pytest.skip(result.saw)
    assert result.is_as_expected, result.saw


def test_every_client_server_and_scenario_is_among_them() -> None:
    assert {cell.client for cell in SELECTION} == set(CLIENTS)
    assert {cell.server for cell in SELECTION} == set(ADAPTERS)
    assert {cell.feature for cell in SELECTION} == set(Feature)
    assert all(cell.why_not() is None for cell in SELECTION)
