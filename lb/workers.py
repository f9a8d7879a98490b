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
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from lb import handover, log
from lb.address import Address
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
START_PATIENCE = 60.0  # seconds that it may take to start, which is longer with many flows to carry on
ANSWER_PATIENCE = 10.0  # seconds that it may take for anything else

Orders = tuple[Sequence[RoutingTable], Mapping[str, ServicePolicy]]  # what all workers obey

logger = logging.getLogger(__name__)


class WorkerSettings(NamedTuple):
    """What each of `workers` workers begins with.

    `return_paths(directory, flows, number, workers, lock)` is called in the worker. With `take_over` it begins with
    what workers of another process have, which serve sockets in `directory`.
    """

    limits: UdpLimits
    policies: Mapping[str, ServicePolicy]
    directory: Path
    workers: int
    log_format: str
    log_level: str
    return_paths: Callable[[Path, int, int, int, int | None], ReturnPaths | None]
    log_flows: float = 0.0
    take_over: bool = False


def make_worker(
    settings: WorkerSettings,
    number: int,
    *,
    suspect: Suspect,
    on_handed_over: Callable[[], None],
    inherited: Sequence[socket.socket] = (),
    keep: Callable[[Address, int | None], None] = lambda *_: None,
) -> UdpEngine:
    """The engine of worker `number`, for the process that it is to run in."""
    directory, workers, flows = settings.directory, settings.workers, settings.limits.flows
    return UdpEngine(
        settings.limits,
        settings.policies,
        suspect=suspect,
        return_paths=lambda lock: settings.return_paths(directory, flows, number, workers, lock),
        shared=workers > 1,
        inherited=inherited,
        keep=keep,
        handover=directory / handover.SOCKET.format(number),
        take_over=settings.take_over,
        predecessors=handover.sockets_of(directory, number, workers) if settings.take_over else (),
        on_handed_over=on_handed_over,
        log_flows=settings.log_flows,
    )


