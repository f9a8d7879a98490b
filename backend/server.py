"""The server's sockets: which connection a datagram is for, and what is said to one that is for none.

It stands in place of aioquic's `QuicServer` and differs in what a balancer needs: connection IDs are registered when
they are made, a Retry carries one that can be routed, and a client of a connection that is gone is told.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum, auto
from functools import partial
from typing import cast

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY, NetworkAddress
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import (
    PACKET_FIXED_BIT,
    QuicErrorCode,
    QuicFrameType,
    QuicHeader,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder

from backend.ledger import Ledger
from backend.paths import Paths, PreferredAddress
from backend.renewal import Renewals
from backend.resumable import ResumableConnection
from backend.routable import Identity, IssuedCid, RoutableConnection
from backend.seal import Kind
from backend.tickets import Tickets
from backend.tokens import Proof, Tokens, kind_of
from lb.address import Address
from lb.cid import UNROUTABLE, ConnectionId, config_id_of
from lb.limiter import RateLimiter
from lb.log import event
from lb.packet import LONG_HEADER, parse_header
from lb.reset import reset_datagram, reset_size

log = logging.getLogger(__name__)

# Ours.
SOCKET_BUFFER = 4 << 20  # octets, as far as net.core.rmem_max lets us: bursts arrive faster than Python reads
RETIRED_CID_LINGERS = 3.0  # seconds; packets overtaken by RETIRE_CONNECTION_ID are late, not strange
MAX_CONNECTIONS = 10_000  # about 1.2 GB of aioquic


class Outcome(Enum):
    """What became of a datagram that was for no connection."""

    ACCEPTED = auto()
    MALFORMED = auto()
    VERSION_NEGOTIATED = auto()
    RETRIED = auto()
    INVALID_TOKEN = auto()
    NOT_INITIAL = auto()  # a long header, to a connection that does not exist (any more)
    INITIAL_TOO_SMALL = auto()
    INITIAL_NOT_AUTHENTIC = auto()
    REFUSED = auto()  # no new connections are accepted any more
    TOO_MANY_CONNECTIONS = auto()
    RESET = auto()
    NOT_MINE = auto()  # a short header with no connection ID of this server, or one that cannot be reset
    TOO_SMALL_FOR_RESET = auto()
    RESET_LIMITED = auto()


class Sockets(asyncio.DatagramTransport):
    """All sockets, as the one transport that aioquic knows.

    An address to send to is a client's, as Python has it, with one more item: the socket that it was heard on. So a
    path of aioquic's is what RFC 9000 calls one, and what a client asked at one address comes from no other.
    """

    def __init__(self) -> None:
        super().__init__()
        self._all: list[asyncio.DatagramTransport] = []

    def add(self, transport: asyncio.DatagramTransport) -> None:
        self._all.append(transport)

    def at(self, address: Address) -> asyncio.DatagramTransport | None:
        """The socket that is bound to an address."""
        return next((each for each in self._all if each.get_extra_info("sockname")[:2] == address), None)

    def sendto(self, data: bytes | bytearray | memoryview, addr: NetworkAddress = None) -> None:
        transport = addr[-1]
        if not transport.is_closing():
            transport.sendto(data, addr[:-1])

    def close(self) -> None:
        for transport in self._all:
            transport.close()


class _Ear(asyncio.DatagramProtocol):
    """Tells a server what one of its sockets hears."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self._server.opened(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.lost()

    def datagram_received(self, data: bytes, addr: NetworkAddress) -> None:
        self._server.received(data, (*addr, self._transport))


