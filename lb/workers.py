"""WorkerPool: several UdpEngines on the same addresses, each in a process of its own, seen as one Engine.

Decoding is stateless, so that it does not matter which worker gets a packet. Workers decide nothing: tables come
from the pool over a socket pair, counters and suspicions go back over it, and when it closes they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

import uvloop

from lb import log
from lb.engine import Counters, Suspect, add_counters
from lb.log import event
from lb.nat import UdpLimits
from lb.returnpath import ReturnPaths
from lb.routing import RoutingTable
from lb.udp import UdpEngine
from lb.upstream import ServicePolicy

_LENGTH = 4  # octets that say how long a message is
RESTART_DELAY = 0.2  # seconds before a worker that died is started again
STOP_PATIENCE = 3.0  # seconds that a worker may take to end

logger = logging.getLogger(__name__)


class WorkerSettings(NamedTuple):
    """What every worker of a pool begins with. `return_paths(number)` is called in the worker."""

    limits: UdpLimits
    policies: Mapping[str, ServicePolicy]
    return_paths: Callable[[int], ReturnPaths | None]
    log_format: str
    log_level: str


class WorkerPool:
    """`count` workers. A worker that dies is started again with the tables of the day; what it counted stays."""

    def __init__(self, count: int, settings: WorkerSettings, *, suspect: Suspect) -> None:
        self._settings = settings
        self._suspect = suspect
        self._tables: Sequence[RoutingTable] = ()
        self._workers = [_Worker(number, self) for number in range(count)]

    async def start(self, tables: Sequence[RoutingTable]) -> None:
        self._tables = tables
        try:
            await asyncio.gather(*(worker.start() for worker in self._workers))
        except BaseException:
            await self.stop()
            raise

    async def apply(self, tables: Sequence[RoutingTable]) -> None:
        before, self._tables = self._tables, tables
        settings = self._settings
        answers = await asyncio.gather(
            *(worker.ask("apply", (tables, settings.policies)) for worker in self._workers), return_exceptions=True
        )
        for answer in answers:
            # A worker that died meanwhile starts again with these tables; one that could not listen ends it.
            if isinstance(answer, BaseException) and not isinstance(answer, ConnectionError):
                await self._go_back_to(before)
                raise answer

    async def _go_back_to(self, tables: Sequence[RoutingTable]) -> None:
        self._tables = tables
        for worker in self._workers:
            with contextlib.suppress(OSError):
                await worker.ask("apply", (tables, self._settings.policies))

    def set_policies(self, policies: Mapping[str, ServicePolicy]) -> None:
        self._settings = self._settings._replace(policies=policies)

    async def counters(self) -> Counters:
        total = Counters()
        for part in await asyncio.gather(*(worker.counters() for worker in self._workers)):
            add_counters(total, part)
        return total

    async def stop(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    @property
    def settings(self) -> WorkerSettings:
        return self._settings

    @property
    def tables(self) -> Sequence[RoutingTable]:
        return self._tables

    def suspect(self, service: str, backend: str) -> None:
        self._suspect(service, backend)


class _Worker:
    """The pool's end of one worker."""

    def __init__(self, number: int, pool: WorkerPool) -> None:
        self._number = number
        self._pool = pool
        self._process: SpawnProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Any] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._past = Counters()  # of predecessors
        self._last = Counters()
        self._stopping = False

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        settings = self._pool.settings
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(
            target=_worker_main, args=(theirs, self._number, settings, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.create_task(self._read(reader))
        try:
            await self.ask("start", (self._pool.tables, settings.policies))
        except (ConnectionError, EOFError) as error:
            raise OSError(f"worker {self._number} did not start") from error

    async def ask(self, what: str, argument: Any = None) -> Any:
        """Send a request and wait for its answer. Raises what the worker raised, or ConnectionError if it is gone."""
        async with self._one_at_a_time:
            writer = self._writer
            if writer is None:
                raise ConnectionResetError(f"worker {self._number} is gone")
            self._answer = asyncio.get_running_loop().create_future()
            writer.write(_packed((what, argument)))
            await writer.drain()
            return await self._answer

    async def counters(self) -> Counters:
        with contextlib.suppress(ConnectionError):
            self._last = await self.ask("counters")
        total = Counters()
        add_counters(total, self._past)
        add_counters(total, self._last)
        return total

    async def stop(self) -> None:
        self._stopping = True
        if self._writer is not None:
            self._writer.close()  # a worker ends when its pool is gone
        process = self._process
        if process is not None:
            await asyncio.get_running_loop().run_in_executor(None, process.join, STOP_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                what, argument = await _unpacked(reader)
                if what == "suspect":
                    self._pool.suspect(*argument)
                elif self._answer is not None and not self._answer.done():
                    if what == "error":
                        self._answer.set_exception(argument)
                    else:
                        self._answer.set_result(argument)
        self._writer = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError(f"worker {self._number} is gone"))
        if not self._stopping:
            self._reading = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        assert self._process is not None  # noqa: S101 - it was started once
        await asyncio.get_running_loop().run_in_executor(None, self._process.join)
        event(logger, logging.ERROR, "worker-died", worker=self._number, status=self._process.exitcode)
        self._last.flows = self._last.flow_limit = self._last.sockets = self._last.socket_limit = 0
        for service in self._last.services.values():
            for backend in service.backends.values():
                backend.flows = 0
        add_counters(self._past, self._last)
        self._last = Counters()
        while not self._stopping:
            await asyncio.sleep(RESTART_DELAY)
            try:
                await self.start()
            except OSError as error:
                event(logger, logging.ERROR, "worker-failed", worker=self._number, reason=str(error))
                continue
            event(logger, logging.INFO, "worker-started", worker=self._number)
            return


def _packed(message: tuple[str, Any]) -> bytes:
    octets = pickle.dumps(message)
    return len(octets).to_bytes(_LENGTH) + octets


async def _unpacked(reader: asyncio.StreamReader) -> tuple[str, Any]:
    length = int.from_bytes(await reader.readexactly(_LENGTH))
    # Both ends are this program, over a socket pair that nobody else can reach.
    what, argument = pickle.loads(await reader.readexactly(length))  # noqa: S301
    return what, argument


def _worker_main(sock: socket.socket, number: int, settings: WorkerSettings, parent: int) -> None:
    """A worker process. Signals are for the parent, which may be in the same process group."""
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    log.configure(settings.log_format, settings.log_level)
    if os.getppid() != parent:
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(sock, number, settings))


async def _work(sock: socket.socket, number: int, settings: WorkerSettings) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    engine = UdpEngine(
        settings.limits,
        settings.policies,
        suspect=lambda service, backend: writer.write(_packed(("suspect", (service, backend)))),
        return_paths=settings.return_paths(number),
        shared=True,
    )
    try:
        while True:
            what, argument = await _unpacked(reader)
            answer: tuple[str, Any] = ("done", None)
            try:
                if what == "counters":
                    answer = ("done", await engine.counters())
                else:
                    tables, policies = argument
                    engine.set_policies(policies)
                    await (engine.start(tables) if what == "start" else engine.apply(tables))
            except OSError as error:
                answer = ("error", error)
            writer.write(_packed(answer))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the pool is gone
    finally:
        await engine.stop()
        writer.close()
