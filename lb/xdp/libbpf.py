"""libbpf.so.1 through ctypes: objects, programs, maps, links. The only module that knows bpf(2).

Everything here that has a `close` owns a descriptor, or memory of the library's, and is a context manager. What
libbpf would print ends up in the errors that are raised.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from ctypes import c_size_t, c_uint32
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lb.xdp.abi import (
    LIBRARY,
    BpfError,
    LinkCreate,
    LinkUpdate,
    ProgramTestRun,
    RawLinkInfo,
    RawProgramInfo,
    XdpQuery,
    check,
    libbpf,
    listening,
)
from lb.xdp.maps import (
    BATCH,
    BPF_ANY,
    BPF_EXIST,
    BPF_NOEXIST,
    Descriptor,
    Map,
    MapDefinition,
    MapInfo,
    MapType,
    RingBuffer,
    possible_cpus,
)

__all__ = [
    "BATCH",
    "BPF_ANY",
    "BPF_EXIST",
    "BPF_NOEXIST",
    "LIBRARY",
    "Attached",
    "BpfError",
    "Link",
    "LinkInfo",
    "Map",
    "MapDefinition",
    "MapInfo",
    "MapType",
    "Object",
    "Program",
    "ProgramInfo",
    "RingBuffer",
    "RunResult",
    "attached",
    "has_library",
    "links",
    "possible_cpus",
    "supports_helper",
    "supports_map",
    "supports_program",
    "version",
]

# linux/bpf.h, linux/if_link.h
BPF_F_REPLACE = 1 << 2  # of a link's program, if it is the one that is expected
BPF_F_TEST_XDP_LIVE_FRAMES = 1 << 1
BPF_XDP = 37
BPF_LINK_TYPE_XDP = 6
BPF_PROG_TYPE_XDP = 6
BPF_LOG_STATS = 4
XDP_FLAGS_SKB_MODE = 1 << 1
XDP_FLAGS_DRV_MODE = 1 << 2

# Ours.
VERIFIER_LOG = 16 << 20  # octets, of which only those in use are ever touched


class ProgramInfo(NamedTuple):
    id: int
    name: str  # 15 characters of it
    type: int
    tag: str  # a hash of its instructions
    loaded_at: float  # seconds since boot
    uid: int  # who loaded it
    map_ids: tuple[int, ...]
    verified_insns: int  # that the verifier went through
    jited_octets: int


class LinkInfo(NamedTuple):
    id: int
    type: int
    program_id: int
    ifindex: int  # 0: its interface is gone


class Attached(NamedTuple):
    """The IDs of the programs on an interface; 0: none."""

    native: int
    generic: int
    offloaded: int


class RunResult(NamedTuple):
    """What one packet, or the last of many, became. `duration` is nanoseconds per run, by the kernel's measure."""

    retval: int
    data: bytes
    duration: int


def has_library() -> bool:
    try:
        libbpf()
    except OSError:
        return False
    return True


def version() -> str:
    return str(libbpf().libbpf_version_string().decode())


def supports_program(kind: int = BPF_PROG_TYPE_XDP) -> bool:
    """Whether this kernel takes programs of a type from us."""
    return _quietly(libbpf().libbpf_probe_bpf_prog_type, kind, None) == 1


def supports_map(kind: MapType) -> bool:
    """Whether this kernel takes maps of a type from us."""
    return _quietly(libbpf().libbpf_probe_bpf_map_type, kind, None) == 1


def supports_helper(helper: int, program: int = BPF_PROG_TYPE_XDP) -> bool:
    """Whether programs of a type may call a helper, by its number in `enum bpf_func_id`."""
    return _quietly(libbpf().libbpf_probe_bpf_helper, program, helper, None) == 1


def attached(ifindex: int) -> Attached:
    """What is on an interface of the calling thread's network namespace."""
    options = XdpQuery()
    check(libbpf().bpf_xdp_query(ifindex, 0, ctypes.byref(options)), f"cannot ask interface {ifindex} for programs")
    return Attached(options.drv_prog_id, options.skb_prog_id, options.hw_prog_id)


def links() -> Iterator[Link]:
    """Every link of the machine, each to be closed by whoever takes it."""
    found = c_uint32(0)
    while libbpf().bpf_link_get_next_id(found.value, ctypes.byref(found)) == 0:
        try:
            link = Link.from_id(found.value)
        except BpfError as error:
            if error.errno == errno.ENOENT:  # gone meanwhile
                continue
            raise
        yield link


