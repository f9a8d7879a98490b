"""The QUIC client: aioquic, watched from inside. The only module here that knows it.

Written for aioquic 1.7.2 and for no other version: names that begin with an underscore are its own. It sees what a
client's application does not: each CID with its token, each Retry Prior To, each PATH_CHALLENGE. Certificates
are not verified: what is examined is not who the server is.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lb.address import Address
from lb.conformance.datagrams import Datagrams
from lb.packet import LONG_HEADER, parse_header
from lb.reset import TOKEN_LENGTH

try:
    from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # not in its __all__
    from aioquic.quic import events
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.connection import QuicConnection, QuicConnectionError
    from aioquic.quic.packet import (
        QuicErrorCode,
        QuicPacketType,
        QuicProtocolVersion,
        pull_quic_header,
        pull_quic_transport_parameters,
    )
    from aioquic.tls import Epoch
except ModuleNotFoundError:  # an extra: `missing` says so to whoever calls
    if importlib.util.find_spec("aioquic") is not None:
        raise
    QuicConnection = object  # type: ignore[assignment, misc]

logger = logging.getLogger(__name__)
# It logs what each connection does, and the reasons that peers give, as they are.
logging.getLogger("quic").setLevel(logging.ERROR)

# RFC 9000, section 17.2.1.
VERSION_NEGOTIATION = bytes(4)

H3_NO_ERROR = 0x100  # RFC 9114, section 8.1; other applications know it as an error without a name

# Ours.
VERSION = "1.7.2"  # of aioquic
CLIENT_CID_LENGTH = 8
IDLE_TIMEOUT = 60.0  # seconds
MOST_CIDS = 8  # that a client takes at a time; aioquic's own number
REASON_LIMIT = 120  # characters of somebody else's


def missing() -> str | None:
    """What an examination lacks on this machine, in words for the operator; None if nothing."""
    how = "pip install 'quiclb[conformance]'"
    if importlib.util.find_spec("aioquic") is None:
        return f"conformance needs aioquic, which is not installed: {how}"
    found = importlib.metadata.version("aioquic")
    if found != VERSION:
        return f"conformance needs aioquic {VERSION}, and {found} is installed: {how}"
    return None


class ExaminationError(Exception):
    """A connection that is not what it should be, in words for the operator."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A CID as a server announced it."""

    cid: bytes
    sequence: int
    retire_prior_to: int
    token: bytes | None = field(repr=False)
    in_preferred_address: bool = False


class Offer(NamedTuple):
    """What a client says in its first flight."""

    alpn: tuple[str, ...]
    server_name: str
    active_cid_limit: int = MOST_CIDS


class _Watched(QuicConnection):
    """A connection that writes down what its server announces."""

    def __init__(self, offer: Offer) -> None:
        configuration = QuicConfiguration(
            alpn_protocols=list(offer.alpn),
            connection_id_length=CLIENT_CID_LENGTH,
            idle_timeout=IDLE_TIMEOUT,
            server_name=offer.server_name,
            supported_versions=[QuicProtocolVersion.VERSION_1],
            verify_mode=ssl.CERT_NONE,
        )
        super().__init__(configuration=configuration)
        self.limit = offer.active_cid_limit
        self._local_active_connection_id_limit = self.limit
        self.issued: list[Issued] = []
        self.token: bytes | None = None
        self.disables_migration = False
        self.exceeded_limit = False
        self.challenges = 0
        self.is_challenge_answered = False
        self.keeps_old = False
        """Whether CIDs that are to be retired are used all the same, as a slow client would."""
        self._is_challenge_wanted = False

    @property
    def active_cids(self) -> list[bytes]:
        return [self._peer_cid.cid, *(each.cid for each in self._peer_cid_available)]

    @property
    def active_sequences(self) -> list[int]:
        return [each.sequence_number or 0 for each in (self._peer_cid, *self._peer_cid_available)]

    @property
    def peer_cid(self) -> bytes:
        return self._peer_cid.cid

    @property
    def is_complete(self) -> bool:
        return self._handshake_complete and self._handshake_confirmed

    def expect_no_limit(self) -> None:
        """Take as many CIDs as come: those that are kept count, and are not the server's fault."""
        self._local_active_connection_id_limit = 1 << 16

    def challenge(self) -> None:
        """Send a PATH_CHALLENGE with the next packet."""
        self.is_challenge_answered = False
        self._is_challenge_wanted = True

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        parameters = pull_quic_transport_parameters(Buffer(data=data))
        self.token = parameters.stateless_reset_token
        self.disables_migration = bool(parameters.disable_active_migration)
        preferred = parameters.preferred_address
        if preferred is not None:
            self.issued.append(Issued(preferred.connection_id, 1, 0, preferred.stateless_reset_token, True))
            self._remote_preferred_address = None  # the CID is looked at; we stay where we are

    def _handle_new_connection_id_frame(self, context: Any, frame_type: int, buf: Buffer) -> None:
        begin = buf.tell()
        sequence, retire_prior_to = buf.pull_uint_var(), buf.pull_uint_var()
        cid = buf.pull_bytes(buf.pull_uint8())
        token = buf.pull_bytes(TOKEN_LENGTH)
        if all(each.sequence != sequence for each in self.issued):  # frames are sent again when they get lost
            self.issued.append(Issued(cid, sequence, retire_prior_to, token))
        if self.keeps_old and retire_prior_to:
            # The same frame, without the demand.
            end = buf.tell()
            frame = Buffer(capacity=64)
            frame.push_uint_var(sequence)
            frame.push_uint_var(0)
            frame.push_uint8(len(cid))
            frame.push_bytes(cid + token)
            super()._handle_new_connection_id_frame(context, frame_type, Buffer(data=frame.data))
            buf.seek(end)
            return
        buf.seek(begin)
        try:
            super()._handle_new_connection_id_frame(context, frame_type, buf)
        except QuicConnectionError as error:
            self.exceeded_limit |= error.error_code == QuicErrorCode.CONNECTION_ID_LIMIT_ERROR
            raise

    def _handle_path_challenge_frame(self, context: Any, frame_type: int, buf: Buffer) -> None:
        self.challenges += 1
        super()._handle_path_challenge_frame(context, frame_type, buf)

    def _handle_path_response_frame(self, context: Any, frame_type: int, buf: Buffer) -> None:
        begin = buf.tell()
        self.is_challenge_answered |= buf.pull_bytes(8) in self._network_paths[0].local_challenges
        buf.seek(begin)
        super()._handle_path_response_frame(context, frame_type, buf)

    def _write_application(self, builder: Any, network_path: Any, now: float) -> None:
        if self._is_challenge_wanted and self._handshake_complete:
            self._is_challenge_wanted = False
            builder.start_packet(QuicPacketType.ONE_RTT, self._cryptos[Epoch.ONE_RTT])
            self._write_path_challenge_frame(builder=builder, network_path=network_path)
        super()._write_application(builder, network_path, now)


