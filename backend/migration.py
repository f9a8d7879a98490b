"""A server's side of connection migration: what aioquic does, and what RFC 9000 and a hostile client want besides.

Written for aioquic 1.7.2 and for no other version: everything here that begins with an underscore is its own.
aioquic follows a client to another address at once, sends three times what came from there until the client has
answered a PATH_CHALLENGE, and goes back when it does not in time. It keeps eight paths at most. Added here:

* Each attempt costs the connection, and the source, something from a budget. Without it the packet is taken, but the
  path is not: nothing is sent there.
* The path that is left is asked as well. Who copied a packet, and was quicker with it, does not keep the connection
  from a client that is silent otherwise (section 9.3.3).
* A Handshake packet proves the address that the handshake began with, not one that it claims to come from (8.1).
* A CONNECTION_CLOSE counts towards the three times, too.
* At a preferred address clients are sent nothing but probes before it is validated (9.6.3).
* A client at another host gets a congestion window and a round-trip time of its own (9.4).
"""

from __future__ import annotations

import math
import os

from aioquic import tls
from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.congestion.base import K_INITIAL_WINDOW
from aioquic.quic.connection import (
    END_STATES,
    PATH_CHALLENGE_FRAME_CAPACITY,
    NetworkAddress,
    QuicConnection,
    QuicConnectionError,
    QuicConnectionId,
    QuicNetworkPath,
    QuicReceiveContext,
)
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder

from backend.paths import Budget, Doubts, Expense, PathEvent, Paths, PreferredAddress


