"""Nat: which client is behind which local port. Sockets, limits and memory of the socket engine's flows."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lb.address import Address
from lb.engine import Counters
from lb.log import event
from lb.mmsg import raw_address, socket_address
from lb.returnpath import ReturnPath, ReturnPaths
from lb.sockets import upstream_port
from lb.upstream import Flow, Flows, Key, Listener, Member, Ports, Upstream

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


class Nat:
    """All flows of an engine, and the ports that they share.

    `opened` is called with every new port, which somebody must read from. `return_paths` hears of every flow.
    What is given up or restored is counted in `counters`.
    """

    def __init__(
        self,
        limits: UdpLimits,
        counters: Counters,
        opened: Callable[[Upstream], None],
        return_paths: ReturnPaths | None,
    ) -> None:
        self.flows = Flows(limits.flows)
        self._limits = limits
        self._counters = counters
        self._opened = opened
        self._return_paths = return_paths
        self._pools: dict[bool, list[Upstream]] = {False: [], True: []}  # by family: is it IPv6?
        self._ports: dict[bytes, Ports] = {}  # by backend address, as `Upstream.flows` is
        self._families = 1
        self._open_again = float("-inf")
        self._paths = list(return_paths.remembered()) if return_paths is not None else []
        self._reopened: dict[tuple[bool, int], Upstream | None] = {}

    @property
    def sockets(self) -> int:
        return len(self._pools[False]) + len(self._pools[True])

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
        if self._return_paths is not None:
            self._return_paths.clear(flow.number)
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
        if self._return_paths is None:
            return
        client = flow.client
        self._return_paths.write(
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

    def reopen_ports(self, *, final: bool) -> bool:
        """Bind the ports that a killed predecessor's flows used. Returns whether that is settled.

        A port that is still taken may be free a moment later; `final` gives it up.
        """
        for path in self._paths:
            place = (path.backend.is_ipv6, path.local_port)
            if place in self._reopened:
                continue
            if self.sockets >= self._limits.sockets:
                self._reopened[place] = None
                continue
            try:
                port = upstream_port(place[0], buffer=self._limits.socket_buffer, port=place[1])
                self._reopened[place] = self._add_port(Upstream(port))
            except OSError:
                if not final:
                    return False
                self._reopened[place] = None
        return True

    def restore(self, listeners: Mapping[Address, Listener], now: float) -> None:
        """Carry on the flows of a process that died: same ports, same clients."""
        if self._return_paths is None:
            return
        restored = sum(self._restore(path, listeners, now) for path in self._paths)
        if self._paths:
            event(logger, logging.INFO, "flows-restored", flows=restored, lost=len(self._paths) - restored)
        self._counters.flows_restored += restored
        self._paths = []
        self._reopened = {}
        self._return_paths.commit()

    def close(self) -> None:
        for upstream in [*self._pools[False], *self._pools[True]]:
            upstream.close()
        if self._return_paths is not None:
            self._return_paths.close()

    def _restore(self, path: ReturnPath, listeners: Mapping[Address, Listener], now: float) -> bool:
        listener = listeners.get(path.listener)
        upstream = self._reopened[path.backend.is_ipv6, path.local_port]
        if listener is None or upstream is None or self.flows.is_full:
            return False
        member = next((m for m in listener.service.members if m.address == path.backend), None)
        if member is None or member.raw in upstream.flows:
            return False
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
        return True

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
