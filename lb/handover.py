"""Handover: a process that ends gives everything it has to its successor, over a unix socket, while it goes on.

The successor asks, the predecessor answers. Both speak JSON, one object a message; descriptors travel beside it.

    successor                                 predecessor
    take-over (version)                       belongings (its return path file and the lock), or refused
    more                                      sockets, MAX_DESCRIPTORS at most; again until there are none
    … reads the file, begins with its flows   … forwards
    ready                                     stops reading; sockets that were opened since
                                              yours
    … reads what has changed in the file
    mine; begins to read                      … waits

Datagrams wait in the sockets' buffers between "ready" and "mine", and nowhere else. Until the predecessor ends, all
of this can be undone: if the connection closes, whenever that is, it reads on as if nothing had been asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lb.log import event

# include/net/scm.h
MAX_DESCRIPTORS = 253  # SCM_MAX_FD
MSG_CMSG_CLOEXEC = 0x40000000

# Ours.
VERSION = 1  # of the messages, and of the return path file
MESSAGE = 65536  # octets, at most
ANSWER_PATIENCE = 10.0  # seconds that a predecessor may take to answer
READY_PATIENCE = 120.0  # seconds that a successor may take to begin with all flows
PAUSE_PATIENCE = 2.0  # seconds that it may take afterwards, while nobody reads
SOCKET = "handover-{}.sock"

_INT = struct.calcsize("i")
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user and group ID

logger = logging.getLogger(__name__)


class Sockets(NamedTuple):
    """Those that clients send to, and those that backends answer to."""

    listening: list[socket.socket]
    upstream: list[socket.socket]

    def close(self) -> None:
        for sock in (*self.listening, *self.upstream):
            sock.close()


class Giver(Protocol):
    """An engine that can be succeeded."""

    def files(self) -> tuple[str, int, int] | None:
        """The name of the return path file, its descriptor and that of its lock; None if there is none."""

    def sockets(self) -> Sockets: ...

    def records(self) -> int:
        """How many numbers of the return path file were ever in use."""

    async def pause(self) -> None:
        """Stop reading and changing flows, with nothing left in hand."""

    def resume(self) -> None:
        """Go on: the successor has ended."""

    def handed_over(self) -> None:
        """The successor reads."""


def sockets_of(directory: Path, worker: int, workers: int) -> list[Path]:
    """The sockets of those whom worker number `worker` of so many succeeds: its own number, and every so many more.

    Number 0 is there in any case; whether somebody serves a socket is another question.
    """
    found = (re.fullmatch(r"handover-(\d{1,6})\.sock", path.name) for path in directory.glob("handover-*.sock"))
    numbers = {0} | {int(match[1]) for match in found if match}
    return [directory / SOCKET.format(n) for n in sorted(numbers) if n % workers == worker]


def is_trusted(peer: int, ours: int) -> bool:
    """Whether a process of the user ID `peer` may have what one of `ours` has, or give it something."""
    return peer in (0, ours)


class Channel:
    """One end of a handover: a connected SOCK_SEQPACKET socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    async def send(self, what: str, descriptors: Sequence[int] = (), **values: object) -> None:
        """Raises OSError if there is nobody who would read it."""
        octets = json.dumps({"what": what, **values}).encode()
        while True:
            try:
                socket.send_fds(self._sock, [octets], list(descriptors))
            except BlockingIOError:
                await self._when(writable=True)
            else:
                return

    async def receive(self, *expected: str, patience: float | None) -> tuple[dict[str, Any], list[int]]:
        """The next message and the descriptors that came with it, which are the caller's.

        Raises OSError if the other end is gone, is too slow, or says something else.
        """
        try:
            async with asyncio.timeout(patience):
                while True:
                    try:
                        return self._received(expected)
                    except BlockingIOError:
                        await self._when(writable=False)
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, f"no word within {patience} s: expected {_named(expected)}") from None

    def last_word(self, *expected: str) -> bool:
        """Whether one of these was sent by now. From now on the other end can send nothing, and knows it."""
        self._sock.shutdown(socket.SHUT_RD)
        try:
            _, descriptors = self._received(expected)
        except OSError:
            return False
        close(descriptors)
        return True

    async def closed(self) -> None:
        """Wait until the other end is gone."""
        with contextlib.suppress(OSError):
            await self.receive(patience=None)

    def close(self) -> None:
        self._sock.close()

    def _received(self, expected: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
        # Not socket.recv_fds: it forgets its flags.
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT)
        octets, control, flags, _ = self._sock.recvmsg(MESSAGE, space, MSG_CMSG_CLOEXEC)
        whole = (data[: len(data) // _INT * _INT] for _, kind, data in control if kind == socket.SCM_RIGHTS)
        descriptors = [number for data in whole for number in memoryview(data).cast("i")]
        try:
            if not octets:
                raise ConnectionResetError(errno.ECONNRESET, f"the other process is gone: expected {_named(expected)}")
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise OSError(errno.EMFILE, "not all descriptors arrived: the limit of open files is too low")
            try:
                message = json.loads(octets)
                what = message["what"]
            except (ValueError, TypeError, KeyError):
                raise OSError(errno.EPROTO, "what the other process says makes no sense") from None
            if what == "refused":
                raise OSError(errno.EBUSY, f"refused: {message.get('reason')}")
            if what not in expected:
                raise OSError(errno.EPROTO, f"the other process says {what!r}: expected {_named(expected)}")
        except OSError:
            close(descriptors)
            raise
        return message, descriptors

    async def _when(self, *, writable: bool) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
        add(self._sock.fileno(), lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            remove(self._sock.fileno())


class Taking:
    """The successor's end."""

    def __init__(self, path: Path, channel: Channel, file: str, map_descriptor: int, lock: int) -> None:
        self.file = path.with_name(Path(file).name)
        self.map_descriptor = map_descriptor
        self.lock = lock
        self._path = path
        self._channel = channel

    @classmethod
    async def connect(cls, path: Path) -> Taking | None:
        """Ask the process that serves `path`. Raises OSError, with a reason, if it does not agree.

        None if nobody serves it: a process that had more workers left it behind. The first worker's is served always.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            with _short(path) as name:
                sock.connect(name)
            if not is_trusted(_peer(sock), os.geteuid()):
                raise PermissionError(errno.EPERM, "it is somebody else's process")
            channel = Channel(sock)
            await channel.send("take-over", version=VERSION)
            message, descriptors = await channel.receive("belongings", patience=ANSWER_PATIENCE)
            return cls(path, channel, str(message["file"]), *descriptors)
        except OSError as error:
            sock.close()
            if isinstance(error, ConnectionRefusedError) and path.name != SOCKET.format(0):
                return None
            raise _told(path, error) from error

    async def sockets(self) -> Sockets:
        """Those that were not sent yet."""
        return (await self._take("more", again="more"))[1]

    async def ready(self) -> tuple[int, Sockets]:
        """Have the predecessor stop. Returns how many records its file has, and sockets that were opened meanwhile."""
        return await self._take("ready")

    async def _take(self, ask: str, again: str = "") -> tuple[int, Sockets]:
        found = Sockets([], [])
        try:
            await self._channel.send(ask)
            while True:
                message, descriptors = await self._channel.receive("sockets", "yours", patience=ANSWER_PATIENCE)
                if message["what"] == "yours":
                    return int(message["records"]), found
                listening = int(message["listening"])
                socks = [socket.socket(fileno=descriptor) for descriptor in descriptors]
                found.listening.extend(socks[:listening])
                found.upstream.extend(socks[listening:])
                if again and not socks:
                    return 0, found
                if again:
                    await self._channel.send(again)
        except OSError as error:
            found.close()
            raise _told(self._path, error) from error

    async def mine(self) -> None:
        """Tell the predecessor that it is not needed any more. Raises OSError if it has gone on reading."""
        try:
            await self._channel.send("mine")
        except OSError as error:
            raise _told(self._path, error) from error

    def close_files(self) -> None:
        """Let go of its files; to be called once."""
        close([self.map_descriptor, self.lock])

    def close(self) -> None:
        """End the connection: a predecessor that lives reads on."""
        self._channel.close()


class Handover:
    """The predecessor's end: serves `path` to one successor after the other, until one of them has everything."""

    def __init__(self, path: Path, giver: Giver) -> None:
        self._path = path
        self._giver = giver
        self._sock: socket.socket | None = None
        self._giving: asyncio.Task[None] | None = None
        self._refusing: set[asyncio.Task[None]] = set()
        self._is_given = False

    def serve(self) -> None:
        """Begin to listen; who listened at this path before does not any more. Raises OSError if that cannot be."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        new = self._path.with_suffix(".new-sock")
        try:
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            with _short(new) as name:
                sock.bind(name)
            new.chmod(0o600)
            sock.listen()
            new.replace(self._path)
        except OSError:
            sock.close()
            raise
        self._sock = sock
        asyncio.get_running_loop().add_reader(sock.fileno(), self._accept)

    async def stop(self) -> None:
        """A successor keeps what it has; one that was not ready yet gets nothing."""
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
            if not self._is_given:
                with contextlib.suppress(OSError):
                    self._path.unlink()
        tasks = self._refusing | ({self._giving} if self._giving is not None else set())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        assert self._sock is not None  # noqa: S101 - we are its reader
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return  # it has gone again, or there is no descriptor to be had for it now
        reason = self._why_not(_peer(sock))
        if reason is not None:
            event(logger, logging.WARNING, "handover-refused", reason=reason)
            refusing = asyncio.ensure_future(_refuse(Channel(sock), reason))
            self._refusing.add(refusing)
            refusing.add_done_callback(self._refusing.discard)
            return
        self._giving = asyncio.ensure_future(self._give(Channel(sock)))

    def _why_not(self, peer: int) -> str | None:
        if not is_trusted(peer, os.geteuid()):
            return f"user {peer} may not have this"
        if self._giving is not None and not self._giving.done():
            return "another process is about to take over"
        return None

    async def _give(self, channel: Channel) -> None:
        is_paused = False
        try:
            message, _ = await channel.receive("take-over", patience=ANSWER_PATIENCE)
            files = self._giver.files()
            if message.get("version") != VERSION or files is None:
                reason = "it has no return path file" if files is None else f"it speaks version {VERSION}"
                await channel.send("refused", reason=reason)
                raise OSError(errno.EPROTO, reason)
            name, *descriptors = files
            await channel.send("belongings", descriptors, file=name)
            sent: set[socket.socket] = set()
            while (await channel.receive("more", "ready", patience=READY_PATIENCE))[0]["what"] == "more":
                await self._send_some(channel, sent)
            is_paused = True
            await self._giver.pause()
            while await self._send_some(channel, sent):
                pass
            await channel.send("yours", records=self._giver.records())
            try:
                await channel.receive("mine", patience=PAUSE_PATIENCE)
            except TimeoutError:
                if not channel.last_word("mine"):
                    raise
            self._is_given = True
            self._giver.handed_over()
            await channel.closed()
            raise ConnectionResetError(errno.ECONNRESET, "the successor has ended")
        except asyncio.CancelledError:
            is_paused = False  # for good
            raise
        except OSError as error:
            event(logger, logging.WARNING, "handover-failed", reason=error.strerror, meaning="this process goes on")
        finally:
            channel.close()  # before anything is read here: the successor must know
            if is_paused:
                self._take_back()

    async def _send_some(self, channel: Channel, sent: set[socket.socket]) -> bool:
        """Send some that were not sent yet, in one message. Returns whether there were any."""
        listening, upstream = ([sock for sock in socks if sock not in sent] for socks in self._giver.sockets())
        now = [*listening, *upstream][:MAX_DESCRIPTORS]
        await channel.send("sockets", [sock.fileno() for sock in now], listening=min(len(listening), len(now)))
        sent.update(now)
        return bool(now)

    def _take_back(self) -> None:
        if self._is_given:
            self._is_given = False
            assert self._sock is not None  # noqa: S101 - nobody stopped us
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
            with contextlib.suppress(OSError):
                self.serve()
        self._giver.resume()


async def _refuse(channel: Channel, reason: str) -> None:
    with contextlib.suppress(OSError):
        await channel.receive("take-over", patience=ANSWER_PATIENCE)  # closed with this unread, it would not hear us
        await channel.send("refused", reason=reason)
    channel.close()


def close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _peer(sock: socket.socket) -> int:
    """The user ID of the process at the other end."""
    octets = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(octets)[1])


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for `path` that is short enough for a socket's address, however deep its directory lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _told(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot take over through {path}: {error.strerror or error}")


def _named(expected: Sequence[str]) -> str:
    return " or ".join(expected) or "the end"
