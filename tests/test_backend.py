"""The reference backend, as real clients and its balancers meet it, over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import pytest
import qh3.asyncio.client
import qh3.asyncio.protocol
import qh3.h3.connection
import qh3.quic.configuration
import qh3.quic.events
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import ErrorCode, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionId, QuicNetworkPath

from backend import certificate
from backend.__main__ import quic_configuration
from backend.app import BUFFER_HIGH, CHUNK, MAX_BYTES, Http3Protocol, Site
from backend.routable import Identity, RoutableConnection
from backend.seal import Seal
from backend.server import Outcome, Server
from backend.tokens import Tokens
from lb.address import Address
from lb.cid import UNROUTABLE, CidConfig, Codec, ConfigId, ConnectionId, ServerId, config_id_of
from lb.generator import CidGenerator
from lb.limiter import RateLimiter
from lb.reset import MAX_RESET, reset_token

pytestmark = pytest.mark.e2e

SERVER_ID = ServerId(bytes.fromhex("3fa91c02"))
OTHER_SERVER_ID = ServerId(bytes.fromhex("3fa91c03"))
CID_KEY = bytes(range(16))
RESET_KEY = bytes(range(32))
SINGLE_PASS = CidConfig(ConfigId(2), 4, 12, CID_KEY)
CERTIFICATE = certificate.self_signed(datetime.now(UTC))
RESERVED_VERSION = bytes.fromhex("1a2a3a4a")
DEADLINE = 30.0  # seconds, for a whole test

P = ParamSpec("P")


def scenario(story: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """An asynchronous test."""

    @functools.wraps(story)
    def test(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(story(*args, **kwargs), DEADLINE))

    return test


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is another library's
        await asyncio.sleep(0.005)


def identity(
    config: CidConfig | None = SINGLE_PASS,
    server_id: ServerId | None = SERVER_ID,
    reset_key: bytes | None = RESET_KEY,
) -> Identity:
    length = config.cid_length if config else 8
    generator = CidGenerator(config, server_id if config else None, random=os.urandom)
    codec = Codec(config) if config else None
    return Identity(generator, codec, server_id, reset_key, cid_length=length, random=os.urandom)


def tokens() -> Tokens:
    return Tokens(Seal([bytes(32)], os.urandom), time.time)


class Backend(NamedTuple):
    server: Server
    address: Address

    @property
    def connection(self) -> RoutableConnection:
        [connection] = self.server.connections
        return connection


@contextlib.asynccontextmanager
async def serve(
    who: Identity | None = None,
    protocol: type[Http3Protocol] = Http3Protocol,
    limiter: RateLimiter | None = None,
    also: Sequence[str] = (),
    **options: Any,
) -> AsyncIterator[Backend]:
    """A server on a port of 127.0.0.1, and of the hosts in `also`."""
    who = who or identity()
    site = Site("a", who.server_id)
    configuration = quic_configuration(who, CERTIFICATE)
    server = Server(
        who, configuration, lambda quic: protocol(quic, site), limiter or RateLimiter(0, 0), os.urandom, **options
    )
    [address] = await server.listen([Address("127.0.0.1", 0)])
    await server.listen([address._replace(host=host) for host in also])
    try:
        yield Backend(server, address)
    finally:
        await server.stop()


@dataclass
class Answer:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    is_complete: bool = False

    @property
    def status(self) -> int:
        return int(self.headers[b":status"])

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client(QuicConnectionProtocol):
    """An aioquic client."""

    def __init__(self, quic: QuicConnection) -> None:
        super().__init__(quic)
        self.quic = quic
        self.http = H3Connection(quic)
        self.answers: dict[int, Answer] = {}
        self.ended: events.ConnectionTerminated | None = None
        self.is_frozen = False

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        if not self.is_frozen:
            super().datagram_received(data, addr)

    def quic_event_received(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.ConnectionTerminated):
            self.ended = event
        for http_event in self.http.handle_event(event):
            if isinstance(http_event, HeadersReceived):
                self.answers[http_event.stream_id].headers |= dict(http_event.headers)
            elif isinstance(http_event, DataReceived):
                self.answers[http_event.stream_id].body += http_event.data
            if isinstance(http_event, HeadersReceived | DataReceived) and http_event.stream_ended:
                self.answers[http_event.stream_id].is_complete = True

    def start(self, method: str, path: str, *, ends: bool = True) -> tuple[int, Answer]:
        stream_id = self.quic.get_next_available_stream_id()
        answer = self.answers[stream_id] = Answer()
        self.http.send_headers(
            stream_id,
            [
                (b":method", method.encode()),
                (b":scheme", b"https"),
                (b":authority", b"localhost"),
                (b":path", path.encode()),
            ],
            end_stream=ends,
        )
        self.transmit()
        return stream_id, answer

    async def request(self, method: str, path: str, body: bytes | None = None) -> Answer:
        stream_id, answer = self.start(method, path, ends=body is None)
        if body is not None:
            self.http.send_data(stream_id, body, end_stream=True)
            self.transmit()
        await until(lambda: answer.is_complete or self.ended)
        assert answer.is_complete, self.ended
        return answer

    def cids(self) -> dict[bytes, bytes]:
        """The connection IDs that the server has given it, and their reset tokens."""
        return {each.cid: each.stateless_reset_token for each in (self.quic._peer_cid, *self.quic._peer_cid_available)}

    async def move(self) -> None:
        """Go on from another port."""
        old = self._transport
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        assert old is not None
        old.close()


def quic_client(cid_length: int = 8, cid_limit: int = 8) -> QuicConnection:
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=["h3"], connection_id_length=cid_length, server_name="localhost"
    )
    configuration.load_verify_locations(cadata=CERTIFICATE.pem())
    quic = QuicConnection(configuration=configuration)
    quic._local_active_connection_id_limit = cid_limit
    if not cid_length:
        quic._replenish_connection_ids = lambda: None  # type: ignore[method-assign]  # there is nothing to issue
    return quic


@contextlib.asynccontextmanager
async def connect(address: Address, quic: QuicConnection | None = None) -> AsyncIterator[Client]:
    loop = asyncio.get_running_loop()
    here, there = (("::1", 0), (*address, 0, 0)) if address.is_ipv6 else (("127.0.0.1", 0), (*address,))
    _, client = await loop.create_datagram_endpoint(lambda: Client(quic or quic_client()), local_addr=here)
    client.connect(there)
    await client.wait_connected()
    try:
        yield client
    finally:
        client.close()
        await client.wait_closed()
        assert client._transport is not None
        client._transport.close()


class Wire:
    """A UDP socket connected to the server."""

    def __init__(self, address: Address) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.connect(address)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    async def ask(self, datagram: bytes) -> list[bytes]:
        """What the server says to a datagram before it answers the next, which is a probe for versions."""
        loop = asyncio.get_running_loop()
        mark = os.urandom(8)
        answers: list[bytes] = []
        await loop.sock_sendall(self._sock, datagram)
        await loop.sock_sendall(self._sock, version_probe(mark))
        while True:
            answer = await loop.sock_recv(self._sock, 65536)
            if answer[1:14] == bytes(4) + b"\x08" + mark:
                return answers
            answers.append(answer)


def version_probe(scid: bytes, size: int = 1200) -> bytes:
    header = b"\xc0" + RESERVED_VERSION + b"\x08" + bytes(8) + bytes((len(scid),)) + scid
    return header + bytes(size - len(header))


def short(dcid: bytes, size: int = 60) -> bytes:
    return (b"\x40" + dcid).ljust(size, b"\xaa")[:size]


def initial(dcid: bytes = b"whatever", token: bytes = b"", size: int = 1200) -> bytes:
    """An Initial as far as anybody can tell who does not try to decrypt it."""
    header = b"\xc0\x00\x00\x00\x01" + bytes((len(dcid),)) + dcid + b"\x00" + bytes((len(token),)) + token
    return (header + (size - len(header) - 2 | 0x4000).to_bytes(2)).ljust(size, b"\xaa")


def real_initial() -> bytes:
    quic = quic_client()
    quic.connect(("127.0.0.1", 1), now=0.0)
    [(datagram, _), *_more] = quic.datagrams_to_send(now=0.0)
    return datagram


CONFIGS = {
    "plaintext": CidConfig(ConfigId(0), 4, 8),
    "single-pass": SINGLE_PASS,
    "four-pass": CidConfig(ConfigId(5), 4, 7, CID_KEY, appended_length=3),
    "random-first-octet": CidConfig(ConfigId(6), 4, 12, CID_KEY, encodes_length=False),
}


@pytest.mark.parametrize("name", CONFIGS)
@scenario
async def test_every_cid_that_clients_get_carries_the_server_id_and_the_token_of_its_reset_key(name: str) -> None:
    config = CONFIGS[name]
    codec = Codec(config)
    issued: list[tuple[bytes, bytes]] = []
    async with serve(identity(config)) as backend:
        for _ in range(2):
            async with connect(backend.address) as client:
                of_this: dict[bytes, bytes] = {}
                for _ in range(4):
                    await client.ping()
                    await until(lambda: len(client.cids()) == 8)
                    of_this |= client.cids()
                    client.change_connection_id()
                assert len(of_this) == 11
                issued += of_this.items()

    decoded = [codec.decode(cid) for cid, _ in issued]
    assert {SERVER_ID} == {each.server_id for each in decoded if each}
    assert len(issued) == len({each.nonce for each in decoded if each})
    assert [(cid, reset_token(RESET_KEY, cid)) for cid, _ in issued] == issued


@pytest.mark.parametrize("limit", [2, 5, 8, 20])
@scenario
async def test_a_client_has_as_many_cids_as_it_allows_up_to_eight(limit: int) -> None:
    async with serve() as backend, connect(backend.address, quic_client(cid_limit=limit)) as client:
        await until(lambda: len(client.cids()) == min(8, limit))
        answer = await client.request("GET", "/whoami")
        assert set(answer.json["cids"]) == {cid.hex() for cid in client.cids()}


@scenario
async def test_without_a_configuration_cids_are_unroutable_and_tokens_die_with_the_process() -> None:
    tokens = set()
    for _ in range(2):
        async with serve(identity(None, None)) as backend, connect(backend.address) as client:
            await until(lambda: len(client.cids()) == 8)
            assert {(UNROUTABLE, 8)} == {(config_id_of(cid), len(cid)) for cid in client.cids()}
            tokens |= set(client.cids().values())
            assert not tokens & {reset_token(RESET_KEY, cid) for cid in client.cids()}
    assert len(tokens) == 16


@scenario
async def test_a_new_cid_is_known_to_the_server_before_its_client_can_have_it() -> None:
    async with serve() as backend, connect(backend.address):
        [connection] = backend.server.connections
        unsent = []
        issue = backend.server.issue

        def issued(connection: RoutableConnection) -> Any:
            made = issue(connection)
            unsent.append(backend.server._by_cid[made.cid])
            return made

        connection._issuer.issue = issued  # type: ignore[method-assign]
        del connection._host_cids[-1]
        connection._replenish_connection_ids()
        assert [connection] == unsent


@scenario
async def test_a_cid_that_is_in_use_already_is_drawn_again(caplog: pytest.LogCaptureFixture) -> None:
    who = identity()
    first, second, *later = [who.new_cid() for _ in range(40)]
    draws = iter([first, first, first, second, *later])
    who.new_cid = lambda: next(draws)
    async with serve(who) as backend, connect(backend.address) as client:
        await until(lambda: len(client.cids()) == 8)
        assert [first, second] == list(client.cids())[:2]
    assert sum("cid-collision" in record.message for record in caplog.records) == 2


@scenario
async def test_whoami_says_who_answers_by_which_cids_and_to_whom() -> None:
    async with serve() as backend, connect(backend.address) as client:
        await until(lambda: len(client.cids()) == 8)
        for _ in range(2):
            answer = await client.request("GET", "/whoami")
            assert client._transport is not None
            assert answer.json == {
                "name": "a",
                "server_id": SERVER_ID.hex(),
                "config_id": 2,
                "cids": answer.json["cids"],
                "dcid": client.quic._peer_cid.cid.hex(),
                "connection": client.quic.original_destination_connection_id.hex(),
                "client": str(Address(*client._transport.get_extra_info("sockname"))),
                "resumed": False,
                "early": False,
            }
            await client.move()
            client.change_connection_id()


@pytest.mark.parametrize("count", [0, 1, len(CHUNK), len(CHUNK) + 1, 3_000_000])
@scenario
async def test_bytes_are_as_many_as_asked_for(count: int) -> None:
    async with serve() as backend, connect(backend.address) as client:
        answer = await client.request("GET", f"/bytes/{count}")
        assert (200, b"%d" % count) == (answer.status, answer.headers[b"content-length"])
        assert (CHUNK * (count // len(CHUNK) + 1))[:count] == answer.body


@scenario
async def test_slow_trickles() -> None:
    async with serve() as backend, connect(backend.address) as client:
        began = asyncio.get_running_loop().time()
        _, answer = client.start("GET", "/slow/0.3?x")
        await until(lambda: answer.body)
        assert not answer.is_complete
        await until(lambda: answer.is_complete)
        assert answer.body == b"0\n1\n2\n3\n4\n5\nend\n"
        assert asyncio.get_running_loop().time() - began >= 0.3


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("body", [b"", b"x", bytes(1_500_000)], ids=len)
@scenario
async def test_an_upload_is_counted_and_hashed(method: str, body: bytes) -> None:
    async with serve() as backend, connect(backend.address) as client:
        answer = await client.request(method, "/upload", body)
        assert answer.json == {"octets": len(body), "sha256": hashlib.sha256(body).hexdigest()}


RESPONSES = [
    ("GET", "/", 200),
    ("HEAD", "/", 200),
    ("HEAD", "/bytes/1000", 200),
    ("HEAD", "/slow/1000", 200),
    ("HEAD", "/whoami", 200),
    ("GET", "/nothing", 404),
    ("GET", "/whoami/", 404),
    ("GET", "/bytes", 404),
    ("DELETE", "/whoami", 405),
    ("GET", "/upload", 405),
    ("PUT", "/bytes/1", 405),
    ("GET", "/bytes/", 400),
    ("GET", "/bytes/-1", 400),
    ("GET", "/bytes/1e3", 400),
    ("GET", f"/bytes/{MAX_BYTES + 1}", 400),
    ("GET", "/bytes/" + "9" * 5000, 400),
    ("GET", "/slow/nan", 400),
    ("GET", "/slow/inf", 400),
    ("GET", "/slow/-1", 400),
    ("GET", "/slow/1/2", 400),
    ("HEAD", "/status/503", 503),
    ("GET", "/status/600", 400),
    ("GET", "/status/99", 400),
    ("GET", "/status/5e2", 400),
]


@scenario
async def test_every_request_gets_its_status_and_a_head_request_no_body() -> None:
    async with serve() as backend, connect(backend.address) as client:
        for method, path, status in RESPONSES:
            answer = await client.request(method, path)
            assert (method, path, status) == (method, path, answer.status)
            assert bool(answer.body) == (method != "HEAD"), (method, path)
        assert (await client.request("GET", "/upload")).headers[b"allow"] == b"POST, PUT"
        for code in (200, 204, 404, 503):
            assert (await client.request("GET", f"/status/{code}")).status == code


@scenario
async def test_an_unwanted_body_is_ignored() -> None:
    async with serve() as backend, connect(backend.address) as client:
        assert (await client.request("PUT", "/whoami", bytes(300_000))).status == 405
        assert (await client.request("GET", "/whoami")).status == 200


@scenario
async def test_a_thousand_requests_on_one_connection_leave_nothing_behind() -> None:
    async with serve() as backend, connect(backend.address) as client:
        for _ in range(20):
            answers = await asyncio.gather(*(client.request("GET", "/bytes/10") for _ in range(50)))
            assert {(200, 10)} == {(answer.status, len(answer.body)) for answer in answers}
        await client.ping()
        protocol = backend.connection.protocol
        assert isinstance(protocol, Http3Protocol)
        assert (protocol._tasks, protocol._requests, protocol._paused) == ({}, {}, {})


@scenario
async def test_a_body_waits_for_its_client_and_not_in_memory() -> None:
    async with serve() as backend, connect(backend.address) as client:
        stream_id, answer = client.start("GET", f"/bytes/{1 << 30}")
        await until(lambda: len(answer.body) > 1 << 20)
        client.is_frozen = True
        protocol = backend.connection.protocol
        assert isinstance(protocol, Http3Protocol)
        await until(lambda: protocol._paused)
        assert backend.connection.unacknowledged(stream_id) <= BUFFER_HIGH + len(CHUNK) + 16

        client.is_frozen = False
        have = len(answer.body)
        await until(lambda: len(answer.body) > have + (1 << 20))


@scenario
async def test_a_client_that_leaves_takes_its_requests_with_it() -> None:
    async with serve() as backend:
        async with connect(backend.address) as client:
            _, answer = client.start("GET", f"/bytes/{1 << 30}")
            client.start("GET", "/slow/3600")
            client.start("PUT", "/upload", ends=False)
            await until(lambda: answer.body)
            protocol = backend.connection.protocol
            assert isinstance(protocol, Http3Protocol)
            assert len(protocol._tasks) == 3
        await until(lambda: not protocol._tasks)
        await until(lambda: not backend.server.connections)


@pytest.mark.parametrize("method", ["stop", "reset"])
@scenario
async def test_a_cancelled_request_ends_and_its_connection_goes_on(method: str) -> None:
    async with serve() as backend, connect(backend.address) as client:
        for _ in range(200):  # more than the streams that may be open at a time
            path = "/slow/3600" if method == "stop" else "/upload"
            stream_id, answer = client.start("GET" if method == "stop" else "PUT", path, ends=method == "stop")
            if method == "stop":
                await until(functools.partial(getattr, answer, "body"))
                client.quic.stop_stream(stream_id, ErrorCode.H3_REQUEST_CANCELLED)
            else:
                client.quic.reset_stream(stream_id, ErrorCode.H3_REQUEST_CANCELLED)
            await client.ping()
        protocol = backend.connection.protocol
        assert isinstance(protocol, Http3Protocol)
        await until(lambda: not protocol._tasks)
        assert (await client.request("GET", "/")).status == 200


@scenario
async def test_garbage_on_streams_ends_its_connection_only() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    noise = random.Random(seed)
    async with serve() as backend, connect(backend.address) as bystander:
        for _ in range(20):
            async with connect(backend.address) as client:
                for stream_id in (0, 14):
                    client.quic.send_stream_data(stream_id, noise.randbytes(noise.randrange(1, 3000)), end_stream=True)
                client.transmit()
                client.start("GET", "/bytes/100000")
        assert (await bystander.request("GET", "/whoami")).status == 200


@scenario
async def test_a_bug_costs_its_connection_which_is_reset_and_no_other() -> None:
    class Broken(Http3Protocol):
        def quic_event_received(self, event: events.QuicEvent) -> None:
            if isinstance(event, events.StreamDataReceived) and b"crash" in event.data:
                raise ZeroDivisionError
            super().quic_event_received(event)

    async with serve(protocol=Broken) as backend, connect(backend.address) as bystander:
        client = connect(backend.address)
        victim = await client.__aenter__()
        await until(lambda: len(victim.cids()) == 8)
        victim.quic.send_stream_data(14, b"\x21crash")
        victim.transmit()
        await until(lambda: len(backend.server.connections) == 1)
        victim.quic.send_ping(1)
        victim.transmit()
        await until(lambda: backend.server.outcomes[Outcome.RESET])
        assert (await bystander.request("GET", "/whoami")).status == 200
        await client.__aexit__(None, None, None)


@scenario
async def test_a_retry_carries_a_cid_of_this_server_and_a_token_that_is_accepted() -> None:
    quic = quic_client()
    async with serve(tokens=tokens(), retry=True) as backend, connect(backend.address, quic) as client:
        answer = await client.request("GET", "/whoami")
        assert quic.original_destination_connection_id.hex() == answer.json["connection"]
        source = quic._retry_source_connection_id
        assert source is not None
        decoded = Codec(SINGLE_PASS).decode(source)
        assert decoded
        assert decoded.server_id == SERVER_ID
        assert source not in (quic.original_destination_connection_id, *client.cids())
        assert Counter({Outcome.RETRIED: 1, Outcome.ACCEPTED: 1}) == backend.server.outcomes


def own_cid(config: CidConfig = SINGLE_PASS, server_id: ServerId = SERVER_ID) -> ConnectionId:
    """A connection ID as one that a process before this one has issued."""
    return Codec(config).encode(server_id, os.urandom(config.nonce_length))


ANSWERED = {22: {21}, 30: {29}, 43: {42}, 44: {42, 43}, 1200: set(range(42, MAX_RESET + 1))}


@pytest.mark.parametrize("size", ANSWERED)
@scenario
async def test_an_unknown_cid_of_this_server_is_answered_by_its_reset(size: int) -> None:
    async with serve() as backend:
        with Wire(backend.address) as wire:
            cid = own_cid()
            [reset] = await wire.ask(short(cid, size))
            assert len(reset) in ANSWERED[size]
            assert reset[0] >> 6 == 0b01
            assert reset_token(RESET_KEY, cid) == reset[-16:]
        assert backend.server.outcomes[Outcome.RESET] == 1


@scenario
async def test_an_answer_comes_from_the_address_that_was_asked() -> None:
    async with serve(also=["127.0.0.2"]) as backend:
        other = backend.address._replace(host="127.0.0.2")
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)) as sock:
            for asked in (backend.address, other, other, backend.address):
                sock.sendto(version_probe(b"12345678"), asked)
                _, answering = await asyncio.get_running_loop().sock_recvfrom(sock, 65536)
                assert asked == answering


UNANSWERED: dict[str, tuple[Callable[[], bytes], Outcome]] = {
    "another server's CID": (lambda: short(own_cid(server_id=OTHER_SERVER_ID)), Outcome.NOT_MINE),
    "another configuration's CID": (lambda: short(b"\x30" + own_cid()[1:]), Outcome.NOT_MINE),
    "an unroutable CID": (lambda: short(b"\xf0" + own_cid()[1:]), Outcome.NOT_MINE),
    "21 octets": (lambda: short(own_cid(), 21), Outcome.TOO_SMALL_FOR_RESET),
    "less than a CID": (lambda: short(own_cid(), 17), Outcome.NOT_MINE),
    "one octet": (lambda: b"\x40", Outcome.NOT_MINE),
    "no octet": (lambda: b"", Outcome.MALFORMED),
    "no QUIC bit": (lambda: b"\x00" + short(own_cid())[1:], Outcome.MALFORMED),
    "a Handshake": (lambda: b"\xe0" + initial(own_cid())[1:], Outcome.NOT_INITIAL),
    "a small Initial": (lambda: initial(size=1199), Outcome.INITIAL_TOO_SMALL),
    "an Initial that is noise": (initial, Outcome.INITIAL_NOT_AUTHENTIC),
    "half a long header": (lambda: initial()[:12], Outcome.MALFORMED),
    "Version Negotiation": (lambda: b"\xc0" + bytes(4) + version_probe(b"12345678")[5:], Outcome.NOT_INITIAL),
    "a small unknown version": (lambda: version_probe(b"x", 1199), Outcome.INITIAL_TOO_SMALL),
}


@pytest.mark.parametrize("case", UNANSWERED)
@scenario
async def test_nothing_is_said_to(case: str) -> None:
    make, outcome = UNANSWERED[case]
    async with serve() as backend:
        with Wire(backend.address) as wire:
            assert await wire.ask(make()) == []
        assert {outcome: 1, Outcome.VERSION_NEGOTIATED: 1} == backend.server.outcomes
        assert ({}, set()) == (backend.server._by_cid, backend.server.connections)


@scenario
async def test_no_reset_without_a_key_that_outlives_the_process() -> None:
    async with serve(identity(reset_key=None)) as backend:
        with Wire(backend.address) as wire:
            assert await wire.ask(short(own_cid())) == []


@scenario
async def test_resets_are_limited_in_rate() -> None:
    async with serve(limiter=RateLimiter(0.001, 0)) as backend:
        with Wire(backend.address) as wire:
            answers = [await wire.ask(short(own_cid())) for _ in range(10)]
        assert [len(answer) for answer in answers] == [1] + 9 * [0]
        assert backend.server.outcomes[Outcome.RESET_LIMITED] == 9


@scenario
async def test_a_connection_is_reset_only_when_it_is_gone_for_good() -> None:
    async with serve() as backend:
        with Wire(backend.address) as wire:
            async with connect(backend.address) as client:
                await until(lambda: len(client.cids()) == 8)
                retired, kept = list(client.cids())[:2]
                client.change_connection_id()
                await until(lambda: retired not in backend.connection.cids)
                assert await wire.ask(short(retired)) == []  # overtaken by its RETIRE_CONNECTION_ID
                assert await wire.ask(short(kept)) == []
                client.close()
                await until(lambda: backend.connection.protocol._quic._state.name == "DRAINING")
                assert await wire.ask(short(kept)) == []
            await until(lambda: not backend.server.connections)
            [reset] = await wire.ask(short(kept))
            assert reset_token(RESET_KEY, kept) == reset[-16:]


@scenario
async def test_a_long_cid_of_a_future_version_gets_a_version_negotiation() -> None:
    async with serve() as backend:
        loop = asyncio.get_running_loop()
        dcid, scid = bytes(range(255)), bytes(range(200))
        probe = (b"\x80" + RESERVED_VERSION + b"\xff" + dcid + b"\xc8" + scid).ljust(1200, b"\0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(backend.address)
            await loop.sock_sendall(sock, probe)
            answer = await loop.sock_recv(sock, 2000)
        versions = b"\x00\x00\x00\x01\x6b\x33\x43\xcf"
        assert bytes(4) + b"\xc8" + scid + b"\xff" + dcid + versions == answer[1:]


@scenario
async def test_a_client_without_cids_of_its_own_gets_an_answer_on_the_path_that_it_probes() -> None:
    """As Chromium migrates: it asks on the new path first, and moves when that was answered."""
    quic = quic_client(cid_length=0)
    async with serve() as backend, connect(backend.address, quic) as client:
        await until(lambda: len(client.cids()) == 8)
        assert backend.connection._peer_cid.cid == b""

        path = QuicNetworkPath(tuple(backend.address))
        path.peer_cid = quic._peer_cid_available.pop(0)
        quic._network_paths.append(path)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probing:
            probing.bind(("127.0.0.1", 0))
            [(challenge, _)] = quic._send_probing_frames(path, loop.time())
            await loop.sock_sendto(probing, challenge, tuple(backend.address))
            response = await loop.sock_recv(probing, 2000)
            quic.receive_datagram(response, tuple(backend.address), now=loop.time())
        assert path.is_validated
        await client.move()
        assert (await client.request("GET", "/bytes/100000")).status == 200
        assert client.ended is None
        assert len(backend.connection.cids) >= 7


@scenario
async def test_a_zero_length_client_cid_is_never_retired() -> None:
    async with serve() as backend, connect(backend.address, quic_client(cid_length=0)):
        connection = backend.connection
        connection._retire_peer_cid(QuicConnectionId(b"", 0))
        assert connection._retire_connection_ids == []


@scenario
async def test_an_address_may_change_in_mid_download() -> None:
    async with serve() as backend, connect(backend.address) as client:
        _, answer = client.start("GET", "/bytes/3000000")
        for octets in (500_000, 1_000_000, 1_500_000):
            await until(lambda octets=octets: len(answer.body) > octets)  # type: ignore[misc]
            await client.move()
            client.change_connection_id()
        await until(lambda: answer.is_complete)
        assert len(answer.body) == 3_000_000


@scenario
async def test_connections_are_bounded() -> None:
    async with serve(max_connections=1) as backend, connect(backend.address):
        with Wire(backend.address) as wire:
            assert await wire.ask(real_initial()) == []
        assert backend.server.outcomes[Outcome.TOO_MANY_CONNECTIONS] == 1


@scenario
async def test_noise_neither_stops_it_nor_stays_in_memory() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    noise = random.Random(seed)
    real = real_initial()
    makes: list[Callable[[], bytes]] = [
        lambda: noise.randbytes(noise.randrange(1500)),
        lambda: short(own_cid(), noise.randrange(18, 1500)),
        lambda: real[: noise.randrange(len(real))],
        lambda: bytes((real[0] ^ noise.randrange(1, 0x80),)) + real[1:],  # never the real first octet
        lambda: initial(noise.randbytes(noise.randrange(21))),
        lambda: real[:40] + noise.randbytes(1200),
    ]
    async with serve() as backend, connect(backend.address) as bystander:
        with Wire(backend.address) as wire:
            for _ in range(400):
                await wire.ask(noise.choice(makes)())
        assert (await bystander.request("GET", "/whoami")).status == 200
        assert len(backend.server.connections) == 1


class Qh3Client(qh3.asyncio.protocol.QuicConnectionProtocol):
    """A client on another QUIC implementation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.http = qh3.h3.connection.H3Connection(self._quic)
        self.answer = Answer()
        self.ended: Any = None

    def quic_event_received(self, event: Any) -> None:
        if isinstance(event, qh3.quic.events.ConnectionTerminated):
            self.ended = event
        for http_event in self.http.handle_event(event):
            self.answer.headers |= dict(getattr(http_event, "headers", ()))
            self.answer.body += getattr(http_event, "data", b"")
            self.answer.is_complete |= getattr(http_event, "stream_ended", False)

    async def get(self, path: bytes) -> Answer:
        stream_id = self._quic.get_next_available_stream_id()
        names = (b":method", b":scheme", b":authority", b":path")
        self.http.send_headers(stream_id, list(zip(names, (b"GET", b"https", b"localhost", path), strict=True)), True)
        self.transmit()
        await until(lambda: self.answer.is_complete)
        return self.answer


