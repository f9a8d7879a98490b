"""A UdpEngine on loopback between real sockets: backends that a test reads and answers from, clients that it moves."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import uvloop

from lb.address import Address
from lb.cid import Codec, ConfigId
from lb.engine import Counters
from lb.nat import UdpLimits
from lb.returnpath import ReturnPaths
from lb.router import RouterLimits, Verdict
from lb.routing import Backend, BackendState, CidSlot, RoutingTable, Service
from lb.udp import UdpEngine
from lb.upstream import ServicePolicy
from tests.builders import CONFIG, RESET_KEY, server_id

T = TypeVar("T")
PATIENCE = 5.0


def udp_socket(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    sock.settimeout(PATIENCE)
    return sock


def free_port(host: str = "127.0.0.1") -> int:
    with udp_socket(host) as sock:
        port: int = sock.getsockname()[1]
        return port


def eventually(condition: Callable[[], T], patience: float = PATIENCE) -> T:
    """Wait until `condition()` is true, and return what it says; AssertionError if it never is."""
    give_up = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.005)


def quiet(*socks: socket.socket, seconds: float = 0.1) -> bool:
    """Nothing arrives for a while."""
    return not select.select(socks, [], [], seconds)[0]


class Fleet:
    """An engine in a thread of its own, and sockets around it."""

    def __init__(
        self,
        count: int = 3,
        *,
        listen: Sequence[str] = ("127.0.0.1",),
        backend_hosts: Sequence[str] = ("127.0.0.1",),
        flows: int = 1000,
        sockets: int = 200,
        idle_timeout: float = 60.0,
        new_flow_timeout: float = 10.0,
        router: RouterLimits | None = None,
        push_rate: float = 1000.0,
        silence: float = 0.0,
        runtime: Path | None = None,
        of: Fleet | None = None,
        take_over: bool = False,
        **options: Any,
    ) -> None:
        """`of` shares another fleet's backends and addresses: the same balancer, started again.

        With `take_over` it takes over from the one that runs in the same directory. Other options are the engine's.
        """
        self.backends: list[socket.socket]
        self.service: Service
        if of is not None:
            self.backends, self.service = of.backends, of.service
        else:
            self.backends = [udp_socket(backend_hosts[i % len(backend_hosts)]) for i in range(count)]
            members = tuple(
                Backend(
                    f"b{i}",
                    Address(*sock.getsockname()[:2]),
                    {ConfigId(0): frozenset([server_id(i)])},
                )
                for i, sock in enumerate(self.backends)
            )
            addresses = tuple(Address(host, free_port(host)) for host in listen)
            self.service = Service("web", addresses, (CidSlot(CONFIG, RESET_KEY),), members, "a seed")
        self.suspects: list[str] = []
        self.handed_over = threading.Event()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self.engine = UdpEngine(
            UdpLimits(
                flows=flows,
                sockets=sockets,
                idle_timeout=idle_timeout,
                new_flow_timeout=new_flow_timeout,
                socket_buffer=1 << 20,
            ),
            {"web": ServicePolicy(router=router or RouterLimits(), push_rate=push_rate, silence=silence)},
            suspect=lambda _, backend: self.suspects.append(backend),
            return_paths=lambda lock: ReturnPaths(runtime / "flows-0.map", flows, lock=lock) if runtime else None,
            handover=runtime / "handover-0.sock" if runtime else None,
            take_over=take_over,
            predecessors=[runtime / "handover-0.sock"] if runtime and take_over else [],
            on_handed_over=self.handed_over.set,
            **options,
        )
        try:
            self.call(self.engine.start([self.table()]))
        except BaseException:
            self._end()
            for sock in self.backends if of is None else ():
                sock.close()
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        for sock in self.backends:
            sock.close()

    def stop(self) -> None:
        if self._loop.is_running():
            self.call(self.engine.stop())
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def table(self, dead: Sequence[str] = (), **states: BackendState) -> RoutingTable:
        return RoutingTable.build(self.service, states, dead)

    def apply(self, table: RoutingTable) -> None:
        self.call(self.engine.apply([table]))

    def counters(self) -> Counters:
        return self.call(self.engine.counters())

    def verdicts(self) -> dict[Verdict, int]:
        """Those that were given at all."""
        return {Verdict(i): n for i, n in enumerate(self.counters().services["web"].verdicts) if n}

    @property
    def vip(self) -> Address:
        return self.service.listen[0]

    def cid(self, backend: int) -> bytes:
        return Codec(CONFIG).encode(server_id(backend), os.urandom(12))

    @contextmanager
    def client(self, host: str = "127.0.0.1") -> Iterator[socket.socket]:
        with udp_socket(host) as sock:
            yield sock

    def round_trip(
        self, client: socket.socket, datagram: bytes, backend: int, *, to: Any = None, reply: bytes = b"reply"
    ) -> Any:
        """Send a datagram, expect it at a backend, answer, expect the answer. Returns the address that backend saw."""
        client.sendto(datagram, to or self.vip)
        got, seen_as = self.backends[backend].recvfrom(65536)
        assert got == datagram
        self.backends[backend].sendto(reply, seen_as)
        answer, source = client.recvfrom(65536)
        assert (answer, source[:2]) == (reply, tuple(to or self.vip))
        return seen_as
