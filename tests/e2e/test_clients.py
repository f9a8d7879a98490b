"""The clients themselves: what they would miss, the other tests could not see."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from backend.clients.aioquic_client import AioquicClient
from backend.clients.fleet import LIBRARIES
from backend.clients.relay import NatRelay
from backend.clients.transfer import ConnectionEndedError, StatelessResetError, Transfer, slow_body
from backend.demo.place import LOWEST_PORT, free_ports
from backend.demo.stage import Play, Stage
from lb.address import Address
from lb.reset import reset_datagram
from tests.e2e.theatre import Theatre, perform

pytestmark = pytest.mark.e2e


def test_a_datagram_that_ends_in_any_other_token_ends_nothing(peaceful: Theatre, library: str) -> None:
    async def scene(stage: Stage) -> None:
        server = stage.balancers["one"].address
        async with await LIBRARIES[library].connect(server) as client:
            client.datagram_received(reset_datagram(os.urandom(16), 60, os.urandom), (*server,))
            assert not client.ended.done()
            assert (await client.whoami())["name"] in stage.servers

    peaceful.play(scene)


def test_a_close_by_the_server_is_no_reset(library: str) -> None:
    async def scene(stage: Stage) -> None:
        async with await LIBRARIES[library].connect(stage.balancers["one"].address) as client:
            name = (await client.whoami())["name"]
            transfer = client.begin("/slow/10")
            await transfer.reached(1)
            assert await stage.servers[name].child.stop() == 0
            with pytest.raises(ConnectionEndedError) as ended:
                await transfer.complete()
            assert not isinstance(ended.value, StatelessResetError)
            assert client.reset_at is None

    perform(scene, Play(backends=("a", "b")))


def test_an_idle_timeout_is_no_reset(peaceful: Theatre, library: str) -> None:
    async def scene(stage: Stage) -> None:
        async with (
            await NatRelay.open(stage.balancers["one"].address) as relay,
            await LIBRARIES[library].connect(relay.address, idle_timeout=0.3) as client,
        ):
            relay.is_deaf = True
            error = await client.ended
            assert type(error) is ConnectionEndedError
            assert client.reset_at is None

    peaceful.play(scene)


def test_a_connection_to_nowhere_is_an_error(library: str) -> None:
    async def connect() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
            nobody.bind(("127.0.0.1", 0))
            with pytest.raises((ConnectionEndedError, TimeoutError)):
                await LIBRARIES[library].connect(Address(*nobody.getsockname()), idle_timeout=0.3)

    asyncio.run(connect())


def test_a_transfer_says_what_came_and_what_never_will() -> None:
    async def transfer() -> list[object]:
        told: list[int] = []
        whole, refused, lost = Transfer("/a", told.append), Transfer("/b"), Transfer("/c")
        whole.status = 200
        whole.feed(b"abc")
        await whole.reached(2)
        whole.feed(b"de", is_last=True)
        refused.status = 404
        refused.feed(b"no", is_last=True)
        lost.feed(b"x")
        lost.fail(StatelessResetError(1.5))
        outcomes: list[object] = [await whole.complete(), told]
        for waiting in (whole.reached(6), refused.complete(), lost.complete()):
            try:
                await waiting
            except (ConnectionEndedError, ValueError) as error:
                outcomes.append((type(error).__name__, str(error)))
        return outcomes

    assert asyncio.run(transfer()) == [
        b"abcde",
        [3, 5],
        ("ConnectionEndedError", "/a: complete with 5 octets only"),
        ("ValueError", "/b: status 404"),
        ("StatelessResetError", "ended by a Stateless Reset"),
    ]


def test_a_relay_moves_and_forgets_the_old_way_unless_told_otherwise() -> None:
    async def relay() -> None:
        loop = asyncio.get_running_loop()
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with server, client:
            for sock in (server, client):
                sock.bind(("127.0.0.1", 0))
                sock.setblocking(False)
            async with await NatRelay.open(Address(*server.getsockname())) as nat:
                ways = []
                for keep_old in (True, False):
                    client.sendto(b"up", nat.address)
                    data, way = await loop.sock_recvfrom(server, 100)
                    assert (data, way) == (b"up", tuple(nat.outside))
                    ways.append(way)
                    await nat.rebind(keep_old=keep_old)
                client.sendto(b"up", nat.address)
                ways.append((await loop.sock_recvfrom(server, 100))[1])
                assert len(set(ways)) == 3

                for number, way in enumerate(ways):
                    server.sendto(b"%d" % number, way)
                came = [await loop.sock_recv(client, 100) for _ in range(2)]
                assert came == [b"0", b"2"]  # not 1: that way was given up
                assert (nat.counters.up, nat.counters.down, nat.counters.moves) == (3, 2, 2)

    asyncio.run(relay())


def test_the_tokens_of_connection_ids_that_are_not_in_use_end_nothing(peaceful: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        server = stage.balancers["one"].address
        async with await AioquicClient.connect(server) as client:
            await client.whoami()
            spare = client._quic._peer_cid_available[0].stateless_reset_token
            client.datagram_received(reset_datagram(spare, 60, os.urandom), (*server,))
            assert not client.ended.done()

            used = client._quic._peer_cid.stateless_reset_token
            client.datagram_received(reset_datagram(used, 60, os.urandom), (*server,))
            assert type(client.ended.result()) is StatelessResetError

    peaceful.play(scene)


def test_ports_for_balancers_are_none_that_the_kernel_gives_away() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(LOWEST_PORT <= port < max(low, LOWEST_PORT + 1000) for port in ports)


def test_slow_body_is_what_the_backend_sends(peaceful: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        async with await AioquicClient.connect(stage.balancers["one"].address) as client:
            assert await client.get("/slow/0.3") == slow_body(0.3)

    peaceful.play(scene)
