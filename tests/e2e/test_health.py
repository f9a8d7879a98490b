"""Backends that are asked for a page, that freeze, that flap: who is DOWN, who is dead, and who must never be reset."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from backend.clients.fleet import LIBRARIES
from backend.clients.transfer import StatelessResetError, slow_body
from backend.demo.stage import SERVICE, Balancer, LogEvent, Play, Server, Stage
from tests.e2e.theatre import perform, placed, session, whoami

pytestmark = pytest.mark.e2e

LIBRARY = next(iter(LIBRARIES))
ENOUGH = 10  # octets of a slow download: it is on its way
HOLD_OFF = 1.5
PATIENCE = 10.0  # seconds, for counts to grow


def asking(**http3: Any) -> dict[str, Any]:
    """What `health` is, with a page to ask for."""
    times = {"interval": "250ms", "timeout": "1s", "fall": 2, "rise": 2, "silence": "300ms"}
    return {**times, "probe": "http3", "http3": http3}


TWO = Play(backends=("a", "b"), hold_off=HOLD_OFF, health=asking(path="/whoami", body='"name"'))


def test_backends_that_serve_the_page_are_active() -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        for name in stage.servers:
            await _until(balancer, "quiclb_probes_total", 4, backend=name, result="answered")
        async with session(LIBRARY, balancer.address, "/whoami") as client:
            assert (await whoami(client))["name"] in stage.servers
        assert _events(balancer) == []

    perform(scene, TWO)


@pytest.mark.parametrize("path", ["/status/503", "/nothing"])
def test_backends_that_serve_it_no_more_are_down_and_keep_their_clients(path: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session(LIBRARY, balancer.address, "/slow/4") as client:
            await client.transfers[0].reached(ENOUGH)
            since = time.time()
            await _ask(stage, asking(path=path))
            for name in stage.servers:
                down = await balancer.child.logged("backend-down", since, backend=name)
                assert down.fields["reason"] == ("status 503" if path == "/status/503" else "status 404")
            assert await client.transfers[0].complete() == slow_body(4)
        assert balancer.child.find("backend-dead") == []
        assert await _resets(balancer) == 0

        since = time.time()
        await _ask(stage, TWO.health)
        for name in stage.servers:
            await balancer.child.logged("backend-up", since, backend=name)

    perform(scene, TWO)


def test_a_backend_with_another_body_gets_no_new_connections_and_is_never_reset() -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with placed(LIBRARY, balancer.address, "b", "/slow/5") as client:
            await client.transfers[1].reached(ENOUGH)
            since = time.time()
            await _ask(stage, asking(path="/", body="This is a,"))
            down = await balancer.child.logged("backend-down", since)
            assert (down.fields["backend"], down.fields["reason"]) == ("b", "body without the text")
            await _until(balancer, "quiclb_backend_state", 1, backend="b", state="down")
            for _ in range(10):
                async with session(LIBRARY, balancer.address, "/whoami") as other:
                    assert (await whoami(other))["name"] == "a"
            # Longer than the hold-off.
            assert await client.transfers[1].complete() == slow_body(5)
        assert [event.name for event in _events(balancer)] == ["backend-down"]
        assert await _resets(balancer) == 0

    perform(scene, TWO)


def test_a_certificate_is_verified_against_name_and_authority_if_that_is_asked_for() -> None:
    async def scene(stage: Stage) -> None:
        balancer, server = stage.balancers["one"], stage.servers["a"]
        await _restart_with_certificate(stage, server)
        answered = (await balancer.metrics()).value("quiclb_probes_total", result="answered")
        await _until(balancer, "quiclb_probes_total", answered + 3, result="answered")  # it is up, if it was down
        trusting = {"path": "/", "verify": True, "ca-file": "ca.pem"}

        for wrong, reason in (
            ({**trusting, "server-name": "www.example.com"}, "closed: hostname 'www.example.com' doesn't match"),
            ({"path": "/", "verify": True}, "closed: "),  # the system does not know them
        ):
            since = time.time()
            await _ask(stage, asking(**wrong))
            down = await balancer.child.logged("backend-down", since)
            assert down.fields["reason"].startswith(reason)

            since = time.time()
            await _ask(stage, asking(**trusting, **{"server-name": "localhost"}))
            await balancer.child.logged("backend-up", since)

    perform(scene, replace(TWO, backends=("a",)))


def test_a_frozen_backend_is_down_then_dead_and_comes_back() -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session(LIBRARY, balancer.address, "/whoami", "/slow/15") as client:
            victim = (await whoami(client))["name"]
            await client.transfers[1].reached(ENOUGH)
            began = time.time()
            stage.servers[victim].child.signal(signal.SIGSTOP)
            down = await balancer.child.logged("backend-down", began, backend=victim)
            assert down.fields["reason"] == "timeout"
            dead = await balancer.child.logged("backend-dead", began, backend=victim)
            assert dead.time - down.time >= HOLD_OFF - 0.05
            with pytest.raises(StatelessResetError):
                await client.transfers[1].complete()

        stage.servers[victim].child.signal(signal.SIGCONT)
        await balancer.child.logged("backend-up", began, backend=victim)
        async with placed(LIBRARY, balancer.address, victim):
            pass

    perform(scene, TWO)


def test_a_backend_that_flaps_faster_than_the_hold_off_keeps_its_clients() -> None:
    """Frozen and thawed, down and up, three times over: for longer than the hold-off in all."""

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session(LIBRARY, balancer.address, "/whoami", "/slow/3") as client:
            flapping = stage.servers[(await whoami(client))["name"]]
            await client.transfers[1].reached(ENOUGH)
            start = time.time()
            rounds = 0
            while time.time() < start + hold_off or rounds < 3:
                began = time.time()
                flapping.child.signal(signal.SIGSTOP)
                await balancer.child.logged("backend-down", began, backend=flapping.name)
                flapping.child.signal(signal.SIGCONT)
                await balancer.child.logged("backend-up", began, backend=flapping.name)
                rounds += 1
            assert await client.transfers[1].complete() == slow_body(3)

        assert balancer.child.find("backend-dead") == []
        assert await _resets(balancer) == 0

    hold_off = 4.0
    hasty = {**asking(path="/"), "interval": "100ms", "timeout": "400ms"}
    perform(scene, replace(TWO, hold_off=hold_off, health=hasty))


@pytest.mark.parametrize("sign", ["icmp", "silence"])
def test_traffic_finds_out_a_backend_that_is_asked_once_an_hour(sign: str) -> None:
    """The network's word that its port is closed, or its silence while it is sent plenty."""

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session(LIBRARY, balancer.address, "/slow/15", is_talkative=True) as client:
            await client.transfers[0].reached(ENOUGH)
            (victim,) = await _with_flows(stage)
            began = time.time()
            if sign == "icmp":
                await stage.servers[victim].child.kill()
            else:
                stage.servers[victim].child.signal(signal.SIGSTOP)
            down = await balancer.child.logged("backend-down", began, backend=victim)
            assert down.fields["reason"] == ("refused" if sign == "icmp" else "timeout")
            await balancer.child.logged("backend-dead", began, backend=victim)

    hourly = {"interval": "1h", "timeout": "300ms", "fall": 2, "rise": 2, "silence": "300ms"}
    perform(scene, replace(TWO, health=hourly))