class Connection:
    """A connection to the end of its handshake and beyond. It may be moved to another port."""

    def __init__(self, server: Address, offer: Offer, sock: Datagrams | None = None) -> None:
        self.quic = _Watched(offer)
        self.ended: str | None = None  # why
        self.alpn: str | None = None
        self.retries: list[tuple[bytes, bytes]] = []
        self._server = server
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._acknowledged: set[int] = set()
        self._pings = 0

    @classmethod
    async def open(cls, server: Address, offer: Offer, within: float) -> Connection:
        """A connection whose handshake is confirmed. Raises ExaminationError, OSError."""
        connection = cls(server, offer)
        try:
            await connection.rebind()
            connection.quic.connect(tuple(server), connection._loop.time())
            connection._transmit()
            # Who is told that nobody listens need not wait.
            await connection.until(lambda: connection.quic.is_complete or connection._is_refused, within)
            if not connection.quic.is_complete:
                raise ExaminationError(connection._unanswered("no handshake", within))
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def _is_refused(self) -> bool:
        return self._sock is not None and self._sock.error is not None

    @property
    def handshake_cid(self) -> bytes:
        return self.quic._remote_initial_source_connection_id or b""

    async def until(self, condition: Callable[[], bool], within: float) -> bool:
        """Whether it became true within so many seconds; not, if the connection ends before."""
        try:
            async with asyncio.timeout(within):
                while not condition():
                    if self.ended is not None:
                        return False
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def ping(self, within: float) -> bool:
        """Whether a PING is acknowledged."""
        self._pings += 1
        uid = self._pings
        if self.ended is None:
            self.quic.send_ping(uid)
            self._transmit()
        return await self.until(lambda: uid in self._acknowledged, within)

    async def challenge(self, within: float) -> bool:
        """Whether a PATH_CHALLENGE is answered. It is sent again, since QUIC does not."""
        for _ in range(3):
            self.quic.challenge()
            self._transmit()
            if await self.until(lambda: self.quic.is_challenge_answered, within / 3):
                return True
        return False

    def change_cid(self) -> bool:
        """Use another CID and retire the one in use; False if there is no other."""
        before = self.quic.peer_cid
        self.quic.change_connection_id()
        self._transmit()
        return self.quic.peer_cid != before

    def close(self) -> None:
        """Say that it is over, as far as the server can be told."""
        if self.ended is None:
            self.quic.close(error_code=H3_NO_ERROR)
            self._transmit()
        self.abandon()

    def abandon(self) -> None:
        """Forget it, as if the machine had died."""
        self.ended = self.ended or "closed by us"
        if self._timer is not None:
            self._timer.cancel()
        if self._sock is not None:
            self._sock.close()

    async def rebind(self) -> None:
        """Go on from another port, as if a NAT had changed its mind. Raises OSError."""
        before = self._sock
        self._sock = await Datagrams.open(self._server, self._receive, self._changed.set)
        if before is not None:
            before.close()

    def _receive(self, datagram: bytes) -> None:
        if self.ended is not None:
            return
        if (retry := retry_scid(datagram)) is not None and self.quic._retry_source_connection_id is None:
            self.retries.append((retry, self.quic.peer_cid))
        self._advance(lambda now: self.quic.receive_datagram(datagram, tuple(self._server), now))

    def _tick(self) -> None:
        self._advance(self.quic.handle_timer)

    def _advance(self, step: Callable[[float], None]) -> None:
        try:
            step(self._loop.time())
            self._handle_events()
            self._transmit()
        except Exception as error:  # whatever a server makes aioquic fail at, it is not in order
            self.ended = f"cannot be understood: {type(error).__name__}"
        self._changed.set()

    def _handle_events(self) -> None:
        while (event := self.quic.next_event()) is not None:
            match event:
                case events.ConnectionTerminated() if self.ended is None:
                    phrase = "".join(c for c in event.reason_phrase if c.isprintable())[:REASON_LIMIT]
                    self.ended = f"closed: {phrase or f'code {event.error_code:#x}'}"
                case events.HandshakeCompleted():
                    self.alpn = event.alpn_protocol
                case events.PingAcknowledged():
                    self._acknowledged.add(event.uid)

    def _transmit(self) -> None:
        now = self._loop.time()
        for datagram, _ in self.quic.datagrams_to_send(now):
            if self._sock is not None:
                self._sock.send(datagram)
        if self._timer is not None:
            self._timer.cancel()
        at = self.quic.get_timer()
        if at is not None and self.ended is None:
            self._timer = self._loop.call_later(max(0.0, at - now), self._tick)

    def _unanswered(self, what: str, within: float) -> str:
        if self.ended is not None:
            return f"{what}: {self.ended}"
        if self._sock is not None and self._sock.error is not None:
            return f"{what}: {_said(self._sock.error)}"
        return f"{what} within {within:g} s"


