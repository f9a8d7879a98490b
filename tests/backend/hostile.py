"""A connection between the reference backend and a client that breaks every rule, without sockets and without a clock.

The client is aioquic's, driven by hand: it may send from any address, as a packet with any frames in it, and hears only
what is sent to the addresses in `owned`. Every octet is counted by the client's address.
"""

from __future__ import annotations

import os
import ssl
from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from aioquic import tls
from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionId, QuicNetworkPath
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder

from backend import certificate
from backend.paths import PathEvent, Paths, PreferredAddress
from backend.routable import Identity, IssuedCid, RoutableConnection
from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId, ServerId
from lb.generator import CidGenerator

CONFIG = CidConfig(ConfigId(2), 4, 12, bytes(range(16)))
SERVER_ID = ServerId(b"self")
CERTIFICATE = certificate.self_signed(datetime.now(UTC))
SOCKET = "socket"  # stands for the one that the server listens on
RTT = 0.02  # seconds

Where = tuple[str, int, str]

HOME: Where = ("192.0.2.1", 40000, SOCKET)
SERVER = ("198.51.100.1", 443)  # as the client sees it
OWN = Address("198.51.100.2", 443)  # where the server prefers to be
AT_OWN: Where = (*HOME[:2], "own")


class Sent(NamedTuple):
    """A datagram of the server's."""

    at: float
    to: Where
    data: bytes


class Issuer:
    """Makes connection IDs, and counts them."""

    def __init__(self) -> None:
        self.identity = Identity(
            CidGenerator(CONFIG, SERVER_ID, random=os.urandom),
            Codec(CONFIG),
            SERVER_ID,
            bytes(32),
            cid_length=CONFIG.cid_length,
            random=os.urandom,
        )
        self.issued = 0

    def issue(self, connection: RoutableConnection) -> IssuedCid:
        self.issued += 1
        cid = self.identity.new_cid()
        return IssuedCid(cid, self.identity.reset_token(cid))


class Watched(RoutableConnection):
    """Counts what it says about paths and connection IDs."""

    challenges = 0
    responses = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.announced: list[int] = []  # sequence numbers of NEW_CONNECTION_ID frames

    def _write_new_connection_id_frame(self, builder: QuicPacketBuilder, connection_id: QuicConnectionId) -> None:
        super()._write_new_connection_id_frame(builder, connection_id)
        self.announced.append(connection_id.sequence_number)

    def _write_path_challenge_frame(self, builder: QuicPacketBuilder, network_path: QuicNetworkPath) -> None:
        super()._write_path_challenge_frame(builder, network_path)
        self.challenges += 1

    def _write_path_response_frame(self, builder: QuicPacketBuilder, challenge: bytes) -> None:
        super()._write_path_response_frame(builder, challenge)
        self.responses += 1