def test_a_fenced_backend_is_dead_at_once_until_it_is_fenced_no_more() -> None:
    """However healthy it is, and however long the hold-off."""

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with placed(LIBRARY, balancer.address, "b", "/slow/15") as client:
            await client.transfers[1].reached(ENOUGH)
            await _quiclb(stage, "fence", "b")
            with pytest.raises(StatelessResetError):
                await client.transfers[1].complete()
        for _ in range(5):
            async with session(LIBRARY, balancer.address, "/whoami") as other:
                assert (await whoami(other))["name"] == "a"

        await _quiclb(stage, "unfence", "b")
        async with placed(LIBRARY, balancer.address, "b"):
            pass
        assert _events(balancer) == []  # the checks had nothing to do with it

    perform(scene, replace(TWO, hold_off=600.0))


def test_below_the_panic_threshold_nobody_is_reset() -> None:
    """Two of three are frozen, for longer than the hold-off: that is taken for our mistake."""

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with placed(LIBRARY, balancer.address, "b", "/slow/2") as client:
            await client.transfers[1].reached(ENOUGH)
            frozen = [stage.servers["b"], stage.servers["c"]]
            for server in frozen:
                server.child.signal(signal.SIGSTOP)
            for server in frozen:
                await balancer.child.logged("backend-dead", backend=server.name)
            assert balancer.child.find("fail-open")
            for server in frozen:
                server.child.signal(signal.SIGCONT)
            assert await client.transfers[1].complete() == slow_body(2)
        assert await _resets(balancer) == 0
        await balancer.child.logged("fail-open-over")

    health = {**asking(path="/"), "panic-threshold": "50%"}
    perform(scene, Play(backends=("a", "b", "c"), hold_off=HOLD_OFF, health=health))