class Glimpse(NamedTuple):
    """What the beginning of a handshake shows: the server's CID, and the SCIDs of Retry packets with the DCIDs that
    they answer."""

    cid: bytes
    retries: tuple[tuple[bytes, bytes], ...]


async def glimpse(server: Address, offer: Offer, within: float) -> Glimpse | None:
    """The server's CID, by as little of a handshake as shows it; then it is told that it is over.

    None if nothing was heard in time. Raises OSError.
    """
    received: asyncio.Queue[bytes] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    sock = await Datagrams.open(server, received.put_nowait)
    try:
        quic = _Watched(offer)
        quic.connect(tuple(server), loop.time())
        retries: list[tuple[bytes, bytes]] = []
        async with asyncio.timeout(within):
            while True:
                for datagram, _ in quic.datagrams_to_send(loop.time()):
                    sock.send(datagram)
                wait = max(0.0, (quic.get_timer() or 0.0) - loop.time())
                try:
                    async with asyncio.timeout(wait):
                        answer = await received.get()
                except TimeoutError:
                    quic.handle_timer(loop.time())  # packets get lost
                    continue
                header = parse_header(answer)
                if header is None or header.scid is None or answer[1:5] == VERSION_NEGOTIATION:
                    continue
                if header.dcid != quic.host_cid:
                    continue  # to whoever had our port before
                if (retry := retry_scid(answer)) is not None:
                    if not retries:
                        retries.append((retry, quic.peer_cid))
                    quic.receive_datagram(answer, tuple(server), loop.time())
                    continue
                try:
                    quic.receive_datagram(_first_packet(answer), tuple(server), loop.time())
                    quic.close()
                    for datagram, _ in quic.datagrams_to_send(loop.time()):
                        sock.send(datagram)
                except Exception as error:  # whatever a server makes aioquic fail at, its CID is known
                    logger.debug("no farewell: %s", type(error).__name__)
                return Glimpse(header.scid, tuple(retries))
    except TimeoutError:
        return None
    finally:
        sock.close()


def _said(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def retry_scid(datagram: bytes) -> bytes | None:
    """The SCID of a Retry packet; None if it is none."""
    if not datagram or not datagram[0] & LONG_HEADER:
        return None
    try:
        header = pull_quic_header(Buffer(data=datagram))
    except ValueError:
        return None
    return header.source_cid if header.packet_type is QuicPacketType.RETRY else None


def _first_packet(datagram: bytes) -> bytes:
    """What of a datagram has to be understood to answer in kind: its Initial, and not the certificate behind it."""
    try:
        return datagram[: pull_quic_header(Buffer(data=datagram)).packet_length]
    except ValueError:
        return datagram
