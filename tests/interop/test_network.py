"""The network between a client and the balancer: a narrow relay, one that cuts off, and who looks on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from aioquic.quic.packet import QuicPacketType, encode_quic_retry

from backend.clients.http3 import QUIC_V2
from backend.clients.relay import NatRelay
from lb.address import Address
from tests.interop.witness import Witness

PATIENCE = 5.0  # seconds
RATE = 1_000_000  # octets per second
DATAGRAM = 1000  # octets
CIDS = [bytes([first]) + bytes(16) for first in (0x10, 0x30)]


def play(scene: Callable[[socket.socket, socket.socket], Awaitable[None]]) -> None:
    """With a server's socket and a client's."""

    async def run() -> None:
        server, client = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        with server, client:
            for sock in (server, client):
                sock.bind(("127.0.0.1", 0))
                sock.setblocking(False)
            async with asyncio.timeout(PATIENCE):
                await scene(server, client)

    asyncio.run(run())


async def told(sock: socket.socket) -> tuple[bytes, Address]:
    data, source = await asyncio.get_running_loop().sock_recvfrom(sock, 2048)
    return data, Address(*source)


def test_a_narrow_way_lets_its_rate_through_and_drops_what_does_not_fit_into_its_queue() -> None:
    async def scene(server: socket.socket, client: socket.socket) -> None:
        async with await NatRelay.open(Address(*server.getsockname()), rate=RATE) as relay:
            client.sendto(b"up", relay.address)
            _, way = await told(server)
            loop = asyncio.get_running_loop()
            began = loop.time()
            for _ in range(200):
                server.sendto(bytes(DATAGRAM), way)
            while relay.counters.down + relay.counters.queue_full < 200:
                await told(client)
            assert relay.counters.queue_full > 0
            assert relay.counters.down * DATAGRAM / RATE <= loop.time() - began + 0.001

    play(scene)


def test_who_is_cut_off_is_heard_no_more_and_hears_no_more_but_another_socket_gets_through() -> None:
    async def scene(server: socket.socket, client: socket.socket) -> None:
        async with await NatRelay.open(Address(*server.getsockname())) as relay:
            client.sendto(b"before", relay.address)
            _, way = await told(server)
            relay.cut_off()
            client.sendto(b"not this", relay.address)
            server.sendto(b"nor this", way)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as another:
                another.bind(("127.0.0.1", 0))
                another.setblocking(False)
                another.sendto(b"after", relay.address)
                data, another_way = await told(server)
                assert (data, another_way != way) == (b"after", True)
                server.sendto(b"down", another_way)
                assert (await told(another))[0] == b"down"
            while relay.counters.cut < 2:  # noqa: ASYNC110 - a relay sets no event for what it does not relay
                await asyncio.sleep(0.01)

    play(scene)


def test_each_client_socket_has_its_own_outside_and_what_comes_back_is_told_apart() -> None:
    async def scene(server: socket.socket, client: socket.socket) -> None:
        async with await NatRelay.open(Address(*server.getsockname())) as relay:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as another:
                another.bind(("127.0.0.1", 0))
                another.setblocking(False)
                ways = []
                for sock in (client, another):
                    sock.sendto(b"up", relay.address)
                    ways.append((await told(server))[1])
                assert ways[0] != ways[1]
                for way, answer in zip(ways, (b"to client", b"to another"), strict=True):
                    server.sendto(answer, way)
                assert (await told(client))[0] == b"to client"
                assert (await told(another))[0] == b"to another"

    play(scene)


def test_a_witness_sees_connection_ids_and_where_they_come_from_each_change_once() -> None:
    witness = Witness(cid_length=17)
    for cid, source in ((CIDS[0], "here"), (CIDS[0], "here"), (CIDS[0], "there"), (CIDS[1], "there")):
        witness.see(True, b"\x40" + cid + bytes(30), source)
    assert (witness.cids, witness.sources, witness.cid) == (CIDS, ["here", "there"], CIDS[1])


def test_a_witness_sees_a_retry_and_what_a_reset_would_end_in() -> None:
    witness = Witness(cid_length=17)
    for version in (1, QUIC_V2):
        retry = encode_quic_retry(
            version=version,
            source_cid=CIDS[0],
            destination_cid=b"client",
            original_destination_cid=b"original",
            retry_token=b"token",
        )
        witness.see(False, retry, "here")
    assert witness.down[QuicPacketType.RETRY] == 2
    assert witness.retry_scid == CIDS[0]
    assert witness.versions == {1, QUIC_V2}

    witness.see(False, b"\x40" + bytes(10) + b"its last sixteen", "here")
    assert witness.last_words == {b"its last sixteen"}


def test_a_witness_is_not_put_off_by_what_is_no_quic() -> None:
    witness = Witness(cid_length=17)
    for datagram in (b"", b"\xc0", b"\xc0\x00\x00\x00\x01\xff", bytes(5)):
        witness.see(True, datagram, "here")
        witness.see(False, datagram, "here")
    assert not witness.up
    assert not witness.down