def test_a_backend_that_rises_gets_its_share_by_and_by() -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        since = time.time()
        stage.servers["a"].child.signal(signal.SIGSTOP)
        await balancer.child.logged("backend-down", since, backend="a")
        stage.servers["a"].child.signal(signal.SIGCONT)
        await balancer.child.logged("backend-up", since, backend="a")
        began = time.monotonic()
        weights: list[float] = []
        while not weights or weights[-1] < 1:
            await asyncio.sleep(0.05)
            metrics = await balancer.metrics()
            if metrics.value("quiclb_backend_state", backend="a", state="active"):
                weights.append(round(metrics.value("quiclb_backend_weight", backend="a"), 6))
        assert weights == sorted(weights)
        assert set(weights) <= {tenths / 10 for tenths in range(1, 11)}
        assert len(set(weights)) >= 4
        assert time.monotonic() - began > 2.0

    perform(scene, replace(TWO, hold_off=30.0, health={**TWO.health, "slow-start": "3s"}))


async def _quiclb(stage: Stage, *arguments: str) -> None:
    """What an operator types."""
    socket = stage.directory / "run-one" / "admin.sock"
    command = (sys.executable, "-m", "lb", *arguments, "--admin", f"unix:{socket}")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


async def _ask(stage: Stage, health: Mapping[str, Any]) -> None:
    """Have the balancer ask its backends something else."""
    stage.play = replace(stage.play, health=health)
    await stage.reload(stage.balancers["one"])


async def _restart_with_certificate(stage: Stage, server: Server) -> None:
    """Have a backend write its certificate to ca.pem."""
    await server.child.stop()
    listens = (word for each in server.listens for word in ("--listen", str(each)))
    await server.child.start("--write-cert", str(stage.directory / "ca.pem"), *listens)
    await server.child.is_ready()


async def _until(balancer: Balancer, name: str, value: float, **labels: str) -> None:
    """Wait until a metric has grown to a value."""
    async with asyncio.timeout(PATIENCE):
        while (await balancer.metrics()).value(name, **labels) < value:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def _resets(balancer: Balancer) -> float:
    return (await balancer.metrics()).value("quiclb_resets_total", service=SERVICE)


async def _with_flows(stage: Stage) -> list[str]:
    metrics = await stage.balancers["one"].metrics()
    return [name for name in stage.servers if metrics.value("quiclb_backend_flows", backend=name)]


def _events(balancer: Balancer) -> list[LogEvent]:
    """What was said about backends."""
    return [event for event in balancer.child.events if event.name.startswith("backend-")]
