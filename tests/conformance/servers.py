"""Servers to be examined, in this process: the reference one, and others that are wrong in one respect each."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aioquic.quic.connection import QuicConnection

from backend import certificate
from backend.__main__ import quic_configuration
from backend.app import Http3Protocol, Site
from backend.reload import identity_of
from backend.routable import Identity, IssuedCid, RoutableConnection
from backend.seal import Seal
from backend.server import Outcome, Server
from backend.tokens import Tokens
from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId, ConnectionId, ServerId
from lb.conformance.examination import Examination, Plan
from lb.conformance.judgement import Status
from lb.conformance.observed import Observations
from lb.conformance.report import judged
from lb.conformance.stale import StaleFourPass
from lb.conformance.subject import Subject
from lb.limiter import RateLimiter
from lb.reset import reset_datagram, reset_token
from lb.server_config import ServerConfig

ROOT = Path(__file__).parents[2]
CERTIFICATE = certificate.self_signed(datetime.now(UTC))
CID_KEY = bytes.fromhex("8f95f09245765f80256934e50c66207f")
NEW_CID_KEY = bytes.fromhex("fdf726a9893ec05c0632d3956680baf0")
RESET_KEY = bytes(range(32))
NEW_RESET_KEY = bytes(range(32, 64))
SERVER_ID = ServerId(bytes.fromhex("c0ffee01"))
SINGLE_PASS = CidConfig(ConfigId(0), 4, 12, CID_KEY)
FOUR_PASS = CidConfig(ConfigId(2), 4, 9, CID_KEY)
PLAINTEXT = CidConfig(ConfigId(1), 4, 8)
RANDOM_LOW_BITS = CidConfig(ConfigId(6), 4, 12, CID_KEY, encodes_length=False)
APPENDED = CidConfig(ConfigId(0), 4, 12, CID_KEY, appended_length=2)
STALE_KEY = CidConfig(ConfigId(5), 4, 12, CID_KEY)
NEW = CidConfig(ConfigId(5), 4, 12, NEW_CID_KEY)
DEADLINE = 60.0  # seconds


def server_config(config: CidConfig = SINGLE_PASS, reset_key: bytes | None = RESET_KEY) -> ServerConfig:
    return ServerConfig(name="a", cid_config=config, server_id=SERVER_ID, reset_key=reset_key)


def subject(config: CidConfig = SINGLE_PASS, reset_key: bytes | None = RESET_KEY) -> Subject:
    token = None if reset_key is None else lambda cid: reset_token(reset_key, cid)
    return Subject("a", config, SERVER_ID, token)


@dataclass
class Place:
    """A server in a process that has a port, and may end and begin again."""

    config: CidConfig = SINGLE_PASS
    reset_key: bytes = RESET_KEY
    make: type[Server] = Server
    retry: bool = False
    is_preferring: bool = False
    """Whether clients are asked to go on at another port."""
    spoil: Callable[[Identity], None] = lambda identity: None
    """Makes an identity wrong."""
    twist: Callable[[RoutableConnection], None] = lambda connection: None
    """Makes a connection wrong."""
    address: Address = field(default=Address("127.0.0.1", 0))
    starts: int = 0
    identity: Identity = field(init=False)
    server: Server = field(init=False)

    async def start(self) -> None:
        self.starts += 1
        self.identity = identity = identity_of(server_config(self.config, self.reset_key), None)
        self.spoil(identity)

        def protocol(connection: RoutableConnection) -> Http3Protocol:
            self.twist(connection)
            return Http3Protocol(connection, Site("a", SERVER_ID))

        configuration = quic_configuration(identity, CERTIFICATE)
        tokens = Tokens(Seal([bytes(32)], os.urandom), time.time) if self.retry else None
        self.server = self.make(
            identity, configuration, protocol, RateLimiter(0, 0), os.urandom, tokens=tokens, retry=self.retry
        )
        [self.address] = await self.server.listen([self.address])
        if self.is_preferring:
            await self.server.prefer([self.address._replace(port=0)])

    async def stop(self) -> None:
        await self.server.stop()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def rotate(self) -> None:
        self.identity.switch(Codec(NEW), SERVER_ID, NEW_RESET_KEY)
        self.server.renew_cids()


async def examined(place: Place, how: Plan, wanted: Subject | None = None) -> tuple[Observations, dict[str, Status]]:
    """What is seen of a server, and what became of each check."""
    wanted = wanted or subject(place.config)
    if how.rotate is not None:
        wanted = replace(wanted, rotated=subject(NEW, NEW_RESET_KEY))
    await place.start()
    try:
        async with asyncio.timeout(DEADLINE):
            seen = await Examination(place.address, wanted, how).run()
    finally:
        await place.stop()
    return seen, {check.name: finding.status for check, finding in judged(wanted, seen)}


def plan(**options: Any) -> Plan:
    """A plan for servers in this process."""
    usual = {"connections": 24, "concurrency": 4, "quiet": 0.5, "spacing": 0.0, "deadline": DEADLINE}
    return Plan(**usual | options)


def of(statuses: dict[str, Status], status: Status) -> set[str]:
    return {name for name, found in statuses.items() if found is status}


# What can be wrong with connection IDs.


def made_by(make: Callable[[CidConfig], Callable[[], bytes]], config: CidConfig) -> Callable[[Identity], None]:
    """An identity whose CIDs come from somewhere else."""

    def spoil(identity: Identity) -> None:
        new_cid = make(config)
        identity.new_cid = lambda: ConnectionId(new_cid())

    return spoil


def random_block(config: CidConfig) -> Callable[[], bytes]:
    return lambda: bytes((config.first_octet(),)) + os.urandom(config.cid_length - 1)


def random_octets(config: CidConfig) -> Callable[[], bytes]:
    return lambda: os.urandom(config.cid_length)


def unroutable(config: CidConfig) -> Callable[[], bytes]:
    return lambda: bytes((0b111 << 5 | config.cid_length - 1,)) + os.urandom(config.cid_length - 1)


def other_server(config: CidConfig) -> Callable[[], bytes]:
    codec = Codec(config)
    return lambda: codec.encode(b"\xc0\xff\xee\x02", os.urandom(config.nonce_length))


def counted_from(start: int | None) -> Callable[[CidConfig], Callable[[], bytes]]:
    """Nonces that are a counter as it is."""

    def make(config: CidConfig) -> Callable[[], bytes]:
        codec, length = Codec(config), config.nonce_length
        counter = int.from_bytes(os.urandom(length)) if start is None else start

        def new_cid() -> bytes:
            nonlocal counter
            counter = (counter + 1) % (1 << 8 * length)
            return codec.encode(SERVER_ID, counter.to_bytes(length), low_bits=os.urandom(1)[0])

        return new_cid

    return make


def old_cipher(config: CidConfig) -> Callable[[], bytes]:
    """The cipher of drafts -15 to -18."""
    assert config.key is not None
    cipher = StaleFourPass(config.key, config.routing_block_length)
    first = bytes((config.first_octet(),))
    return lambda: first + cipher.encrypt(SERVER_ID + os.urandom(config.nonce_length))


def each_nonce_twice(config: CidConfig) -> Callable[[], bytes]:
    """Two threads with a counter each, and an appended octet that tells their CIDs apart."""
    codec = Codec(config)
    count = int.from_bytes(os.urandom(config.nonce_length)) >> 1

    def new_cid() -> bytes:
        nonlocal count
        count += 1
        nonce = (count // 2).to_bytes(config.nonce_length)
        return codec.encode(SERVER_ID, nonce, appended=os.urandom(config.appended_length))

    return new_cid


def low_bits(numbers: Callable[[int], int]) -> Callable[[CidConfig], Callable[[], bytes]]:
    """The low bits of the first octet are what `numbers` makes of how many CIDs there were."""

    def make(config: CidConfig) -> Callable[[], bytes]:
        codec = Codec(config)
        count = 0

        def new_cid() -> bytes:
            nonlocal count
            count += 1
            return codec.encode(SERVER_ID, os.urandom(config.nonce_length), low_bits=numbers(count))

        return new_cid

    return make


# What can be wrong with connections.


def without_path_responses(connection: RoutableConnection) -> None:
    connection._write_path_response_frame = lambda **_: None  # type: ignore[method-assign]


def without_validation(connection: RoutableConnection) -> None:
    """Whatever address a packet comes from is believed."""
    find = connection._find_network_path

    def believe(addr: Any) -> Any:
        path = find(addr)
        path.is_validated = True
        return path

    connection._find_network_path = believe  # type: ignore[method-assign]


def tied_to_its_address(connection: RoutableConnection) -> None:
    receive, known = connection.receive_datagram, list[Any]()

    def hear(data: bytes, addr: Any, now: float) -> None:
        if not known:
            known.append(addr)
        if addr in known:
            receive(data, addr, now)

    connection.receive_datagram = hear  # type: ignore[method-assign]


def beyond_the_limit(connection: RoutableConnection) -> None:
    replenish = connection._replenish_connection_ids

    def more() -> None:
        connection._remote_active_connection_id_limit = 8
        replenish()

    connection._replenish_connection_ids = more  # type: ignore[method-assign]


def without_refills(connection: RoutableConnection) -> None:
    replenish = connection._replenish_connection_ids

    def once() -> None:
        connection._replenish_connection_ids = lambda: None  # type: ignore[method-assign]
        replenish()

    connection._replenish_connection_ids = once  # type: ignore[method-assign]


def with_parameter(octets: bytes) -> Callable[[RoutableConnection], None]:
    """One more transport parameter."""

    def twist(connection: RoutableConnection) -> None:
        serialize = connection._serialize_transport_parameters
        connection._serialize_transport_parameters = lambda: serialize() + octets  # type: ignore[method-assign]

    return twist


class ForeignOnce:
    """Issues one CID of another server's, which does reach the connection, and then good ones."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._is_spent = False

    def issue(self, connection: RoutableConnection) -> IssuedCid:
        if self._is_spent:
            issued: IssuedCid = self._server.issue(connection)
            return issued
        self._is_spent = True
        cid = ConnectionId(other_server(SINGLE_PASS)())
        self._server._by_cid[cid] = connection
        return IssuedCid(cid, reset_token(RESET_KEY, cid))


