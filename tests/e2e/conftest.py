"""The clients that play, and a stage that nobody breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backend.clients.fleet import LIBRARIES, STACKS, missing
from backend.demo.stage import Play
from tests.e2e.theatre import Theatre, theatre


@pytest.fixture(params=STACKS)
def stack(request: pytest.FixtureRequest) -> str:
    """One of the clients."""
    name: str = request.param
    reason = missing(name)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> str:
    """One of the clients that run in this process, and can do more."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def peaceful() -> Iterator[Theatre]:
    """One balancer and three backends, shared by the tests of a module."""
    with theatre(Play()) as made:
        yield made
