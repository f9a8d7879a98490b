"""libbpf.so.1 and bpf(2) as ctypes sees them: functions, structs, errors, and what the library would print."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any

LIBRARY = "libbpf.so.1"

# Ours.
MESSAGE = 4096  # octets of one of libbpf's messages

_U32 = POINTER(c_uint32)
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # what it returns, what it takes
    "libbpf_version_string": (c_char_p,),
    "libbpf_set_print": (c_void_p, c_void_p),
    "libbpf_num_possible_cpus": (c_int,),
    "libbpf_probe_bpf_prog_type": (c_int, c_int, c_void_p),
    "libbpf_probe_bpf_map_type": (c_int, c_int, c_void_p),
    "libbpf_probe_bpf_helper": (c_int, c_int, c_int, c_void_p),
    "bpf_object__open_file": (c_void_p, c_char_p, c_void_p),
    "bpf_object__load": (c_int, c_void_p),
    "bpf_object__close": (None, c_void_p),
    "bpf_object__find_program_by_name": (c_void_p, c_void_p, c_char_p),
    "bpf_object__find_map_by_name": (c_void_p, c_void_p, c_char_p),
    "bpf_object__next_program": (c_void_p, c_void_p, c_void_p),
    "bpf_object__next_map": (c_void_p, c_void_p, c_void_p),
    "bpf_map__name": (c_char_p, c_void_p),
    "bpf_map__fd": (c_int, c_void_p),
    "bpf_map__type": (c_int, c_void_p),
    "bpf_map__key_size": (c_uint32, c_void_p),
    "bpf_map__value_size": (c_uint32, c_void_p),
    "bpf_map__max_entries": (c_uint32, c_void_p),
    "bpf_map__map_flags": (c_uint32, c_void_p),
    "bpf_map__initial_value": (c_void_p, c_void_p, POINTER(c_size_t)),
    "bpf_map__set_max_entries": (c_int, c_void_p, c_uint32),
    "bpf_map__reuse_fd": (c_int, c_void_p, c_int),
    "bpf_program__name": (c_char_p, c_void_p),
    "bpf_program__fd": (c_int, c_void_p),
    "bpf_program__set_autoload": (c_int, c_void_p, c_bool),
    "bpf_program__set_log_buf": (c_int, c_void_p, c_void_p, c_size_t),
    "bpf_program__set_log_level": (c_int, c_void_p, c_uint32),
    "bpf_map_create": (c_int, c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p),
    "bpf_map_lookup_elem": (c_int, c_int, c_char_p, c_void_p),
    "bpf_map_update_elem": (c_int, c_int, c_char_p, c_char_p, c_uint64),
    "bpf_map_delete_elem": (c_int, c_int, c_char_p),
    "bpf_map_update_batch": (c_int, c_int, c_char_p, c_char_p, _U32, c_void_p),
    "bpf_map_delete_batch": (c_int, c_int, c_char_p, _U32, c_void_p),
    "bpf_map_lookup_batch": (c_int, c_int, c_char_p, c_void_p, c_void_p, c_void_p, _U32, c_void_p),
    "bpf_map_get_fd_by_id": (c_int, c_uint32),
    "bpf_prog_get_fd_by_id": (c_int, c_uint32),
    "bpf_link_get_fd_by_id": (c_int, c_uint32),
    "bpf_link_get_next_id": (c_int, c_uint32, _U32),
    "bpf_obj_get_info_by_fd": (c_int, c_int, c_void_p, _U32),
    "bpf_obj_pin": (c_int, c_int, c_char_p),
    "bpf_obj_get": (c_int, c_char_p),
    "bpf_prog_bind_map": (c_int, c_int, c_int, c_void_p),
    "bpf_prog_test_run_opts": (c_int, c_int, c_void_p),
    "bpf_link_create": (c_int, c_int, c_int, c_int, c_void_p),
    "bpf_link_update": (c_int, c_int, c_int, c_void_p),
    "bpf_link_detach": (c_int, c_int),
    "bpf_xdp_query": (c_int, c_int, c_int, c_void_p),
    "ring_buffer__new": (c_void_p, c_int, c_void_p, c_void_p, c_void_p),
    "ring_buffer__poll": (c_int, c_void_p, c_int),
    "ring_buffer__consume": (c_int, c_void_p),
    "ring_buffer__epoll_fd": (c_int, c_void_p),
    "ring_buffer__free": (None, c_void_p),
}

ON_RECORD = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)  # ring_buffer_sample_fn
_ON_MESSAGE = CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)  # libbpf_print_fn_t
_DEBUG = 2  # enum libbpf_print_level


class BpfError(OSError):
    """What the kernel or libbpf refused. `log` has the words of libbpf and of the verifier, however many."""

    def __init__(self, number: int, what: str, log: str = "") -> None:
        reason = _last_words(log)
        super().__init__(number, f"{what}: {os.strerror(number)}{f' ({reason})' if reason else ''}")
        self.log = log


@functools.cache
def libbpf() -> Any:
    """The library. Raises OSError if it is not installed."""
    library = ctypes.CDLL(LIBRARY, use_errno=True)
    for name, (returned, *taken) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    library.libbpf_set_print(_on_message)
    return library


def check(result: int, what: str, said: list[str] | None = None) -> int:
    """A result, if it is not an error. libbpf 1 returns errors as negative numbers."""
    if result < 0:
        raise BpfError(-result, what, "\n".join(said or ()))
    return result


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """A list that fills with libbpf's messages to this thread in the block."""
    before = getattr(_messages, "said", None)
    said: list[str] = []
    _messages.said = said
    try:
        yield said
    finally:
        _messages.said = before


def mount_bpf(where: str) -> None:
    """Mount a BPF file system. Raises OSError."""
    if _libc.mount(b"bpf", os.fsencode(where), b"bpf", 0, b"mode=0700"):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), where)


def unmount(where: str) -> None:
    """Raises OSError."""
    if _libc.umount2(os.fsencode(where), 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), where)


_messages = threading.local()
_libc: Any = ctypes.CDLL(None, use_errno=True)
_vsnprintf: Any = _libc.vsnprintf
_vsnprintf.argtypes = (c_char_p, c_size_t, c_char_p, c_void_p)


def _say(level: int, form: bytes, arguments: int) -> int:
    said = getattr(_messages, "said", None)
    if said is None or level >= _DEBUG:
        return 0
    # A va_list is an array or is passed by reference wherever Linux runs BPF in 64 bits: a pointer either way.
    buffer = ctypes.create_string_buffer(MESSAGE)
    _vsnprintf(buffer, MESSAGE, form, arguments)
    said.append(buffer.value.decode(errors="replace").removeprefix("libbpf: ").rstrip())
    return 0


_on_message = _ON_MESSAGE(_say)  # to live as long as the library


def _last_words(log: str) -> str:
    """The line of a log that says why: the verifier's last before its statistics, or else libbpf's first."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for at, line in enumerate(lines):
        if re.match(r"(processed \d+ insns|verification time)", line) and at:
            return lines[at - 1]
    return lines[0] if lines else ""


class Options(ctypes.Structure):
    """One of libbpf's option structs: they begin with their own size, so that they may grow."""

    def __init__(self, **values: Any) -> None:
        super().__init__(sz=ctypes.sizeof(type(self)), **values)


class MapCreate(Options):
    _fields_ = [
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
        ("map_extra", c_uint64),
        ("numa_node", c_uint32),
        ("map_ifindex", c_uint32),
    ]


class MapBatch(Options):
    _fields_ = [("sz", c_size_t), ("elem_flags", c_uint64), ("flags", c_uint64)]


class ProgramTestRun(Options):
    _fields_ = [
        ("sz", c_size_t),
        ("data_in", c_char_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_char_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    ]


class LinkCreate(Options):
    _fields_ = [
        ("sz", c_size_t),
        ("flags", c_uint32),
        ("iter_info", c_void_p),
        ("iter_info_len", c_uint32),
        ("target_btf_id", c_uint32),
    ]


class LinkUpdate(Options):
    _fields_ = [("sz", c_size_t), ("flags", c_uint32), ("old_prog_fd", c_uint32)]


class XdpQuery(Options):
    _fields_ = [
        ("sz", c_size_t),
        ("prog_id", c_uint32),
        ("drv_prog_id", c_uint32),
        ("hw_prog_id", c_uint32),
        ("skb_prog_id", c_uint32),
        ("attach_mode", c_uint8),
    ]


class RawMapInfo(ctypes.Structure):
    """The beginning of struct bpf_map_info: what the kernel has more of, it keeps."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * 16),
    ]


class RawLinkInfo(ctypes.Structure):
    """The beginning of struct bpf_link_info, as an XDP link has it."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("align", c_uint32),
        ("ifindex", c_uint32),
        ("others", c_uint32 * 11),
    ]


class RawProgramInfo(ctypes.Structure):
    """struct bpf_prog_info, as far as we read it."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("gpl_compatible", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("nr_jited_ksyms", c_uint32),
        ("nr_jited_func_lens", c_uint32),
        ("jited_ksyms", c_uint64),
        ("jited_func_lens", c_uint64),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64),
        ("jited_line_info", c_uint64),
        ("nr_jited_line_info", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("jited_line_info_rec_size", c_uint32),
        ("nr_prog_tags", c_uint32),
        ("prog_tags", c_uint64),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
        ("recursion_misses", c_uint64),
        ("verified_insns", c_uint32),
        ("attach_btf_obj_id", c_uint32),
        ("attach_btf_id", c_uint32),
    ]