def with_a_foreign_second_cid(connection: RoutableConnection) -> None:
    connection._issuer = ForeignOnce(connection._issuer)


def without_token(connection: QuicConnection) -> None:
    connection._host_cids[0].stateless_reset_token = None  # type: ignore[assignment]


# What can be wrong with resets.


class ForeignResets(Server):
    """Whatever is unknown is reset, as by servers that have one key."""

    def _answer_short_header(self, data: bytes, cid: bytes, addr: Any) -> Outcome:
        if len(data) < 40:
            return Outcome.TOO_SMALL_FOR_RESET
        self._sockets.sendto(reset_datagram(reset_token(RESET_KEY, cid), 39, os.urandom), addr)
        return Outcome.RESET


class WrongResets(Server):
    """The tokens that it gives are right, and those of its resets are others."""

    def _answer_short_header(self, data: bytes, cid: bytes, addr: Any) -> Outcome:
        if len(data) < 40 or not self.identity.may_reset(cid):
            return Outcome.NOT_MINE
        self._sockets.sendto(reset_datagram(os.urandom(16), 39, os.urandom), addr)
        return Outcome.RESET


class LargeResets(Server):
    """Resets are as long as what they answer: two such servers would never stop."""

    def _answer_short_header(self, data: bytes, cid: bytes, addr: Any) -> Outcome:
        if len(data) < 40 or not self.identity.may_reset(cid):
            return Outcome.NOT_MINE
        self._sockets.sendto(reset_datagram(reset_token(RESET_KEY, cid), len(data), os.urandom), addr)
        return Outcome.RESET


class LongHeaderResets(Server):
    """Resets look like long headers."""

    def _answer_short_header(self, data: bytes, cid: bytes, addr: Any) -> Outcome:
        if len(data) < 40 or not self.identity.may_reset(cid):
            return Outcome.NOT_MINE
        self._sockets.sendto(b"\xc0" + os.urandom(22) + reset_token(RESET_KEY, cid), addr)
        return Outcome.RESET


class NoResets(Server):
    def _answer_short_header(self, data: bytes, cid: bytes, addr: Any) -> Outcome:
        return Outcome.NOT_MINE


class RandomTokens(Server):
    """The tokens that it gives are random, as aioquic's own are; those of its resets are right."""

    def issue(self, connection: RoutableConnection) -> IssuedCid:
        return super().issue(connection)._replace(stateless_reset_token=os.urandom(16))


class OneToken(Server):
    def issue(self, connection: RoutableConnection) -> IssuedCid:
        return super().issue(connection)._replace(stateless_reset_token=bytes(16))


class RandomRetries(Server):
    """The SCID of a Retry is random, as aioquic's own is."""

    def _send_retry(self, *args: Any) -> None:
        new_cid = self.identity.new_cid
        self.identity.new_cid = made = lambda: ConnectionId(random_block(SINGLE_PASS)())
        try:
            super()._send_retry(*args)
        finally:
            assert self.identity.new_cid is made
            self.identity.new_cid = new_cid
