"""Rotation under load: keys and server IDs change every few seconds under real clients, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from backend.clients.fleet import LIBRARIES, missing
from backend.clients.gtlsclient import GtlsClient
from backend.clients.transfer import Move, slow_body
from backend.demo import lan
from backend.demo.lan import Xdp
from backend.demo.stage import SERVICE, Play, Server, Stage, stage
from backend.server import Outcome
from lb.admin.client import Client, RefusedError, Where
from lb.cid import CONFIG_IDS, ConfigId
from lb.config import load_config
from lb.forward import Forward
from lb.rotation import SlotView, views_of
from lb.server_half import SERVER_FILE, server_half
from tests.e2e.theatre import moves

SECONDS = float(os.environ.get("QUICLB_ROTATION_SECONDS", "30"))  # that keys are rotated for
XDP_SECONDS = SECONDS / 3
SETTLE = 60.0  # seconds, above what one step or the end can take on a machine that is busy
GUARD = 1.0  # seconds
POLL = 0.2  # seconds
DOWNLOAD = 100_000  # octets
SLOW = 3  # seconds
UPLOAD = 2 << 20  # octets
OUTCOMES = {outcome.name.lower() for outcome in Outcome}  # of datagrams that were for no connection
HARMLESS = {"accepted", "version_negotiated"}  # the first Initial, a health probe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(SECONDS + 180)]


@dataclass
class Tally:
    """What the clients did."""

    connections: int = 0
    answers: int = 0
    rebound: int = 0
    migrated: int = 0
    config_ids: Counter[int] = field(default_factory=Counter)  # by which /whoami was asked


class Clients:
    """Clients that go on until they are told to stop. Any connection that is lost ends the test."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.tally = Tally()
        self._server = stage.balancers["one"].address
        self._random = random.Random(seed)
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Raises what ended a connection, or that a client found itself elsewhere."""
        async with asyncio.TaskGroup() as group:
            for library in LIBRARIES:
                group.create_task(self._stay(library, busy=True))
                group.create_task(self._stay(library, busy=False))
                group.create_task(self._come_and_go(library))
            if missing(GtlsClient.name) is None:
                group.create_task(self._programs())

    def stop(self) -> None:
        self._stopping.set()

    async def _stay(self, library: str, *, busy: bool) -> None:
        """One connection from the beginning to the end, with downloads all the time or with long pauses."""
        async with await LIBRARIES[library].connect(self._server) as client:
            self.tally.connections += 1
            first = await client.whoami()
            while not self._stopping.is_set():
                if busy:
                    transfer = client.begin(f"/bytes/{DOWNLOAD}")
                    await transfer.reached(DOWNLOAD // 3)
                if self._random.random() < 0.3:
                    await client.rebind()
                    self.tally.rebound += 1
                elif self._random.random() < 0.3:
                    await client.migrate()
                    self.tally.migrated += 1
                if busy:
                    assert len(await transfer.complete()) == DOWNLOAD
                await self._pause(0.1 if busy else 2.5)
                now = await client.whoami()
                assert (now["name"], now["connection"]) == (first["name"], first["connection"])
                self.tally.answers += 1
                self.tally.config_ids[int(now["dcid"][:2], 16) >> 5] += 1

    async def _come_and_go(self, library: str) -> None:
        while not self._stopping.is_set():
            async with await LIBRARIES[library].connect(self._server) as client:
                self.tally.connections += 1
                first = await client.whoami()
                await self._pause(0.3)
                await client.rebind()
                self.tally.rebound += 1
                assert await client.get("/slow/0.2") == slow_body(0.2)
                assert (await client.whoami())["connection"] == first["connection"]
                self.tally.answers += 1

    async def _programs(self) -> None:
        while not self._stopping.is_set():
            # One that migrates, and one that talks while its NAT rebinds: silent, it would not be heard from again.
            path = f"/slow/{SLOW}"
            async with await GtlsClient.start(self._server, path, move=Move.MIGRATION, move_after=0.8) as program:
                assert await program.transfers[0].complete() == slow_body(SLOW)
            body = bytes(UPLOAD)
            rebinding = Move.NAT_REBINDING
            async with await GtlsClient.start(
                self._server, "/upload", body=body, move=rebinding, move_after=0.05
            ) as program:
                assert json.loads(await program.transfers[0].complete())["octets"] == UPLOAD
            self.tally.connections += 2
            self.tally.answers += 2

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)


class Operator:
    """Who rotates keys, by the admin API and by SIGHUP to the servers, as docs/rotation.md says."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._balancer = stage.balancers["one"]
        self._file = stage.directory / "balancer-one.yaml"
        self._client = Client(Where(stage.directory / "run-one" / "admin.sock"))
        self.refused = 0
        self.retired: list[int] = []

    async def set_guard(self, guard: float = GUARD) -> None:
        """Put a guard time into the file, and leave one service in it, as servers have one configuration each."""
        config = json.loads(self._file.read_text())
        config["services"] = config["services"][:1]
        config["services"][0]["rotation"] = {"guard": f"{guard:g}s"}
        config["services"][0]["unknown-server"] = "drop"  # so that each is counted
        self._file.write_text(json.dumps(config, indent=2))
        await asyncio.to_thread(self._client.reload)

    async def rotate(self) -> None:
        """Once round: another configuration is prepared and activated, the old one retired as soon as it may be."""
        before = await self._views()
        (old,) = (config_id for config_id, view in before.items() if view.phase == "active")
        await self.step("prepare")
        (new,) = (config_id for config_id, view in (await self._views()).items() if view.phase == "prepared")
        await self.step("activate", new)
        await self._give_servers_their_halves(new)
        with pytest.raises(RefusedError) as refused:
            await self.step("retire", old)
        assert "in use" in str((refused.value.error, refused.value.reasons))
        await self._refuses_a_file_without(old)
        self.refused += 2

        async def is_quiet() -> bool:
            return (await self._views())[old].may_be_freed

        await _until(is_quiet)
        await self.step("retire", old)
        assert (await self._views())[old].phase == "free"
        self.retired.append(old)

    async def _refuses_a_file_without(self, config_id: ConfigId) -> None:
        """Try what a rotation must not do with an editor either: take a configuration away that clients use."""
        good = self._file.read_text()
        config = json.loads(good)
        service = config["services"][0]
        service["cid-configs"] = [each for each in service["cid-configs"] if each["config-id"] != config_id]
        for backend in service["backends"]:
            del backend["server-ids"][str(config_id)]
        self._file.write_text(json.dumps(config))
        with pytest.raises(RefusedError) as refused:
            await asyncio.to_thread(self._client.reload)
        assert f"nothing for config ID {config_id}, which is retiring and in use" in str(refused.value.reasons)
        self._file.write_text(good)

    async def step(self, do: str, config_id: int | None = None, *, force: bool = False) -> None:
        step: dict[str, Any] = {"do": do} if config_id is None else {"do": do, "config-id": config_id}
        step |= {"force": True} if force else {}
        await asyncio.to_thread(self._client.rotate, SERVICE, step)

    async def _views(self) -> dict[ConfigId, SlotView]:
        return views_of((await asyncio.to_thread(self._client.rotation))[SERVICE])

    async def _give_servers_their_halves(self, config_id: ConfigId) -> None:
        config = await asyncio.to_thread(load_config, self._file)
        directory = self._stage.directory
        for name, server in self._stage.servers.items():
            half = server_half(config, name, config_id=config_id, nonce_file=str(directory / f"{name}.nonces"))
            half.write(directory)
            (directory / SERVER_FILE).rename(directory / f"{name}.yaml")
            before = len(_logged(server, "reloaded"))
            server.child.signal(signal.SIGHUP)

            async def is_reloaded(server: Server = server, before: int = before) -> bool:
                return len(_logged(server, "reloaded")) > before

            await _until(is_reloaded)


