"""What makes an aioquic server routable: every connection ID that a client may ever use is one of ours.

Written for aioquic 1.7.2 and for no other version: everything here that begins with an underscore is its own.
A server on another stack needs the same four things: choose the first connection ID, choose the later ones,
choose their reset tokens, and know a connection ID before its client does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    NEW_CONNECTION_ID_FRAME_CAPACITY,
    NetworkAddress,
    QuicConnection,
    QuicConnectionId,
    QuicConnectionState,
)
from aioquic.quic.events import ConnectionIdIssued
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.packet_builder import QuicPacketBuilder

from lb.cid import Codec, ConfigId, ConnectionId, ServerId, config_id_of
from lb.generator import CidGenerator
from lb.reset import RESET_KEY_LENGTH, reset_token

# aioquic's own bound on the connection IDs that one connection has at a time.
MAX_ACTIVE_CIDS = 8


class Identity:
    """Who this server is to its balancers: it makes the server's connection IDs and their reset tokens.

    `reset_key` belongs to the server ID (`lb.reset.server_reset_key`). Without one, and for connection IDs that no
    balancer can route (0b111), tokens come from a key that dies with the process: a key that several servers
    had would let one of them end another's connections (RFC 9000, section 21.11).
    """

    def __init__(
        self,
        generator: CidGenerator,
        codec: Codec | None,
        server_id: ServerId | None,
        reset_key: bytes | None,
        *,
        cid_length: int,
        random: Callable[[int], bytes],
    ) -> None:
        self.server_id = server_id
        self.cid_length = cid_length
        self.new_cid = generator.next
        self._generator = generator
        self._known_as: dict[ConfigId, _KnownAs] = {}
        self._process_key = random(RESET_KEY_LENGTH)
        self._take(codec, server_id, reset_key)

    def switch(self, codec: Codec | None, server_id: ServerId | None, reset_key: bytes | None) -> None:
        """Make connection IDs in another way from now on; the earlier ones stay this server's.

        Raises ValueError for connection IDs of another length, by which short headers could not be told apart, and
        QuicLbError for nonces that cannot be used; then nothing has changed.
        """
        if codec is not None and codec.config.cid_length != self.cid_length:
            raise ValueError(
                f"connection IDs of {codec.config.cid_length} octets: this process has some of {self.cid_length}; "
                "a restart changes it"
            )
        self._generator.switch(codec.config if codec else None, server_id)
        self.server_id = server_id
        self._take(codec, server_id, reset_key)

    def reset_token(self, cid: bytes) -> bytes:
        """The stateless reset token, 16 octets, of one of this server's connection IDs."""
        known_as = self._of(cid)
        return reset_token(known_as.reset_key if known_as and known_as.reset_key else self._process_key, cid)

    def may_reset(self, cid: bytes) -> bool:
        """Whether `cid` carries this server's ID, and its token would be one that a client can have been given."""
        known_as = self._of(cid)
        if known_as is None or known_as.reset_key is None:
            return False
        decoded = known_as.codec.decode(cid)
        return decoded is not None and decoded.server_id == known_as.server_id

    def _take(self, codec: Codec | None, server_id: ServerId | None, reset_key: bytes | None) -> None:
        if codec is not None and server_id is not None:
            self._known_as[codec.config.config_id] = _KnownAs(codec, server_id, reset_key)

    def _of(self, cid: bytes) -> _KnownAs | None:
        config_id = config_id_of(cid)
        return self._known_as.get(config_id) if config_id is not None else None


class _KnownAs(NamedTuple):
    """What connection IDs with one config ID are made of: that of now, or of an earlier configuration."""

    codec: Codec
    server_id: ServerId
    reset_key: bytes | None


class IssuedCid(NamedTuple):
    """A connection ID and what its NEW_CONNECTION_ID frame says beside it."""

    cid: ConnectionId
    stateless_reset_token: bytes


class CidIssuer(Protocol):
    """Where a connection gets its connection IDs from."""

    def issue(self, connection: RoutableConnection) -> IssuedCid:
        """A new connection ID, by which datagrams reach `connection` from now on."""
        ...


