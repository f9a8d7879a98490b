"""Http3Probes: a page is asked for, as a client would, by a new connection each time. aioquic does the QUIC.

Every probe costs both sides a TLS handshake, which is some milliseconds of this process's only thread.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lb.address import Address
from lb.config import Http3Config
from lb.healthcheck import HealthCheck
from lb.packet import LONG_HEADER, parse_header
from lb.probing import Probes, ProbeSocket, Sent, Surroundings

try:
    from aioquic.h3.connection import H3_ALPN, ErrorCode, H3Connection
    from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
    from aioquic.quic import events
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.connection import QuicConnection
except ModuleNotFoundError:  # an extra: `missing` says so to whoever configures it
    if importlib.util.find_spec("aioquic") is not None:
        raise

logger = logging.getLogger(__name__)
# It logs what each connection does, and the reasons that peers give, as they are.
logging.getLogger("quic").setLevel(logging.ERROR)

# Ours.
CID_LENGTH = 8  # of the CIDs that answers go to
BODY_LIMIT = 1 << 16  # octets in which the text has to be
RECEIVE_LIMIT = BODY_LIMIT + (1 << 16)  # octets of one exchange, handshake and all: then it is over
FRAME_LIMIT = 1 << 14  # octets of one HEADERS frame: each may stand for a field of 4 KiB (RFC 9204, section 3.2)
PART = 1 << 12  # octets that are looked at together
REASON_LIMIT = 120  # characters of somebody else's
USER_AGENT = b"quiclb-health"
_GIVEN_UP = "no answer in time"  # our own reason for closing, which is none to report


def missing() -> str | None:
    """What `probe: http3` lacks on this machine, in words for the operator; None if nothing."""
    if importlib.util.find_spec("aioquic") is not None:
        return None
    return "probe: http3 needs aioquic, which is not installed: pip install 'quiclb[http3]'"


class Outcome(NamedTuple):
    """What came of an exchange; `reason` says what is wrong with an answer that is not good."""

    is_good: bool
    reason: str = ""


class Exchange:
    """A connection to `address` with one request, until `outcome` is set. No socket and no clock."""

    def __init__(self, wanted: Http3Config, address: Address, timeout: float, now: float) -> None:
        """`timeout` is for how long the server remembers us if it does not hear that the exchange is over."""
        self.outcome: Outcome | None = None
        self._wanted = wanted
        self._address = address
        self._received = 0
        self._body = b""
        self._is_answered = False  # with a status that is wanted
        self._stream = 0  # that of the request
        self._pending = 0  # octets of it that have not made a frame yet
        self._http: H3Connection | None = None
        self._quic = QuicConnection(configuration=_configuration(wanted, address, timeout))
        self._quic.connect(address, now)
        self.cids = {self._quic.host_cid}  # that the server may send to

    @property
    def is_heard(self) -> bool:
        """Whether the server has sent anything."""
        return self._received > 0

    def receive(self, datagram: bytes, now: float) -> None:
        self._received += len(datagram)
        try:
            self._quic.receive_datagram(datagram, self._address, now)
            self._handle_events()
        except Exception as error:  # whatever a server makes aioquic fail at, it is not a good answer
            self.outcome = _bad(f"cannot be understood: {type(error).__name__}")
        if self._received > RECEIVE_LIMIT and self.outcome is None:
            self.outcome = _bad(f"more than {RECEIVE_LIMIT} octets")

    def timer(self) -> float | None:
        """When `on_timer` has to be called."""
        return self._quic.get_timer()

    def on_timer(self, now: float) -> None:
        self._quic.handle_timer(now)
        self._handle_events()

    def to_send(self, now: float) -> Iterator[bytes]:
        return (datagram for datagram, _ in self._quic.datagrams_to_send(now))

    def close(self) -> None:
        """End the connection, if it has not ended yet: there will be another datagram to send."""
        self._quic.close(error_code=ErrorCode.H3_NO_ERROR, reason_phrase=_GIVEN_UP)

    def expire(self) -> None:
        """There is no more time, also not for the closing of a connection, which aioquic would still wait for.

        To be called after `close` and `to_send`, and last.
        """
        if self.outcome is None:
            self._quic.handle_timer(float("inf"))
            self._handle_events()

    def _handle_events(self) -> None:
        while self.outcome is None and (event := self._quic.next_event()) is not None:
            match event:
                case events.ConnectionIdIssued():
                    self.cids.add(event.connection_id)
                case events.ProtocolNegotiated():
                    self._http = H3Connection(self._quic)
                case events.HandshakeCompleted() if event.alpn_protocol in H3_ALPN:
                    self._request()
                case events.HandshakeCompleted():
                    self.outcome = _bad("speaks no HTTP/3")
                case events.StreamReset() if event.stream_id == self._stream:
                    self.outcome = _bad(f"request refused: code {event.error_code:#x}")
                case events.ConnectionTerminated():
                    self._terminated(event)
            if self._http is not None:
                self._feed(self._http, event)

    def _feed(self, http: H3Connection, event: events.QuicEvent) -> None:
        """Hand an event on, in parts: what frames expand to is held for one part at a time."""
        for part in _parts(event):
            if self.outcome is not None:
                return
            made = http.handle_event(part)
            for http_event in made:
                self._handle_http(http_event)
            if isinstance(part, events.StreamDataReceived) and part.stream_id == self._stream:
                self._pending = 0 if made else self._pending + len(part.data)
                if self._pending > FRAME_LIMIT:
                    self.outcome = _bad(f"a frame of more than {FRAME_LIMIT} octets")

    def _request(self) -> None:
        assert self._http is not None  # noqa: S101 - a protocol is negotiated before a handshake completes
        wanted = self._wanted
        self._stream = self._quic.get_next_available_stream_id()
        headers = [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":authority", (wanted.server_name or str(self._address)).encode()),
            (b":path", wanted.path.encode()),
            (b"user-agent", USER_AGENT),
            (b"accept-encoding", b"identity"),
        ]
        self._http.send_headers(self._stream, headers, end_stream=True)

    def _handle_http(self, event: H3Event) -> None:
        if self.outcome is not None or getattr(event, "stream_id", None) != self._stream:
            return
        is_over = False
        if isinstance(event, HeadersReceived):
            is_over = event.stream_ended
            if not self._is_answered:
                status = int(dict(event.headers)[b":status"])
                if status < 200:
                    return  # an interim one: the answer is still to come (RFC 9110, section 15.2)
                if status not in self._wanted.status:
                    self.outcome = _bad(f"status {status}")
                    return
                self._is_answered = True
        elif isinstance(event, DataReceived):
            is_over = event.stream_ended
            self._body = (self._body + event.data)[:BODY_LIMIT]
        text = self._wanted.body
        if self._is_answered and (text is None or text.encode() in self._body):
            self.outcome = Outcome(True)
        elif is_over or len(self._body) == BODY_LIMIT:
            self.outcome = _bad("body without the text" if self._is_answered else "no answer to the request")

    def _terminated(self, event: events.ConnectionTerminated) -> None:
        # By whoever never sent us a word, nothing has been terminated.
        if self.is_heard and event.reason_phrase != _GIVEN_UP:
            phrase = "".join(c for c in event.reason_phrase if c.isprintable())[:REASON_LIMIT]
            self.outcome = _bad(f"closed: {phrase or f'code {event.error_code:#x}'}")


@dataclass(slots=True, eq=False)
class _Running:
    """An exchange under way."""

    exchange: Exchange
    sock: ProbeSocket
    began: float
    timer: asyncio.TimerHandle | None = None


class Http3Probes(Probes):
    """Probes of one connection each.

    Whatever comes to one of their CIDs shows that the backend lives, also long after an exchange is over.
    """

    def __init__(self, address: Address, check: HealthCheck, around: Surroundings) -> None:
        super().__init__(address, check, around)
        self._running: dict[int, _Running] = {}  # by probe

    def expire(self, probe: int, now: float) -> None:
        running = self._running.get(probe)
        if running is not None:
            self._end(probe, running, now)

    def close(self) -> None:
        now = self._clock()
        for probe, running in list(self._running.items()):
            self._part(probe, running, now)
        super().close()

    def _ask(self, probe: int, sock: ProbeSocket, now: float) -> None:
        config = self._check.config
        exchange = Exchange(config.http3, self.address, 2 * config.timeout + 1, now)
        running = _Running(exchange, sock, now)
        self._flush(probe, running, now)
        self._running[probe] = running
        self._arm(probe, running, now)

    def _hear(self, sock: ProbeSocket, datagram: bytes) -> bool:
        sent = sock.expected(_destination(datagram))
        if sent is None:
            return False
        now = self._clock()
        self._check.on_sign_of_life(now)
        running = self._running.get(sent.probe)
        if running is not None:
            running.exchange.receive(datagram, now)
            self._advance(sent.probe, running, now)
        return True

    def _tick(self, probe: int, running: _Running) -> None:
        now = self._clock()
        running.exchange.on_timer(now)
        self._advance(probe, running, now)
        self._on_news()

    def _advance(self, probe: int, running: _Running, now: float) -> None:
        """Send what there is to be sent, and go on until there is an outcome."""
        if running.exchange.outcome is not None or not running.sock.is_open or not self._check.awaits(probe):
            self._end(probe, running, now)
            return
        try:
            self._flush(probe, running, now)
        except OSError as error:
            self._unsent(probe, error, now)
            self._part(probe, running, now)
        else:
            self._arm(probe, running, now)

    def _flush(self, probe: int, running: _Running, now: float) -> None:
        """Raises OSError."""
        for datagram in running.exchange.to_send(now):
            self._transmit(running.sock, datagram, now)
        for cid in running.exchange.cids:
            running.sock.expect(cid, Sent(probe, running.began))

    def _end(self, probe: int, running: _Running, now: float) -> None:
        """Part, and report what came of it; if nothing did, the check knows what to think of that."""
        self._part(probe, running, now)
        outcome = running.exchange.outcome
        if outcome is None or not self._check.awaits(probe):
            return
        if outcome.is_good:
            self.round_trip = now - running.began
            self._check.on_reply(probe, now)
        else:
            self._check.on_wrong(probe, outcome.reason, now)

    def _part(self, probe: int, running: _Running, now: float) -> None:
        """Close a connection. If the server does not hear of it, it will forget us soon all the same."""
        del self._running[probe]
        if running.timer is not None:
            running.timer.cancel()
        running.exchange.close()
        datagrams = list(running.exchange.to_send(now))
        running.exchange.expire()
        if running.sock.is_open and running.exchange.is_heard:
            try:
                for datagram in datagrams:
                    running.sock.send(datagram, now)
            except OSError as error:
                logger.debug("farewell not sent: %s", error.strerror)

    def _arm(self, probe: int, running: _Running, now: float) -> None:
        if running.timer is not None:
            running.timer.cancel()
        at = running.exchange.timer()
        if at is not None:
            loop = asyncio.get_running_loop()
            running.timer = loop.call_later(max(0.0, at - now), self._tick, probe, running)


def _configuration(wanted: Http3Config, address: Address, timeout: float) -> QuicConfiguration:
    configuration = QuicConfiguration(
        alpn_protocols=H3_ALPN,
        connection_id_length=CID_LENGTH,
        idle_timeout=timeout,
        max_data=RECEIVE_LIMIT,
        max_stream_data=RECEIVE_LIMIT,
        # What a certificate is compared with. As SNI only names are sent (RFC 6066, section 3).
        server_name=wanted.server_name or address.host,
        verify_mode=ssl.CERT_REQUIRED if wanted.verify else ssl.CERT_NONE,
    )
    if wanted.ca_file is not None:
        configuration.load_verify_locations(cafile=str(wanted.ca_file))
    else:
        system = ssl.get_default_verify_paths()
        configuration.load_verify_locations(system.cafile, system.capath)
    return configuration


def _parts(event: events.QuicEvent) -> Iterator[events.QuicEvent]:
    if not isinstance(event, events.StreamDataReceived) or len(event.data) <= PART:
        yield event
        return
    for at in range(0, len(event.data), PART):
        is_last = at + PART >= len(event.data)
        yield events.StreamDataReceived(event.data[at : at + PART], event.end_stream and is_last, event.stream_id)


def _bad(reason: str) -> Outcome:
    return Outcome(False, reason)


def _destination(datagram: bytes) -> bytes:
    """The CID that a datagram goes to, if it is one of ours at all."""
    if datagram and not datagram[0] & LONG_HEADER:
        return datagram[1 : 1 + CID_LENGTH]
    header = parse_header(datagram)
    return header.dcid if header is not None else b""
