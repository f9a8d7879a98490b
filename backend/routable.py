"""What makes an aioquic server routable: every connection ID that a client may ever use is one of ours.

Written for aioquic 1.7.2 and for no other version: everything here that begins with an underscore is its own.
A server on another stack needs the same four things: choose the first connection ID, choose the later ones,
choose their reset tokens, and know a connection ID before its client does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import aioquic.quic.connection
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import (
    EPOCHS,
    NEW_CONNECTION_ID_FRAME_CAPACITY,
    NetworkAddress,
    QuicConnectionId,
    QuicConnectionState,
    QuicReceiveContext,
)
from aioquic.quic.events import ConnectionIdIssued
from aioquic.quic.packet import QuicFrameType, QuicPreferredAddress, push_quic_preferred_address
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.tls import Epoch

from backend.migration import MigratingConnection
from backend.paths import ALLOWANCES, Expense, Paths, PreferredAddress
from lb.cid import Codec, ConfigId, ConnectionId, ServerId, config_id_of
from lb.generator import CidGenerator
from lb.reset import RESET_KEY_LENGTH, reset_token

# aioquic's own bound on the connection IDs that one connection has at a time.
MAX_ACTIVE_CIDS = 8
# Ours: packets that wait for an acknowledgement, before those that need none are forgotten.
MOST_SENT = 1024
# The transport parameter's (RFC 9000, section 18.2).
PREFERRED_ADDRESS = 0x0D

# aioquic makes 33 sets anew for each connection, of the few that there are: 7 kB of an idle one, and a twentieth of
# the time that a handshake takes.
aioquic.quic.connection.EPOCHS = cache(EPOCHS)
_SPENT_BUFFERS = {epoch: Buffer(capacity=0) for epoch in (Epoch.INITIAL, Epoch.HANDSHAKE, Epoch.ONE_RTT)}


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

    @property
    def nonces_used(self) -> int:
        """Nonces that connection IDs of this process took so far, those of Retry packets included."""
        return self._generator.issued - self._generator.unroutable_issued

    @property
    def nonces_remaining(self) -> int:
        """Connection IDs that can still be made under the configuration in use."""
        return self._generator.remaining

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


class RoutableConnection(MigratingConnection):
    """A server's connection that gets its connection IDs from a `CidIssuer`.

    `configuration.connection_id_length` must be their length: it is how aioquic finds the end of a short header.
    The client is asked to go on at `preferred`, if there is such an address.
    """

    protocol: QuicConnectionProtocol  # set by whoever accepts the connection

    def __init__(
        self,
        issuer: CidIssuer,
        *,
        configuration: QuicConfiguration,
        original_destination_connection_id: bytes,
        retry_source_connection_id: bytes | None = None,
        paths: Paths | None = None,
        preferred: PreferredAddress | None = None,
    ) -> None:
        self._retire_prior_to = 0
        self._is_renewal_due = False
        self._is_pool_filled = False  # which happens at the end of the handshake
        self._refill_at: float | None = None  # a replacement for a retired CID was too soon
        self._forget_at = MOST_SENT
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
            paths=paths or Paths(),
            preferred=preferred,
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

    @property
    def is_sending(self) -> bool:
        """Whether the client has yet to acknowledge something on a stream of its own, the stream's end included."""
        senders = (stream.sender for number, stream in self._streams.items() if number % 4 == 0)
        return any(s._buffer_fin is not None and s._reset_error_code is None and not s.is_finished for s in senders)

    def _confirm_handshake(self) -> None:
        super()._confirm_handshake()
        # Three buffers of 16 KiB, for what TLS has to say: half of what an idle connection takes. A server's says no
        # more, the tickets included.
        self._crypto_buffers = _SPENT_BUFFERS

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        if self._refill_at is not None and now >= self._refill_at:
            self._now = now
            self._replenish_connection_ids()
        datagrams = super().datagrams_to_send(now)
        self._forget_acknowledgements()
        return datagrams

    def _forget_acknowledgements(self) -> None:
        # aioquic keeps a packet until the client acknowledges it, and what holds nothing but acknowledgements too. A
        # client need not acknowledge those, and if it sends nothing but PINGs they pile up.
        sent = self._spaces[Epoch.ONE_RTT].sent_packets
        if len(sent) < self._forget_at:
            return
        for number in [number for number, packet in sent.items() if not packet.in_flight]:
            del sent[number]
        self._forget_at = max(MOST_SENT, 2 * len(sent))

    def get_timer(self) -> float | None:
        timer = super().get_timer()
        return timer if self._refill_at is None or timer is None else min(timer, self._refill_at)

    def renew(self) -> None:
        """Give the client new connection IDs, and have it retire those that it has (RFC 9000, section 5.1.2).

        With the next datagrams to send; during the handshake, with its end; and if the client has not done yet what
        an earlier call asks of it, when it has. So it has twice as many as it may use at most.
        """
        self._is_renewal_due = self.is_renewing
        if self._is_renewal_due:
            return
        self._retire_prior_to = self._host_cid_seq
        if self._handshake_complete:
            self._fill(self._missing)

    @property
    def is_renewing(self) -> bool:
        """Whether the client has yet to retire connection IDs that it was asked to."""
        return self._host_cids[0].sequence_number < self._retire_prior_to  # they are in order

    @property
    def _missing(self) -> int:
        wanted = min(MAX_ACTIVE_CIDS, self._remote_active_connection_id_limit)
        return wanted - sum(each.sequence_number >= self._retire_prior_to for each in self._host_cids)

    def _replenish_connection_ids(self) -> None:
        # In place of random ones, at the end of the handshake and whenever the client has retired one.
        missing = self._missing
        if not self._is_pool_filled:
            self._is_pool_filled = True
            self._fill(missing)
            return
        # A client that retires all the time would use up all nonces.
        self._refill_at = None
        for _ in range(missing):
            if not self._budget.allow(Expense.CONNECTION_ID, self._now):
                self._refill_at = self._now + 1 / ALLOWANCES[Expense.CONNECTION_ID].per_second
                return
            self._fill(1)

    def _fill(self, count: int) -> None:
        # aioquic would make them known for demultiplexing at the connection's next datagram or timer only. A client
        # that is quicker than that would be taken for a stranger, and reset: one in three was.
        for _ in range(count):
            cid, token = self._issuer.issue(self)
            self._host_cids.append(QuicConnectionId(cid, self._host_cid_seq, token))
            self._host_cid_seq += 1

    def _handle_retire_connection_id_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        super()._handle_retire_connection_id_frame(context, frame_type, buf)
        if self._is_renewal_due and not self.is_renewing:
            self.renew()

    def _serialize_transport_parameters(self) -> bytes:
        # An aioquic server has no preferred address. Its connection ID is the second one that the client gets.
        parameters = super()._serialize_transport_parameters()
        preferred = self._preferred
        if preferred is None:
            return parameters
        if self._host_cid_seq == 1:  # it may be called again, when the version is known
            self._fill(1)
            self._host_cids[1].was_sent = True
        second = self._host_cids[1]
        value = Buffer(capacity=64)
        push_quic_preferred_address(
            value, QuicPreferredAddress(preferred.ipv4, preferred.ipv6, second.cid, second.stateless_reset_token)
        )
        buf = Buffer(capacity=2 + len(value.data))
        buf.push_uint_var(PREFERRED_ADDRESS)
        buf.push_uint_var(len(value.data))
        return parameters + buf.data + value.data

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