def test_a_key_is_rotated_every_few_seconds_under_load_and_no_connection_is_lost() -> None:
    asyncio.run(_performance(Play(), SECONDS))


@pytest.mark.skipif(lan.missing() is not None, reason=str(lan.missing()))
def test_the_same_with_the_xdp_engine() -> None:
    asyncio.run(_performance(Play(backends=("a", "b"), xdp=Xdp(forward=Forward.NAT, attach="native")), XDP_SECONDS))


def test_what_is_retired_by_force_goes_on_by_its_address_and_rests_for_the_guard_time() -> None:
    async def performance() -> None:
        async with stage(Play()) as made:
            operator = Operator(made)
            await operator.set_guard(300)
            async with await LIBRARIES["qh3"].connect(made.balancers["one"].address) as client:
                before = await client.whoami()
                await operator.step("prepare", 4)
                await operator.step("activate", 4)
                with pytest.raises(RefusedError, match="config ID 0 is in use"):
                    await operator.step("retire", 0)
                await operator.step("retire", 0, force=True)
                with pytest.raises(RefusedError, match="config ID 0 was freed while it was in use"):
                    await operator.step("prepare", 0)
                after = await client.whoami()
            assert (after["config_id"], after["connection"]) == (0, before["connection"])
            metrics = await made.balancers["one"].metrics()
            assert metrics.value("quiclb_datagrams_total", verdict="table_flow") > 0
            assert metrics.value("quiclb_config_id_phase", config_id="0", phase="free") == 1
            assert metrics.value("quiclb_config_id_phase", config_id="4", phase="active") == 1

    asyncio.run(performance())


