"""The return path of every flow, in a memory-mapped file: what a balancer that was killed needs to carry on.

A reply from a backend arrives at a local port and says nothing about the client it is for. Which client that is
would be lost with the process; in the page cache it survives. The file is a header and one record per flow,
written when a flow begins, when its CID changes and when it ends. Every record has a checksum, so that a
record that was half written when the process died is known for what it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lb.address import Address, packed
from lb.log import event

MAGIC = b"quiclb return paths 1\n".ljust(24, b"\0")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOCK_PATIENCE = 2.0  # seconds that a killed predecessor's workers may take to notice

_HEADER = struct.Struct("=24s16sII")  # magic, boot ID, capacity, CRC-32 of what is before
# checksum; in use | established << 1; local port; backend, client, local (listener) as address and port;
# client's scope ID; address that the client sent to; CID length and CID
_RECORD = struct.Struct("=IBxH 16sH 16sH 16sH I 16s B20s")
_CHECKSUM = struct.Struct("=I")
_IN_USE, _ESTABLISHED, _HAS_LOCAL = 1, 2, 4
_BLOCK = 512 * _RECORD.size  # octets that are compared at once
_IPV4_MAPPED = bytes(10) + b"\xff\xff"

logger = logging.getLogger(__name__)


class ReturnPath(NamedTuple):
    """How replies of one flow get back: they arrive at `local_port` from `backend`, and leave `listener` for `client`.

    `local` is the address that the client sent to, if the listener is a wildcard. `cid` is the last routable CID
    that the client used, `scope_id` that of a link-local client.
    """

    local_port: int
    backend: Address
    client: Address
    listener: Address
    scope_id: int
    local: str | None
    cid: bytes | None
    established: bool


class ReturnPaths:
    """Up to `capacity` return paths in the file at `path`, which one process at a time may use.

    `orphans` are files of processes that have no successor of their own: what they say is remembered, too, and they
    go with the commit. With `lock`, the descriptor of a predecessor's lock, nothing is read: the predecessor lives,
    goes on writing its file until the commit, and whoever calls has read it.
    Raises OSError if the file cannot be made, or is in use.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        *,
        orphans: Sequence[Path] = (),
        lock: int | None = None,
        patience: float = LOCK_PATIENCE,
    ) -> None:
        self._path = path
        self.capacity = capacity
        self.lost = 0
        self._remembered: list[ReturnPath] = []
        self._orphans: list[tuple[Path, int]] = []  # and their locks
        if lock is None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(path.parent.stat()):
                raise PermissionError(errno.EPERM, "the directory is somebody else's", str(path.parent))
            lock = _locked(path.with_suffix(".lock"), patience)
            read = True
        else:
            lock, read = os.dup(lock), False
        self.lock = lock
        try:
            if read:
                self._remembered = self._read_old(path)
                for orphan in orphans:
                    self._adopt(orphan)
            self.descriptor, self._map = self._make_new()
        except BaseException:
            self._close_locks()
            raise

    @property
    def path(self) -> Path:
        return self._path

    def remembered(self) -> Iterator[ReturnPath]:
        """What an earlier process left; each is forgotten unless written again."""
        yield from self._remembered
        self._remembered = []

    def write(self, number: int, path: ReturnPath) -> None:
        """Remember the return path of flow number `number`."""
        flags = _IN_USE
        if path.established:
            flags |= _ESTABLISHED
        if path.local is not None:
            flags |= _HAS_LOCAL
        cid = path.cid or b""
        record = _RECORD.pack(
            0,
            flags,
            path.local_port,
            packed(path.backend.host),
            path.backend.port,
            packed(path.client.host),
            path.client.port,
            packed(path.listener.host),
            path.listener.port,
            path.scope_id,
            packed(path.local) if path.local is not None else bytes(16),
            len(cid),
            cid,
        )
        at = _HEADER.size + number * _RECORD.size
        self._map[at : at + _RECORD.size] = _CHECKSUM.pack(zlib.crc32(record[4:])) + record[4:]

    def clear(self, number: int) -> None:
        """Forget flow number `number`."""
        at = _HEADER.size + number * _RECORD.size
        self._map[at : at + _RECORD.size] = bytes(_RECORD.size)

    def close(self) -> None:
        """Let another process have the file. What it says stays."""
        self._map.close()
        os.close(self.descriptor)
        self._close_locks()

    def take_orphan(self, path: Path, lock: int) -> None:
        """Have the file of flows that were taken over go with the commit. `lock` is the descriptor of its lock."""
        self._orphans.append((path, os.dup(lock)))

    def is_in_place(self) -> bool:
        """Whether the file is where a successor of a killed process would look."""
        with contextlib.suppress(OSError):
            return os.path.samestat(self._path.stat(), os.fstat(self.descriptor))
        return False

    def reclaim(self) -> None:
        """Put the file in its place again, after a successor that has ended put its own there. Raises OSError."""
        descriptor, mapped = self._make_new()
        mapped[:] = self._map[:]
        self._map.close()
        os.close(self.descriptor)
        self.descriptor, self._map = descriptor, mapped
        self.commit()

    def _adopt(self, path: Path) -> None:
        try:
            lock = _locked(path.with_suffix(".lock"), 0)
        except OSError:
            return  # it has a process, which will see to it
        self._orphans.append((path, lock))
        self._remembered += self._read_old(path)

    def _close_locks(self) -> None:
        for _, lock in self._orphans:
            os.close(lock)
        self._orphans = []
        os.close(self.lock)

    def _read_old(self, path: Path) -> list[ReturnPath]:
        try:
            # A FIFO would have us wait for its writer.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                octets = file.read(_HEADER.size)
                reason = _what_is_wrong(octets) if _is_ours(os.fstat(file.fileno())) else "somebody else's"
                octets += b"" if reason else file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            _set_aside(path, str(error.strerror))
            return []
        if reason:
            _set_aside(path, reason)
            return []
        found, lost = [], 0
        for at in range(_HEADER.size, len(octets) - _RECORD.size + 1, _RECORD.size):
            record = octets[at : at + _RECORD.size]
            parsed = _parse(record)
            if parsed:
                found.append(parsed)
            elif any(record):
                lost += 1
        if lost:
            event(logger, logging.WARNING, "return-paths-damaged", file=path, records=lost)
            self.lost += lost
        return found

    def _make_new(self) -> tuple[int, mmap.mmap]:
        header = _HEADER.pack(MAGIC, _boot_id(), self.capacity, 0)
        header = header[:-4] + _CHECKSUM.pack(zlib.crc32(header[:-4]))
        new = self._path.with_suffix(".new")
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Not sparse: a file system that is full says so here, and not by a signal at some later write.
            os.posix_fallocate(descriptor, 0, _HEADER.size + self.capacity * _RECORD.size)
            mapped = mmap.mmap(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
        mapped[: len(header)] = header
        return descriptor, mapped

    def commit(self) -> None:
        """Put the new file in the place of the old one; to be called once what was remembered is written again."""
        try:
            self._path.with_suffix(".new").replace(self._path)
        except OSError as error:
            event(logger, logging.WARNING, "return-paths-lost", file=self._path, reason=error.strerror)
        for orphan, lock in self._orphans:
            with contextlib.suppress(OSError):
                orphan.unlink()
            os.close(lock)
        self._orphans = []


class LivePaths:
    """The file behind `descriptor`, of a process that goes on writing it: what it says, and then what has changed.

    Raises OSError if it is not such a file, of this boot.
    """

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        reason = _what_is_wrong(self._map[: _HEADER.size])
        if reason:
            self._map.close()
            raise OSError(errno.EINVAL, f"its return path file: {reason}")
        self.capacity = (len(self._map) - _HEADER.size) // _RECORD.size
        self._seen = [bytes(_BLOCK)] * -(-(len(self._map) - _HEADER.size) // _BLOCK)

    def changes(self, records: int) -> list[tuple[int, ReturnPath | None]]:
        """The numbers, below `records`, under which another return path is found than at the last call, or none.

        One that is being written this moment may be among them as none; it is found by the next call.
        """
        found: list[tuple[int, ReturnPath | None]] = []
        size = _RECORD.size
        for block in range(min(len(self._seen), -(-records * size // _BLOCK))):
            at = _HEADER.size + block * _BLOCK
            octets, before = self._map[at : at + _BLOCK], self._seen[block]
            if octets == before:
                continue
            self._seen[block] = octets
            first = block * (_BLOCK // size)
            found += [
                (first + start // size, _parse(octets[start : start + size]))
                for start in range(0, len(octets), size)
                if octets[start : start + size] != before[start : start + size]
            ]
        return found

    def close(self) -> None:
        self._map.close()
        self._seen = []


def _set_aside(path: Path, reason: str) -> None:
    """Keep what is not ours, or no longer makes sense, under another name; there may be one of those."""
    event(logger, logging.WARNING, "return-paths-ignored", file=path, reason=reason)
    with contextlib.suppress(OSError):
        path.replace(path.with_suffix(".ignored"))


def _locked(path: Path, patience: float) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < give_up:
                time.sleep(0.01)
                continue
            os.close(descriptor)
            raise
        return descriptor


def _is_ours(status: os.stat_result) -> bool:
    """Whoever can write here can have replies sent to wherever they like."""
    return status.st_uid in (0, os.geteuid())


def _boot_id() -> bytes:
    """Ports and addresses of before the last boot mean nothing any more."""
    try:
        return bytes.fromhex(BOOT_ID.read_text(encoding="ascii").strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def _what_is_wrong(octets: bytes) -> str | None:
    if len(octets) < _HEADER.size or octets[: len(MAGIC)] != MAGIC:
        return "not a file of this version of quiclb"
    _, boot_id, _, checksum = _HEADER.unpack_from(octets)
    if checksum != zlib.crc32(octets[: _HEADER.size - 4]):
        return "its header is damaged"
    if boot_id != _boot_id():
        return "from before the last boot"
    return None


def _parse(record: bytes) -> ReturnPath | None:
    if len(record) != _RECORD.size:
        return None
    checksum, flags, port, *addresses, scope_id, local, cid_length, cid = _RECORD.unpack(record)
    if checksum != zlib.crc32(record[4:]) or not flags & _IN_USE:
        return None
    backend, client, listener = (
        Address(_unpacked(host), number) for host, number in zip(addresses[::2], addresses[1::2], strict=True)
    )
    return ReturnPath(
        port,
        backend,
        client,
        listener,
        scope_id,
        _unpacked(local) if flags & _HAS_LOCAL else None,
        cid[:cid_length] or None,
        bool(flags & _ESTABLISHED),
    )


@lru_cache(maxsize=256)
def _unpacked(host: bytes) -> str:
    if host.startswith(_IPV4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, host[len(_IPV4_MAPPED) :])
    return socket.inet_ntop(socket.AF_INET6, host)
