"""A dead backend's clients are told at once, and only they; nobody is told too early."""

from __future__ import annotations

import signal
import time
from dataclasses import replace

import pytest

from backend.clients.fleet import LIBRARIES
from backend.clients.relay import NatRelay
from backend.clients.transfer import StatelessResetError, slow_body
from backend.demo.stage import SERVICE, Balancer, Play, Stage
from tests.e2e.theatre import perform, placed, session, whoami

pytestmark = pytest.mark.e2e

TWO = Play(backends=("a", "b"), hold_off=0.5)
PROMPT = 1.0  # seconds; a push takes milliseconds on a machine that is not busy
ENOUGH = 10  # octets of a slow download: it is on its way


def test_a_client_that_only_listens_is_reset_when_its_backend_is_declared_dead(stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with (
            await NatRelay.open(balancer.address) as relay,
            session(stack, relay.address, "/whoami", "/slow/15") as client,
        ):
            victim = (await whoami(client))["name"]
            await client.transfers[1].reached(ENOUGH)
            killed = await stage.servers[victim].child.kill()
            relay.is_muted = True  # whatever it says now is not heard
            dead = await balancer.child.logged("backend-dead", killed, backend=victim)
            with pytest.raises(StatelessResetError) as reset:
                await client.transfers[1].complete()
            assert client.reset_at == reset.value.at
            assert 0 < reset.value.at - dead.time < PROMPT

        assert await _resets(balancer) == {"pushed": 1, "answered": 0}
        async with session(stack, balancer.address, "/whoami") as again:
            assert (await whoami(again))["name"] != victim

    perform(scene, TWO)


def test_a_client_that_sends_to_a_dead_backend_is_answered_with_a_reset(stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session(stack, balancer.address, "/slow/15", is_talkative=True) as client:
            if client.can_speak:
                await client.transfers[0].reached(ENOUGH)
            victim = await _only_backend_with_flows(stage)
            killed = await stage.servers[victim].child.kill()
            with pytest.raises(StatelessResetError) as reset:
                await client.transfers[0].complete()
            dead = await balancer.child.logged("backend-dead", killed, backend=victim)
            assert reset.value.at - dead.time > 0

        resets = await _resets(balancer)
        assert resets["pushed"] == 0
        assert resets["answered"] >= 1

    perform(scene, replace(TWO, push=False))


def test_clients_of_other_backends_do_not_notice_that_one_dies(library: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with placed(library, balancer.address, "a", "/slow/2") as client:
            await client.transfers[1].reached(ENOUGH)
            killed = await stage.servers["b"].child.kill()
            await balancer.child.logged("backend-dead", killed, backend="b")
            assert await client.transfers[1].complete() == slow_body(2)
        assert client.transfers[1].longest_pause < PROMPT

    perform(scene, TWO)


def test_a_backend_that_is_frozen_for_less_than_the_hold_off_keeps_its_clients(stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session(stack, balancer.address, "/whoami", "/slow/2") as client:
            frozen = stage.servers[(await whoami(client))["name"]]
            await client.transfers[1].reached(ENOUGH)
            began = time.time()
            frozen.child.signal(signal.SIGSTOP)
            await balancer.child.logged("backend-down", began, backend=frozen.name)
            frozen.child.signal(signal.SIGCONT)
            await balancer.child.logged("backend-up", began, backend=frozen.name)
            assert await client.transfers[1].complete() == slow_body(2)

        assert balancer.child.find("backend-dead") == []
        assert await _resets(balancer) == {"pushed": 0, "answered": 0}

    perform(scene, replace(TWO, hold_off=8.0))


def test_new_connections_avoid_a_backend_that_is_down_and_come_back_to_it_afterwards() -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        library = next(iter(LIBRARIES))
        killed = await stage.servers["a"].child.kill()
        await balancer.child.logged("backend-down", killed, backend="a")
        for _ in range(10):
            async with session(library, balancer.address, "/whoami") as client:
                assert (await whoami(client))["name"] == "b"

        await stage.restart(stage.servers["a"])
        await balancer.child.logged("backend-up", killed, backend="a")
        async with placed(library, balancer.address, "a"):
            pass

    perform(scene, TWO)


async def _resets(balancer: Balancer) -> dict[str, float]:
    metrics = await balancer.metrics()
    return {kind: metrics.value("quiclb_resets_total", service=SERVICE, kind=kind) for kind in ("pushed", "answered")}


async def _only_backend_with_flows(stage: Stage) -> str:
    metrics = await stage.balancers["one"].metrics()
    (name,) = [name for name in stage.servers if metrics.value("quiclb_backend_flows", backend=name)]
    return name
