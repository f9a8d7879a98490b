"""What lets a client come back, to any server of the fleet: it is given tokens and session tickets.

Written for aioquic 1.7.2 and for no other version: everything here that begins with an underscore is its own.
"""

from __future__ import annotations

import datetime
from typing import NamedTuple, cast

from aioquic import tls
from aioquic.buffer import Buffer, size_uint_var  # type: ignore[attr-defined]  # not in its __all__
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import MAX_EARLY_DATA, NetworkAddress, QuicNetworkPath
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace

from backend.paths import Paths, PreferredAddress
from backend.routable import CidIssuer, RoutableConnection
from backend.tickets import TICKET_LIFETIME, Promises, Session, Tickets, TicketVerdict
from backend.tokens import Tokens

# Ours; the ticket's own times count, and they have been looked at before aioquic looks at these.
_ALWAYS = (datetime.datetime.min.replace(tzinfo=datetime.UTC), datetime.datetime.max.replace(tzinfo=datetime.UTC))


class _Offer(NamedTuple):
    """What a client comes back with: a session, how old it says its ticket is, and the proof that it has the secret."""

    session: Session
    obfuscated_age: int
    binder: bytes


class ResumableConnection(RoutableConnection):
    """A connection that gives its client tokens and tickets, and resumes an earlier one of any server's.

    `proved` is the client's address, if it has proved that it can be reached there.
    """

    def __init__(
        self,
        issuer: CidIssuer,
        *,
        configuration: QuicConfiguration,
        original_destination_connection_id: bytes,
        retry_source_connection_id: bytes | None = None,
        tokens: Tokens | None = None,
        tickets: Tickets | None = None,
        proved: NetworkAddress | None = None,
        paths: Paths | None = None,
        preferred: PreferredAddress | None = None,
    ) -> None:
        super().__init__(
            issuer,
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
            paths=paths,
            preferred=preferred,
        )
        self._tokens = tokens
        self._tickets = tickets
        self._token_is_for: str | None = None  # the host that the client has been given a token for
        self._offer: _Offer | None = None
        if proved is not None:
            # aioquic would wait for the end of the handshake, and send three times what came until then.
            self._network_paths = [QuicNetworkPath(proved, is_validated=True)]

    # Tokens. An aioquic server never gives any.

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        # Comes by whenever a packet is written once the handshake is complete.
        super()._write_connection_limits(builder, space)
        path = self._network_paths[0]
        if self._tokens is None or not self._tokens.offers_new_tokens or not path.is_validated:
            return
        host = path.addr[0]
        if host != self._token_is_for:
            self._write_new_token_frame(builder, self._tokens.for_later(path.addr, cast(int, self._version)), host)

    def _write_new_token_frame(self, builder: QuicPacketBuilder, token: bytes, host: str) -> None:
        buf = builder.start_frame(
            QuicFrameType.NEW_TOKEN,
            capacity=1 + size_uint_var(len(token)) + len(token),
            handler=self._on_new_token_delivery,
            handler_args=(host,),
        )
        buf.push_uint_var(len(token))
        buf.push_bytes(token)
        self._token_is_for = host

    def _on_new_token_delivery(self, delivery: QuicDeliveryState, host: str) -> None:
        if delivery != QuicDeliveryState.ACKED and self._token_is_for == host:
            self._token_is_for = None  # another one, with the next packet

    # Tickets. aioquic's are 64 random octets, by which a server looks up a session that it keeps.

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        if self._tickets is None:
            return
        self._promises = Promises(
            self._local_active_connection_id_limit,
            self._local_max_data.value,
            self._local_max_stream_data_bidi_local,
            self._local_max_stream_data_bidi_remote,
            self._local_max_stream_data_uni,
            self._local_max_streams_bidi.value,
            self._local_max_streams_uni.value,
            self._configuration.max_datagram_frame_size or 0,
        )
        self.tls._server_handle_hello = self._handle_hello  # type: ignore[method-assign]
        self.tls._server_handle_finished = self._handle_finished  # type: ignore[method-assign]

    def _handle_hello(self, input_buf: Buffer, initial_buf: Buffer, handshake_buf: Buffer) -> None:
        tickets = cast(Tickets, self._tickets)
        hello = input_buf.data_slice(0, input_buf.capacity)
        self.tls.get_session_ticket_cb = lambda ticket: self._session_of(tickets, ticket, hello)
        try:
            tls.Context._server_handle_hello(self.tls, input_buf, initial_buf, handshake_buf)
        finally:
            if self._offer is not None:
                resumed = self.tls.session_resumed
                tickets.counts[TicketVerdict.RESUMED if resumed else TicketVerdict.NOT_RESUMED] += 1
            self.tls.get_session_ticket_cb = self._offer = None  # nothing of it is kept

    def _session_of(self, tickets: Tickets, ticket: bytes, hello: bytes) -> tls.SessionTicket | None:
        session = tickets.open(ticket, cast(int, self._version))
        if session is None:
            return None
        offered = cast(tls.OfferedPsks, tls.pull_client_hello(Buffer(data=hello)).pre_shared_key)
        [(_, obfuscated_age)], [binder] = offered.identities, offered.binders
        self._offer = _Offer(session, obfuscated_age, binder)
        return tls.SessionTicket(
            age_add=session.age_add,
            cipher_suite=cast(tls.CipherSuite, session.cipher_suite),
            not_valid_before=_ALWAYS[0],
            not_valid_after=_ALWAYS[1],
            resumption_secret=session.secret,
            server_name="",
            ticket=ticket,
        )

    def _update_traffic_key(
        self, direction: tls.Direction, epoch: tls.Epoch, cipher_suite: tls.CipherSuite, secret: bytes
    ) -> None:
        # TLS has checked the binder by now, and says that early data is accepted unless it is told otherwise.
        if epoch is tls.Epoch.ZERO_RTT and not self._accepts_early():
            self.tls.early_data_accepted = False
            return
        super()._update_traffic_key(direction, epoch, cipher_suite, secret)

    def _accepts_early(self) -> bool:
        return (
            self._tickets is not None
            and self._offer is not None
            and self._tickets.accepts_early(
                *self._offer,
                cast(int, self._crypto_packet_version),  # by which 0-RTT packets come, whatever is negotiated
                self.tls.alpn_negotiated or "",
                self._promises,
            )
        )

    def _handle_finished(self, input_buf: Buffer, output_buf: Buffer) -> None:
        # Without a handler for them it issues no tickets itself.
        tls.Context._server_handle_finished(self.tls, input_buf, output_buf)
        if self.tls._psk_key_exchange_mode is None:
            return  # the client has no use for one
        tickets = cast(Tickets, self._tickets)
        session = self.tls._build_session_ticket(tls.NewSessionTicket(), [])
        ticket, age_add = tickets.issue(
            cast(int, self._version),
            session.cipher_suite,
            session.resumption_secret,
            self.tls.alpn_negotiated or "",
            self._promises,
        )
        tls.push_new_session_ticket(
            output_buf,
            tls.NewSessionTicket(
                ticket_lifetime=TICKET_LIFETIME,
                ticket_age_add=age_add,
                ticket=ticket,
                max_early_data_size=MAX_EARLY_DATA if tickets.early_data else None,
            ),
        )