class MigratingConnection(QuicConnection):
    """A server's connection whose client may move, and may only seem to.

    A `NetworkAddress` is the client's, and ends in whatever tells the server's own addresses apart, if that is needed.
    """

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        original_destination_connection_id: bytes,
        retry_source_connection_id: bytes | None,
        paths: Paths,
        preferred: PreferredAddress | None,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._now = 0.0
        self._paths = paths
        self._preferred = preferred
        self._budget = Budget()
        self._doubts = Doubts()
        self._began_at: NetworkAddress | None = None
        self._host = ""  # the last one that the client was proved to be at
        self._left: QuicNetworkPath | None = None  # a path that is to be asked whether it has been left

    def receive_datagram(self, data: bytes, addr: NetworkAddress, now: float) -> None:
        self._now = now
        paths = self._network_paths
        if self._began_at is None:
            self._began_at = addr
            self._host = addr[0]
        if paths and paths[0].is_validated and paths[0].addr == addr:
            super().receive_datagram(data, addr, now)
            return
        before = _Before(self, addr)
        super().receive_datagram(data, addr, now)
        if before.paths:
            self._judge(before, addr, now)

    def handle_timer(self, now: float) -> None:
        self._now = now
        super().handle_timer(now)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        self._now = now
        path = self._network_paths[0]
        # aioquic limits everything but a CONNECTION_CLOSE.
        is_limited = self._close_pending and not path.is_validated
        room = 3 * path.bytes_received - path.bytes_sent
        self._share_zero_length_cid()
        datagrams = super().datagrams_to_send(now)
        if is_limited and sum(len(data) for data, _ in datagrams) > room:
            datagrams = []
        if self._left is not None:
            left, self._left = self._left, None
            if self._state not in END_STATES:
                datagrams += self._challenge(left)
        return datagrams

    def _judge(self, before: _Before, addr: NetworkAddress, now: float) -> None:
        """Whether a connection goes where its last datagram came from."""
        path = _at(addr, self._network_paths)
        if path is None:
            return  # nothing authentic came from there
        if before.is_handshake and addr != self._began_at:
            path.is_validated = False  # by a Handshake packet, which may be from anywhere
        is_promoted = self._network_paths[0] is path and before.paths[0] is not path
        if not path.is_validated:
            is_held = is_promoted and self._is_at_preferred(addr) and not self._is_at_preferred(before.paths[0].addr)
            is_waiting = is_held and before.deadline is not None and now < before.deadline
            is_attempt = before.path is None or is_promoted
            if is_waiting or (is_attempt and not self._paths.allow(self._budget, self._doubts, addr, now)):
                before.restore(self)
                return
            if is_held:
                self._hold(path, before.paths[0], now)
                return
        if is_promoted:
            self._paths.counts[PathEvent.MIGRATED] += 1
            # Who has changed the connection ID has moved on purpose, and took the old one along.
            if self._handshake_complete and self._peer_cid is before.peer_cid:
                self._left = next((each for each in before.paths if each.is_validated and each is not path), None)
            if path.is_validated:
                self._proved(path)

    def _is_at_preferred(self, addr: NetworkAddress) -> bool:
        return self._preferred is not None and self._preferred.is_at(addr)

    def _hold(self, path: QuicNetworkPath, active: QuicNetworkPath, now: float) -> None:
        """Keep to a path, and send a PATH_CHALLENGE on another one for now."""
        self._network_paths.remove(active)
        self._network_paths.insert(0, active)
        path.local_challenge_sent = False
        path.validation_deadline = now + self._loss.get_probe_timeout()

    def _proved(self, path: QuicNetworkPath) -> None:
        """The client is on this path: what was learnt about the network towards another host is worth nothing."""
        if path.addr[0] == self._host:
            return
        self._host = path.addr[0]
        self._loss._cc.congestion_window = K_INITIAL_WINDOW * self._max_datagram_size
        self._loss._cc.ssthresh = None
        self._loss._rtt_initialized = False
        self._loss._rtt_min = math.inf

    def _challenge(self, path: QuicNetworkPath) -> list[tuple[bytes, NetworkAddress]]:
        """A PATH_CHALLENGE on a validated path that is not the active one, to which any packet is an answer.

        aioquic does not hear of it, so that its loss, which is likely, is no loss on the active path.
        """
        builder = QuicPacketBuilder(
            host_cid=self.host_cid,
            is_client=False,
            max_datagram_size=self._max_datagram_size,
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            version=self._version,  # type: ignore[arg-type]  # known since the first packet
        )
        builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[tls.Epoch.ONE_RTT])
        buf = builder.start_frame(QuicFrameType.PATH_CHALLENGE, capacity=PATH_CHALLENGE_FRAME_CAPACITY)
        buf.push_bytes(os.urandom(8))
        datagrams, _ = builder.flush()
        self._packet_number = builder.packet_number
        return [(datagram, path.addr) for datagram in datagrams]

    def _abandon_path_validation(self) -> None:
        self._paths.counts[PathEvent.FAILED] += 1
        self._doubts.failed(self._now)
        super()._abandon_path_validation()

    def _handle_path_response_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        doubtful = [path for path in self._network_paths if not path.is_validated]
        super()._handle_path_response_frame(context, frame_type, buf)
        for path in doubtful:
            if path.is_validated:
                self._paths.counts[PathEvent.VALIDATED] += 1
                self._doubts.proved()
                if path is self._network_paths[0]:
                    self._proved(path)

    def _handle_path_challenge_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        # An answer is a datagram of 1200 octets, to one that may be of 40.
        if self._budget.allow(Expense.PATH_RESPONSE, context.time):
            super()._handle_path_challenge_frame(context, frame_type, buf)
        else:
            buf.pull_bytes(8)
            self._paths.counts[PathEvent.CHALLENGE_IGNORED] += 1

    def _consume_peer_cid(self) -> None:
        if not self._peer_cid_available:
            # All that it has given us are retired at once, or lie on other paths.
            raise QuicConnectionError(
                QuicErrorCode.PROTOCOL_VIOLATION, QuicFrameType.NEW_CONNECTION_ID, "No connection ID left"
            )
        super()._consume_peer_cid()

    # Clients with zero-length connection IDs, as Chromium. aioquic wants a spare client CID for each new path, so that
    # no path can be linked to another (RFC 9000, section 9.5). These clients have none and need none, section 5.1.
    # Stock aioquic never answers their PATH_CHALLENGE, and they reconnect instead of migrating.

    def _share_zero_length_cid(self) -> None:
        if not self._peer_cid.cid and self._peer_cid.sequence_number is not None:
            for path in self._network_paths[1:]:
                path.peer_cid = path.peer_cid or QuicConnectionId(b"", self._peer_cid.sequence_number)

    def _retire_peer_cid(self, connection_id: QuicConnectionId) -> None:
        # The zero-length CID of a path that is left stays in use on the next; to retire it is a protocol violation.
        if connection_id.cid:
            super()._retire_peer_cid(connection_id)


class _Before:
    """A connection's paths as they were before a datagram from `addr`."""

    def __init__(self, connection: QuicConnection, addr: NetworkAddress) -> None:
        self.paths = connection._network_paths.copy()
        self.path = _at(addr, self.paths)
        self.is_handshake = not connection._handshake_complete
        self.peer_cid = connection._peer_cid
        self.challenge_sent = self.path is not None and self.path.local_challenge_sent
        self.deadline = self.path.validation_deadline if self.path is not None else None

    def restore(self, connection: QuicConnection) -> None:
        """Go back: the active path is what it was, and nothing is tried on any other that was not tried before."""
        for path in self.paths:
            if path not in connection._network_paths:
                path.peer_cid = None  # evicted, and its client CID retired
        if self.path is not None:
            self.path.local_challenge_sent = self.challenge_sent
            self.path.validation_deadline = self.deadline
        connection._network_paths[:] = self.paths


def _at(addr: NetworkAddress, paths: list[QuicNetworkPath]) -> QuicNetworkPath | None:
    return next((path for path in paths if path.addr == addr), None)
