"""WorkerPool: workers that die, are stuck, or cannot start; what that does to the others, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop

from lb.address import Address
from lb.engines import open_return_paths
from lb.nat import UdpLimits
from lb.returnpath import ReturnPath
from lb.router import RouterLimits
from lb.routing import Backend, RoutingTable, Service
from lb.upstream import ServicePolicy
from lb.workers import WorkerPool, WorkerSettings
from tests.builders import backends
from tests.fleet import free_port, udp_socket

DEADLINE = 30.0
POLICY = ServicePolicy(router=RouterLimits(), push_rate=0, silence=0)


def table(name: str, *listen: Address) -> RoutingTable:
    return RoutingTable.build(Service(name, listen, (), backends(1), "a seed"))


@contextlib.asynccontextmanager
async def working(
    tmp_path: Path,
    tables: Sequence[RoutingTable],
    count: int,
    *,
    take_over: bool = False,
    on_handed_over: Callable[[], None] = lambda: None,
) -> AsyncIterator[WorkerPool]:
    limits = UdpLimits(flows=100, sockets=40, idle_timeout=60, new_flow_timeout=10, socket_buffer=1 << 20)
    policies = {t.service.name: POLICY for t in tables}
    settings = WorkerSettings(
        limits, policies, tmp_path, count, "text", "error", open_return_paths, take_over=take_over
    )
    pool = WorkerPool(settings, suspect=lambda *_: None, on_handed_over=on_handed_over)
    await pool.start(tables)
    try:
        yield pool
    finally:
        before = workers()
        await pool.stop()
        assert len(workers()) <= len(before) - count


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


@pytest.mark.parametrize(("old", "new"), [(2, 2), (2, 1), (1, 2), (3, 2)])
def test_a_pool_takes_over_from_a_pool_of_another_size(tmp_path: Path, old: int, new: int) -> None:
    """Every flow has the same port afterwards, whichever worker it is in, and every address is listened on."""
    vip = Address("127.0.0.1", free_port())
    backend = udp_socket()
    clients = [udp_socket() for _ in range(24)]
    members = (Backend("b0", Address(*backend.getsockname()), {}),)
    tables = [RoutingTable.build(Service("web", (vip,), (), members, "a seed"))]

    def asked(client: socket.socket) -> Any:
        client.sendto(b"\x41" * 50, vip)
        return backend.recvfrom(100)[1]

    async def story() -> None:
        handed_over = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            async with working(tmp_path, tables, old, on_handed_over=handed_over.set):
                seen_as = [await asyncio.to_thread(asked, client) for client in clients]
                pool = await stack.enter_async_context(working(tmp_path, tables, new, take_over=True))
                await handed_over.wait()
            for client, port in zip(clients, seen_as, strict=True):
                backend.sendto(b"download", port)
                assert await asyncio.to_thread(client.recv, 100) == b"download"
            if new <= old:  # more sockets of an address share clients out anew
                assert [await asyncio.to_thread(asked, client) for client in clients] == seen_as
            else:
                assert len({await asyncio.to_thread(asked, client) for client in clients}) == len(clients)
            assert (await pool.counters()).flows_restored == len(clients)
            assert sorted(n for n in os.listdir(tmp_path) if n.endswith(".map")) == [
                f"flows-{i}.map" for i in range(new)
            ]

    run(story())
    for sock in (backend, *clients):
        sock.close()


def test_a_pool_that_cannot_take_over_from_all_takes_over_from_none(tmp_path: Path) -> None:
    vip, other = (Address("127.0.0.1", free_port()) for _ in range(2))

    async def story() -> None:
        handed_over = asyncio.Event()
        async with working(tmp_path, [table("web", vip)], 2, on_handed_over=handed_over.set) as pool:
            with udp_socket(other.host, other.port), pytest.raises(OSError, match="cannot listen"):
                async with working(tmp_path, [table("web", vip, other)], 2, take_over=True):
                    pass
            assert await forwarding(pool) == 2
            await pool.apply([table("web", vip)])  # which waits for a worker that is about to hand over
            assert not handed_over.is_set()

    run(story())


def test_flows_of_workers_that_there_are_no_more_are_restored(tmp_path: Path) -> None:
    path = ReturnPath(1, Address("192.0.2.1", 1), Address("192.0.2.2", 2), Address("192.0.2.3", 3), 0, None, None, True)
    for worker in range(5):
        left = open_return_paths(tmp_path, 10, worker, 5)
        assert left is not None
        left.write(0, path._replace(local_port=worker + 1))
        left.commit()
        left.close()
    found = [open_return_paths(tmp_path, 10, worker, 2) for worker in range(2)]
    ports = [sorted(path.local_port for path in paths.remembered()) for paths in found if paths is not None]
    assert ports == [[1, 3, 5], [2, 4]]
    for paths in found:
        assert paths is not None
        paths.commit()
        paths.close()
    assert sorted(path.name for path in tmp_path.glob("*.map")) == ["flows-0.map", "flows-1.map"]


def _bound(address: Address, sock: socket.socket) -> bool:
    try:
        sock.bind(address)
    except OSError:
        return False
    return True


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_answer_that_nobody_waits_for_any_more_is_not_taken_for_the_next(tmp_path: Path) -> None:
    """A snapshot gives up after a while. What comes then must not pass for the answer to new tables."""

    async def story() -> None:
        async with working(tmp_path, [table("web", Address("127.0.0.1", free_port()))], 1) as pool:
            slow = pool._workers[0]
            assert slow._process is not None
            assert slow._process.pid is not None
            os.kill(slow._process.pid, signal.SIGSTOP)
            try:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await slow.ask("counters")
                applied = asyncio.ensure_future(slow.ask("apply", pool.orders))
                await asyncio.sleep(0)
            finally:
                os.kill(slow._process.pid, signal.SIGCONT)
            assert await applied is None

    run(story())
