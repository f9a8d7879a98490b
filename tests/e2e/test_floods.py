"""Floods of real datagrams from as many sources as there are, at a real balancer: it loses and forgets nobody."""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from lb.cid import Codec
from lb.router import Verdict
from lb.sockets import SO_RCVBUFFORCE, source_control
from tests import namespaces
from tests.builders import CONFIG, long, server_id, short
from tests.fleet import udp_socket
from tests.test_control import Site

pytestmark = pytest.mark.e2e

SEED = 20260529
FLOWS, ENTRIES, SOCKETS = 2000, 2000, 1500  # limits of the balancer
PREFIX_RATE = 100  # of new flows
EVERYWHERE = IPv4Address("10.78.0.0")  # and the 65 535 addresses after it
ONE_PREFIX = IPv4Address("10.79.0.0")  # and 255
STRIDE = 40_503  # odd: every address in turn, and neighbours far apart
PORTS = 8  # of each address
BURST = 1 << 21  # octets of the kernel's between two looks, half of what its buffer holds
OVERHEAD = 2048  # of each datagram
BUFFER = 4 << 20

# What a flow, a table entry and a socket may cost, and what an allocator may keep to itself; in octets.
PER_FLOW, PER_ENTRY, PER_SOCKET, SLACK = 1024, 512, 1024, 4 << 20
GROWTH = 1 << 20  # of a second flood, when the first one has filled everything


class Wave(NamedTuple):
    """So many datagrams of one kind, each from a 4-tuple of its own, and the verdict that becomes them."""

    datagrams: int
    datagram: Callable[[random.Random], bytes]
    verdict: Verdict
    is_one_prefix: bool = False


WAVES = {
    "Initials": Wave(5000, lambda r: long(r.randbytes(8), r.randbytes(8)), Verdict.FALLBACK),
    "Initials from one prefix": Wave(1000, lambda r: long(r.randbytes(8)), Verdict.NEW_FLOW_LIMIT, True),
    "made-up CIDs": Wave(5000, lambda r: bytes((0x41, r.randrange(32))) + r.randbytes(40), Verdict.UNKNOWN_SERVER),
    "CIDs of no configuration": Wave(
        3000, lambda r: bytes((0x41, r.randrange(32, 224))) + r.randbytes(40), Verdict.FALLBACK
    ),
    "empty": Wave(2000, lambda _: b"", Verdict.EMPTY),
    "tiny, long": Wave(2000, lambda r: bytes((r.randrange(128, 256),)) + bytes(r.randrange(5)), Verdict.MALFORMED),
    "tiny, short": Wave(2000, lambda r: bytes((r.randrange(128),)), Verdict.FALLBACK),
    "64 KiB": Wave(300, lambda _: b"\x41\x55" + bytes(65_505), Verdict.FALLBACK),
}


