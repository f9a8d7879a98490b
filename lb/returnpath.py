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
import ipaddress
import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator
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

    Raises OSError if the file cannot be made, or is in use.
    """

    def __init__(self, path: Path, capacity: int, *, patience: float = LOCK_PATIENCE) -> None:
        self._path = path
        self.capacity = capacity
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(path.parent.stat()):
            raise PermissionError(errno.EPERM, "the directory is somebody else's", str(path.parent))
        self._lock = _locked(path.with_suffix(".lock"), patience)
        self.lost = 0
        try:
            self._remembered = self._read_old()
            self._map = self._make_new()
        except BaseException:
            os.close(self._lock)
            raise

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
        os.close(self._lock)

    def _read_old(self) -> list[ReturnPath]:
        try:
            # A FIFO would have us wait for its writer.
            with open(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                octets = file.read(_HEADER.size)
                reason = _what_is_wrong(octets) if _is_ours(os.fstat(file.fileno())) else "somebody else's"
                octets += b"" if reason else file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._set_aside(str(error.strerror))
            return []
        if reason:
            self._set_aside(reason)
            return []
        found = []
        for at in range(_HEADER.size, len(octets) - _RECORD.size + 1, _RECORD.size):
            record = octets[at : at + _RECORD.size]
            path = _parse(record)
            if path:
                found.append(path)
            elif any(record):
                self.lost += 1
        if self.lost:
            event(logger, logging.WARNING, "return-paths-damaged", file=self._path, records=self.lost)
        return found

    def _set_aside(self, reason: str) -> None:
        """Keep what is not ours, or no longer makes sense, under another name; there may be one of those."""
        event(logger, logging.WARNING, "return-paths-ignored", file=self._path, reason=reason)
        with contextlib.suppress(OSError):
            self._path.replace(self._path.with_suffix(".ignored"))

    def _make_new(self) -> mmap.mmap:
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
        finally:
            os.close(descriptor)
        mapped[: len(header)] = header
        return mapped

    def commit(self) -> None:
        """Put the new file in the place of the old one; to be called once what was remembered is written again."""
        try:
            self._path.with_suffix(".new").replace(self._path)
        except OSError as error:
            event(logger, logging.WARNING, "return-paths-lost", file=self._path, reason=error.strerror)


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


def _unpacked(host: bytes) -> str:
    ip = ipaddress.IPv6Address(host)
    return str(ip.ipv4_mapped or ip)