class WorkerPool:
    """Workers. One that dies is started again with the tables of the day; what it counted stays.

    `on_handed_over` is called when each has handed over everything to one of another process, which has then taken
    over the pool. `inherited` are bound sockets that somebody opened for us: the first worker has them.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        suspect: Suspect,
        on_handed_over: Callable[[], None],
        inherited: Sequence[socket.socket] = (),
    ) -> None:
        self._settings = settings
        self._suspect = suspect
        self._on_handed_over = on_handed_over
        self._handed_over: set[int] = set()
        self._inherited = inherited
        self._orders: Orders = (), settings.policies
        self._workers = [_Worker(number, self) for number in range(settings.workers)]

    async def start(self, tables: Sequence[RoutingTable]) -> None:
        self._orders = tables, self._settings.policies
        try:
            started = await asyncio.gather(*(worker.start() for worker in self._workers), return_exceptions=True)
            for error in started:
                if error is not None:
                    raise error
        except BaseException:
            await self.stop()
            raise
        # A worker that is started again has a predecessor of its own, which is dead.
        self._settings = self._settings._replace(take_over=False)

    async def apply(self, tables: Sequence[RoutingTable]) -> None:
        before, self._orders = self._orders, (tables, self._settings.policies)
        answers = await asyncio.gather(
            *(worker.ask("apply", self._orders) for worker in self._workers), return_exceptions=True
        )
        for answer in answers:
            # A worker that died meanwhile starts again with these tables; one that could not listen ends it.
            if isinstance(answer, BaseException) and not isinstance(answer, ConnectionError):
                await self._go_back_to(before)
                raise answer

    async def _go_back_to(self, orders: Orders) -> None:
        self._orders = orders
        for worker in self._workers:
            with contextlib.suppress(OSError):
                await worker.ask("apply", orders)

    def set_policies(self, policies: Mapping[str, ServicePolicy]) -> None:
        self._settings = self._settings._replace(policies=policies)

    async def counters(self) -> Counters:
        total = Counters()
        for part in await asyncio.gather(*(worker.counters() for worker in self._workers)):
            add_counters(total, part)
        return total

    async def stop(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        for sock in self._inherited:
            sock.close()

    @property
    def settings(self) -> WorkerSettings:
        return self._settings

    @property
    def orders(self) -> Orders:
        return self._orders

    def suspect(self, service: str, backend: str) -> None:
        self._suspect(service, backend)

    def inherited_by(self, number: int) -> list[socket.socket]:
        return [] if number else [sock for sock in self._inherited if sock.fileno() >= 0]

    def handed_over(self, number: int) -> None:
        self._handed_over.add(number)
        if len(self._handed_over) == len(self._workers):
            self._handed_over.clear()
            self._on_handed_over()


class _Worker:
    """The pool's end of one worker."""

    def __init__(self, number: int, pool: WorkerPool) -> None:
        self._number = number
        self._pool = pool
        self._process: SpawnProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Any] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._past = Counters()  # of predecessors
        self._last = Counters()

    async def start(self) -> None:
        """Start it, and again whenever it ends, until `stop`. Raises OSError if it does not start the first time."""
        await self._spawn()
        self._keeping = asyncio.create_task(self._keep())

    async def ask(self, what: str, argument: Any = None, patience: float = ANSWER_PATIENCE) -> Any:
        """Send a request and wait for its answer. Raises what the worker raised, or ConnectionError if it is gone.

        One that does not answer in time is ended: its successor has its flows, and the others are not kept waiting.
        Whoever is cancelled leaves the answer to be waited for: it must not be taken for that to the next question.
        """
        asking = asyncio.ensure_future(self._ask(what, argument, patience))
        asking.add_done_callback(lambda asked: None if asked.cancelled() else asked.exception())
        return await asyncio.shield(asking)

    async def _ask(self, what: str, argument: Any, patience: float) -> Any:
        async with self._one_at_a_time:
            writer = self._writer
            if writer is None:
                raise ConnectionResetError(f"worker {self._number} is gone")
            self._answer = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(patience):
                    writer.write(_packed((what, argument)))
                    await writer.drain()
                    return await self._answer
            except TimeoutError:
                event(logger, logging.ERROR, "worker-stuck", worker=self._number, request=what)
                self._writer = None  # an answer that comes now would be taken for that to the next question
                writer.close()
                if self._process is not None:
                    self._process.kill()
                raise ConnectionResetError(f"worker {self._number} does not answer") from None
            finally:
                self._answer = None

    async def counters(self) -> Counters:
        with contextlib.suppress(ConnectionError):
            self._last = await self.ask("counters")
        total = Counters()
        add_counters(total, self._past)
        add_counters(total, self._last)
        return total

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        await self._end()

    async def _spawn(self) -> None:
        """Start a process, and wait until it forwards. Raises OSError, and leaves nothing behind, if it does not."""
        ours, theirs = socket.socketpair()
        settings = self._pool.settings
        context = multiprocessing.get_context("spawn")
        try:
            with theirs:
                inherited = self._pool.inherited_by(self._number)
                self._process = context.Process(
                    target=_worker_main, args=(theirs, self._number, settings, os.getpid(), inherited), daemon=True
                )
                self._process.start()
            reader, self._writer = await asyncio.open_connection(sock=ours)
            self._reading = asyncio.create_task(self._read(reader))
            await self.ask("start", self._pool.orders, START_PATIENCE)
        except BaseException as error:
            if self._writer is None:
                ours.close()
            await self._end()
            if isinstance(error, ConnectionError):
                raise OSError(f"worker {self._number} did not start") from error
            raise

    async def _end(self) -> None:
        """End the process, if there is one, and forget it."""
        if self._writer is not None:
            self._writer.close()  # a worker ends when its pool is gone
            self._writer = None
        process = self._process
        if process is not None and process.pid is not None:
            await asyncio.get_running_loop().run_in_executor(None, process.join, STOP_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            self._reading = None

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                what, argument = await _unpacked(reader)
                if what == "suspect":
                    self._pool.suspect(*argument)
                elif what == "handed-over":
                    self._pool.handed_over(self._number)
                elif self._answer is not None and not self._answer.done():
                    if what == "error":
                        self._answer.set_exception(argument)
                    else:
                        self._answer.set_result(argument)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it has ended
        finally:
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(ConnectionResetError(f"worker {self._number} is gone"))

    async def _keep(self) -> None:
        while True:
            assert self._reading is not None  # noqa: S101 - it was started
            await asyncio.wait([self._reading])
            await self._end()
            assert self._process is not None  # noqa: S101
            event(logger, logging.ERROR, "worker-died", worker=self._number, status=self._process.exitcode)
            self._bury()
            while True:
                await asyncio.sleep(RESTART_DELAY)
                try:
                    await self._spawn()
                except OSError as error:
                    event(logger, logging.ERROR, "worker-failed", worker=self._number, reason=str(error))
                else:
                    break
            event(logger, logging.INFO, "worker-started", worker=self._number)

    def _bury(self) -> None:
        """Keep what it counted, and not what it had."""
        self._last.flows = self._last.flow_limit = self._last.sockets = self._last.socket_limit = 0
        for service in self._last.services.values():
            for backend in service.backends.values():
                backend.flows = 0
        add_counters(self._past, self._last)
        self._last = Counters()


def _packed(message: tuple[str, Any]) -> bytes:
    octets = pickle.dumps(message)
    return len(octets).to_bytes(_LENGTH) + octets


async def _unpacked(reader: asyncio.StreamReader) -> tuple[str, Any]:
    length = int.from_bytes(await reader.readexactly(_LENGTH))
    # Both ends are this program, over a socket pair that nobody else can reach.
    what, argument = pickle.loads(await reader.readexactly(length))  # noqa: S301
    return what, argument


def _worker_main(
    sock: socket.socket, number: int, settings: WorkerSettings, parent: int, inherited: list[socket.socket]
) -> None:
    """A worker process. Signals are for the parent, which may be in the same process group."""
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    log.configure(settings.log_format, settings.log_level)
    if os.getppid() != parent:
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(sock, number, settings, inherited))


async def _work(sock: socket.socket, number: int, settings: WorkerSettings, inherited: Sequence[socket.socket]) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    engine = make_worker(
        settings,
        number,
        suspect=lambda service, backend: writer.write(_packed(("suspect", (service, backend)))),
        on_handed_over=lambda: writer.write(_packed(("handed-over", None))),
        inherited=inherited,
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
