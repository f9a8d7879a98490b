"""rtnetlink: what the kernel knows of links, addresses, routes and neighbours, and what it says when they change.

The small part of it that the xdp engine needs. pyroute2 has all of it, but keeps event loops of its own, which are
left unclosed beside ours, and takes twenty times as long per route.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lb.address import packed

# linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_CREATE = 0x1, 0x4, 0x300, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_GET_STRICT_CHK = 12
NETLINK_GENERIC = 16
NLA_TYPE_MASK = 0x3FFF

# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTNLGRP_LINK, RTNLGRP_NEIGH = 1, 3
RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE = 5, 7, 8
RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE, RTNLGRP_IPV6_RULE = 9, 11, 19
RTN_UNICAST, RTN_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_METRICS, RTA_VIA = 1, 4, 5, 8, 18
RTAX_MTU = 2
RT_SCOPE_UNIVERSE = 0

# linux/if_link.h, linux/if_addr.h, linux/neighbour.h
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU = 1, 3, 4
IFF_UP = 0x1
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x08, 0x20, 0x40
NDA_DST, NDA_LLADDR = 1, 2
NTF_USE = 0x01
NUD_INCOMPLETE, NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE, NUD_FAILED = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NUD_VALID = NUD_PERMANENT | NUD_NOARP | NUD_REACHABLE | NUD_PROBE | NUD_STALE | NUD_DELAY

# Ours.
RECEIVE_SIZE = 1 << 18
RECEIVE_BUFFER = 4 << 20  # for a burst of changes
PIPELINED = 64  # questions in one message

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")  # family, device type, index, flags, changed flags
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, lengths, tos, table, protocol, scope, type, flags
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_FAMILY = struct.Struct("=BBH")

GROUPS = (
    RTNLGRP_LINK,
    RTNLGRP_NEIGH,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_RULE,
)


class Message(NamedTuple):
    type: int
    body: bytes


class Link(NamedTuple):
    """A network interface."""

    index: int  # type: ignore[assignment]  # over tuple's method
    name: str
    mac: bytes
    mtu: int
    is_up: bool


class InterfaceAddress(NamedTuple):
    """An address of an interface."""

    index: int  # type: ignore[assignment]
    host: str
    scope: int
    is_usable: bool  # not given up, and not still being probed for duplicates


class Route(NamedTuple):
    """How the kernel would send to one address. `mtu` 0: the interface's own."""

    type: int
    interface: int
    gateway: str | None
    mtu: int


class Neighbour(NamedTuple):
    """Who has an address on a link. `mac` is empty while nobody is known to."""

    interface: int
    host: str
    mac: bytes
    has_failed: bool  # nobody answered


