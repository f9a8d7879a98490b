"""WorkerPool: workers that die, are stuck, or cannot start; what that does to the others, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import uvloop

from lb.address import Address
from lb.control import open_return_paths
from lb.nat import UdpLimits
from lb.router import RouterLimits
from lb.routing import RoutingTable, Service
from lb.upstream import ServicePolicy
from lb.workers import WorkerPool, WorkerSettings
from tests.builders import backends
from tests.fleet import free_port, udp_socket

DEADLINE = 30.0
POLICY = ServicePolicy(router=RouterLimits(), push_rate=0, silence=0)


def table(name: str, *listen: Address) -> RoutingTable:
    return RoutingTable.build(Service(name, listen, (), backends(1), "a seed"))


@contextlib.asynccontextmanager
async def working(tmp_path: Path, tables: Sequence[RoutingTable], count: int) -> AsyncIterator[WorkerPool]:
    limits = UdpLimits(flows=100, sockets=10, idle_timeout=60, new_flow_timeout=10, socket_buffer=1 << 20)
    return_paths = functools.partial(open_return_paths, tmp_path, 100)
    policies = {t.service.name: POLICY for t in tables}
    pool = WorkerPool(count, WorkerSettings(limits, policies, return_paths, "text", "error"), suspect=lambda *_: None)
    await pool.start(tables)
    try:
        yield pool
    finally:
        await pool.stop()
        assert workers() == set()


def workers() -> set[int]:
    """The worker processes that there are, dead ones that nobody has waited for included."""
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in pids if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()}


def run(story: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE):
            await story

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def eventually(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - it is the outside that is waited for
        await asyncio.sleep(0.01)


async def forwarding(pool: WorkerPool) -> int:
    """How many workers have a flow table."""
    return (await pool.counters()).flow_limit // 100


def test_a_worker_that_does_not_answer_is_replaced(tmp_path: Path) -> None:
    async def story() -> None:
        async with working(tmp_path, [table("web", Address("127.0.0.1", free_port()))], 2) as pool:
            before = workers()
            stuck = pool._workers[0]
            assert stuck._process is not None
            assert stuck._process.pid is not None
            os.kill(stuck._process.pid, signal.SIGSTOP)
            with pytest.raises(ConnectionResetError):
                await stuck.ask("counters", patience=0.2)
            while await forwarding(pool) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

            assert len(workers() - before) == 1
            assert len(workers()) == 2

    run(story())


def test_a_worker_that_cannot_start_again_is_tried_again_and_leaves_nothing_behind(tmp_path: Path) -> None:
    vip = Address("127.0.0.1", free_port())

    async def story() -> None:
        async with working(tmp_path, [table("web", vip)], 1) as pool:
            tried = set(workers())
            os.kill(tried.copy().pop(), signal.SIGKILL)
            await eventually(lambda: _bound(vip, taken))
            descriptors = 0
            while len(tried) < 5:
                now = workers()
                assert len(now) <= 1
                if now - tried:
                    tried |= now
                    descriptors = descriptors or _descriptors()
                await asyncio.sleep(0.001)
            assert _descriptors() <= descriptors + 4  # a new one is being started, or was just ended
            taken.close()
            while await forwarding(pool) < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        run(story())


def test_tables_that_cannot_be_had_harm_no_worker(tmp_path: Path) -> None:
    """Not even if they were to bring other services, with policies of their own."""

    async def story() -> None:
        old = [table("web", Address("127.0.0.1", free_port())), table("api", Address("127.0.0.1", free_port()))]
        async with working(tmp_path, old, 2) as pool:
            before = workers()
            with udp_socket() as taken:
                pool.set_policies({"new": POLICY})
                with pytest.raises(OSError, match="cannot listen"):
                    await pool.apply([table("new", Address(*taken.getsockname()))])
            counters = await pool.counters()

            assert set(counters.services) == {"web", "api"}
            assert (workers(), counters.flow_limit) == (before, 200)

    run(story())


def test_a_pool_that_cannot_start_leaves_no_process_behind(tmp_path: Path) -> None:
    async def story() -> None:
        with udp_socket() as taken, pytest.raises(OSError, match="cannot listen"):
            async with working(tmp_path, [table("web", Address(*taken.getsockname()))], 2):
                pass
        assert workers() == set()

    run(story())


def _bound(address: Address, sock: socket.socket) -> bool:
    try:
        sock.bind(address)
    except OSError:
        return False
    return True


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
