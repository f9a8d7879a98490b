"""Nat: which client is behind which local port. Sockets, limits and memory of the socket engine's flows."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from lb.address import Address
from lb.engine import Counters
from lb.log import event
from lb.mmsg import raw_address, socket_address
from lb.returnpath import ReturnPath, ReturnPaths
from lb.routing import FourTuple
from lb.sockets import Port, upstream_port
from lb.upstream import ENDED, Flow, Flows, Key, Listener, Member, Ports, Upstream

SOCKET_REST = 1.0  # seconds from a socket that could not be had to the next attempt

logger = logging.getLogger(__name__)


class UdpLimits:
    """What an engine may use, and how long it remembers. Times in seconds, sizes in octets."""

    __slots__ = ("flows", "idle_timeout", "new_flow_timeout", "socket_buffer", "sockets")

    def __init__(
        self, *, flows: int, sockets: int, idle_timeout: float, new_flow_timeout: float, socket_buffer: int
    ) -> None:
        self.flows = flows
        self.sockets = sockets
        self.idle_timeout = idle_timeout
        self.new_flow_timeout = new_flow_timeout
        self.socket_buffer = socket_buffer


class Followed(NamedTuple):
    """A flow of a predecessor, as its return path file said it, and what it is here."""

    path: ReturnPath
    flow: Flow


class Nat:
    """All flows of an engine, and the ports that they share.

    `opened` is called with every new port, which somebody must read from. `return_paths`, once there are some, hear
    of every flow. What is given up or restored is counted in `counters`.
    """

    return_paths: ReturnPaths | None = None

    def __init__(self, limits: UdpLimits, counters: Counters, opened: Callable[[Upstream], None]) -> None:
        self.flows = Flows(limits.flows)
        self._limits = limits
        self._counters = counters
        self._opened = opened
        self._pools: dict[bool, list[Upstream]] = {False: [], True: []}  # by family: is it IPv6?
        self._ports: dict[bytes, Ports] = {}  # by backend address, as `Upstream.flows` is
        self._families = 1
        self._open_again = float("-inf")
        self._known: dict[tuple[bool, int], Upstream | None] = {}  # ports of another process, None if not to be had
        self._members: dict[Address, dict[Address, Member]] = {}  # by listener and backend, while flows are restored

    @property
    def sockets(self) -> int:
        return len(self._pools[False]) + len(self._pools[True])

    @property
    def upstreams(self) -> list[Upstream]:
        return [*self._pools[False], *self._pools[True]]

    def set_backends(self, members: Collection[Member]) -> None:
        """From now on there are these, and no others. The flows of others have ended."""
        self._ports = {member.raw: self._ports.get(member.raw) or Ports() for member in members}
        self._families = len({member.address.is_ipv6 for member in members})

    def begin(
        self, listener: Listener, key: Key, client: Any, local: bytes | None, member: Member, now: float
    ) -> Flow | None:
        """A new flow; the oldest idle one goes if there is no room. None if there is no port to be had."""
        if self.flows.is_full:
            victim = self.flows.victim()
            if victim is None:
                return None
            self._counters.flows_evicted += 1
            self.end(victim, now)
        upstream = self._port_for(member, now)
        if upstream is None:
            return None
        flow = Flow(listener, key, client, local, member, upstream)
        flow.seen = now
        self._add(flow)
        self.remember(flow)
        return flow

    def _add(self, flow: Flow) -> None:
        link(flow)
        flow.upstream.flows[flow.member.raw] = flow
        flow.member.flows += 1
        self.flows.add(flow)

    def end(self, flow: Flow, now: float) -> None:
        unlink(flow)
        del flow.upstream.flows[flow.member.raw]
        flow.member.flows -= 1
        self._ports[flow.member.raw].give_back(flow.upstream, now)
        if self.return_paths is not None:
            self.return_paths.clear(flow.number)
        self.flows.remove(flow)

    def _port_for(self, member: Member, now: float) -> Upstream | None:
        """A port that no flow of this backend uses: one long given back, one never used, a new one, or the idlest's."""
        is_ipv6 = member.address.is_ipv6
        pool, ports = self._pools[is_ipv6], self._ports[member.raw]
        upstream = ports.take(pool, now)
        if upstream is None and self._may_open(pool, now) and self._open(is_ipv6, now):
            upstream = ports.take(pool, now)
        if upstream is None:
            upstream = ports.take_early()
        if upstream is None:
            victim = ports.victim(member, pool)
            if victim is None:
                return None
            self._counters.flows_evicted += 1
            self.end(victim, now)
            upstream = ports.take_early()
        return upstream

    def _may_open(self, pool: list[Upstream], now: float) -> bool:
        """Whether a pool may grow: with backends of both families to half of all sockets, and to one in any case."""
        if now < self._open_again:
            return False
        share = self._limits.sockets // max(1, self._families)
        return not pool or (len(pool) < share and self.sockets < self._limits.sockets)

    def _open(self, is_ipv6: bool, now: float) -> bool:
        """Open another port. Returns whether that was possible."""
        try:
            self._add_port(Upstream(upstream_port(is_ipv6, buffer=self._limits.socket_buffer)))
        except OSError as error:
            if self._counters.socket_limit != self.sockets:
                reason = os.strerror(error.errno or 0)
                event(logger, logging.WARNING, "no-more-sockets", sockets=self.sockets, reason=reason)
            # Whatever the limit was meant to be, this is what it is for now.
            self._counters.socket_limit = self.sockets
            self._open_again = now + SOCKET_REST
            return False
        self._counters.socket_limit = self._limits.sockets
        return True

    def remember(self, flow: Flow) -> None:
        if self.return_paths is None:
            return
        client = flow.client
        self.return_paths.write(
            flow.number,
            ReturnPath(
                flow.upstream.address.port,
                flow.member.address,
                Address(client[0], client[1]),
                flow.listener.address,
                client[3] if len(client) > 2 else 0,
                None if flow.local is None else host_of(flow.local),
                flow.cid,
                flow.established,
            ),
        )

    # Flows of another process: one that was killed, or a predecessor that hands over.

    def reopen_ports(self, paths: Iterable[ReturnPath], now: float, *, final: bool) -> bool:
        """Bind the ports that a killed predecessor's flows used. Returns whether that is settled.

        A port that is still taken may be free a moment later; `final` gives it up.
        """
        for path in paths:
            place = (path.backend.is_ipv6, path.local_port)
            if place in self._known:
                continue
            if self.sockets >= self._limits.sockets:
                self._known[place] = None
                continue
            try:
                port = upstream_port(place[0], buffer=self._limits.socket_buffer, port=place[1])
                self._known[place] = self._add_port(Upstream(port, now))
            except OSError:
                if not final:
                    return False
                self._known[place] = None
        return True

    def adopt_ports(self, ports: Iterable[Port], now: float) -> None:
        """Have the ports of a predecessor; those that are too many are closed."""
        for port in ports:
            place = (port.is_ipv6, port.address.port)
            if self.sockets < self._limits.sockets:
                self._known[place] = self._add_port(Upstream(port, now))
            else:
                port.close()
                self._known[place] = None

    def restore(self, paths: Collection[ReturnPath], listeners: Mapping[Address, Listener], now: float) -> None:
        """Carry on the flows of a process that died: same ports, same clients."""
        restored = sum(self._restore(path, listeners, now) is not None for path in paths)
        if paths:
            event(logger, logging.INFO, "flows-restored", flows=restored, lost=len(paths) - restored)
        self._counters.flows_restored += restored
        self.forget_ports()

    def follow(
        self,
        changes: Iterable[tuple[int, ReturnPath | None]],
        followed: dict[int, Followed],
        listeners: Mapping[Address, Listener],
        now: float,
    ) -> list[tuple[int, ReturnPath | None]]:
        """Do as a predecessor did: what its file has now under some of its numbers. `followed` are its flows here.

        Returns the changes whose ports it has not sent yet: they come first the next time.
        """
        begun: dict[int, ReturnPath] = {}
        for number, path in changes:
            begun.pop(number, None)
            before = followed.get(number)
            if before is not None:
                if path is not None and path[:6] == before.path[:6] and before.flow.number != ENDED:
                    self._update(before.flow, path)
                    followed[number] = Followed(path, before.flow)
                    continue
                del followed[number]
                if before.flow.number != ENDED:
                    self.end(before.flow, now)
            if path is not None:
                begun[number] = path
        early: list[tuple[int, ReturnPath | None]] = []
        for number, path in begun.items():
            if (path.backend.is_ipv6, path.local_port) not in self._known:
                early.append((number, path))
            elif (flow := self._restore(path, listeners, now)) is not None:
                followed[number] = Followed(path, flow)
        return early

    def forget_ports(self) -> None:
        """Whatever is to be restored is restored."""
        self._known = {}
        self._members = {}

    def close(self) -> None:
        for upstream in self.upstreams:
            upstream.close()
        if self.return_paths is not None:
            self.return_paths.close()
            self.return_paths = None

    def _restore(self, path: ReturnPath, listeners: Mapping[Address, Listener], now: float) -> Flow | None:
        listener = listeners.get(path.listener)
        upstream = self._known.get((path.backend.is_ipv6, path.local_port))
        if listener is None:
            return None
        member = self._members_of(listener).get(path.backend)
        if member is None:
            return None
        if upstream is None or not self._make_room(path):
            self._counters.flows_evicted += 1
            return None
        if member.raw in upstream.flows:
            return None
        local = None if path.local is None else _packed(path.local)
        client = raw_address(path.client, path.scope_id)
        key = client if local is None else (client, local)
        flow = Flow(listener, key, socket_address(client), local, member, upstream)
        flow.seen = now
        flow.cid = path.cid
        flow.established = path.established
        flow.short_header_seen = path.established
        self._add(flow)
        self._ports[member.raw].carry_on(upstream)
        self.remember(flow)
        if path.cid is None:
            # Nothing in its packets says where they belong: the router has to know.
            host = listener.address.host if path.local is None else path.local
            four_tuple = FourTuple(flow.client[0], flow.client[1], host, listener.address.port)
            listener.service.router.adopt(four_tuple, member.name, now)
        return flow

    def _members_of(self, listener: Listener) -> dict[Address, Member]:
        members = self._members.get(listener.address)
        if members is None:
            members = {member.address: member for member in reversed(listener.service.members)}
            self._members[listener.address] = members
        return members

    def _make_room(self, path: ReturnPath) -> bool:
        """Whether there is room for a flow; if it is established, that of one that is not."""
        if not self.flows.is_full:
            return True
        victim = self.flows.victim() if path.established else None
        if victim is None or victim.established:
            return False
        self._counters.flows_evicted += 1
        self.end(victim, victim.seen)
        return True

    def _update(self, flow: Flow, path: ReturnPath) -> None:
        flow.cid = path.cid
        if path.established:
            flow.short_header_seen = True
            self.flows.establish(flow)
        self.remember(flow)

    def _add_port(self, upstream: Upstream) -> Upstream:
        try:
            self._opened(upstream)
        except OSError:
            upstream.close()
            raise
        self._pools[upstream.is_ipv6].append(upstream)
        return upstream


def bring_forward(flow: Flow) -> None:
    """Make a flow the first of its client's, the one whose CID is looked at first."""
    unlink(flow)
    link(flow)


def link(flow: Flow) -> None:
    """Put a flow at the head of the chain of its client's."""
    flow.sibling = flow.listener.flows.get(flow.key)
    flow.listener.flows[flow.key] = flow


def unlink(flow: Flow) -> None:
    """Take a flow out of the chain of its client's."""
    flows, key = flow.listener.flows, flow.key
    before = flows[key]
    if before is flow:
        if flow.sibling is None:
            del flows[key]
        else:
            flows[key] = flow.sibling
    else:
        while before.sibling is not flow:
            assert before.sibling is not None  # noqa: S101 - it is in its own client's chain
            before = before.sibling
        before.sibling = flow.sibling
    flow.sibling = None


def host_of(packed: bytes) -> str:
    """A packed address as the kernel prints it."""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