class Program(Descriptor):
    """A loaded program."""

    @classmethod
    def from_id(cls, number: int) -> Program:
        return cls(check(libbpf().bpf_prog_get_fd_by_id(number), f"cannot open program {number}"))

    @property
    def info(self) -> ProgramInfo:
        raw = RawProgramInfo()
        self.read_info(raw)
        ids = (c_uint32 * raw.nr_map_ids)()
        raw = RawProgramInfo(nr_map_ids=len(ids), map_ids=ctypes.addressof(ids))
        self.read_info(raw)
        return ProgramInfo(
            id=raw.id,
            name=raw.name.decode(),
            type=raw.type,
            tag=bytes(raw.tag).hex(),
            loaded_at=raw.load_time / 1e9,
            uid=raw.created_by_uid,
            map_ids=tuple(ids),
            verified_insns=raw.verified_insns,
            jited_octets=raw.jited_prog_len,
        )

    def maps(self) -> dict[str, Map]:
        """The maps that live with it, by name."""
        return {found.name: found for found in map(Map.from_id, self.info.map_ids)}

    def bind_map(self, bound: Map) -> None:
        """Let a map that the program does not use live for as long as the program."""
        check(libbpf().bpf_prog_bind_map(self.fd, bound.fd, None), f"cannot bind map {bound.name}")

    def test_run(
        self,
        data: bytes,
        *,
        repeat: int = 1,
        context: bytes | None = None,
        flags: int = 0,
        batch_size: int = 0,
        space: int = 512,
    ) -> RunResult:
        """Run it on a packet (BPF_PROG_TEST_RUN). `context` is a struct xdp_md; `space` is for what it adds."""
        live = bool(flags & BPF_F_TEST_XDP_LIVE_FRAMES)  # those leave, and nothing comes back
        out = None if live else ctypes.create_string_buffer(len(data) + space)
        options = ProgramTestRun(
            data_in=data,
            data_size_in=len(data),
            data_out=None if out is None else ctypes.addressof(out),
            data_size_out=0 if out is None else len(out),
            ctx_in=context,
            ctx_size_in=len(context or b""),
            repeat=repeat,
            flags=flags,
            batch_size=batch_size,
        )
        check(libbpf().bpf_prog_test_run_opts(self.fd, ctypes.byref(options)), "cannot run the program on a packet")
        returned = b"" if out is None else out.raw[: options.data_size_out]
        return RunResult(options.retval, returned, options.duration)


class Link(Descriptor):
    """What holds an XDP program on an interface, until nobody holds the link: no descriptor, no pin."""

    @classmethod
    def create(cls, program: Program, ifindex: int, flags: int) -> Link:
        """Attach natively (XDP_FLAGS_DRV_MODE) or generically (XDP_FLAGS_SKB_MODE)."""
        options = LinkCreate(flags=flags)
        with listening() as said:
            made = libbpf().bpf_link_create(program.fd, ifindex, BPF_XDP, ctypes.byref(options))
        return cls(check(made, f"cannot attach to interface {ifindex}", said))

    @classmethod
    def from_id(cls, number: int) -> Link:
        return cls(check(libbpf().bpf_link_get_fd_by_id(number), f"cannot open link {number}"))

    @classmethod
    def open_pinned(cls, path: Path) -> Link:
        """Raises FileNotFoundError if nothing is there, BpfError if it is something else."""
        opened = libbpf().bpf_obj_get(os.fsencode(path))
        if opened == -errno.ENOENT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        return cls(check(opened, f"cannot open {path}"))

    @property
    def info(self) -> LinkInfo:
        raw = RawLinkInfo()
        self.read_info(raw)
        return LinkInfo(raw.id, raw.type, raw.prog_id, raw.ifindex if raw.type == BPF_LINK_TYPE_XDP else 0)

    def update(self, program: Program, *, instead_of: Program | None = None) -> None:
        """Replace the program between two packets; only if it is still `instead_of`, if that is given."""
        options = LinkUpdate()
        if instead_of is not None:
            options.flags, options.old_prog_fd = BPF_F_REPLACE, instead_of.fd
        check(
            libbpf().bpf_link_update(self.fd, program.fd, ctypes.byref(options)), "cannot replace the running program"
        )

    def pin(self, path: Path) -> None:
        """Let a file in a BPF file system hold it."""
        check(libbpf().bpf_obj_pin(self.fd, os.fsencode(path)), f"cannot pin to {path}")

    def detach(self) -> None:
        """Take the program off the interface, whoever else holds the link."""
        check(libbpf().bpf_link_detach(self.fd), "cannot detach")