@pytest.mark.parametrize("retry", [False, True])
@scenario
async def test_qh3_is_served_too(retry: bool) -> None:
    configuration = qh3.quic.configuration.QuicConfiguration(alpn_protocols=["h3"], server_name="localhost")
    configuration.load_verify_locations(cadata=CERTIFICATE.pem())
    async with (
        serve(tokens=tokens(), retry=retry) as backend,
        qh3.asyncio.client.connect(*backend.address, configuration=configuration, create_protocol=Qh3Client) as client,
    ):
        assert isinstance(client, Qh3Client)
        answer = await client.get(b"/whoami")
        decoded = Codec(SINGLE_PASS).decode(bytes.fromhex(answer.json["dcid"]))
        assert (answer.status, decoded and decoded.server_id) == (200, SERVER_ID)


@scenario
async def test_a_reset_ends_a_real_client_at_once() -> None:
    configuration = qh3.quic.configuration.QuicConfiguration(alpn_protocols=["h3"], server_name="localhost")
    configuration.load_verify_locations(cadata=CERTIFICATE.pem())
    async with (
        serve() as backend,
        qh3.asyncio.client.connect(*backend.address, configuration=configuration, create_protocol=Qh3Client) as client,
    ):
        assert isinstance(client, Qh3Client)
        await client.get(b"/")
        backend.server._abandon(backend.connection)  # as if the process had been another
        began = asyncio.get_running_loop().time()
        client._quic.send_ping(1)
        client.transmit()
        await until(lambda: client.ended)
        assert asyncio.get_running_loop().time() - began < 1  # its idle timeout is far away
        assert backend.server.outcomes[Outcome.RESET]