class Server:
    """Demultiplexes datagrams to connections by DCID; accepts, retries and resets.

    `configuration` must have the identity's connection ID length. With `retry`, which needs `tokens`, clients prove
    their address first. Without `tickets` no session is resumed.
    """

    def __init__(
        self,
        identity: Identity,
        configuration: QuicConfiguration,
        create_protocol: Callable[[RoutableConnection], QuicConnectionProtocol],
        limiter: RateLimiter,
        random: Callable[[int], bytes],
        *,
        tokens: Tokens | None = None,
        tickets: Tickets | None = None,
        retry: bool = False,
        paths: Paths | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.connections: set[RoutableConnection] = set()
        self.ledger = Ledger(lambda: event(log, logging.INFO, "rotated", connections=len(self.connections)))
        self.is_accepting = True  # new connections; otherwise they are refused, in so many words
        self.tokens = tokens
        self.tickets = tickets
        self.paths = paths or Paths()
        self._preferred: PreferredAddress | None = None
        self._renewals = Renewals(self._renew, asyncio.get_running_loop().call_later)
        self._by_cid: dict[bytes, RoutableConnection] = {}
        self.identity = identity
        self._cid_end = 1 + identity.cid_length
        self._configuration = configuration
        self._create_protocol = create_protocol
        self._limiter = limiter
        self._random = random
        if retry and tokens is None:
            raise ValueError("a Retry needs tokens")
        self._retry_tokens = tokens if retry else None
        self._max_connections = max_connections
        self._loop = asyncio.get_running_loop()
        self._sockets = Sockets()
        self._is_routable = True  # until the generator has no nonces, or nowhere to write them down
        self._open_sockets = 0
        self._closed = asyncio.Event()

    async def listen(self, addresses: Iterable[Address]) -> list[Address]:
        """Bind one socket to each address; returns them with the ports that were bound. Raises OSError."""
        bound = []
        for address in addresses:
            sock = bound_socket(address)
            bound.append(Address(*sock.getsockname()[:2]))
            await self._loop.create_datagram_endpoint(lambda: _Ear(self), sock=sock)
        return bound

    async def prefer(self, addresses: Iterable[Address]) -> list[Address]:
        """Ask clients to go on at these addresses, and listen there too: at most one for each family.

        Returns them with the ports that were bound. Raises OSError, and ValueError for one that clients cannot be told.
        """
        preferred = PreferredAddress()
        for address in addresses:
            if self._sockets.at(address) is None:
                [address] = await self.listen([address])  # noqa: PLW2901 - with its port
            preferred.add(address, self._sockets.at(address))
        self._preferred = preferred if preferred.addresses else None
        return preferred.addresses

    async def stop(self) -> None:
        """Close every connection, with a CONNECTION_CLOSE, and then the sockets."""
        for connection in list(self.connections):
            self.guard(connection, connection.protocol.close)
        self._sockets.close()
        if self._open_sockets:
            await self._closed.wait()

    def renew_cids(self) -> None:
        """Have all clients move to connection IDs as the identity makes them now; `ledger.old` is how many they have
        to leave."""
        self.ledger.switch(cid for connection in self.connections for cid in connection.cids)
        self._renewals.begin(self.connections)

    def guard(self, connection: RoutableConnection, act: Callable[[], None]) -> None:
        """Do something to a connection. A bug, aioquic's or ours, costs that connection and no other."""
        try:
            act()
        except Exception as error:
            self._failed(connection, error)

    def opened(self, transport: asyncio.DatagramTransport) -> None:
        self._sockets.add(transport)
        self._open_sockets += 1

    def lost(self) -> None:
        self._open_sockets -= 1
        if not self._open_sockets:
            self._closed.set()

    def received(self, data: bytes, addr: NetworkAddress) -> None:
        """Deliver or answer a datagram that came by one of the sockets, with which `addr` ends."""
        is_short = data and not data[0] & LONG_HEADER
        if is_short:
            cid = data[1 : self._cid_end]
        else:
            header = parse_header(data)
            cid = header.dcid if header else b""
        connection = self._by_cid.get(cid)
        if connection is not None:
            self._deliver(connection, data, addr)
        elif is_short:
            self.outcomes[self._answer_short_header(data, cid, addr)] += 1
        else:
            self.outcomes[self._answer_long_header(data, addr)] += 1

    # CidIssuer

    def issue(self, connection: RoutableConnection) -> IssuedCid:
        cid = self._new_cid()
        self._by_cid[cid] = connection
        self.ledger.issue(cid)
        return IssuedCid(cid, self.identity.reset_token(cid))

    def _renew(self, connection: RoutableConnection) -> None:
        def act() -> None:
            connection.renew()
            connection.protocol.transmit()

        if connection in self.connections:  # still
            self.guard(connection, act)

    def _new_cid(self) -> ConnectionId:
        cid = self.identity.new_cid()
        is_routable = config_id_of(cid) != UNROUTABLE
        if is_routable != self._is_routable:
            self._is_routable = is_routable
            event(log, logging.WARNING, "routable" if is_routable else "not-routable")
        while cid in self._by_cid:
            # A nonce came twice (or somebody guessed one): two clients would hold each other's reset token.
            event(log, logging.ERROR, "cid-collision")
            cid = self.identity.new_cid()
        return cid

    def _deliver(self, connection: RoutableConnection, data: bytes, addr: NetworkAddress) -> None:
        try:
            connection.protocol.datagram_received(data, addr)
        except Exception as error:
            self._failed(connection, error)

    def _answer_short_header(self, data: bytes, cid: bytes, addr: NetworkAddress) -> Outcome:
        """To a short header: a Stateless Reset, if it was for a connection that this server has had, and lost."""
        if not data[0] & PACKET_FIXED_BIT:
            return Outcome.MALFORMED  # we never offer to accept these (RFC 9287)
        if len(cid) < self.identity.cid_length or not self.identity.may_reset(cid):
            return Outcome.NOT_MINE
        size = reset_size(len(data), self._random)
        if size is None:
            return Outcome.TOO_SMALL_FOR_RESET
        if not self._limiter.allow(addr[0], self._loop.time()):
            return Outcome.RESET_LIMITED
        self._sockets.sendto(reset_datagram(self.identity.reset_token(cid), size, self._random), addr)
        return Outcome.RESET

    def _answer_long_header(self, data: bytes, addr: NetworkAddress) -> Outcome:
        """To a long header: Version Negotiation, a Retry, or a new connection."""
        invariant = parse_header(data)
        if invariant is None or invariant.scid is None:
            return Outcome.MALFORMED
        version = int.from_bytes(data[1:5])
        if version == 0:
            return Outcome.NOT_INITIAL  # a Version Negotiation packet; answered, it could go on for ever
        if version not in self._configuration.supported_versions:
            if len(data) < SMALLEST_MAX_DATAGRAM_SIZE:
                return Outcome.INITIAL_TOO_SMALL
            versions = self._configuration.supported_versions
            answer = encode_quic_version_negotiation(invariant.dcid, invariant.scid, versions)
            self._sockets.sendto(answer, addr)
            return Outcome.VERSION_NEGOTIATED

        try:
            header = pull_quic_header(Buffer(data=data))
        except ValueError:
            return Outcome.MALFORMED
        if header.packet_type is not QuicPacketType.INITIAL:
            return Outcome.NOT_INITIAL
        if len(data) < SMALLEST_MAX_DATAGRAM_SIZE:
            return Outcome.INITIAL_TOO_SMALL
        if not self.is_accepting:
            self._refuse(header, addr, QuicErrorCode.CONNECTION_REFUSED)
            return Outcome.REFUSED
        proof = None
        if header.token and self.tokens is not None:
            proof = self.tokens.check(header.token, addr, version, header.destination_cid)
            if proof is None and kind_of(header.token) is Kind.RETRY_TOKEN:
                self._refuse(header, addr, QuicErrorCode.INVALID_TOKEN)
                return Outcome.INVALID_TOKEN
        if proof is None and self._retry_tokens is not None:
            self._send_retry(self._retry_tokens, header, addr)
            return Outcome.RETRIED
        return self._accept(data, addr, header.destination_cid, proof)

    def _accept(self, data: bytes, addr: NetworkAddress, dcid: bytes, proof: Proof | None) -> Outcome:
        """Make a connection of a client's Initial, unless it is garbage."""
        if len(self.connections) >= self._max_connections:
            return Outcome.TOO_MANY_CONNECTIONS
        retried_from = proof.original if proof else None
        connection = ResumableConnection(
            self,
            configuration=self._configuration,
            original_destination_connection_id=dcid if retried_from is None else retried_from,
            retry_source_connection_id=None if retried_from is None else dcid,
            tokens=self.tokens,
            tickets=self.tickets,
            proved=addr if proof else None,
            paths=self.paths,
            preferred=self._preferred,
        )
        connection.protocol = protocol = self._create_protocol(connection)
        protocol._connection_id_retired_handler = partial(self._cid_retired, connection)
        protocol._connection_terminated_handler = partial(self._terminated, connection)
        protocol.connection_made(self._sockets)
        self.connections.add(connection)
        self._by_cid[dcid] = connection  # the client uses it until it has seen ours
        self._deliver(connection, data, addr)
        if not connection.has_started:
            self._abandon(connection)
            return Outcome.INITIAL_NOT_AUTHENTIC
        if proof is not None and self.tokens is not None:
            self.tokens.use(proof)
        return Outcome.ACCEPTED

    def _send_retry(self, tokens: Tokens, header: QuicHeader, addr: NetworkAddress) -> None:
        # aioquic's is 8 random octets, which would send the client's next Initial to any backend.
        scid = self._new_cid()
        while scid == header.destination_cid:  # the client would discard it (RFC 9000, section 17.2.5.2)
            scid = self._new_cid()
        version = cast(int, header.version)
        retry = encode_quic_retry(
            version=version,
            source_cid=scid,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=tokens.for_retry(addr, version, header.destination_cid, scid),
        )
        self._sockets.sendto(retry, addr)

    def _refuse(self, header: QuicHeader, addr: NetworkAddress, error: QuicErrorCode) -> None:
        """Say why there is no connection, by an Initial with a CONNECTION_CLOSE, and keep nothing."""
        version = cast(int, header.version)
        crypto = CryptoPair()
        crypto.setup_initial(cid=header.destination_cid, is_client=False, version=version)
        builder = QuicPacketBuilder(
            host_cid=header.destination_cid,
            is_client=False,
            max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
            peer_cid=header.source_cid,
            version=version,
        )
        builder.start_packet(QuicPacketType.INITIAL, crypto)
        buf = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY)
        buf.push_uint_var(error)
        buf.push_uint_var(QuicFrameType.PADDING)  # of no frame in particular
        buf.push_uint_var(0)
        [close], _ = builder.flush()
        self._sockets.sendto(close, addr)

    def _cid_retired(self, connection: RoutableConnection, cid: bytes) -> None:
        self.ledger.retire(cid)
        self._renewals.heard(connection)
        self._loop.call_later(RETIRED_CID_LINGERS, self._forget, connection, cid)

    def _terminated(self, connection: RoutableConnection) -> None:
        # aioquic says so when the closing or draining period is over: from here on its clients get resets.
        if connection not in self.connections:
            return
        self.connections.remove(connection)
        self._renewals.gone(connection)
        self._forget(connection, connection.original_destination_connection_id)
        if connection._retry_source_connection_id is not None:
            self._forget(connection, connection._retry_source_connection_id)
        for cid in connection.cids:
            self.ledger.end(cid)
            self._forget(connection, cid)

    def _forget(self, connection: RoutableConnection, cid: bytes) -> None:
        if self._by_cid.get(cid) is connection:
            del self._by_cid[cid]

    def _failed(self, connection: RoutableConnection, error: Exception) -> None:
        # A bug, aioquic's or ours, costs its connection; the server lives, and a reset tells the client.
        log.error("connection-failed", exc_info=error)
        self._abandon(connection)

    def _abandon(self, connection: RoutableConnection) -> None:
        self._terminated(connection)
        connection.protocol.connection_lost(None)


def bound_socket(address: Address) -> socket.socket:
    """A UDP socket at an address of one family, with room for bursts. Raises OSError."""
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        if address.is_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock
