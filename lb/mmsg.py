"""recvmmsg(2): many datagrams, or trains of them, in one system call. Python's `socket` does not have it.

A call of `socket.recvmsg_into` costs a microsecond beside the system call, most of it for an address that is
printed to be looked up; and the last one of a batch costs an exception. Here addresses stay the octets that
the kernel wrote, which are as good a key, and a batch that is not full has drained its socket.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

from lb.address import Address

CONTROL_SPACE = 96  # traffic class, train segment size and destination address
_SOCKADDR_IN6 = 28  # octets; the longest address
_NAME_STRIDE = 32

_FAMILY = struct.Struct("=H")
_PORT = struct.Struct("!H")
_SCOPE_ID = struct.Struct("=I")
_CONTROL_HEADER = struct.Struct("@Nii")  # length with the header, level, type


class _IoVec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("msg_name", ctypes.c_void_p),
        ("msg_namelen", ctypes.c_uint32),
        ("msg_iov", ctypes.POINTER(_IoVec)),
        ("msg_iovlen", ctypes.c_size_t),
        ("msg_control", ctypes.c_void_p),
        ("msg_controllen", ctypes.c_size_t),
        ("msg_flags", ctypes.c_int),
    )


class _MMsgHdr(ctypes.Structure):
    _fields_ = (("msg_hdr", _MsgHdr), ("msg_len", ctypes.c_uint32))


_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg = _libc.recvmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_recvmmsg.restype = ctypes.c_int

# What is read of each header: (octets of control messages, octets of the datagram).
_CONTROL_LENGTH_AT = _MMsgHdr.msg_hdr.offset + _MsgHdr.msg_controllen.offset
_LENGTH_AT = _MMsgHdr.msg_len.offset
_RESULT = struct.Struct(
    f"@{_CONTROL_LENGTH_AT}xN{_LENGTH_AT - _CONTROL_LENGTH_AT - ctypes.sizeof(ctypes.c_size_t)}xI"
    f"{ctypes.sizeof(_MMsgHdr) - _LENGTH_AT - 4}x"
)
_NAME = {False: struct.Struct("16s16x"), True: struct.Struct("28s4x")}  # by family: is it IPv6?
_CONTROL = struct.Struct(f"{CONTROL_SPACE}s")


class Batch:
    """Room for `count` receives of up to `octets` octets each. `buffers` and `views` are that room, to be read."""

    def __init__(self, count: int, octets: int) -> None:
        self.buffers = [bytearray(octets) for _ in range(count)]
        self.views = [memoryview(buffer) for buffer in self.buffers]
        self._count = count
        self._names = bytearray(count * _NAME_STRIDE)
        self._controls = bytearray(count * CONTROL_SPACE)
        self._vectors = (_IoVec * count)()
        self._headers = (_MMsgHdr * count)()
        names, controls = (_address_of(b) for b in (self._names, self._controls))
        for i, buffer in enumerate(self.buffers):
            self._vectors[i] = _IoVec(_address_of(buffer), octets)
            self._headers[i].msg_hdr = _MsgHdr(
                names + i * _NAME_STRIDE,
                _SOCKADDR_IN6,
                ctypes.pointer(self._vectors[i]),
                1,
                controls + i * CONTROL_SPACE,
                CONTROL_SPACE,
                0,
            )
        self._at = ctypes.addressof(self._headers)
        self._header_octets = memoryview(self._headers).cast("B")
        # The kernel writes lengths over the room that it was given; they are put back before the next call.
        self._fresh = bytes(self._header_octets)
        self._name_octets = memoryview(self._names)
        self._control_octets = memoryview(self._controls)

    def receive(self, descriptor: int, is_ipv6: bool) -> Iterator[tuple[Any, Any, Any, bytearray, memoryview]]:
        """What has arrived at a socket, oldest first; fewer than there is room for if that is all. Does not wait.

        Each receive is ((octets of control messages, octets of the datagram or train), (sender's socket address as
        the kernel has it,), (control messages,), buffer, view of the buffer). Raises OSError if an error is pending.
        """
        received = _recvmmsg(descriptor, self._at, self._count, socket.MSG_DONTWAIT, None)
        if received < 0:
            error = ctypes.get_errno()
            if error == errno.EAGAIN:
                return iter(())
            raise OSError(error, os.strerror(error))
        octets = received * ctypes.sizeof(_MMsgHdr)
        results = bytes(self._header_octets[:octets])
        self._header_octets[:octets] = self._fresh[:octets]
        return zip(
            _RESULT.iter_unpack(results),
            _NAME[is_ipv6].iter_unpack(self._name_octets[: received * _NAME_STRIDE]),
            _CONTROL.iter_unpack(self._control_octets[: received * CONTROL_SPACE]),
            self.buffers,
            self.views,
            strict=False,
        )


def control_messages(octets: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The control messages in what the kernel wrote: (level, type, data)."""
    at = 0
    while at + _CONTROL_HEADER.size <= len(octets):
        length, level, kind = _CONTROL_HEADER.unpack_from(octets, at)
        if length < _CONTROL_HEADER.size:
            return
        yield level, kind, octets[at + _CONTROL_HEADER.size : at + length]
        at += -(-length // ctypes.sizeof(ctypes.c_size_t)) * ctypes.sizeof(ctypes.c_size_t)


def raw_address(address: Address, scope_id: int = 0) -> bytes:
    """A socket address as the kernel has it (struct sockaddr_in, struct sockaddr_in6)."""
    if not address.is_ipv6:
        host = socket.inet_pton(socket.AF_INET, address.host)
        return _FAMILY.pack(socket.AF_INET) + _PORT.pack(address.port) + host + bytes(8)
    host = socket.inet_pton(socket.AF_INET6, address.host)
    return _FAMILY.pack(socket.AF_INET6) + _PORT.pack(address.port) + bytes(4) + host + _SCOPE_ID.pack(scope_id)


def socket_address(raw: bytes) -> Any:
    """The same as Python's `socket` has it: (host, port), or (host, port, flow information, scope ID)."""
    port = _PORT.unpack_from(raw, 2)[0]
    if len(raw) < _SOCKADDR_IN6:
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port, 0, _SCOPE_ID.unpack_from(raw, 24)[0]


def _address_of(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


if sys.platform != "linux":
    raise ImportError("recvmmsg is Linux's")
