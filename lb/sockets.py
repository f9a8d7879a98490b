"""UDP sockets as a data plane wants them: trains in and out (GRO, GSO), ECN read and set, fragmentation off.

What the kernel can do here and Python's `socket` has no name for is named at the top.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

from lb.address import Address
from lb.engine import Drop
from lb.log import event
from lb.mmsg import CONTROL_SPACE, control_messages, raw_address

# linux/udp.h, linux/in.h, linux/in6.h
SOL_UDP = socket.IPPROTO_UDP
SOL_IP = socket.IPPROTO_IP
SOL_IPV6 = socket.IPPROTO_IPV6
UDP_SEGMENT = 103
UDP_GRO = 104
IP_TOS = 1
IP_PKTINFO = 8
IP_MTU_DISCOVER = 10
IP_RECVERR = 11
IP_RECVTOS = 13
IPV6_MTU_DISCOVER = 23
IPV6_RECVERR = 25
IPV6_RECVPKTINFO = 49
IPV6_PKTINFO = 50
IPV6_RECVTCLASS = 66
IPV6_TCLASS = 67
PMTUDISC_PROBE = 3  # set DF, and leave path MTU discovery to the endpoints
MSG_ERRQUEUE = 0x2000
SO_RCVBUFFORCE = 33
SO_SNDBUFFORCE = 32

MAX_DATAGRAM = 65536
NO_SEGMENTS = MAX_DATAGRAM  # what is sent stays in one piece, however long
UNKNOWN = -1  # an option that another process may have set
MAX_TRAIN_OCTETS = 65000  # one IP packet's worth to the kernel, headers included
MAX_TRAIN_SEGMENTS = 64

_ERROR = struct.Struct("=I")  # what struct sock_extended_err begins with (linux/errqueue.h)

Control = list[tuple[int, int, bytes]]
NO_CONTROL: Control = []

_CONGESTED = frozenset((errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM))
# Reported on whatever is sent next, perhaps to somebody else: an ICMP error that came in before.
_SOMEBODY_ELSES = frozenset((errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPROTO, errno.EACCES))
_NO_TRAINS = frozenset((errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP, errno.ENOPROTOOPT))

logger = logging.getLogger(__name__)


class Port:
    """A bound UDP socket and what was last set on it."""

    __slots__ = ("address", "descriptor", "is_ipv6", "segment", "sendto", "sock", "tos")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.is_ipv6 = sock.family == socket.AF_INET6
        self.address = Address(*sock.getsockname()[:2])
        self.descriptor = sock.fileno()
        self.sendto = sock.sendto
        self.tos = 0
        self.segment = NO_SEGMENTS

    def send(
        self,
        views: Sequence[memoryview | bytes],
        size: int,
        count: int,
        tos: int,
        to: Any,
        control: Control,
        *,
        last_try: bool = False,
    ) -> str | None:
        """Send `count` datagrams of `size` octets, the last one perhaps shorter, to the socket address `to`.

        `tos` is the traffic class, ECN bits included. Returns None, or the reason why (some of) it was lost.
        """
        try:
            # Options, and not control messages: mostly they stay as they are from one train to the next.
            if tos != self.tos:
                self._set_tos(tos)
            if count > 1:
                if size != self.segment:
                    self._set_segment(size)
            elif size > self.segment:
                self._set_segment(NO_SEGMENTS)
            if control or len(views) > 1:
                self.sock.sendmsg(views, control, 0, to)
            else:
                self.sendto(views[0], to)
        except OSError as error:
            if error.errno in _CONGESTED:
                return Drop.BUFFER_FULL
            if error.errno in _NO_TRAINS and (count > 1 or self.segment != NO_SEGMENTS):
                return self._send_singly(views, size, tos, to, control)
            if error.errno == errno.EMSGSIZE:
                return Drop.TOO_LARGE
            if last_try or error.errno not in _SOMEBODY_ELSES:
                return Drop.UNREACHABLE
            return self.send(views, size, count, tos, to, control, last_try=True)
        return None

    def close(self) -> None:
        self.sock.close()

    def _send_singly(
        self, views: Sequence[memoryview | bytes], size: int, tos: int, to: Any, control: Control
    ) -> str | None:
        """For a kernel that has no trains, and a path that is too narrow for the segments of the last one."""
        self.segment = NO_SEGMENTS
        with contextlib.suppress(OSError):
            self._set_segment(NO_SEGMENTS)
        whole = views[0] if len(views) == 1 else b"".join(views)
        singles = [whole[at : at + size] for at in range(0, len(whole), size or 1)] or [whole]
        drops = [self.send([single], len(single), 1, tos, to, control) for single in singles]
        return next((drop for drop in drops if drop), None)

    def _set_segment(self, size: int) -> None:
        self.sock.setsockopt(SOL_UDP, UDP_SEGMENT, 0 if size == NO_SEGMENTS else size)
        self.segment = size

    def _set_tos(self, tos: int) -> None:
        level, option = (SOL_IPV6, IPV6_TCLASS) if self.is_ipv6 else (SOL_IP, IP_TOS)
        self.sock.setsockopt(level, option, tos)
        self.tos = tos


def listening_port(address: Address, *, buffer: int, shared: bool, bound: socket.socket | None = None) -> Port:
    """A port that clients send to. `shared` lets other workers bind it too (SO_REUSEPORT).

    Bound to a wildcard it reports which address each datagram came to, so that answers can leave from there.
    `bound` is a socket that has this address already, because another process bound it.
    Raises OSError if the address cannot be had.
    """
    sock = bound or _open(address.is_ipv6)
    try:
        _prepare(sock, buffer)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address.is_wildcard:
            option = (SOL_IPV6, IPV6_RECVPKTINFO) if address.is_ipv6 else (SOL_IP, IP_PKTINFO)
            sock.setsockopt(*option, 1)
        if bound is None:
            sock.bind(address)
    except OSError:
        sock.close()
        raise
    return Port(sock) if bound is None else adopted(sock)


def upstream_port(is_ipv6: bool, *, buffer: int, port: int = 0) -> Port:
    """A port that backends are reached from; a given one, or any that is free. It hears of ICMP errors.

    Raises OSError if there is none left, or no descriptor for it.
    """
    sock = _open(is_ipv6)
    try:
        _prepare(sock, buffer)
        sock.setsockopt(*((SOL_IPV6, IPV6_RECVERR) if is_ipv6 else (SOL_IP, IP_RECVERR)), 1)
        sock.bind(("::" if is_ipv6 else "0.0.0.0", port))
    except OSError:
        sock.close()
        raise
    return Port(sock)


def adopted(sock: socket.socket) -> Port:
    """A port of another process, which may still be using it: nothing is set before something is sent."""
    sock.setblocking(False)
    port = Port(sock)
    port.tos = port.segment = UNKNOWN
    return port


class BoundSockets:
    """UDP sockets that another process bound, by where, until somebody wants them."""

    def __init__(self, socks: Sequence[socket.socket] = ()) -> None:
        self._by_address: dict[Address, list[socket.socket]] = {}
        self.add(socks)

    def add(self, socks: Sequence[socket.socket]) -> None:
        """More of them; what is no UDP socket is closed."""
        for sock in socks:
            if sock.type == socket.SOCK_DGRAM and sock.family in (socket.AF_INET, socket.AF_INET6):
                self._by_address.setdefault(Address(*sock.getsockname()[:2]), []).append(sock)
            else:
                event(logger, logging.WARNING, "socket-unused", name=sock.getsockname())
                sock.close()

    def take(self, address: Address) -> list[socket.socket]:
        return self._by_address.pop(address, [])

    def close(self) -> None:
        """Nobody wants those that are left."""
        for address, socks in self._by_address.items():
            event(logger, logging.WARNING, "socket-unused", address=address)
            for sock in socks:
                sock.close()
        self._by_address.clear()


def read_errors(port: Port) -> list[bytes]:
    """The addresses, as the kernel has them, to which datagrams were sent that ICMP errors have come back for.

    Not those that were merely too long: that says nothing about who they were for.
    """
    addresses = []
    for _ in range(MAX_TRAIN_SEGMENTS):
        try:
            _, control, _, to = port.sock.recvmsg(0, CONTROL_SPACE, MSG_ERRQUEUE)
        except OSError:
            break
        reasons = [_ERROR.unpack_from(value)[0] for _, kind, value in control if kind in (IP_RECVERR, IPV6_RECVERR)]
        if to and reasons != [errno.EMSGSIZE]:
            addresses.append(raw_address(Address(*to[:2])))
    return addresses


def read_control(octets: bytes) -> tuple[int, int, bytes | None]:
    """Segment size of a train (0 for a single datagram), traffic class, and packed address that it came to."""
    segment = tos = 0
    local = None
    for level, kind, value in control_messages(octets):
        if level == SOL_UDP and kind == UDP_GRO:
            segment = int.from_bytes(value, sys.byteorder)
        elif level == SOL_IP and kind == IP_TOS:
            tos = value[0]
        elif level == SOL_IPV6 and kind == IPV6_TCLASS:
            tos = int.from_bytes(value, sys.byteorder)
        elif level == SOL_IP and kind == IP_PKTINFO:
            local = value[8:12]
        elif level == SOL_IPV6 and kind == IPV6_PKTINFO:
            local = value[:16]
    return segment, tos, local


def source_control(local: bytes | None) -> Control:
    """Control message that makes a datagram leave from the packed address `local`; none for None."""
    if local is None:
        return NO_CONTROL
    if len(local) == 4:
        return [(SOL_IP, IP_PKTINFO, bytes(4) + local + bytes(4))]
    return [(SOL_IPV6, IPV6_PKTINFO, local + bytes(4))]


def _open(is_ipv6: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    if is_ipv6:
        try:
            sock.setsockopt(SOL_IPV6, socket.IPV6_V6ONLY, 1)
        except OSError:
            sock.close()
            raise
    return sock


def _prepare(sock: socket.socket, buffer: int) -> None:
    """What all sockets of ours have in common. It may be done again, by whoever gets the socket next."""
    sock.setblocking(False)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(SOL_IPV6, IPV6_RECVTCLASS, 1)
        sock.setsockopt(SOL_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
    else:
        sock.setsockopt(SOL_IP, IP_RECVTOS, 1)
        sock.setsockopt(SOL_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
    for force, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, buffer)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, buffer)  # capped by net.core.?mem_max
    with contextlib.suppress(OSError):  # before Linux 5.0 there are no trains, only single datagrams
        sock.setsockopt(SOL_UDP, UDP_GRO, 1)
