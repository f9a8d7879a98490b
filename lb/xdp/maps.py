"""BPF maps: their elements, one by one and in batches, and the records of ring buffers."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from ctypes import c_uint32
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple, TypeVar

from lb.xdp.abi import ON_RECORD, BpfError, MapBatch, MapCreate, RawMapInfo, check, libbpf, listening

# linux/bpf.h
BPF_ANY, BPF_NOEXIST, BPF_EXIST = 0, 1, 2

# Ours.
BATCH = 4096  # elements in one call


class MapType(IntEnum):
    """The kinds of maps that we use; `enum bpf_map_type`."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    ARRAY_OF_MAPS = 12
    DEVMAP = 14
    RINGBUF = 27


PER_CPU = (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH)


class MapDefinition(NamedTuple):
    """What a map is made from; two programs can share one if they define it alike."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class MapInfo(NamedTuple):
    id: int
    name: str  # 15 characters of it
    definition: MapDefinition


@functools.cache
def possible_cpus() -> int:
    """How many values an element of a per-CPU map has."""
    return check(libbpf().libbpf_num_possible_cpus(), "cannot count CPUs")


D = TypeVar("D", bound="Descriptor")


class Descriptor:
    """A descriptor of something that lives in the kernel."""

    def __init__(self, descriptor: int) -> None:
        self.fd = descriptor

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self: D) -> D:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def read_info(self, info: ctypes.Structure) -> None:
        length = c_uint32(ctypes.sizeof(info))
        check(
            libbpf().bpf_obj_get_info_by_fd(self.fd, ctypes.byref(info), ctypes.byref(length)),
            "cannot read what the kernel knows of a descriptor",
        )


class Map(Descriptor):
    """A map. Keys and values are octets; a value of a per-CPU map is those of all CPUs, one behind the other."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        info = self.info
        self.id = info.id
        self.name = info.name
        self.definition = info.definition
        self.key_size = info.definition.key_size
        self.value_size = info.definition.value_size
        self.max_entries = info.definition.max_entries
        if info.definition.type in PER_CPU:
            self.value_size = (self.value_size + 7) // 8 * 8 * possible_cpus()

    @classmethod
    def create(cls, kind: MapType, name: str, key_size: int, value_size: int, max_entries: int, flags: int = 0) -> Map:
        options = MapCreate(map_flags=flags)
        created = libbpf().bpf_map_create(kind, name.encode(), key_size, value_size, max_entries, ctypes.byref(options))
        return cls(check(created, f"cannot create map {name}"))

    @classmethod
    def from_id(cls, number: int) -> Map:
        return cls(check(libbpf().bpf_map_get_fd_by_id(number), f"cannot open map {number}"))

    @property
    def info(self) -> MapInfo:
        raw = RawMapInfo()
        self.read_info(raw)
        definition = MapDefinition(raw.type, raw.key_size, raw.value_size, raw.max_entries, raw.map_flags)
        return MapInfo(raw.id, raw.name.decode(), definition)

    def lookup(self, key: bytes) -> bytes | None:
        value = ctypes.create_string_buffer(self.value_size)
        result = libbpf().bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        self._refuse(result, "look something up in")
        return value.raw

    def update(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
        if len(key) != self.key_size or len(value) != self.value_size:
            raise ValueError(f"map {self.name}: {len(key)} and {len(value)} octets for a key and a value")
        self._refuse(libbpf().bpf_map_update_elem(self.fd, key, value, flags), "update")

    def update_fd(self, key: bytes, element: Map) -> None:
        """Put a map into a map of maps."""
        self.update(key, element.fd.to_bytes(4, "little"))

    def delete(self, key: bytes) -> bool:
        """Returns whether it was there."""
        result = libbpf().bpf_map_delete_elem(self.fd, key)
        if result == -errno.ENOENT:
            return False
        self._refuse(result, "delete from")
        return True

    def update_batch(self, entries: Mapping[bytes, bytes], flags: int = BPF_ANY) -> None:
        """Update many elements at the price of few calls. If it raises, some of them are there."""
        if not entries:
            return
        options = MapBatch(elem_flags=flags)
        keys, values = b"".join(entries), b"".join(entries.values())
        if len(keys) != len(entries) * self.key_size or len(values) != len(entries) * self.value_size:
            raise ValueError(f"map {self.name}: keys or values of a wrong size")
        count = c_uint32(len(entries))
        result = libbpf().bpf_map_update_batch(self.fd, keys, values, ctypes.byref(count), ctypes.byref(options))
        self._refuse(result, "update")

    def delete_batch(self, keys: Iterable[bytes]) -> int:
        """Delete many elements of a hash. Returns how many were there."""
        left = list(keys)
        deleted = 0
        while left:
            count = c_uint32(len(left))
            result = libbpf().bpf_map_delete_batch(self.fd, b"".join(left), ctypes.byref(count), None)
            deleted += count.value
            if result != -errno.ENOENT:
                self._refuse(result, "delete from")
                break
            left = left[count.value + 1 :]  # it stopped at a key that is not there
        return deleted

    def lookup_batch(self, token: bytes | None = None, count: int = BATCH) -> tuple[dict[bytes, bytes], bytes | None]:
        """About `count` elements, and a token to go on with; None if that was all.

        What is added or deleted meanwhile may be among them or not.
        """
        following = ctypes.create_string_buffer(max(8, self.key_size))
        while True:
            keys = ctypes.create_string_buffer(self.key_size * count)
            values = ctypes.create_string_buffer(self.value_size * count)
            found = c_uint32(count)
            result = libbpf().bpf_map_lookup_batch(self.fd, token, following, keys, values, ctypes.byref(found), None)
            if result != -errno.ENOSPC:
                break
            count *= 2  # a bucket of a hash comes whole or not at all
        if result != -errno.ENOENT:
            self._refuse(result, "read")
        entries = dict(
            zip(_cut(keys, self.key_size, found.value), _cut(values, self.value_size, found.value), strict=True)
        )
        return entries, None if result else following.raw

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every element."""
        token: bytes | None = None
        while True:
            entries, token = self.lookup_batch(token, min(BATCH, self.max_entries))
            yield from entries.items()
            if token is None:
                return

    def _refuse(self, result: int, verb: str) -> None:
        if result < 0:
            raise BpfError(-result, f"cannot {verb} map {self.name}")


class RingBuffer:
    """Reads the records of a ring buffer map. `fd` becomes readable when there are some and the program wakes us."""

    def __init__(self, source: Map, on_record: Callable[[bytes], None]) -> None:
        self._on_record = on_record
        self._error: BaseException | None = None
        self._callback = ON_RECORD(self._take)  # to live as long as we do
        with listening() as said:
            self._handle = libbpf().ring_buffer__new(source.fd, self._callback, None, None)
        if not self._handle:
            raise BpfError(ctypes.get_errno(), f"cannot read map {source.name}", "\n".join(said))
        self.fd: int = libbpf().ring_buffer__epoll_fd(self._handle)

    def consume(self) -> int:
        """Hand over what is there. Returns how many records, and raises what `on_record` raised."""
        return self._handed(libbpf().ring_buffer__consume(self._handle))

    def poll(self, patience: float) -> int:
        """The same, after waiting for at most `patience` seconds until the program wakes us."""
        return self._handed(libbpf().ring_buffer__poll(self._handle, int(patience * 1000)))

    def close(self) -> None:
        if self._handle:
            libbpf().ring_buffer__free(self._handle)
            self._handle = None

    def __enter__(self) -> RingBuffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _take(self, _: int, data: int, size: int) -> int:
        try:
            self._on_record(ctypes.string_at(data, size))
        except BaseException as error:  # a C function called us: nothing can be raised through it
            self._error = error
            return -errno.ECANCELED
        return 0

    def _handed(self, result: int) -> int:
        error, self._error = self._error, None
        if error is not None:
            raise error
        return check(result, "cannot read a ring buffer")


def _cut(buffer: ctypes.Array[ctypes.c_char], size: int, count: int) -> list[bytes]:
    octets = buffer.raw
    return [octets[at : at + size] for at in range(0, size * count, size)]
