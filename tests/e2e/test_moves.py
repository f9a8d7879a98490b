"""A connection lives through every move of its client."""

from __future__ import annotations

import hashlib
import json

import pytest

from backend.clients.fleet import LIBRARIES, open_session
from backend.clients.gtlsclient import GtlsClient
from backend.clients.relay import NatRelay
from backend.clients.transfer import Move, slow_body
from backend.demo.place import has_ipv6
from backend.demo.stage import Stage
from lb.cid import Codec
from tests.e2e.theatre import Theatre, divert, moves, session, whoami

pytestmark = pytest.mark.e2e

ENOUGH = 10  # octets of a slow download: it is on its way
DOWNLOAD = 1_500_000  # octets
UPLOAD = 4_000_000  # octets


def test_a_request_is_answered_by_a_backend_whose_server_id_is_in_every_connection_id(
    peaceful: Theatre, stack: str
) -> None:
    async def scene(stage: Stage) -> None:
        codec = Codec(stage.cid_config)
        async with session(stack, stage.balancers["one"].address, "/whoami") as client:
            answer = await whoami(client)
        server = stage.servers[answer["name"]]

        assert answer["server_id"] == server.server_id.hex()
        assert len(answer["cids"]) >= 2
        decoded = [codec.decode(bytes.fromhex(cid)) for cid in answer["cids"]]
        assert {each and each.server_id for each in decoded} == {server.server_id}

    peaceful.play(scene)


def test_a_download_survives_a_nat_that_rebinds_twice(peaceful: Theatre, stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        before = await moves(balancer)
        async with (
            await NatRelay.open(balancer.address) as nat,
            session(stack, nat.address, f"/bytes/{DOWNLOAD}") as client,
        ):
            for third in (1, 2):
                await client.transfers[0].reached(third * DOWNLOAD // 3)
                await divert(nat, client, nat.target)
            body = await client.transfers[0].complete()

        assert (len(body), await moves(balancer) - before) == (DOWNLOAD, 2)

    peaceful.play(scene)


def test_a_client_that_takes_another_port_in_mid_upload_stays_with_its_backend(peaceful: Theatre, stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        before = await moves(balancer)
        content = bytes(range(256)) * (UPLOAD // 256)
        if stack == GtlsClient.name:
            async with await GtlsClient.start(
                balancer.address, "/upload", body=content, move=Move.NAT_REBINDING, move_after=0.05
            ) as program:
                answer = json.loads(await program.transfers[0].complete())
        else:
            async with await LIBRARIES[stack].connect(balancer.address) as client:
                transfer = client.begin("/upload", content)
                await client.sent(UPLOAD // 2 // 1200)
                assert not transfer.is_over
                await client.rebind()
                answer = json.loads(await transfer.complete())

        assert answer == {"octets": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert await moves(balancer) - before == 1

    peaceful.play(scene)


def test_a_client_that_migrates_stays_with_its_backend(peaceful: Theatre, stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        before = await moves(balancer)
        async with session(stack, balancer.address, "/slow/1", move=Move.MIGRATION) as client:
            assert await client.transfers[0].complete() == slow_body(1)

        assert await moves(balancer) - before == 1

    peaceful.play(scene)


def test_a_client_that_goes_to_another_address_and_connection_id_keeps_its_connection(
    peaceful: Theatre, library: str
) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with await LIBRARIES[library].connect(balancer.address, local="127.0.0.1") as client:
            before = await client.whoami()
            transfer = client.begin("/slow/1")
            await transfer.reached(ENOUGH)
            await client.migrate("127.0.0.2")
            assert await transfer.complete() == slow_body(1)
            after = await client.whoami()

        assert client.local.host == "127.0.0.2"
        assert (after["name"], after["connection"]) == (before["name"], before["connection"])
        assert after["dcid"] != before["dcid"]
        assert after["client"] != before["client"]  # the server saw it happen

    peaceful.play(scene)


@pytest.mark.skipif(not has_ipv6(), reason="there is no ::1 here")
@pytest.mark.parametrize("first_family", ["IPv6", "IPv4"])
def test_a_client_may_change_its_address_family(peaceful: Theatre, stack: str, first_family: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        assert balancer.address_v6 is not None
        ways = [balancer.address_v6, balancer.address]
        first, second = ways if first_family == "IPv6" else reversed(ways)
        async with await NatRelay.open(first) as relay, session(stack, relay.address, "/slow/1") as client:
            await client.transfers[0].reached(ENOUGH)
            await divert(relay, client, second)
            assert await client.transfers[0].complete() == slow_body(1)
        assert relay.counters.moves == 1

    peaceful.play(scene)


def test_connections_are_spread_over_all_backends(peaceful: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        found = set()
        for i in range(60):
            client = await open_session(list(LIBRARIES)[i % 2], stage.balancers["one"].address, "/whoami")
            found.add((await whoami(client))["name"])
            await client.close()
        assert found == set(stage.servers)

    peaceful.play(scene)