class Duel:
    """A server's connection and its client, with `RTT` between them. `now` is what they take for the time."""

    def __init__(
        self,
        *,
        cid_limit: int = 8,
        paths: Paths | None = None,
        preferred: PreferredAddress | None = None,
        is_connected: bool = True,
    ) -> None:
        self.now = 1000.0
        self.paths = paths or Paths()
        self.issuer = Issuer()
        self.client = QuicConnection(
            configuration=QuicConfiguration(
                is_client=True, alpn_protocols=["x"], server_name="x", verify_mode=ssl.CERT_NONE, idle_timeout=600
            )
        )
        self.client._local_active_connection_id_limit = cid_limit
        self.client.connect(SERVER, self.now)
        self.server = Watched(
            self.issuer,
            configuration=QuicConfiguration(
                is_client=False,
                alpn_protocols=["x"],
                connection_id_length=CONFIG.cid_length,
                idle_timeout=600,
                certificate=CERTIFICATE.chain[0],
                private_key=CERTIFICATE.key,
            ),
            original_destination_connection_id=self.client.original_destination_connection_id,
            paths=self.paths,
            preferred=preferred,
        )
        self.home: Where = HOME  # where the client sends from when it behaves
        self.owned: set[Where] = {HOME}
        self.heard: Counter[Where] = Counter()  # octets from there
        self.said: Counter[Where] = Counter()  # octets to there
        self.log: list[Sent] = []
        self.sockets = {SERVER: SOCKET}  # by where the client sends to; what goes elsewhere is lost
        self.held: list[bytes] | None = None  # the client's datagrams, while somebody keeps them back
        self.downloaded = 0
        self.ended: list[events.ConnectionTerminated] = []
        self._on_the_way: deque[tuple[float, bool, bytes, Any]] = deque()  # in order, as all take half of RTT
        if is_connected:
            self.advance(1.0)
            assert self.server._handshake_confirmed

    @property
    def active(self) -> QuicNetworkPath:
        return self.server._network_paths[0]

    def path_at(self, where: Where) -> QuicNetworkPath | None:
        """What the server knows of an address."""
        return next((path for path in self.server._network_paths if path.addr == where), None)

    @property
    def counts(self) -> dict[PathEvent, int]:
        return dict(self.paths.counts)

    def client_cids(self) -> int:
        """How many of the server's connection IDs the client has."""
        return 1 + len(self.client._peer_cid_available)

    def send(self, data: bytes, source: Where | None = None) -> None:
        """A datagram reaches the server at once, as if from any address."""
        source = source or self.home
        self.heard[source] += len(data)
        self.server.receive_datagram(data, source, self.now)
        self._server_speaks()

    def packet(self, *frames: bytes, cid: bytes | None = None, size: int = 0) -> bytes:
        """An authentic 1-RTT packet of the client's with frames of one's own making, padded to `size` octets."""
        return packet(self.client, *frames, cid=cid, size=size)

    def download(self, octets: int) -> None:
        """The server begins to send that many on a stream of its own."""
        self.server.send_stream_data(self.server.get_next_available_stream_id(is_unidirectional=True), bytes(octets))
        self._server_speaks()

    def advance(self, seconds: float) -> None:
        """Let time pass: what is on its way arrives, timers fire, and the client goes on behaving."""
        until = self.now + seconds
        self._server_speaks()
        self._client_speaks()
        while (at := self._next()) <= until:
            self.now = max(self.now, at)
            while self._on_the_way and self._on_the_way[0][0] <= self.now:
                _, is_to_server, data, where = self._on_the_way.popleft()
                if is_to_server:
                    self.send(data, where)
                else:
                    front = next(front for front, socket in self.sockets.items() if socket == where[2])
                    self.client.receive_datagram(data, front, self.now)
            for each in (self.server, self.client):
                if (timer := each.get_timer()) is not None and timer <= self.now:
                    each.handle_timer(self.now)
            self._server_speaks()
            self._client_speaks()
        self.now = until

    def until(self, seconds: float, condition: Callable[[], object]) -> None:
        """Let time pass until something is true, and fail if it is not in time."""
        until = self.now + seconds
        while not condition():
            assert self.now < until, "it never came true"
            self.advance(RTT / 4)

    def _next(self) -> float:
        timers = [timer for each in (self.server, self.client) if (timer := each.get_timer()) is not None]
        return min([*timers, *(each[0] for each in list(self._on_the_way)[:1]), float("inf")])

    def _server_speaks(self) -> None:
        if self.server._network_paths:
            for data, to in self.server.datagrams_to_send(self.now):
                self.said[to] += len(data)
                self.log.append(Sent(self.now, to, data))
                if to in self.owned:
                    self._on_the_way.append((self.now + RTT / 2, False, data, to))
        self.server.get_timer()  # as who drives it does after each sending
        while (event := self.server.next_event()) is not None:
            if isinstance(event, events.ConnectionTerminated):
                self.ended.append(event)

    def _client_speaks(self) -> None:
        for data, to in self.client.datagrams_to_send(self.now):
            if self.held is not None:
                self.held.append(data)
            elif to in self.sockets:
                source = (*self.home[:2], self.sockets[to])
                self._on_the_way.append((self.now + RTT / 2, True, data, source))
        self.client.get_timer()
        while (event := self.client.next_event()) is not None:
            if isinstance(event, events.StreamDataReceived):
                self.downloaded += len(event.data)


def packet(client: QuicConnection, *frames: bytes, cid: bytes | None = None, size: int = 0) -> bytes:
    """A 1-RTT packet of a client's with any frames, padded to `size` octets. The client does not hear of it."""
    builder = QuicPacketBuilder(
        host_cid=client.host_cid,
        peer_cid=cid or client._peer_cid.cid,
        version=client._version or 1,
        is_client=True,
        max_datagram_size=1200,
        packet_number=client._packet_number,
    )
    builder.start_packet(QuicPacketType.ONE_RTT, client._cryptos[tls.Epoch.ONE_RTT])
    overhead = 1 + len(builder._peer_cid) + 2 + 16
    builder._buffer.push_bytes(b"".join(frames).ljust(max(4, size - overhead), b"\0"))
    [datagram], _ = builder.flush()
    client._packet_number = builder.packet_number
    return datagram


def ping() -> bytes:
    return bytes((QuicFrameType.PING,))


def path_challenge(data: bytes = bytes(8)) -> bytes:
    return bytes((QuicFrameType.PATH_CHALLENGE,)) + data


def retire(sequence_number: int) -> bytes:
    buf = Buffer(capacity=16)
    buf.push_uint_var(QuicFrameType.RETIRE_CONNECTION_ID)
    buf.push_uint_var(sequence_number)
    return buf.data


def new_cid(sequence_number: int, retire_prior_to: int, cid: bytes) -> bytes:
    buf = Buffer(capacity=64)
    buf.push_uint_var(QuicFrameType.NEW_CONNECTION_ID)
    buf.push_uint_var(sequence_number)
    buf.push_uint_var(retire_prior_to)
    buf.push_uint8(len(cid))
    buf.push_bytes(cid + bytes(16))
    return buf.data
