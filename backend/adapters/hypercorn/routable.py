"""What makes hypercorn routable: its QUIC protocol, with connections that get their connection IDs from an identity.

Written for hypercorn 0.18.0 and aioquic 1.7.2. hypercorn has no option for any of it: `install` replaces three names in
its module `hypercorn.protocol.quic`, where every server of the process finds them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import hypercorn.protocol.quic
from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
from aioquic.h3.connection import ErrorCode
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE
from aioquic.quic.packet import PACKET_FIXED_BIT, QuicHeader, encode_quic_version_negotiation, pull_quic_header
from hypercorn.events import Event, RawData

from backend.routable import Identity, IssuedCid, RoutableConnection
from lb.limiter import RateLimiter
from lb.packet import LONG_HEADER, parse_header
from lb.reset import reset_datagram, reset_size

log = logging.getLogger(__name__)

# Ours.
RESETS_PER_SECOND = 200
RETIRED_CID_LINGERS = 3.0  # seconds; packets overtaken by RETIRE_CONNECTION_ID are late, not strange
MAX_LINGERING = 65_536  # connection IDs


def install(identity: Identity, *, idle_timeout: float) -> Callable[[], list[RoutableProtocol]]:
    """Have all servers of this process make their connection IDs as `identity` does; times in seconds.

    Returns what lists them: one for each socket.
    """
    protocols: list[RoutableProtocol] = []

    def create(*args: Any) -> RoutableProtocol:
        protocol = RoutableProtocol(identity, idle_timeout, *args)
        protocols.append(protocol)
        return protocol

    def pull_header(buffer: Buffer, host_cid_length: int) -> QuicHeader:
        return pull_quic_header(buffer, host_cid_length=identity.cid_length)  # hypercorn's is always 8

    quic: Any = hypercorn.protocol.quic
    quic.QuicProtocol = create
    quic.pull_quic_header = pull_header
    return lambda: protocols


class _Connections(dict[bytes, Any]):
    """Connections by connection ID, and which connection IDs were among them a moment ago."""

    def __init__(self) -> None:
        super().__init__()
        self._gone: OrderedDict[bytes, float] = OrderedDict()

    def __delitem__(self, cid: bytes) -> None:
        super().__delitem__(cid)
        self._gone[cid] = _now()
        if len(self._gone) > MAX_LINGERING:
            self._gone.popitem(last=False)

    def lingers(self, cid: bytes) -> bool:
        while self._gone and next(iter(self._gone.values())) + RETIRED_CID_LINGERS < _now():
            self._gone.popitem(last=False)
        return cid in self._gone


class RoutableProtocol(hypercorn.protocol.quic.QuicProtocol):
    """One socket's connections. It is the issuer of their connection IDs, and answers for those that are gone."""

    def __init__(self, identity: Identity, idle_timeout: float, *args: Any) -> None:
        super().__init__(*args)
        self.connections: _Connections = _Connections()
        self.resets = 0
        self._identity = identity
        self._limiter = RateLimiter(RESETS_PER_SECOND, 0)
        self.quic_config.connection_id_length = identity.cid_length
        self.quic_config.idle_timeout = idle_timeout

    async def handle(self, event: Event) -> None:
        """Deliver a datagram, or answer it with a Stateless Reset or Version Negotiation. None ends the server."""
        if not isinstance(event, RawData) or not event.data:
            return
        try:
            await self._received(event)
        except Exception:
            log.exception("datagram-failed")

    async def _received(self, event: RawData) -> None:
        if (negotiation := self._negotiation(event.data)) is not None:
            await self.send(RawData(data=negotiation, address=event.address))
            return
        if (reset := self._reset(event.data)) is not None:
            self.resets += 1
            await self.send(RawData(data=reset, address=event.address))
            return
        # hypercorn makes connections by this name, before it awaits anything.
        module: Any = hypercorn.protocol.quic
        module.QuicConnection = partial(RoutableConnection, self)
        await super().handle(event)
        if (connection := self._of(event.data)) is not None and connection.h3:
            connection.h3.client = event.address  # hypercorn's own is where the first packet came from

    def issue(self, connection: RoutableConnection) -> IssuedCid:
        """A new connection ID for a connection. hypercorn itself knows it one datagram too late."""
        cid = self._identity.new_cid()
        while cid in self.connections:
            cid = self._identity.new_cid()
        known = self.connections.get(connection.original_destination_connection_id)
        if known is not None:  # the first one it registers at once
            known.cids.add(cid)
            self.connections[cid] = known
        return IssuedCid(cid, self._identity.reset_token(cid))

    async def renew_cids(self) -> None:
        """Have all clients move to connection IDs as the identity makes them now."""
        for connection in self._all():
            cast(RoutableConnection, connection.quic).renew()
            await self.send_all(connection)

    async def close(self) -> None:
        """Close every connection."""
        for connection in self._all():
            connection.quic.close(error_code=ErrorCode.H3_NO_ERROR)
            await self.send_all(connection)

    def _all(self) -> list[Any]:
        return list({id(each): each for each in self.connections.values()}.values())

    def _of(self, data: bytes) -> Any:
        """The connection of a short header; None if there is none."""
        return self.connections.get(data[1 : 1 + self._identity.cid_length]) if not data[0] & LONG_HEADER else None

    def _negotiation(self, data: bytes) -> bytes | None:
        """What answers a version that is not spoken here, such as a balancer's probe.

        hypercorn reads the whole header first, as if it were version 1, and drops what makes no sense then.
        """
        header = parse_header(data)
        if header is None or header.scid is None or len(data) < SMALLEST_MAX_DATAGRAM_SIZE:
            return None
        versions = self.quic_config.supported_versions
        if int.from_bytes(data[1:5]) in (0, *versions):
            return None
        return encode_quic_version_negotiation(header.dcid, header.scid, versions)

    def _reset(self, data: bytes) -> bytes | None:
        """A Stateless Reset, for a short header with a connection ID of this server that no connection has."""
        if data[0] & LONG_HEADER or not data[0] & PACKET_FIXED_BIT:
            return None
        cid = data[1 : 1 + self._identity.cid_length]
        if cid in self.connections or self.connections.lingers(cid) or not self._identity.may_reset(cid):
            return None
        size = reset_size(len(data), os.urandom)
        if size is None or not self._limiter.allow("", _now()):
            return None
        return reset_datagram(self._identity.reset_token(cid), size, os.urandom)


def _now() -> float:
    return asyncio.get_running_loop().time()