class Netlink:
    """A socket to the kernel, in the network namespace of the thread that opens it. Methods but `changes` block."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._sequence = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def subscribe(self) -> None:
        """From now on hear of changes, and do not ask anything any more."""
        for group in GROUPS:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self._socket.setblocking(False)

    def changes(self) -> list[Message] | None:
        """What has changed since the last call; None if some of it got lost, and all has to be asked for."""
        found: list[Message] = []
        while True:
            try:
                octets = self._socket.recv(RECEIVE_SIZE)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return None
                raise
            found += [Message(kind, body) for kind, _, body in _messages(octets)]

    def links(self) -> list[Link]:
        return [link for m in self.dump(RTM_GETLINK, _LINK.pack(0, 0, 0, 0, 0)) if (link := read_link(m))]

    def addresses(self) -> list[InterfaceAddress]:
        dumped = self.dump(RTM_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0))
        return [address for m in dumped if (address := read_address(m))]

    def neighbours(self) -> list[Neighbour]:
        dumped = self.dump(RTM_GETNEIGH, _NEIGHBOUR.pack(0, 0, 0, 0, 0))
        return [neighbour for m in dumped if (neighbour := read_neighbour(m))]

    def routes(self, hosts: Sequence[str]) -> list[Route | OSError]:
        """How the kernel would send to each of these, or why it could not."""
        found: list[Route | OSError] = []
        for at in range(0, len(hosts), PIPELINED):
            questions = []
            for host in hosts[at : at + PIPELINED]:
                family, octets = raw(host)
                body = _ROUTE.pack(family, 8 * len(octets), 0, 0, 0, 0, 0, 0, 0) + attribute(RTA_DST, octets)
                questions.append((RTM_GETROUTE, NLM_F_REQUEST, body))
            found += [answer if isinstance(answer, OSError) else _read_route(answer) for answer in self._ask(questions)]
        return found

    def use(self, interface: int, hosts: Sequence[str]) -> None:
        """Have the kernel find out, or make sure, who has these addresses on a link, as if a packet had to go there."""
        for at in range(0, len(hosts), PIPELINED):
            questions = []
            for host in hosts[at : at + PIPELINED]:
                family, octets = raw(host)
                body = _NEIGHBOUR.pack(family, interface, 0, NTF_USE, 0) + attribute(NDA_DST, octets)
                questions.append((RTM_NEWNEIGH, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, body))
            self._ask(questions)

    def request(self, kind: int, body: bytes) -> Message:
        """The only answer to a question. Raises OSError."""
        (answer,) = self._ask([(kind, NLM_F_REQUEST, body)])
        if isinstance(answer, OSError):
            raise answer
        return answer

    def dump(self, kind: int, body: bytes) -> list[Message]:
        """Everything of one kind."""
        self._sequence += 1
        self._socket.send(_message(kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, body))
        found: list[Message] = []
        while True:
            for answer, sequence, octets in _messages(self._socket.recv(RECEIVE_SIZE)):
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_DONE:
                    return found
                if answer == NLMSG_ERROR:
                    raise _error(octets) or OSError(errno.EPROTO, "an acknowledgement in place of an answer")
                found.append(Message(answer, octets))

    def _ask(self, questions: Sequence[tuple[int, int, bytes]]) -> list[Message | OSError]:
        """One answer, or acknowledgement, for each question, in one go."""
        first = self._sequence + 1
        self._sequence += len(questions)
        self._socket.send(b"".join(_message(*q[:2], first + i, q[2]) for i, q in enumerate(questions)))
        found: dict[int, Message | OSError] = {}
        while len(found) < len(questions):
            for kind, sequence, octets in _messages(self._socket.recv(RECEIVE_SIZE)):
                if first <= sequence < first + len(questions):
                    found[sequence] = (_error(octets) if kind == NLMSG_ERROR else None) or Message(kind, octets)
        return [found[first + i] for i in range(len(questions))]


def read_link(message: Message) -> Link | None:
    if message.type not in (RTM_NEWLINK, RTM_DELLINK):
        return None
    family, _, index, flags, _ = _LINK.unpack_from(message.body)
    if family != socket.AF_UNSPEC:  # a bridge's port, and not a link of its own
        return None
    found = attributes(message.body[_LINK.size :])
    return Link(
        index,
        found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        found.get(IFLA_ADDRESS, b""),
        _u32(found.get(IFLA_MTU, bytes(4))),
        bool(flags & IFF_UP) and message.type == RTM_NEWLINK,
    )


def read_address(message: Message) -> InterfaceAddress | None:
    if message.type not in (RTM_NEWADDR, RTM_DELADDR):
        return None
    _, _, flags, scope, index = _ADDRESS.unpack_from(message.body)
    found = attributes(message.body[_ADDRESS.size :])
    flags = _u32(found[IFA_FLAGS]) if IFA_FLAGS in found else flags
    octets = found.get(IFA_LOCAL, found.get(IFA_ADDRESS))
    if octets is None:
        return None
    unusable = flags & (IFA_F_DADFAILED | IFA_F_DEPRECATED | IFA_F_TENTATIVE)
    return InterfaceAddress(index, _host(octets), scope, not unusable and message.type == RTM_NEWADDR)


def read_neighbour(message: Message) -> Neighbour | None:
    if message.type not in (RTM_NEWNEIGH, RTM_DELNEIGH):
        return None
    family, index, state, _, _ = _NEIGHBOUR.unpack_from(message.body)
    found = attributes(message.body[_NEIGHBOUR.size :])
    if family not in (socket.AF_INET, socket.AF_INET6) or NDA_DST not in found:
        return None
    if message.type == RTM_DELNEIGH:
        state = 0
    mac = found.get(NDA_LLADDR, b"") if state & NUD_VALID else b""
    return Neighbour(index, _host(found[NDA_DST]), mac, bool(state & NUD_FAILED))


def attributes(octets: bytes) -> dict[int, bytes]:
    """The last attribute of each type."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(octets):
        length, kind = _ATTRIBUTE.unpack_from(octets, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & NLA_TYPE_MASK] = octets[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)
    return found


def attribute(kind: int, octets: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(octets)
    return _ATTRIBUTE.pack(length, kind) + octets.ljust(_aligned(length) - _ATTRIBUTE.size, b"\0")


def raw(host: str) -> tuple[int, bytes]:
    """Family and octets of an address."""
    return (socket.AF_INET6, packed(host)) if ":" in host else (socket.AF_INET, packed(host)[12:])


def _read_route(message: Message) -> Route:
    kind = _ROUTE.unpack_from(message.body)[7]
    found = attributes(message.body[_ROUTE.size :])
    gateway = found.get(RTA_GATEWAY)
    if RTA_VIA in found:  # an IPv6 gateway of an IPv4 route
        gateway = found[RTA_VIA][2:]
    metrics = attributes(found.get(RTA_METRICS, b""))
    return Route(
        kind,
        _u32(found.get(RTA_OIF, bytes(4))),
        None if gateway is None else _host(gateway),
        _u32(metrics.get(RTAX_MTU, bytes(4))),
    )


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, kind, flags, sequence, 0) + body.ljust(_aligned(length) - _HEADER.size, b"\0")


def _messages(octets: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and body of each message."""
    at = 0
    while at + _HEADER.size <= len(octets):
        length, kind, _, sequence, _ = _HEADER.unpack_from(octets, at)
        if length < _HEADER.size:
            return
        yield kind, sequence, octets[at + _HEADER.size : at + length]
        at += _aligned(length)


def _error(octets: bytes) -> OSError | None:
    """What went wrong; None for an acknowledgement."""
    number = -struct.unpack_from("=i", octets)[0]
    return OSError(number, os.strerror(number)) if number else None


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _u32(octets: bytes) -> int:
    return int(struct.unpack_from("=I", octets)[0])


def _host(octets: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(octets) == 4 else socket.AF_INET6, octets)