async def _performance(play: Play, seconds: float) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    async with stage(play) as made:
        operator, clients = Operator(made), Clients(made, seed)
        await operator.set_guard()
        async with _beside(clients.run(), clients.stop):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                await operator.rotate()
        metrics = await made.balancers["one"].metrics()
        moved = await moves(made.balancers["one"])
        outcomes = await _outcomes(made)
    tally = clients.tally
    print(
        f"{len(operator.retired)} rotations in {seconds:g} s: {operator.retired}; {operator.refused} steps refused; "
        f"{tally}; moves {moved:g}; outcomes {dict(outcomes)}"
    )
    assert {kind: count for kind, count in outcomes.items() if kind not in HARMLESS} == {}
    resets = metrics.value("quiclb_datagrams_total", verdict="reset") + metrics.value("quiclb_resets_pushed_total")
    dropped = metrics.value("quiclb_datagrams_total", verdict="unknown_server")
    assert (resets, dropped) == (0, 0)
    if play.xdp is None:
        # By 4-tuple alone goes only what has a short header and no connection ID of ours. (The xdp engine knows
        # client-chosen connection IDs by it too.)
        assert metrics.value("quiclb_datagrams_total", verdict="table_flow") == 0
    assert moved > 0
    assert 2 * len(operator.retired) == operator.refused >= seconds / 5
    assert set(tally.config_ids) >= set(operator.retired[1:])  # clients did use them
    if len(operator.retired) >= len(CONFIG_IDS):
        assert set(operator.retired) == set(CONFIG_IDS)


async def _outcomes(stage: Stage) -> Counter[str]:
    """What all backends, being ended, say about datagrams that were for no connection."""
    total: Counter[str] = Counter()
    for server in stage.servers.values():
        assert await server.child.stop() == 0
        assert (_logged(server, "cid-collision"), _logged(server, "reload-refused")) == ([], [])
        (stopped,) = _logged(server, "stopped")
        total.update({kind: int(count) for kind, count in stopped.items() if kind in OUTCOMES})
    return total


def _logged(server: Server, event: str) -> list[dict[str, str]]:
    """The events of that name in a backend's log, which is of text."""
    lines = [line.split() for line in server.child.log_path.read_text().splitlines()]
    events = [dict(word.split("=", 1) for word in line if "=" in word) for line in lines]
    return [fields for fields in events if fields.get("event") == event]


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SETTLE):
        while not await is_so():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(POLL)


@contextlib.asynccontextmanager
async def _beside(running: Coroutine[Any, Any, None], stop: Callable[[], None]) -> AsyncIterator[None]:
    """Run something for as long as the block takes; what goes wrong in it ends the block."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(running)
        yield
        stop()
        async with asyncio.timeout(SETTLE):
            await task
