"""AdminServer: where the API, the status page and the metrics are served, on a thread and an event loop of their own.

A slow client, or many, hold up no datagram. At each address so many connections are served at a time, and more are
turned away.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
import struct
import threading
from collections.abc import Coroutine, Sequence
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lb.address import Address
from lb.admin.access import Peer, Policy, Tokens
from lb.admin.api import Api, Balancer, Probes
from lb.admin.files import Kept, kept_tls, kept_token
from lb.admin.http import Problem
from lb.keys import AdminConfig
from lb.log import event
from lb.operations import Operations

if TYPE_CHECKING:
    from lb.admin.connection import Connections

logger = getLogger(__name__)

T = TypeVar("T")

MAX_CONNECTIONS = 32  # at an address
MAX_SCRAPES = 16  # at the metrics port
BACKLOG = 64
CLIENT_PATIENCE = 10.0  # seconds for a request to come, and again for its answer to be taken
TAKEN_PATIENCE = 3.0  # seconds to wait for an address that a predecessor has not left yet
PAUSE = 1.0  # seconds until it accepts again, when there was no descriptor
CYCLES = 3  # of the event loop, that a transport takes to close its socket, with TLS in between
GRACE = 2.0  # seconds that answers have left when the server stops


class AdminServer:
    """Serves at `addresses` (paths are those of unix sockets) and, to anybody, metrics at `metrics`."""

    def __init__(
        self,
        config: AdminConfig,
        metrics: Address | None,
        addresses: Sequence[Path | Address],
        *,
        operations: Operations,
        loop: asyncio.AbstractEventLoop,
        client_patience: float = CLIENT_PATIENCE,
    ) -> None:
        """`operations` are called on `loop`."""
        self._config = config
        self._wanted = tuple(addresses)
        self._wanted_metrics = metrics
        self._balancer = Balancer(operations, loop)
        self._client_patience = client_patience
        self._listeners: list[_Listener] = []
        self._own: _Thread | None = None
        self._admin: Connections | None = None
        self._metrics: Connections | None = None
        self._tls: Kept[ssl.SSLContext] | None = None
        self._doors: list[_Door] = []
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def addresses(self) -> tuple[Path | Address, ...]:
        """Where it serves now; with the ports that were found, if 0 was asked for."""
        return tuple(listener.where for listener in self._listeners if not listener.is_metrics)

    @property
    def metrics_address(self) -> Address | None:
        """Where metrics are served now."""
        found = (listener.where for listener in self._listeners if listener.is_metrics)
        return next((where for where in found if isinstance(where, Address)), None)

    async def start(self, *, patience: float = TAKEN_PATIENCE) -> None:
        """Listen and serve. Raises OSError, naming the address or file, if that is not possible.

        Addresses that are taken may become free within `patience` seconds.
        """
        if self._listeners:
            return
        listeners = await self._listen(patience)
        try:
            if self._own is None:
                self._own = _Thread()
                await self._own.do(self._prepare())
        except BaseException:
            for listener in listeners:
                listener.close()
            self._stop_thread()
            raise
        self._listeners = listeners
        await self._own.do(self._open(listeners))

    async def release(self) -> None:
        """Leave the addresses to somebody else. Who is connected is still answered; `start` takes them again."""
        if self._own is None:
            return
        self._listeners = []
        await self._own.do(self._close())

    async def stop(self) -> None:
        """Stop listening, answer those who are connected, cut off who is too slow. Harmless if not started."""
        if self._own is None:
            return
        await self.release()
        await self._own.do(self._end())
        self._stop_thread()

    async def _listen(self, patience: float) -> list[_Listener]:
        give_up = asyncio.get_running_loop().time() + patience
        listeners: list[_Listener] = []
        metrics = [] if self._wanted_metrics is None else [self._wanted_metrics]
        try:
            for where, is_metrics in [*((each, False) for each in self._wanted), *((each, True) for each in metrics)]:
                while True:
                    try:
                        listeners.append(_listener(where, is_metrics))
                        break
                    except OSError as error:
                        if error.errno != errno.EADDRINUSE or asyncio.get_running_loop().time() >= give_up:
                            raise
                    await asyncio.sleep(0.02)
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        return listeners

    def _stop_thread(self) -> None:
        if self._own is not None:
            self._own.stop()
            self._own = None

    # What follows runs on the thread of its own.

    async def _prepare(self) -> None:
        from lb.admin.connection import Connections  # noqa: PLC0415 - aiohttp takes 0.2 s, which nobody is to wait for

        config = self._config
        read, write = kept_token(config.read_token_file), kept_token(config.write_token_file)
        self._tls = kept_tls(config)
        probes = Probes(self._balancer)
        api = Api(self._balancer, probes, Policy.of(config), lambda: Tokens(read(), write()))
        self._admin = Connections(api.answer, self._client_patience)
        self._metrics = Connections(probes.answer, self._client_patience)

    async def _open(self, listeners: list[_Listener]) -> None:
        for listener in listeners:
            connections = self._metrics if listener.is_metrics else self._admin
            assert connections is not None  # noqa: S101 - _prepare came before
            has_tls = isinstance(listener.where, Address) and not listener.is_metrics and self._tls is not None
            self._doors.append(_Door(listener, connections, self._tls if has_tls else None, self._serving))

    async def _close(self) -> None:
        while self._doors:
            self._doors.pop().close()

    async def _end(self) -> None:
        for connections in (self._admin, self._metrics):
            if connections is not None:
                await connections.stop(GRACE)
        left = list(self._serving)  # accepted a moment ago, or too slow
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for _ in range(CYCLES):
            await asyncio.sleep(0)


class _Door:
    """An address while it is open: who comes in is served, or turned away if there are too many."""

    def __init__(
        self,
        listener: _Listener,
        connections: Connections,
        tls: Kept[ssl.SSLContext] | None,
        serving: set[asyncio.Task[None]],
    ) -> None:
        """`serving` are those behind all doors."""
        self._listener = listener
        self._connections = connections
        self._tls = tls
        self._serving = serving
        self._inside: set[asyncio.Task[None]] = set()
        self._most = MAX_SCRAPES if listener.is_metrics else MAX_CONNECTIONS
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """Let nobody in any more."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listener.socket)
        self._listener.close()

    def _listen(self) -> None:
        # Not loop.sock_accept(): whom it has accepted when it is cancelled, nobody closes.
        self._loop.add_reader(self._listener.socket, self._accept)

    def _accept(self) -> None:
        try:
            sock, name = self._listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors, most likely: they come back, and the log is not to fill up
            reason = error.strerror or str(error)
            event(logger, ERROR, "admin-error", address=self._listener.where, error=reason)
            self._loop.remove_reader(self._listener.socket)
            self._again = self._loop.call_later(PAUSE, self._listen)
            return
        sock.setblocking(False)
        tls = None if self._tls is None else self._tls.get()
        if len(self._inside) >= self._most:
            _turn_away(sock, is_tls=tls is not None)
            return
        task = self._loop.create_task(self._connections.serve(sock, _peer(sock, name, is_tls=tls is not None), tls))
        for tasks in (self._inside, self._serving):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        # Nobody else closes it if the task is cancelled before its first step.
        task.add_done_callback(lambda _: sock.close())