class Object:
    """A compiled object file: to be sized and set, then loaded. Raises BpfError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with listening() as said:
            self._handle = libbpf().bpf_object__open_file(os.fsencode(path), None)
        if not self._handle:
            raise BpfError(ctypes.get_errno(), f"cannot open {path}", "\n".join(said))
        self._logs: dict[str, ctypes.Array[ctypes.c_char]] = {}

    def definitions(self) -> dict[str, MapDefinition]:
        """The maps that it defines, by name, as they are set now."""
        library = libbpf()
        return {
            library.bpf_map__name(found).decode(): MapDefinition(
                library.bpf_map__type(found),
                library.bpf_map__key_size(found),
                library.bpf_map__value_size(found),
                library.bpf_map__max_entries(found),
                library.bpf_map__map_flags(found),
            )
            for found in self._each("bpf_object__next_map")
        }

    def section(self, name: str) -> memoryview:
        """The variables of a section, such as `.rodata.settings`, to be written before it is loaded."""
        size = c_size_t()
        start = libbpf().bpf_map__initial_value(self._map(name), ctypes.byref(size))
        if not start:
            raise BpfError(errno.EINVAL, f"{self._path} has no variables in {name}")
        return memoryview((ctypes.c_char * size.value).from_address(start)).cast("B")

    def set_max_entries(self, name: str, entries: int) -> None:
        check(libbpf().bpf_map__set_max_entries(self._map(name), entries), f"cannot size map {name}")

    def reuse_map(self, name: str, existing: Map) -> None:
        """Have the program use a map that is there already."""
        with listening() as said:
            result = libbpf().bpf_map__reuse_fd(self._map(name), existing.fd)
        check(result, f"cannot reuse map {name}", said)

    def load(self, *, statistics: bool = False) -> None:
        """Create the maps and load the programs. With `statistics`, `verifier_log` says what it took."""
        for found in self._each("bpf_object__next_program"):
            name = libbpf().bpf_program__name(found).decode()
            log = self._logs[name] = ctypes.create_string_buffer(VERIFIER_LOG)
            check(libbpf().bpf_program__set_log_buf(found, log, len(log)), "cannot set a verifier log")
            if statistics:
                check(libbpf().bpf_program__set_log_level(found, BPF_LOG_STATS), "cannot set a log level")
        with listening() as said:
            result = libbpf().bpf_object__load(self._handle)
        if result < 0:
            words = [self.verifier_log(name) for name in self._logs]
            raise BpfError(-result, f"cannot load {self._path}", "\n".join([*said, *filter(None, words)]))

    def verifier_log(self, program: str) -> str:
        """What the verifier said about a program when it was loaded."""
        return self._logs[program].value.decode(errors="replace").strip()

    def program(self, name: str) -> Program:
        """A loaded program, which then lives without the object."""
        handle = libbpf().bpf_object__find_program_by_name(self._handle, name.encode())
        if not handle:
            raise BpfError(errno.ENOENT, f"{self._path}, program {name}")
        return Program(os.dup(check(libbpf().bpf_program__fd(handle), f"program {name} is not loaded")))

    def map(self, name: str) -> Map:
        """A map of a loaded object, which then lives without it."""
        return Map(os.dup(check(libbpf().bpf_map__fd(self._map(name)), f"map {name} is not created")))

    def maps(self) -> dict[str, Map]:
        """All of them."""
        return {name: self.map(name) for name in self.definitions()}

    def close(self) -> None:
        if self._handle:
            libbpf().bpf_object__close(self._handle)
            self._handle = None

    def __enter__(self) -> Object:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _map(self, name: str) -> int:
        found = libbpf().bpf_object__find_map_by_name(self._handle, name.encode())
        if not found:
            raise BpfError(errno.ENOENT, f"{self._path}, map {name}")
        return int(found)

    def _each(self, function: str) -> Iterator[int]:
        following = getattr(libbpf(), function)
        found = following(self._handle, None)
        while found:
            yield found
            found = following(self._handle, found)


def _quietly(probe: Any, *arguments: object) -> int:
    """A probe's answer. A negative one means that it could not find out."""
    with listening():
        return int(probe(*arguments))
