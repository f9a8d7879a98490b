"""Echoes beside every backend, as a service of their own, and numbered datagrams to them: whatever is lost has a
number.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple, cast

from backend.clients.source import source_towards
from backend.demo.lan import VIP, VIP_V6
from backend.demo.stage import Stage
from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId, ServerId
from tests.builders import short

NAME = "echo"
PORT = 7
CONFIG = CidConfig(ConfigId(0), 4, 4, None)
UNROUTABLE_CID = b"\xe0" + bytes(8)
INTERVAL = 0.002  # seconds from one datagram of a socket to its next
GRACE = 2.0  # seconds that an answer may take; on this network it takes far less than a millisecond
SIZE = 60  # octets of a datagram
NUMBER = 8  # octets, the last ones, are its number
# Each is used once: a balancer remembers 4-tuples for longer than a test takes. The kernel gives away others.
PORTS = itertools.count(10_000)


def service(stage: Stage, *backends: str, nobody: str | None = None) -> dict[str, Any]:
    """The service, in a balancer's file, with the echoes beside some backends; and with one where `nobody` is."""
    listen = [Address(VIP, PORT)] if stage.place.splits_families else [Address(VIP, PORT), Address(VIP_V6, PORT)]
    where = {
        name: stage.servers[name].address_for(listen, same_family=stage.place.splits_families).host for name in backends
    }
    if nobody is not None:
        where["nobody"] = nobody
    return {
        "name": NAME,
        "listen": [str(address) for address in listen],
        "cid-configs": [{"config-id": 0, "server-id-length": 4, "nonce-length": 4}],
        "backends": [
            {"name": name, "address": str(Address(host, PORT)), "server-ids": {"0": [server_id(name).hex()]}}
            for name, host in where.items()
        ],
        "health": {"probe": "none"},
    }


def server_id(backend: str) -> ServerId:
    return ServerId(b"\xec" + backend.encode().ljust(3, b"\0")[:3])


def cid_of(backend: str) -> bytes:
    """A connection ID of the echo beside a backend."""
    return Codec(CONFIG).encode(server_id(backend), bytes(CONFIG.nonce_length))


class _Echo(asyncio.DatagramProtocol):
    def __init__(self, name: str) -> None:
        self._name = name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._transport.sendto(self._name.encode() + b" " + data[-NUMBER:], addr)


@contextlib.asynccontextmanager
async def echoes(stage: Stage) -> AsyncIterator[None]:
    """Echoes beside every backend, on all its addresses, as long as the block lasts."""
    async with contextlib.AsyncExitStack() as opened:
        for name, server in stage.servers.items():
            with stage.place.inside(name):
                for address in server.listens:
                    await _open(opened, _Echo(name), address._replace(port=PORT))
        yield


class Answer(NamedTuple):
    number: int
    backend: str
    source: Address


class Caller(asyncio.DatagramProtocol):
    """One socket that sends numbered datagrams with one connection ID."""

    def __init__(self, target: Address, dcid: bytes) -> None:
        self.target = target
        self.sent = 0
        self.answers: list[Answer] = []
        self._dcid = dcid
        self._came = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        name, _, number = data.partition(b" ")
        self.answers.append(Answer(int.from_bytes(number), name.decode(), Address(*addr[:2])))
        self._came.set()

    def send(self, size: int = SIZE) -> None:
        """One more, of `size` octets."""
        self._transport.sendto(short(self._dcid, size - NUMBER) + self.sent.to_bytes(NUMBER), self.target)
        self.sent += 1

    async def answered(self, number: int) -> None:
        """Wait until it has so many answers."""
        while len(self.answers) < number:
            self._came.clear()
            await self._came.wait()

    async def ask(self) -> str:
        """Send one, and say which backend answers, after all that were sent before."""
        self.send()
        await self.answered(self.sent)
        return self.answers[-1].backend

    def missing(self) -> list[int]:
        """The numbers that were not answered exactly once, from where they were sent to."""
        found = sorted(answer.number for answer in self.answers if answer.source == self.target)
        if found == list(range(self.sent)):
            return []
        return [number for number in range(self.sent) if found.count(number) != 1]

    @property
    def backends(self) -> list[str]:
        """Who answered, in the order of the questions, each named once for all that it answered in a row."""
        return [name for name, _ in itertools.groupby(answer.backend for answer in sorted(self.answers))]


@contextlib.asynccontextmanager
async def callers(target: Address, dcids: Iterable[bytes]) -> AsyncIterator[list[Caller]]:
    """A caller for each connection ID, on ports that nobody had before."""
    async with contextlib.AsyncExitStack() as opened:
        made = [Caller(target, dcid) for dcid in dcids]
        for caller in made:
            await _open(opened, caller, Address(source_towards(target), next(PORTS)))
        yield made


@contextlib.asynccontextmanager
async def calling(everybody: Sequence[Caller]) -> AsyncIterator[None]:
    """They send all the time until the block is left; then whatever is under way arrives, or does not."""

    async def call() -> None:
        while True:
            for caller in everybody:
                caller.send()
            await asyncio.sleep(INTERVAL)

    task = asyncio.create_task(call())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE):
            for caller in everybody:
                await caller.answered(caller.sent)


async def _open(
    opened: contextlib.AsyncExitStack, protocol: asyncio.DatagramProtocol, address: Address
) -> asyncio.DatagramTransport:
    sock = socket.socket(socket.AF_INET6 if address.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: protocol, sock=sock)
    opened.callback(transport.close)
    return transport
