"""A connection lives through what happens to balancers."""

from __future__ import annotations

import asyncio

import pytest

from backend.clients.fleet import LIBRARIES
from backend.clients.relay import NatRelay
from backend.clients.transfer import slow_body
from backend.demo.stage import Balancer, Play, Stage
from tests.e2e.theatre import divert, moves, perform, session, whoami

pytestmark = pytest.mark.e2e

ENOUGH = 10  # octets of a slow download: it is on its way


def test_a_download_goes_on_after_its_balancer_was_killed_although_the_client_says_nothing(stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with await NatRelay.open(balancer.address) as relay, session(stack, relay.address, "/slow/3") as client:
            await client.transfers[0].reached(ENOUGH)
            relay.is_muted = True
            await balancer.child.kill()
            await stage.run(balancer)
            await relay.relayed_down(1)  # the new process knew where the client is
            relay.is_muted = False
            assert await client.transfers[0].complete() == slow_body(3)

        assert await moves(balancer) == 0

    perform(scene, Play(backends=("a", "b")))


def test_another_balancer_with_the_same_configuration_takes_a_connection_over(stack: str) -> None:
    async def scene(stage: Stage) -> None:
        one, two = stage.balancers["one"], stage.balancers["two"]
        async with await NatRelay.open(one.address) as relay, session(stack, relay.address, "/slow/2") as client:
            await client.transfers[0].reached(ENOUGH)
            await divert(relay, client, two.address)
            assert await client.transfers[0].complete() == slow_body(2)

        assert (await moves(one), await moves(two)) == (0, 1)

    perform(scene, Play(), "one", "two")


def test_another_balancer_takes_over_when_the_first_one_is_dead(library: str) -> None:
    async def scene(stage: Stage) -> None:
        one, two = stage.balancers["one"], stage.balancers["two"]
        async with await NatRelay.open(one.address) as relay, await LIBRARIES[library].connect(relay.address) as client:
            before = await client.whoami()
            transfer = client.begin("/slow/2")
            await transfer.reached(ENOUGH)
            await one.child.kill()
            await relay.retarget(two.address)
            client.ping()  # without the first one's file, the connection resumes at the client's next packet
            assert await transfer.complete() == slow_body(2)
            after = await client.whoami()

        assert (after["name"], after["connection"]) == (before["name"], before["connection"])

    perform(scene, Play(), "one", "two")


def test_a_client_is_made_to_prove_its_address_by_a_retry_through_the_balancer(stack: str) -> None:
    async def scene(stage: Stage) -> None:
        for _ in range(3):
            async with session(stack, stage.balancers["one"].address, "/whoami", "/bytes/100000") as client:
                answer = await whoami(client)
                assert answer["server_id"] == stage.servers[answer["name"]].server_id.hex()
                assert len(await client.transfers[1].complete()) == 100_000

    perform(scene, Play(retry=True))


def test_it_does_not_matter_which_of_two_workers_gets_a_moved_client(stack: str) -> None:
    times = 3  # each time another port, and perhaps another worker

    async def travel(balancer: Balancer) -> None:
        async with await NatRelay.open(balancer.address) as relay, session(stack, relay.address, "/slow/2") as client:
            for _ in range(times):
                await client.transfers[0].reached(len(client.transfers[0].body) + ENOUGH)
                await divert(relay, client, balancer.address)
            assert await client.transfers[0].complete() == slow_body(2)

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        clients = 4
        await asyncio.gather(*(travel(balancer) for _ in range(clients)))
        assert await moves(balancer) == times * clients

    perform(scene, Play(backends=("a", "b"), workers=2))