# The program.


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a server configuration that is good."""
    for name, octets in (("cid.key", CID_KEY), ("reset.key", RESET_KEY)):
        (tmp_path / name).write_text(octets.hex() + "\n")
        (tmp_path / name).chmod(0o600)
    (tmp_path / "server.yaml").write_text(
        f"""name: alpha
cid-config:
  config-id: 2
  server-id-length: 4
  nonce-length: 12
  key-file: cid.key
server-id: "{SERVER_ID.hex()}"
reset-key-file: reset.key
nonce-file: nonces
"""
    )
    return tmp_path


COMMAND = [sys.executable, "-W", "error", "-m", "backend", "--server-config", "server.yaml"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


def run(at: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The program, of which the caller knows that it will not start."""
    return subprocess.run(
        [*COMMAND, *options],
        cwd=at,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


class Program(NamedTuple):
    process: subprocess.Popen[str]
    addresses: list[Address]


@contextlib.contextmanager
def running(at: Path, *options: str) -> Iterator[Program]:
    with subprocess.Popen(
        [*COMMAND, "--listen", "127.0.0.1:0", "--listen", "[::1]:0", *options],
        cwd=at,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            word, *addresses = process.stdout.readline().split()
            assert word == "ready"
            yield Program(process, [Address.parse(each) for each in addresses])
        finally:
            if process.poll() is None:
                process.terminate()


def test_sigterm_closes_every_connection_and_ends_with_status_0(files: Path) -> None:
    async def talk(program: Program) -> None:
        ipv4, ipv6 = program.addresses
        trust = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name="localhost")
        trust.load_verify_locations(cafile=str(files / "cert.pem"))
        async with (
            connect(ipv4, QuicConnection(configuration=trust)) as one,
            connect(ipv6, QuicConnection(configuration=trust)) as other,
        ):
            first = (await one.request("GET", "/whoami")).json
            second = (await other.request("GET", "/whoami")).json
            assert ("alpha", SERVER_ID.hex()) == (first["name"], first["server_id"])
            assert second["client"].startswith("[::1]:")
            other.start("GET", "/slow/100")
            program.process.send_signal(signal.SIGTERM)
            await until(lambda: one.ended and other.ended)
            assert {ErrorCode.H3_NO_ERROR} == {each.ended.error_code for each in (one, other) if each.ended}

    with running(files, "--write-cert", "cert.pem") as program:
        asyncio.run(asyncio.wait_for(talk(program), DEADLINE))
        output, log = program.process.communicate(timeout=DEADLINE)
        assert (program.process.returncode, output) == (0, "")
        assert "event=ready" in log
        assert "event=stopped name=alpha connections=2 accepted=2" in log
        for secret in (CID_KEY.hex(), RESET_KEY.hex(), SERVER_ID.hex()):
            assert secret not in log


def test_a_restarted_server_repeats_no_nonce_and_knows_its_predecessors_cids(files: Path) -> None:
    given: list[dict[bytes, bytes]] = []

    async def collect(address: Address) -> None:
        async with connect(address, unverified()) as client:
            await until(lambda: len(client.cids()) == 8)
            given.append(client.cids())

    async def ask(address: Address) -> list[bytes]:
        with Wire(address) as wire:
            return await wire.ask(short(next(iter(given[0]))))

    for turn in range(2):
        with running(files, "--retry") as program:
            asyncio.run(asyncio.wait_for(collect(program.addresses[0]), DEADLINE))
            if turn:
                [reset] = asyncio.run(asyncio.wait_for(ask(program.addresses[0]), DEADLINE))
                assert reset[-16:] == next(iter(given[0].values()))
            program.process.send_signal(signal.SIGTERM)
            program.process.communicate(timeout=DEADLINE)
    codec = Codec(SINGLE_PASS)
    decoded = [codec.decode(cid) for each in given for cid in each]
    assert (16, {SERVER_ID}) == (len(set(decoded)), {each.server_id for each in decoded if each})


def unverified() -> QuicConnection:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name="localhost", verify_mode=0)
    return QuicConnection(configuration=configuration)