class _Thread:
    """An event loop on a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)
        self._thread.start()

    async def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Have it done there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        finally:
            self._loop.close()


class _Listener(NamedTuple):
    """A socket that listens, and where. `inode` is that of a unix socket's file."""

    socket: socket.socket
    where: Path | Address
    is_metrics: bool
    inode: int | None

    def close(self) -> None:
        """Stop listening. A unix socket's file goes, if it is still ours."""
        self.socket.close()
        if isinstance(self.where, Path):
            with contextlib.suppress(OSError):
                if os.lstat(self.where).st_ino == self.inode:
                    self.where.unlink()


def _listener(where: Path | Address, is_metrics: bool) -> _Listener:
    """Raises OSError, naming the address."""
    try:
        if isinstance(where, Path):
            return _unix_listener(where)
        family = socket.AF_INET6 if where.is_ipv6 else socket.AF_INET
        with contextlib.ExitStack() as undo:
            sock = socket.socket(family, socket.SOCK_STREAM)
            undo.callback(sock.close)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a former process
            if where.is_ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(where)
            sock.listen(BACKLOG)
            sock.setblocking(False)
            undo.pop_all()
        return _Listener(sock, Address(*sock.getsockname()[:2]), is_metrics, None)
    except OSError as error:
        shown = f"unix:{where}" if isinstance(where, Path) else where
        raise OSError(error.errno, f"cannot serve HTTP on {shown}: {error.strerror or error}") from None


def _unix_listener(path: Path) -> _Listener:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        undo.callback(sock.close)
        sock.setblocking(False)
        os.fchmod(sock.fileno(), 0o600)  # Linux: before bind() it becomes the file's mode, so that it never has another
        try:
            sock.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            path.unlink(missing_ok=True)
            sock.bind(str(path))
        sock.listen(BACKLOG)
        undo.pop_all()
    return _Listener(sock, path, False, os.lstat(path).st_ino)


def _is_stale(path: Path) -> bool:
    """Whether a file is a socket that nobody listens at: one of a process that was killed."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            sock.connect(str(path))
    except FileNotFoundError:
        return True
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
    return False


def _peer(sock: socket.socket, name: Any, *, is_tls: bool) -> Peer:
    """Who was accepted; `name` is what accept() calls him."""
    if sock.family == socket.AF_UNIX:
        credentials = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
        return Peer(uid=credentials.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[1])
    return Peer(Address(*name[:2]), tls=is_tls)


def _turn_away(sock: socket.socket, *, is_tls: bool) -> None:
    from lb.admin.connection import encode  # noqa: PLC0415 - it is imported by now

    with sock, contextlib.suppress(OSError):
        if not is_tls:
            sock.send(encode(Problem(503, "too many connections").response()))
