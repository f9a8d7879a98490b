"""Starting a successor: what becomes of it when nobody waits for it any more, and of whoever asks too late."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb.config import load_config
from lb.control import Balancer
from lb.operations import Refused
from lb.upgrade import start_successor
from tests.test_control import Site, children

PATIENCE = 15.0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


async def until_children_are(there: bool, before: set[int]) -> None:
    async with asyncio.timeout(PATIENCE):
        while bool(set(children(os.getpid())) - before) is not there:  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(0.005)


def test_a_balancer_that_is_told_to_stop_leaves_no_successor_behind(site: Site) -> None:
    """It has nobody to take over from here, and would wait for a while before it says so."""
    before = set(children(os.getpid()))

    async def story() -> None:
        starting = asyncio.create_task(start_successor(site.directory / "lb.yaml", watch=False))
        await until_children_are(True, before)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await until_children_are(False, before)

    asyncio.run(story())


def test_a_successor_that_ends_is_an_error_with_its_status(site: Site) -> None:
    (site.directory / "lb.yaml").write_text("nonsense")
    with pytest.raises(OSError, match="ended with status 2"):
        asyncio.run(start_successor(site.directory / "lb.yaml", watch=False))


def test_who_asks_a_process_that_has_handed_over_is_told_to_ask_again(site: Site) -> None:
    """What it would do now, its successor would not know."""

    async def story() -> None:
        balancer = Balancer(site.directory / "lb.yaml", load_config(site.directory / "lb.yaml"))
        balancer._has_handed_over = True
        for ask in (
            balancer.change("web", "b0", {"drain": True}, who="test"),
            balancer.reload(who="test"),
            balancer.upgrade(who="test"),
        ):
            with pytest.raises(Refused, match="another process has taken over"):
                await ask
        await balancer._engine.stop()

    asyncio.run(story())
    assert not (site.directory / "run" / "overrides.json").exists()