class RoutableConnection(QuicConnection):
    """A server's connection that gets its connection IDs from a `CidIssuer`.

    `configuration.connection_id_length` must be their length: it is how aioquic finds the end of a short header.
    """

    protocol: QuicConnectionProtocol  # set by whoever accepts the connection

    def __init__(
        self,
        issuer: CidIssuer,
        *,
        configuration: QuicConfiguration,
        original_destination_connection_id: bytes,
        retry_source_connection_id: bytes | None = None,
    ) -> None:
        self._retire_prior_to = 0
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._issuer = issuer
        # In place of 8 random octets and a random token. Nothing has been sent or derived from them yet: the CID
        # becomes the SCID of our Initial, and both go into the transport parameters.
        first = self._host_cids[0]
        first.cid, first.stateless_reset_token = issuer.issue(self)
        self.host_cid = first.cid
        self._local_initial_source_connection_id = first.cid

    @property
    def cids(self) -> list[bytes]:
        """The connection IDs that the client may use now."""
        return [each.cid for each in self._host_cids]

    @property
    def has_started(self) -> bool:
        """Whether any packet was authentic so far."""
        return self._state is not QuicConnectionState.FIRSTFLIGHT

    def unacknowledged(self, stream_id: int) -> int:
        """Octets of a stream that aioquic holds until the client acknowledges them; 0 when it is done with it."""
        stream = self._streams.get(stream_id)
        return stream.sender._buffer_stop - stream.sender._buffer_start if stream else 0

    def _replenish_connection_ids(self) -> None:
        # In place of random ones, at the end of the handshake and whenever the client has retired one.
        # aioquic would make them known for demultiplexing at the connection's next datagram or timer only. A client
        # that is quicker than that would be taken for a stranger, and reset: one in three was.
        wanted = min(MAX_ACTIVE_CIDS, self._remote_active_connection_id_limit)
        while sum(each.sequence_number >= self._retire_prior_to for each in self._host_cids) < wanted:
            cid, token = self._issuer.issue(self)
            self._host_cids.append(QuicConnectionId(cid, self._host_cid_seq, token))
            self._host_cid_seq += 1

    def renew(self) -> None:
        """Give the client new connection IDs, and have it retire those that it has (RFC 9000, section 5.1.2).

        With the next datagrams to send; during the handshake, with its end.
        """
        self._retire_prior_to = self._host_cid_seq
        if self._handshake_complete:
            self._replenish_connection_ids()

    def _write_new_connection_id_frame(self, builder: QuicPacketBuilder, connection_id: QuicConnectionId) -> None:
        # aioquic's always says that nothing is to be retired.
        buf = builder.start_frame(
            QuicFrameType.NEW_CONNECTION_ID,
            capacity=NEW_CONNECTION_ID_FRAME_CAPACITY,
            handler=self._on_new_connection_id_delivery,
            handler_args=(connection_id,),
        )
        buf.push_uint_var(connection_id.sequence_number)
        buf.push_uint_var(min(self._retire_prior_to, connection_id.sequence_number))
        buf.push_uint8(len(connection_id.cid))
        buf.push_bytes(connection_id.cid)
        buf.push_bytes(connection_id.stateless_reset_token)
        connection_id.was_sent = True
        self._events.append(ConnectionIdIssued(connection_id=connection_id.cid))

    # Clients with zero-length connection IDs, as Chromium. aioquic wants a spare client CID for each new path, so that
    # no path can be linked to another (RFC 9000, section 9.5). These clients have none and need none, section 5.1.
    # Stock aioquic never answers their PATH_CHALLENGE, and they reconnect instead of migrating.

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        if not self._peer_cid.cid and self._peer_cid.sequence_number is not None:
            for path in self._network_paths[1:]:
                path.peer_cid = path.peer_cid or QuicConnectionId(b"", self._peer_cid.sequence_number)
        return super().datagrams_to_send(now)

    def _retire_peer_cid(self, connection_id: QuicConnectionId) -> None:
        # The zero-length CID of a path that is left stays in use on the next; to retire it is a protocol violation.
        if connection_id.cid:
            super()._retire_peer_cid(connection_id)
