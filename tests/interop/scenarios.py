"""The scenarios: what happens to one client, and what has to be true of it then.

Between every client and the balancer is a relay, which is the network: it moves the client, and is narrow, so that a
download takes as long as it has to be disturbed. A witness at the relay knows whether it was one connection all the
time: there is no other Initial then.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aioquic.quic.packet import QuicPacketType

from backend.adapters.registry import Feature
from backend.clients.fleet import Session
from backend.clients.http3 import QUIC_V2
from backend.clients.relay import NatRelay
from backend.clients.transfer import ConnectionEndedError, Transfer
from backend.clients.visitor import Visitor, Wishes
from backend.clients.visitors import Client
from lb.address import Address
from lb.cid import config_id_of
from tests.interop.places import CID_LENGTH, Balancing, Site
from tests.interop.witness import Witness

# Ours.
DOWNLOAD = 10_000_000  # octets
RATE = 1_250_000  # octets per second, where a download is to last
PERIOD = 1.0  # seconds between two moves
SHORT, LONG, LONGER = 1_500_000, 3_500_000, 5_000_000  # octets that take 1.2, 2.8 and 4 seconds then
THIRD, TENTH = 3, 10
SETTLING = 0.3  # seconds until a browser has stored what it got
MIGRATES_AFTER = 0.4  # seconds
TOLD_WITHIN = 8.0  # seconds; HEALTH and HOLD_OFF make it 2 or 4
ENOUGH = 20  # octets of a slow download: it is on its way
TRIES = 8  # connections, to find another server than the last one


class FailedError(Exception):
    """It is not as it has to be."""


@dataclass(slots=True)
class Scene:
    """What a scenario needs. `stall`: seconds without one octet that mean that there will be no more.

    `disturbed`: it has come to what it is about.
    """

    site: Site
    balancing: Balancing
    client: Client
    stall: float
    disturbed: bool = False

    @contextlib.asynccontextmanager
    async def visitor(self, *, quic_v2: bool = False, migrates_after: float | None = None) -> AsyncIterator[Visitor]:
        made = self.client.visitor(Wishes(quic_v2=quic_v2, migrates_after=migrates_after, spki=self.site.spki))
        try:
            yield made
        finally:
            await made.close()

    @contextlib.asynccontextmanager
    async def network(self, *, rate: float | None = None, target: Address | None = None) -> AsyncIterator[Network]:
        witness = Witness(CID_LENGTH)
        outside = None if target else self.site.place.clients[0]
        relay = await NatRelay.open(target or self.balancing.address, outside=outside, rate=rate, tap=witness.see)
        try:
            yield Network(relay, witness)
        finally:
            relay.close()


@dataclass(slots=True)
class Network:
    """The way from a client to the balancer, and who looks on."""

    relay: NatRelay
    witness: Witness


@dataclass(slots=True)
class Guest:
    """A client in mid-download, and the server that has it."""

    session: Session
    relay: NatRelay
    witness: Witness
    server: str
    octets: int
    scene: Scene
    initials: int
    disturbed: tuple[float, int] = (0.0, 0)  # when that was, and how many octets were there

    @property
    def transfer(self) -> Transfer:
        return self.session.transfers[-1]

    async def reached(self, octets: int) -> None:
        await within(self.scene.stall, self.transfer.reached(octets), "the download does not begin")

    def disturb(self) -> None:
        """From here on it matters. It must not be over yet."""
        if self.transfer.is_over:
            raise FailedError("the download was over before")
        self.scene.disturbed = True
        self.disturbed = time.monotonic(), len(self.transfer.body)

    async def move(self, outside: str | None = None, target: Address | None = None) -> None:
        """Have a NAT change its mind. What was sent before still arrives if the client cannot be told to speak:
        only its acknowledgements say where it is now."""
        self.disturb()
        keep_old = not self.session.can_speak
        if target is None:
            await self.relay.rebind(outside, keep_old=keep_old)
        else:
            await self.relay.retarget(target, outside, keep_old=keep_old)
        self.session.speak()

    async def complete(self) -> str:
        """The whole download, on the connection that it began on. Returns what was seen."""
        while not self.transfer.is_over:
            waiting = self.transfer.reached(len(self.transfer.body) + 1)
            with contextlib.suppress(ConnectionEndedError):  # complete() says what is wrong
                await within(self.scene.stall, waiting, f"nothing after {len(self.transfer.body):,} octets")
        check_bytes(await self.transfer.complete(), self.octets)
        if self.witness.up[QuicPacketType.INITIAL] > self.initials:
            raise FailedError("it connected anew")
        at, octets = self.disturbed
        if not at:
            return f"{self.octets:,} octets in {self.transfer.last_at - self.transfer.begun_at:.1f} s"
        return f"{self.octets - octets:,} octets after it, in {time.monotonic() - at:.1f} s"


async def within(seconds: float, waiting: Awaitable[Any], otherwise: str) -> None:
    try:
        async with asyncio.timeout(seconds):
            await waiting
    except TimeoutError:
        raise FailedError(f"{otherwise}: for {seconds:g} s") from None


def check_bytes(body: bytes, octets: int) -> None:
    """What the servers' /bytes is: 0, 1, ... 255, again and again."""
    expected = (bytes(range(256)) * (octets // 256 + 1))[:octets]
    if hashlib.sha256(body).digest() != hashlib.sha256(expected).digest():
        raise FailedError(f"{len(body):,} octets that are not the {octets:,} that were asked for")


async def whoami(transfer: Transfer) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(await transfer.complete())
    return answer


@contextlib.asynccontextmanager
async def downloading(
    scene: Scene,
    network: Network,
    octets: int,
    *,
    migrates_after: float | None = None,
) -> AsyncIterator[Guest]:
    """A client that knows its server and has begun a download."""
    async with scene.visitor(migrates_after=migrates_after) as visitor:
        session = await visitor.open(network.relay.address, "/whoami", f"/bytes/{octets}")
        try:
            server = (await whoami(session.transfers[0]))["name"]
            initials = network.witness.up[QuicPacketType.INITIAL]
            yield Guest(session, network.relay, network.witness, server, octets, scene, initials)
        finally:
            await session.close()


@contextlib.asynccontextmanager
async def asked(visitor: Visitor, network: Network) -> AsyncIterator[tuple[Session, dict[str, Any]]]:
    """A connection and its /whoami."""
    session = await visitor.open(network.relay.address, "/whoami")
    try:
        yield session, await whoami(session.transfers[0])
    finally:
        await session.close()


def check_owner(scene: Scene, cid: bytes, server: str) -> None:
    """A connection ID has to be that of the server which answered."""
    owner = scene.site.server_of(cid)
    if owner != server:
        raise FailedError(f"server {server} answered to the connection ID {cid.hex()} of {owner or 'nobody'}")


async def request(scene: Scene) -> str:
    """One request is answered, by the server whose ID is in the connection ID."""
    async with scene.network() as network, scene.visitor() as visitor, asked(visitor, network) as (_, answer):
        check_owner(scene, network.witness.cid, answer["name"])
        return f"server {answer['name']}"


async def download(scene: Scene) -> str:
    """10 MB, and every octet of them."""
    async with scene.network() as network, downloading(scene, network, DOWNLOAD) as guest:
        return await guest.complete()


async def nat_rebinding(scene: Scene) -> str:
    """A NAT gives the client another port every second."""
    async with scene.network(rate=RATE) as network, downloading(scene, network, LONG) as guest:
        for _ in range(2):
            await asyncio.sleep(PERIOD)
            await guest.move()
        return await guest.complete()


async def address_move(scene: Scene) -> str:
    """The client's address changes."""
    async with scene.network(rate=RATE) as network, downloading(scene, network, SHORT) as guest:
        await guest.reached(SHORT // THIRD)
        await guest.move(scene.site.place.clients[1])
        return await guest.complete()


async def ipv6_to_ipv4(scene: Scene) -> str:
    """The client's packets come by IPv6, and then by IPv4."""
    async with (
        scene.network(rate=RATE, target=scene.balancing.address_v6) as network,
        downloading(scene, network, SHORT) as guest,
    ):
        await guest.reached(SHORT // THIRD)
        await guest.move(target=scene.balancing.address)
        return await guest.complete()


async def active_migration(scene: Scene) -> str:
    """The client takes another port, and another connection ID of the same server (RFC 9000, section 9)."""
    cut_off = scene.client.migrates_when_cut_off
    after = None if cut_off else MIGRATES_AFTER
    async with scene.network(rate=RATE) as network, downloading(scene, network, SHORT, migrates_after=after) as guest:
        guest.disturb()
        before = network.witness.cid
        if cut_off:
            await guest.reached(SHORT // THIRD)
            guest.disturb()
            network.relay.cut_off()
            guest.session.speak()  # who has nothing that awaits an acknowledgement does not notice
        saw = await guest.complete()
        if len(network.witness.sources) == 1:
            raise FailedError("it did not migrate")
        if network.witness.cid == before:
            raise FailedError(f"it still uses the connection ID {before.hex()}")
        check_owner(scene, network.witness.cid, guest.server)
        return saw


async def retry(scene: Scene) -> str:
    """The client is sent back once, to prove its address. All servers demand it; see `Site.with_retry`."""
    async with scene.network() as network, scene.visitor() as visitor, asked(visitor, network) as (_, answer):
        if not network.witness.down[QuicPacketType.RETRY] or not network.witness.proofs:
            raise FailedError("there was no Retry")
        check_owner(scene, network.witness.retry_scid, answer["name"])
        check_owner(scene, network.witness.cid, answer["name"])
        return f"server {answer['name']}"


async def early_data_elsewhere(scene: Scene) -> str:
    """What one server gave it for the next time is good at another, at once."""
    async with scene.network() as network, scene.visitor() as visitor:
        async with asked(visitor, network) as (_, answer):
            first = answer["name"]
        server = scene.site.servers[first]
        try:
            if scene.client.keeps_connections:
                await asyncio.sleep(SETTLING)
                await server.child.stop()  # with a word to its clients
            await scene.balancing.avoid(first)
            await network.relay.rebind()
            early_before = network.witness.up[QuicPacketType.ZERO_RTT]
            async with asked(visitor, network) as (session, answer):
                if answer["name"] == first:
                    raise FailedError(f"server {first} again")
                if network.witness.up[QuicPacketType.ZERO_RTT] == early_before:
                    raise FailedError("it sent no early data")
                # Who cannot say whether its early data was taken at least has to have resumed the session.
                if not (answer.get("resumed", True) if session.early is None else session.early):
                    raise FailedError(f"server {answer['name']} did not take the early data")
                return f"a session of server {first}, early data taken by {answer['name']}"
        finally:
            await scene.balancing.avoid_nobody()
            if not server.child.is_running:
                await scene.site.restart(server)
                await scene.balancing.is_back(first)


async def quic_v2(scene: Scene) -> str:
    """RFC 9369: other numbers in the long headers."""
    async with (
        scene.network() as network,
        scene.visitor(quic_v2=True) as visitor,
        asked(visitor, network) as (_, answer),
    ):
        if network.witness.versions != {QUIC_V2}:
            raise FailedError(f"the server's versions: {', '.join(f'{v:#x}' for v in network.witness.versions)}")
        check_owner(scene, network.witness.cid, answer["name"])
        return f"server {answer['name']}"


async def rotation(scene: Scene) -> str:
    """The servers go on with another key, and the client with connection IDs that were made with it."""
    async with scene.network(rate=RATE) as network, downloading(scene, network, LONGER) as guest:
        await guest.reached(LONGER // TENTH)
        check_owner(scene, network.witness.cid, guest.server)
        before = config_id_of(network.witness.cid)
        guest.disturb()
        scene.site.rotate()
        if before == scene.site.config_id:
            raise FailedError(f"the servers had not taken configuration {1 - before} before")
        saw = await guest.complete()
        if config_id_of(network.witness.cid) == before:
            raise FailedError(f"it still uses a connection ID of configuration {before}")
        check_owner(scene, network.witness.cid, guest.server)
        return saw


async def backend_killed(scene: Scene) -> str:
    """The client's server dies. The client is told, and the next connection goes elsewhere."""
    async with scene.network() as network, scene.visitor() as visitor:
        session = await visitor.open(network.relay.address, "/whoami", "/slow/60")
        killed = 0.0
        server = None
        try:
            first = (await whoami(session.transfers[0]))["name"]
            await within(scene.stall, session.transfers[1].reached(ENOUGH), "the download does not begin")
            server = scene.site.servers[first]
            killed = await server.child.kill()
            scene.disturbed = True
            try:
                async with asyncio.timeout(TOLD_WITHIN):
                    await session.transfers[1].complete()
                raise FailedError("a dead server answered")
            except TimeoutError:
                raise FailedError(f"the client was told nothing for {TOLD_WITHIN:g} s") from None
            except ConnectionEndedError:
                told = time.time() - killed
            if not network.witness.last_words & scene.site.reset_tokens(first, network.witness.cids):
                raise FailedError(f"its connection ended after {told:.1f} s, but not by a Stateless Reset")
            async with scene.network() as another, scene.visitor() as newcomer, asked(newcomer, another) as (_, answer):
                if answer["name"] == first:
                    raise FailedError(f"the next connection went to server {first}, which is dead")
                return f"told after {told:.1f} s, then server {answer['name']}"
        finally:
            await session.close()
            if server is not None:
                await scene.site.restart(server)
                await scene.balancing.is_back(server.name)


async def balancer_restarted(scene: Scene) -> str:
    """The balancer is killed and started again."""
    async with scene.network(rate=RATE) as network, downloading(scene, network, SHORT) as guest:
        await guest.reached(SHORT // THIRD)
        guest.disturb()
        await scene.balancing.restart()
        return await guest.complete()


async def balancers_swap(scene: Scene) -> str:
    """Every second another balancer gets the client's packets, and neither tells the other anything."""
    async with scene.network(rate=RATE) as network, downloading(scene, network, LONGER) as guest:
        await asyncio.sleep(PERIOD)
        with scene.balancing.swapped(network.relay):
            guest.disturb()
            await asyncio.sleep(PERIOD)
        await asyncio.sleep(PERIOD)
        with scene.balancing.swapped(network.relay):
            guest.disturb()
            return await guest.complete()


SCENARIOS: Mapping[Feature, Callable[[Scene], Awaitable[str]]] = {
    Feature.REQUEST: request,
    Feature.DOWNLOAD: download,
    Feature.NAT_REBINDING: nat_rebinding,
    Feature.ADDRESS_MOVE: address_move,
    Feature.IPV6_TO_IPV4: ipv6_to_ipv4,
    Feature.ACTIVE_MIGRATION: active_migration,
    Feature.QUIC_V2: quic_v2,
    Feature.EARLY_DATA_ELSEWHERE: early_data_elsewhere,
    Feature.ROTATION: rotation,
    Feature.BALANCER_RESTARTED: balancer_restarted,
    Feature.BALANCERS_SWAP: balancers_swap,
    Feature.BACKEND_KILLED: backend_killed,
    Feature.RETRY: retry,  # the last one: from then on all servers demand it
}