def spoil(path: Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


def spoil_two_keys(at: Path) -> None:
    spoil(at / "cid.key", CID_KEY.hex(), 0o644)
    spoil(at / "reset.key", "00")


MISTAKES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "no file": (lambda at: (at / "server.yaml").unlink(), [], ["server.yaml"]),
    "an unknown key": (lambda at: spoil(at / "server.yaml", "colour: blue\n"), [], ["colour"]),
    "everybody reads the key": (lambda at: (at / "cid.key").chmod(0o644), [], ["cid.key", "0644"]),
    "two keys": (spoil_two_keys, [], ["cid.key", "reset.key"]),
    "no port": (lambda at: None, ["--listen", "127.0.0.1"], ["--listen"]),
    "a certificate alone": (lambda at: None, ["--cert", "x"], ["--key"]),
    "no certificate in it": (lambda at: None, ["--cert", "cid.key", "--key", "cid.key"], ["cid.key"]),
    "all at once": (
        lambda at: (at / "server.yaml").unlink(),
        ["--cert", "/nowhere/c", "--key", "/nowhere/k", "--token-key-file", "/nowhere/t"],
        ["server.yaml", "/nowhere/c", "/nowhere/t"],
    ),
    "a damaged nonce file": (lambda at: spoil(at / "nonces", "{"), [], ["nonces"]),
    "CIDs too short to run out of nonces": (
        lambda at: spoil(
            at / "server.yaml",
            'name: a\ncid-config: {config-id: 0, server-id-length: 1, nonce-length: 4}\nserver-id: "01"\n',
        ),
        [],
        ["6 octets"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_all_told_and_the_status_is_2(case: str, files: Path) -> None:
    make, options, words = MISTAKES[case]
    make(files)
    done = run(files, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr
    assert CID_KEY.hex() not in done.stderr


def test_a_port_that_is_taken_is_status_1(files: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        done = run(files, "--listen", str(Address(*taken.getsockname())))
    assert (done.returncode, done.stdout) == (1, "")
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr
