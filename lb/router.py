"""Router: what becomes of one datagram. It has no socket, no clock and no randomness: all stay with the caller.

The steps are those of the draft's "Load Balancer Forwarding" (section 4.2), in its order. Every datagram gets
exactly one verdict; none raises.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from lb.cid import LENGTH_BITS, UNROUTABLE, ConfigId, ConnectionId
from lb.flows import FlowTable
from lb.limiter import RateLimiter
from lb.packet import Header, parse_header
from lb.reset import MAX_RESET, reset_datagram, reset_size
from lb.routing import Action, BackendState, FourTuple, RoutingTable, Server, UnknownServer, Unroutable


class Verdict(IntEnum):
    """What became of a datagram, one reason each. The same list, in the same order, as `enum verdict` in shared.h."""

    # Forwarded.
    CID = 0  # the CID carries the ID of an active server
    CID_DOWN = 1  # of a server that is DOWN, but not for as long as the hold-off
    TABLE_SCID = 2  # found by 4-tuple and source CID
    TABLE_DCID = 3  # found by destination CID
    TABLE_FLOW = 4  # found by 4-tuple
    FALLBACK = 5  # the ring chose
    # Answered.
    RESET = 6  # with a stateless reset, for a server that is declared dead
    # Dropped.
    EMPTY = 7  # no octets
    MALFORMED = 8  # a long header that ends too early
    UNKNOWN_SERVER = 9  # the CID carries nobody's server ID, and the service says `unknown-server: drop`
    NO_BACKEND = 10  # no backend takes new connections
    NEW_FLOW_LIMIT = 11  # its source prefix begins too many flows
    RESET_TOO_SMALL = 12  # for a dead server, but too short to be answered
    RESET_LIMITED = 13  # for a dead server, but too many were answered already
    FRAGMENT = 14  # part of a fragmented datagram; the xdp engine only: to sockets the kernel reassembles


class Route(NamedTuple):
    """A decision. `backend` indexes the table's backends and is set if the verdict forwards; `reply` is a whole UDP
    payload for the client, set if the verdict is RESET; `unroutable` says why the CID did not decide."""

    verdict: Verdict
    backend: int | None = None
    config_id: ConfigId | None = None
    unroutable: Unroutable | None = None
    reply: bytes | None = None


class RouterLimits(NamedTuple):
    """Bounds of a router's memory and generosity; times in seconds, rates per second (0: no limit)."""

    table_entries: int = 65536
    idle_timeout: float = 120.0
    new_flow_timeout: float = 10.0
    new_flows_rate: float = 10_000.0  # per source prefix
    reset_rate: float = 1000.0
    reset_prefix_rate: float = 10.0


