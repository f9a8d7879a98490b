"""A newer quiclb takes over while real clients are at it: nobody notices, not even who says nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from backend.clients.relay import NatRelay
from backend.clients.transfer import slow_body
from backend.demo.stage import Balancer, Play, Stage
from lb.admin.client import Client, Where
from tests.e2e.theatre import perform, session

pytestmark = pytest.mark.e2e

ENOUGH = 10  # octets of a slow download: it is on its way
PATIENCE = 15.0
ONE = "one"


@asynccontextmanager
async def upgraded(stage: Stage, balancer: Balancer) -> AsyncIterator[None]:
    """Upgrade a balancer; its successor, which is nobody's child, ends with the block."""
    api = Client(Where(stage.directory / f"run-{ONE}" / "admin.sock"))
    successor = (await asyncio.to_thread(api.upgrade))["pid"]
    try:
        async with asyncio.timeout(PATIENCE):
            while balancer.child.is_running:  # noqa: ASYNC110 - nobody would set an event
                await asyncio.sleep(0.01)
        yield
    finally:
        os.kill(successor, signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            while _runs(successor):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return b" Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def test_a_download_notices_nothing_of_an_upgrade_although_its_client_is_muted(stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers[ONE]
        async with await NatRelay.open(balancer.address) as relay, session(stack, relay.address, "/slow/3") as client:
            await client.transfers[0].reached(ENOUGH)
            relay.is_muted = True
            async with upgraded(stage, balancer):
                await relay.relayed_down(1)  # the successor knows where the client is
                relay.is_muted = False
                assert await client.transfers[0].complete() == slow_body(3)

    perform(scene, Play(backends=("a", "b")))


def test_connections_that_begin_while_it_happens_come_about(library: str) -> None:
    """Their first flights have no routable connection ID yet: whom they went to is handed over as well."""

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers[ONE]

        async def come_and_go(until: asyncio.Event) -> int:
            served = 0
            while not until.is_set():
                async with session(library, balancer.address, "/whoami") as client:
                    await client.transfers[0].complete()
                served += 1
            return served

        over = asyncio.Event()
        clients = [asyncio.create_task(come_and_go(over)) for _ in range(3)]
        async with upgraded(stage, balancer):
            over.set()
            assert min(await asyncio.gather(*clients)) > 0

    perform(scene, Play(backends=("a", "b")))