class Backends:
    """Backends that answer everything, attackers too, in a thread of their own."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self._selector = selectors.DefaultSelector()
        self._is_over = False
        for i, sock in enumerate(socks):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
            self._selector.register(sock, selectors.EVENT_READ, b"%d" % i)
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()
        self._selector.close()

    def _answer(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(0.05):
                sock: socket.socket = key.fileobj  # type: ignore[assignment]
                with contextlib.suppress(BlockingIOError):
                    while not self._is_over:
                        _, source = sock.recvfrom(65_536)
                        sock.sendto(key.data, source)


class Client:
    """A connection: all of its datagrams carry one CID, that of a backend, or one that says nothing."""

    def __init__(self, site: Site, backend: int | None) -> None:
        unroutable = bytes((0xE8,)) + os.urandom(8)
        self._cid = unroutable if backend is None else Codec(CONFIG).encode(server_id(backend), os.urandom(12))
        self._sock = udp_socket()
        self._site = site
        self.backend = self.ask() if backend is None else b"%d" % backend

    def ask(self) -> bytes:
        """Which backend answers."""
        self._sock.sendto(short(self._cid), self._site.vip)
        return self._sock.recv(100)

    def close(self) -> None:
        self._sock.close()


class Attacker:
    """Sends from whatever address it likes, and never twice from one 4-tuple."""

    def __init__(self, site: Site) -> None:
        self._to = site.vip
        self._random = random.Random(SEED)
        self._socks = [udp_socket("0.0.0.0") for _ in range(PORTS)]
        self._sent = {True: 0, False: 0}  # by `is_one_prefix`

    def send(self, wave: Wave) -> Iterator[None]:
        """Send a wave, in bursts that the balancer's socket can hold; yields after each."""
        left = wave.datagrams
        while left:
            space = BURST
            while left and space > 0:
                datagram = wave.datagram(self._random)
                sock, source = self._next(wave.is_one_prefix)
                sock.sendmsg([datagram], source_control(source.packed), 0, self._to)
                space -= len(datagram) + OVERHEAD
                left -= 1
            yield

    def close(self) -> None:
        for sock in self._socks:
            sock.close()

    def _next(self, is_one_prefix: bool) -> tuple[socket.socket, IPv4Address]:
        number = self._sent[is_one_prefix]
        self._sent[is_one_prefix] += 1
        first, size = (ONE_PREFIX, 1 << 8) if is_one_prefix else (EVERYWHERE, 1 << 16)
        return self._socks[number // size], first + number * STRIDE % size


def resident(pid: int) -> int:
    """Octets of memory that a process has."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) << 10


def verdicts(site: Site) -> dict[Verdict, int]:
    return {
        verdict: int(site.metric(f'quiclb_datagrams_total{{service="web",verdict="{verdict.name.lower()}"}}'))
        for verdict in Verdict
    }


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    with namespaces.namespaces("flood") as (namespace,), namespaces.inside(namespace):
        namespaces.ip(namespace, f"route add local {EVERYWHERE}/16 dev lo", f"route add local {ONE_PREFIX}/24 dev lo")
        made = Site(tmp_path, backends=3)
        made.options = (
            f"limits: {{flows: {FLOWS}, table-entries: {ENTRIES}, sockets: {SOCKETS}, new-flows-rate: {PREFIX_RATE}}}"
        )
        made.service_options += "\n    unknown-server: drop"
        made.write()
        yield made
        made.close()


def test_floods_cost_bounded_memory_are_counted_by_reason_and_take_nobodys_server_away(site: Site) -> None:
    pid = site.start().process.pid
    with Backends(site.backends), contextlib.ExitStack() as stack:
        attacker = stack.enter_context(contextlib.closing(Attacker(site)))
        kinds = (0, 1, 2, None, None, None)
        active, idle = (
            [stack.enter_context(contextlib.closing(Client(site, kind))) for kind in kinds * 2] for _ in range(2)
        )
        for client in (*active, *idle):
            assert client.ask() == client.backend
        sizes = [resident(pid)]
        asked = 0

        for _ in range(2):
            for name, wave in WAVES.items():
                before = verdicts(site)
                for _ in attacker.send(wave):
                    # What was sent before it has been looked at when its answer comes.
                    client = active[asked % len(active)]
                    asked += 1
                    assert client.ask() == client.backend, name
                got = {verdict: count - before[verdict] for verdict, count in verdicts(site).items()}
                if wave.is_one_prefix:
                    assert got[Verdict.FALLBACK] + got[Verdict.NEW_FLOW_LIMIT] >= wave.datagrams, name
                    assert got[Verdict.NEW_FLOW_LIMIT] > wave.datagrams / 2, name
                elif wave.verdict is Verdict.FALLBACK:
                    # A client without a server ID may be among them, if its entry was pushed out.
                    assert wave.datagrams <= got[Verdict.FALLBACK] <= wave.datagrams + len(active), name
                else:
                    assert got[wave.verdict] == wave.datagrams, name
                assert site.metric("quiclb_flows") <= FLOWS
                assert site.metric("quiclb_sockets") <= SOCKETS
            sizes.append(resident(pid))

        print(f"resident: {[f'{size >> 10} KiB' for size in sizes]}, seed {SEED}")
        assert sizes[1] - sizes[0] < FLOWS * PER_FLOW + 3 * ENTRIES * PER_ENTRY + SOCKETS * PER_SOCKET + SLACK
        assert sizes[2] - sizes[1] < GROWTH
        assert [client.ask() for client in idle] == [client.backend for client in idle]
        assert site.metric("quiclb_flows_evicted_total") > FLOWS
        assert site.processes[0].process.poll() is None