class Router:
    """Routes the datagrams of one service. `random(n)` returns n random octets, for the resets."""

    def __init__(
        self, table: RoutingTable, *, random: Callable[[int], bytes], limits: RouterLimits | None = None
    ) -> None:
        self.table = table
        limits = limits or RouterLimits()
        self._random = random
        self._by_scid: FlowTable[tuple[FourTuple, bytes]] = FlowTable(limits.table_entries)
        self._by_dcid: FlowTable[bytes] = FlowTable(limits.table_entries)
        self._by_flow: FlowTable[FourTuple] = FlowTable(limits.table_entries)
        self.set_limits(limits)

    def set_limits(self, limits: RouterLimits) -> None:
        """Change limits; what is remembered stays, up to the number of entries that the router began with."""
        self.limits = limits
        self._new_flows = RateLimiter(0, limits.new_flows_rate)
        self._resets = RateLimiter(limits.reset_rate, limits.reset_prefix_rate)

    def route(self, datagram: bytes, flow: FourTuple, now: float) -> Route:
        """Decide about a UDP payload that came over `flow` at `now` seconds of any clock that only goes forward."""
        header = parse_header(datagram)
        if header is None:
            return Route(Verdict.MALFORMED if datagram else Verdict.EMPTY)

        # 1. A routable CID: its server, in any packet, from any address.
        server = self.table.by_cid(header.dcid)
        if not isinstance(server, Unroutable):
            if server.action is Action.FORWARD:
                return Route(Verdict.CID, server.backend, server.config_id)
            if server.action is Action.FORWARD_DOWN:
                return Route(Verdict.CID_DOWN, server.backend, server.config_id)
            if not header.is_long:
                return self._reset(datagram, header, server, flow, now)
            # A client that still sends long headers has no token to know a reset by (RFC 9000, section 10.3).
            server = Unroutable.DEAD_SERVER
        unroutable = server
        if unroutable is Unroutable.UNKNOWN_SERVER and self._drops_unknown_servers(header):
            return Route(Verdict.UNKNOWN_SERVER, unroutable=unroutable)

        # 2. to 4. The tables.
        known_dcid = _known_dcid(header)
        for verdict, name in (
            (
                Verdict.TABLE_SCID,
                self._by_scid.get((flow, header.scid), now) if header.scid is not None else None,
            ),
            (Verdict.TABLE_DCID, self._by_dcid.get(known_dcid, now) if known_dcid else None),
            (Verdict.TABLE_FLOW, self._by_flow.get(flow, now)),
        ):
            backend = self._still_there(name, header) if name is not None else None
            if backend is not None:
                self._remember(header, known_dcid, flow, backend, now)
                return Route(verdict, backend, unroutable=unroutable)

        # 5. The fallback algorithm, its answer recorded.
        backend = self.table.fallback(flow)
        if backend is None:
            return Route(Verdict.NO_BACKEND, unroutable=unroutable)
        if not self._new_flows.allow(flow.client, now):
            return Route(Verdict.NEW_FLOW_LIMIT, unroutable=unroutable)
        self._remember(header, known_dcid, flow, backend, now)
        return Route(Verdict.FALLBACK, backend, unroutable=unroutable)

    def farewell(self, cid: bytes) -> bytes | None:
        """The reset, as a whole UDP payload, that tells the user of `cid` that its server is gone.

        None if that server is not declared dead, or has no reset key: then nobody may say so.
        """
        server = self.table.by_cid(cid)
        if isinstance(server, Unroutable) or server.action is not Action.RESET or server.reset_key is None:
            return None
        size = reset_size(2 * MAX_RESET, self._random)  # unprompted: of any size that a data packet could have
        return reset_datagram(server.reset_key.token(cid), size, self._random) if size else None

    def adopt(self, flow: FourTuple, backend: str, now: float) -> None:
        """Remember a decision that a predecessor took: this 4-tuple belongs to the backend of that name."""
        self._by_flow.put(flow, backend, now, self.limits.new_flow_timeout)

    def sweep(self, now: float, steps: int) -> None:
        """Forget some decisions that nobody asked for in a long time. Call it now and then."""
        for table in (self._by_scid, self._by_dcid, self._by_flow):
            table.sweep(now, steps)

    def _reset(self, datagram: bytes, header: Header, server: Server, flow: FourTuple, now: float) -> Route:
        cid = self.table.whole_cid(header.dcid)
        size = reset_size(len(datagram), self._random)
        if cid is None or size is None or server.reset_key is None:
            return Route(Verdict.RESET_TOO_SMALL, config_id=server.config_id)
        if not self._resets.allow(flow.client, now):
            return Route(Verdict.RESET_LIMITED, config_id=server.config_id)
        reply = reset_datagram(server.reset_key.token(cid), size, self._random)
        return Route(Verdict.RESET, config_id=server.config_id, reply=reply)

    def _drops_unknown_servers(self, header: Header) -> bool:
        # A long header's DCID may be the client's own choice, and then it means nothing that it decodes to nobody.
        return self.table.service.unknown_server is UnknownServer.DROP and not header.is_long

    def _still_there(self, name: str, header: Header) -> int | None:
        """The index of a remembered backend, None if it should not get this packet any more."""
        backend = self.table.index.get(name)
        if backend is None:
            return None
        is_believed = not self.table.fail_open or name in self.table.fenced
        if self.table.states[backend] is not BackendState.DOWN or not is_believed:
            return backend
        # An established connection waits for the hold-off; a handshake had better begin elsewhere.
        return None if header.is_long or name in self.table.dead else backend

    def _remember(
        self, header: Header, known_dcid: ConnectionId | None, flow: FourTuple, backend: int, now: float
    ) -> None:
        name = self.table.backends[backend].name
        # A long header proves nothing about its sender's address: not much memory for floods of them.
        lifetime = self.limits.new_flow_timeout if header.is_long else self.limits.idle_timeout
        if header.scid is not None:
            self._by_scid.put((flow, header.scid), name, now, lifetime)
        if known_dcid:
            self._by_dcid.put(known_dcid, name, now, lifetime)
        self._by_flow.put(flow, name, now, lifetime)


def _known_dcid(header: Header) -> ConnectionId | None:
    """The exact DCID, where the packet says how long it is: in a long header, or by itself under codepoint 0b111."""
    if header.is_long:
        return header.dcid or None
    if header.dcid and header.dcid[0] >> 5 == UNROUTABLE:
        length = 1 + (header.dcid[0] & LENGTH_BITS)
        if len(header.dcid) >= length:
            return ConnectionId(header.dcid[:length])
    return None
