"""lb/http3.py: an exchange in virtual time with aioquic's server, and probes over real sockets against real servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer, serve
from aioquic.h3.connection import ErrorCode, FrameType, H3Connection, encode_frame
from aioquic.h3.events import HeadersReceived
from aioquic.quic import events as quic_events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from backend.certificate import Certificate, self_signed
from lb.address import Address
from lb.config import HealthConfig, Http3Config, Probe
from lb.healthcheck import MOST_CONNECTIONS, RESULTS
from lb.http3 import BODY_LIMIT, FRAME_LIMIT, RECEIVE_LIMIT, Exchange, Outcome, missing
from lb.packet import parse_header
from lb.routing import BackendState
from tests.test_health import (
    LOOPS,
    answers,
    closed_port,
    events,
    eventually,
    ignores,
    negotiation,
    now,
    run,
    service,
    serving,
    watching,
)

ACTIVE, DOWN = BackendState.ACTIVE, BackendState.DOWN
SERVER = Address("127.0.0.1", 443)
CLIENT = ("127.0.0.1", 50000)
TIMEOUT = 2.0
Respond = Callable[[H3Connection, int, dict[bytes, bytes]], None]

HASTY = HealthConfig(probe=Probe.HTTP3, interval=0.1, timeout=0.2, fall=3, rise=2, jitter=0.1, suspect_interval=0.005)
PATIENT = replace(HASTY, timeout=10.0)
GOOD = Outcome(True)


@pytest.fixture(scope="module")
def tls() -> Certificate:
    """For localhost, 127.0.0.1 and ::1."""
    return self_signed(datetime.now(UTC))


@pytest.fixture
def ca_file(tls: Certificate, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    path.write_bytes(tls.pem())
    return path


def configuration(tls: Certificate, alpn: str = "h3") -> QuicConfiguration:
    return QuicConfiguration(is_client=False, alpn_protocols=[alpn], certificate=tls.chain[0], private_key=tls.key)


class Http3Server:
    """What a server does with one connection's events, without socket and clock."""

    def __init__(self, quic: QuicConnection, respond: Respond) -> None:
        self.quic = quic
        self.requests: list[dict[bytes, bytes]] = []
        self.ended: quic_events.ConnectionTerminated | None = None
        self._respond = respond
        self._http: H3Connection | None = None

    def handle(self, event: quic_events.QuicEvent) -> None:
        if isinstance(event, quic_events.ProtocolNegotiated) and event.alpn_protocol == "h3":
            self._http = H3Connection(self.quic)
        elif isinstance(event, quic_events.ConnectionTerminated):
            self.ended = event
        if self._http is not None:
            for got in self._http.handle_event(event):
                if isinstance(got, HeadersReceived):
                    self.requests.append(dict(got.headers))
                    self._respond(self._http, got.stream_id, self.requests[-1])


def answering(status: int, *chunks: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Respond:
    def respond(http: H3Connection, stream_id: int, _request: dict[bytes, bytes]) -> None:
        http.send_headers(stream_id, [(b":status", b"%d" % status), *headers], end_stream=not chunks)
        for i, chunk in enumerate(chunks, 1):
            http.send_data(stream_id, chunk, end_stream=i == len(chunks))

    return respond


def says_nothing(_http: H3Connection, _stream_id: int, _request: dict[bytes, bytes]) -> None:
    pass


def refuses(http: H3Connection, stream_id: int, _request: dict[bytes, bytes]) -> None:
    _quic(http).reset_stream(stream_id, ErrorCode.H3_REQUEST_REJECTED)


def closes(http: H3Connection, stream_id: int, _request: dict[bytes, bytes]) -> None:
    _quic(http).close(error_code=ErrorCode.H3_INTERNAL_ERROR, reason_phrase="out of\norder")


def closes_without_a_word(http: H3Connection, stream_id: int, _request: dict[bytes, bytes]) -> None:
    _quic(http).close(error_code=ErrorCode.H3_INTERNAL_ERROR)


def ends_at_once(http: H3Connection, stream_id: int, _request: dict[bytes, bytes]) -> None:
    _quic(http).send_stream_data(stream_id, b"", end_stream=True)


def hints_first(http: H3Connection, stream_id: int, request: dict[bytes, bytes]) -> None:
    http.send_headers(stream_id, [(b":status", b"103"), (b"link", b"</style.css>")])
    answering(200, b"well")(http, stream_id, request)


def adds_trailers(http: H3Connection, stream_id: int, _request: dict[bytes, bytes]) -> None:
    http.send_headers(stream_id, [(b":status", b"200")])
    http.send_data(stream_id, b"all is w", end_stream=False)
    http.send_data(stream_id, b"ell", end_stream=False)
    http.send_headers(stream_id, [(b"checksum", b"1")], end_stream=True)


def changes_cid(http: H3Connection, stream_id: int, request: dict[bytes, bytes]) -> None:
    _quic(http).change_connection_id()
    answering(200)(http, stream_id, request)


def floods(http: H3Connection, stream_id: int, _request: dict[bytes, bytes]) -> None:
    """On another stream, of a type that a client has to ignore (RFC 9114, section 6.2.3)."""
    stream = _quic(http).get_next_available_stream_id(is_unidirectional=True)
    _quic(http).send_stream_data(stream, b"\x21" + bytes(10 * RECEIVE_LIMIT))


def expands(http: H3Connection, stream_id: int, _request: dict[bytes, bytes]) -> None:
    """60 KiB that stand for 240 MiB: one field of 4000 octets, and again and again its index (RFC 9204)."""
    quic, value = _quic(http), b"v" * 4000
    assert http._local_encoder_stream_id is not None
    capacity = b"\x3f\xe1\x1f"  # 4096
    inserted = b"\x41x" + b"\x7f" + encode_integer(len(value) - 127) + value
    quic.send_stream_data(http._local_encoder_stream_id, capacity + inserted)
    section = b"\x02\x00" + b"\xd9" + b"\x80" * 60_000  # :status 200, and the rest
    quic.send_stream_data(stream_id, encode_frame(FrameType.HEADERS, section), end_stream=True)


def encode_integer(value: int) -> bytes:
    """What follows a prefix that is full (RFC 7541, section 5.1)."""
    octets = b""
    while value >= 128:
        octets += bytes([value % 128 | 128])
        value //= 128
    return octets + bytes([value])


def babbles(seed: int) -> Respond:
    """Anything at all, on the request's stream and on new ones."""
    dice = random.Random(seed)

    def respond(http: H3Connection, stream_id: int, request: dict[bytes, bytes]) -> None:
        for _ in range(dice.randrange(4)):
            stream = _quic(http).get_next_available_stream_id(is_unidirectional=True)
            _quic(http).send_stream_data(stream, dice.randbytes(dice.randrange(1, 200)), dice.random() < 0.3)
        if dice.random() < 0.3:
            answering(dice.choice([200, 503]))(http, stream_id, request)
        else:
            frame = encode_frame(dice.randrange(10), dice.randbytes(dice.randrange(100)))
            _quic(http).send_stream_data(stream_id, frame, dice.random() < 0.5)

    return respond


def _quic(http: H3Connection) -> QuicConnection:
    quic: QuicConnection = http._quic
    return quic


class Played:
    """An exchange with a server over a network that takes 10 ms, in virtual time."""

    def __init__(
        self,
        wanted: Http3Config,
        respond: Respond,
        server_configuration: QuicConfiguration,
        *,
        lose: Callable[[int], bool] = lambda _: False,
        corrupt: Callable[[bytes], bytes] = lambda datagram: datagram,
    ) -> None:
        """`lose` is asked for every datagram by its number, `corrupt` for every one of the server's."""
        self.now = 0.0
        self.to_client: list[tuple[float, bytes]] = []
        self.to_server: list[tuple[float, bytes]] = []
        self.sent = 0
        self.server: Http3Server | None = None
        self.exchange = Exchange(wanted, SERVER, 2 * TIMEOUT + 1, 0.0)
        self._respond, self._configuration = respond, server_configuration
        self._lose, self._corrupt = lose, corrupt
        self._play(TIMEOUT)
        self.at = self.now
        self.exchange.close()
        self._from_client()
        self.exchange.expire()
        self.outcome = self.exchange.outcome
        self._hear_server(self.now + 10)

    def _play(self, until: float) -> None:
        self._from_client()
        while self.exchange.outcome is None:
            times = [when for when, _ in (*self.to_client[:1], *self.to_server[:1])]
            times += [t for t in (self.exchange.timer(), self._server_timer()) if t is not None]
            self.now = max(self.now, min(times))
            if self.now > until:
                self.now = until
                return
            if self.to_client and self.to_client[0][0] <= self.now:
                self.exchange.receive(self.to_client.pop(0)[1], self.now)
            elif (at := self.exchange.timer()) is not None and at <= self.now:
                self.exchange.on_timer(self.now)
            self._from_client()
            self._hear_server(self.now)

    def _hear_server(self, until: float) -> None:
        while self.to_server and self.to_server[0][0] <= until:
            datagram = self.to_server.pop(0)[1]
            if self.server is None:
                header = parse_header(datagram)
                assert header is not None
                quic = QuicConnection(configuration=self._configuration, original_destination_connection_id=header.dcid)
                self.server = Http3Server(quic, self._respond)
            self.server.quic.receive_datagram(datagram, CLIENT, self.now)
        if self.server is None:
            return
        at = self._server_timer()
        if at is not None and at <= until:
            self.server.quic.handle_timer(until)
        while (event := self.server.quic.next_event()) is not None:
            self.server.handle(event)
        for data, _ in self.server.quic.datagrams_to_send(self.now):
            self._send(self.to_client, self._corrupt(data))

    def _server_timer(self) -> float | None:
        timer: float | None = self.server.quic.get_timer() if self.server is not None else None
        return timer

    def _from_client(self) -> None:
        for datagram in self.exchange.to_send(self.now):
            self._send(self.to_server, datagram)

    def _send(self, queue: list[tuple[float, bytes]], datagram: bytes) -> None:
        self.sent += 1
        if not self._lose(self.sent):
            queue.append((self.now + 0.01, datagram))


@pytest.mark.parametrize(
    ("wanted", "respond", "outcome"),
    [
        pytest.param({}, answering(200), GOOD, id="200"),
        pytest.param({}, answering(204), GOOD, id="204"),
        pytest.param({}, answering(503), "status 503", id="503"),
        pytest.param({}, answering(301, headers=((b"location", b"/"),)), "status 301", id="no redirect is followed"),
        pytest.param({"status": range(401, 402)}, answering(401), GOOD, id="a status of one's own"),
        pytest.param({"status": range(401, 402)}, answering(200), "status 200", id="not that status"),
        pytest.param({}, answering(200, b"x" * 10 * RECEIVE_LIMIT), GOOD, id="nobody asks for the body"),
        pytest.param({"body": "well"}, answering(200, b"all is well"), GOOD, id="body"),
        pytest.param({"body": "well"}, answering(200, b"all is w", b"ell, ", b"thanks"), GOOD, id="body in pieces"),
        pytest.param({"body": "größer"}, answering(200, "größer".encode()), GOOD, id="body in UTF-8"),
        pytest.param({"body": "well"}, hints_first, GOOD, id="after an interim response"),
        pytest.param({"body": "well"}, adds_trailers, GOOD, id="before trailers"),
        pytest.param({"body": "ill"}, adds_trailers, "body without the text", id="not before trailers"),
        pytest.param({"body": "well"}, answering(200, b"all is lost"), "body without the text", id="another body"),
        pytest.param({"body": "well"}, answering(200), "body without the text", id="no body"),
        pytest.param({"body": "well"}, answering(503, b"well"), "status 503", id="body of another status"),
        pytest.param(
            {"body": "well"}, answering(200, b"x" * (BODY_LIMIT - 4) + b"well"), GOOD, id="at the end of 64 KiB"
        ),
        pytest.param(
            {"body": "well"}, answering(200, b"x" * (BODY_LIMIT - 3) + b"well"), "body without the text", id="too far"
        ),
        pytest.param({}, changes_cid, GOOD, id="the server uses another CID"),
        pytest.param({}, refuses, "request refused: code 0x10b", id="stream reset"),
        pytest.param({}, closes, "closed: out oforder", id="connection close"),
        pytest.param({}, closes_without_a_word, "closed: code 0x102", id="connection close without reason"),
        pytest.param({}, ends_at_once, "no answer to the request", id="no headers"),
        pytest.param({}, floods, f"more than {RECEIVE_LIMIT} octets", id="a flood"),
        pytest.param({}, expands, f"a frame of more than {FRAME_LIMIT} octets", id="a bomb"),
        pytest.param({}, says_nothing, None, id="no answer"),
    ],
)
def test_what_is_a_good_answer(
    tls: Certificate, wanted: dict[str, Any], respond: Respond, outcome: Outcome | str | None
) -> None:
    played = Played(Http3Config(**wanted), respond, configuration(tls))
    expected = Outcome(False, outcome) if isinstance(outcome, str) else outcome
    assert played.outcome == expected


def test_the_request_is_the_configured_one_and_the_connection_is_closed(tls: Certificate) -> None:
    wanted = Http3Config(path="/health?deep=1", server_name="www.example.com")
    played = Played(wanted, answering(200), configuration(tls))
    assert played.server is not None
    (request,) = played.server.requests
    assert {name: request[name] for name in request if name.startswith(b":")} == {
        b":method": b"GET",
        b":scheme": b"https",
        b":authority": b"www.example.com",
        b":path": b"/health?deep=1",
    }
    assert played.server.ended is not None
    assert played.server.ended.error_code == ErrorCode.H3_NO_ERROR


def test_without_a_name_the_address_is_the_authority(tls: Certificate) -> None:
    played = Played(Http3Config(), answering(200), configuration(tls))
    assert played.server is not None
    assert played.server.requests[0][b":authority"] == b"127.0.0.1:443"


def test_a_server_that_only_speaks_something_else_is_wrong(tls: Certificate) -> None:
    outcome = Played(Http3Config(), answering(200), configuration(tls, alpn="hq-interop")).outcome
    assert outcome is not None
    assert outcome.reason.startswith("closed: ")


@pytest.mark.parametrize(
    ("server_name", "trusted", "reason"),
    [
        pytest.param("localhost", True, None, id="name"),
        pytest.param(None, True, None, id="address"),
        pytest.param("www.example.com", True, "closed: hostname 'www.example.com' doesn't match", id="another name"),
        pytest.param("localhost", False, "closed: ", id="signed by itself"),
    ],
)
def test_a_certificate_is_verified_if_that_is_asked_for(
    tls: Certificate, ca_file: Path, server_name: str | None, trusted: bool, reason: str | None
) -> None:
    wanted = Http3Config(server_name=server_name, verify=True, ca_file=ca_file if trusted else None)
    outcome = Played(wanted, answering(200), configuration(tls)).outcome
    assert outcome is not None
    assert outcome.is_good == (reason is None)
    assert outcome.reason.startswith(reason or "")
    assert Played(replace(wanted, verify=False), answering(200), configuration(tls)).outcome == GOOD


def test_certificates_to_trust_that_cannot_be_read_are_no_good_answer(tls: Certificate, tmp_path: Path) -> None:
    wanted = Http3Config(verify=True, ca_file=tmp_path / "nothing.pem")
    outcome = Played(wanted, answering(200), configuration(tls)).outcome
    assert outcome is not None
    assert not outcome.is_good
    assert outcome.reason.startswith("cannot be understood: ")


@pytest.mark.parametrize("lost", range(1, 8))  # as many as there are if none is lost
def test_a_lost_datagram_is_sent_again_in_time(tls: Certificate, lost: int) -> None:
    played = Played(Http3Config(body="well"), answering(200, b"well"), configuration(tls), lose=lost.__eq__)
    assert played.outcome == GOOD
    assert played.sent >= lost


def test_no_answer_at_all_is_no_outcome(tls: Certificate) -> None:
    played = Played(Http3Config(), answering(200), configuration(tls), lose=lambda _: True)
    assert (played.outcome, played.at) == (None, TIMEOUT)


def test_who_never_heard_a_word_has_not_been_answered_however_long_it_waits() -> None:
    """Also when aioquic itself gives the connection up."""
    exchange = Exchange(Http3Config(), SERVER, 0.01, 0.0)
    while (at := exchange.timer()) is not None:
        assert at < 60
        assert list(exchange.to_send(at)) is not None
        exchange.on_timer(at)
    assert (exchange.outcome, exchange.is_heard) == (None, False)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_network_makes_of_answers_nothing_is_raised(tls: Certificate, seed: int) -> None:
    dice = random.Random(seed)

    def corrupt(datagram: bytes) -> bytes:
        at = dice.randrange(len(datagram))
        return dice.choice([datagram, datagram[:at], datagram[:at] + dice.randbytes(9) + datagram[at + 9 :], b""])

    played = Played(Http3Config(), answering(200), configuration(tls), corrupt=corrupt)
    assert played.outcome in (None, GOOD)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_a_server_says_nothing_is_raised(tls: Certificate, seed: int) -> None:
    outcome = Played(Http3Config(), babbles(seed), configuration(tls)).outcome
    assert outcome is None or outcome.is_good or outcome.reason


# Over sockets from here on.


class _Served(QuicConnectionProtocol):
    def __init__(self, site: Site, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._site = site
        self._server = Http3Server(self._quic, lambda *request: site.respond(*request))  # noqa: PLW0108 - it may change
        site.connections.append(self._server)

    def quic_event_received(self, event: quic_events.QuicEvent) -> None:
        self._server.handle(event)


class Site:
    """A server, whose answer a test may change."""

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.connections: list[Http3Server] = []
        self.address = Address("", 0)

    @property
    def requests(self) -> list[dict[bytes, bytes]]:
        return [request for connection in self.connections for request in connection.requests]


@contextlib.asynccontextmanager
async def hosting(
    tls: Certificate, respond: Respond, at: Address | None = None, *, retry: bool = False
) -> AsyncIterator[Site]:
    site = Site(respond)
    host, port = at or ("127.0.0.1", 0)
    server: QuicServer = await serve(
        host,
        port,
        configuration=configuration(tls),
        create_protocol=lambda *args, **keywords: _Served(site, *args, **keywords),
        retry=retry,
    )
    site.address = Address(*server._transport.get_extra_info("sockname")[:2])  # type: ignore[union-attr]
    try:
        yield site
    finally:
        server.close()
        for protocol in set(server._protocols.values()):
            for handle in (protocol._timer, protocol._transmit_task):
                if handle is not None:
                    handle.cancel()
        await asyncio.sleep(0)


@LOOPS
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_server_with_the_wanted_page_is_active(loop_factory: Any, host: str, tls: Certificate) -> None:
    async def story() -> None:
        async with hosting(tls, answering(200, b"all is well"), Address(host, 0)) as site:
            health = replace(PATIENT, http3=Http3Config(path="/health", body="well"))
            with watching(service(site.address, health)) as (monitor, changed):
                await eventually(lambda: now(monitor).results["answered"] >= 4)
                seen = now(monitor)
                assert (seen.state, seen.dead, seen.changes, seen.ignored, changed) == (ACTIVE, False, 0, 0, [])
                assert (seen.since, seen.reason) == (None, "")
                assert seen.round_trip is not None
                assert 0 < seen.round_trip < PATIENT.timeout
                assert {request[b":path"] for request in site.requests} == {b"/health"}
                # One connection and one request per probe, and each connection is ended.
                await eventually(lambda: sum(c.ended is not None for c in site.connections) >= 3)
                assert all(len(c.requests) <= 1 for c in site.connections)

    run(story(), loop_factory)


def test_a_server_that_sends_a_retry_first_is_active(tls: Certificate) -> None:
    async def story() -> None:
        async with hosting(tls, answering(200), retry=True) as site:
            with watching(service(site.address, PATIENT)) as (monitor, _):
                await eventually(lambda: now(monitor).results["answered"] >= 2)
                assert now(monitor).state is ACTIVE

    run(story())


def test_a_server_that_uses_other_cids_of_ours_is_active(tls: Certificate) -> None:
    async def story() -> None:
        async with hosting(tls, changes_cid) as site:
            with watching(service(site.address, PATIENT)) as (monitor, _):
                await eventually(lambda: now(monitor).results["answered"] >= 2)
                assert all(c.quic._peer_cid.sequence_number for c in site.connections if c.requests)

    run(story())


def test_why_a_connection_was_closed_is_known_although_its_end_would_come_too_late(tls: Certificate) -> None:
    """aioquic says so after three probe timeouts, which are more than 75 ms (RFC 9000, section 10.2)."""

    async def story() -> None:
        async with hosting(tls, closes) as site:
            with watching(service(site.address, replace(HASTY, timeout=0.06))) as (monitor, _):
                await eventually(lambda: now(monitor).results["wrong-answer"] >= 2)
                assert not now(monitor).dead

    run(story())


@LOOPS
def test_a_server_that_says_503_is_down_but_lives_and_recovers(
    loop_factory: Any, tls: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with hosting(tls, answering(200)) as site:
            with watching(service(site.address, PATIENT, hold_off=0.2)) as (monitor, _):
                await eventually(lambda: now(monitor).results["answered"] >= 2)
                before = asyncio.get_running_loop().time()
                site.respond = answering(503)
                await eventually(lambda: now(monitor).state is DOWN)
                seen = now(monitor)
                assert seen.reason == "status 503"
                assert seen.since is not None
                down_at = asyncio.get_running_loop().time()
                assert before - 1 <= seen.since <= down_at + 1
                # For many hold-offs.
                wrong = seen.results["wrong-answer"] + 20
                await eventually(lambda: now(monitor).results["wrong-answer"] >= wrong)
                assert (now(monitor).state, now(monitor).dead) == (DOWN, False)
                site.respond = answering(200)
                await eventually(lambda: now(monitor).state is ACTIVE)

    run(story(), loop_factory)
    named = {"service": "web", "backend": "b"}
    assert [e for e in events(caplog) if e[0] != "log"] == [
        ("backend-down", {**named, "reason": "status 503"}),
        ("backend-up", named),
    ]


@LOOPS
def test_a_server_that_does_not_answer_is_down_then_dead_and_comes_back(loop_factory: Any, tls: Certificate) -> None:
    async def story() -> None:
        async with serving(ignores) as silent:
            address = silent.address
            with watching(service(address, HASTY)) as (monitor, _):
                await eventually(lambda: now(monitor).dead)
                assert (now(monitor).results["answered"], now(monitor).reason) == (0, "timeout")
                assert len({addr for _, addr in silent.received}) > 1, "asked from other ports too"
                silent.transport.close()
                await asyncio.sleep(0)
                monitor.update([service(address, PATIENT)])
                async with hosting(tls, answering(200), address):
                    await eventually(lambda: now(monitor).state is ACTIVE)
                    assert not now(monitor).dead

    run(story(), loop_factory)


@LOOPS
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_closed_port_is_refused(loop_factory: Any, host: str) -> None:
    async def story() -> None:
        with watching(service(closed_port(host), replace(PATIENT, timeout=1.0), hold_off=1.0)) as (monitor, _):
            await eventually(lambda: now(monitor).dead)
            seen = now(monitor)
            assert (seen.state, seen.reason) == (DOWN, "refused")
            assert seen.results == dict.fromkeys(RESULTS, 0) | {"refused": seen.results["refused"]}

    run(story(), loop_factory)


def test_a_server_that_takes_too_long_is_down_but_not_dead(tls: Certificate) -> None:
    """It speaks QUIC, and its page never comes: nobody's connections are to be ended for that."""

    async def story() -> None:
        async with hosting(tls, says_nothing) as site:
            with watching(service(site.address, HASTY, hold_off=0.25)) as (monitor, _):
                await eventually(lambda: now(monitor).state is DOWN)
                assert now(monitor).reason == "timeout"
                many = now(monitor).results["timeout"] + 15
                await eventually(lambda: now(monitor).results["timeout"] >= many)
                assert not now(monitor).dead

    run(story())


def test_answers_that_are_always_too_late_are_signs_of_life() -> None:
    """The first word of a handshake comes when the probe has long been given up."""

    async def story() -> None:
        async with serving(None) as server:
            with watching(service(server.address, HASTY, hold_off=1.5)) as (monitor, _):
                await eventually(lambda: now(monitor).state is DOWN)
                for round_ in range(1, 12):
                    await eventually(lambda: len(server.received) >= 5 * round_)  # noqa: B023
                    # All but what was asked in the last 0.3 s.
                    for datagram, addr in server.received[:-5]:
                        server.send([negotiation(datagram)], addr)
                    assert not now(monitor).dead
                assert now(monitor).results["answered"] + now(monitor).results["wrong-answer"] == 0

    run(story())


def test_a_server_of_another_version_is_wrong_and_alive() -> None:
    async def story() -> None:
        async with serving(lambda d: [negotiation(d, bytes.fromhex("ff00001d"))]) as server:
            with watching(service(server.address, PATIENT, hold_off=0.2)) as (monitor, _):
                await eventually(lambda: now(monitor).results["wrong-answer"] >= 10)
                assert (now(monitor).state, now(monitor).dead) == (DOWN, False)
                assert now(monitor).reason.startswith("closed: ")

    run(story())


@pytest.mark.parametrize(
    "babble",
    [
        pytest.param(lambda d: [d], id="echo"),
        pytest.param(lambda _: [b""], id="empty"),
        pytest.param(lambda _: [os.urandom(1200)], id="random"),
        pytest.param(lambda _: [b"\xc0" * 50] * 200, id="a flood"),
    ],
)
def test_garbage_is_counted_and_is_no_sign_of_life(babble: Callable[[bytes], list[bytes]]) -> None:
    async def story() -> None:
        async with serving(babble) as server:
            with watching(service(server.address, HASTY)) as (monitor, _):
                await eventually(lambda: now(monitor).dead)
                seen = now(monitor)
                assert seen.ignored > 0
                assert seen.results["answered"] + seen.results["wrong-answer"] == 0

    run(story())


def test_connections_to_a_silent_server_are_few() -> None:
    """However often it is to be asked."""

    async def story() -> None:
        health = replace(HASTY, interval=0.01, timeout=30.0, suspect_interval=0.001)
        async with serving(ignores) as server:
            with watching(service(server.address, health, hold_off=60)) as (monitor, _):
                await eventually(lambda: len(_cids(server.received)) == MOST_CONNECTIONS)
                monitor.suspect("web", "b")
                # Long enough for a hundred others: aioquic's second attempts come after 0.2 s, its third after 0.6 s.
                await eventually(lambda: len(server.received) >= 3 * MOST_CONNECTIONS)
                assert len(_cids(server.received)) == MOST_CONNECTIONS

    run(story())


def _cids(received: list[tuple[bytes, Any]]) -> set[bytes | None]:
    headers = [parse_header(datagram) for datagram, _ in received]
    return {header.scid for header in headers if header is not None}


@LOOPS
def test_whoever_is_stopped_in_the_middle_leaves_nothing_behind(loop_factory: Any, tls: Certificate) -> None:
    async def story() -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        async with hosting(tls, says_nothing) as site:
            with watching(service(site.address, replace(PATIENT, interval=0.02))) as (monitor, _):
                await eventually(lambda: len(site.requests) >= 5)
                prober = monitor._probers["web"]["b"]
                assert prober is not None
                timers = [running.timer for running in prober._probes._running.values()]  # type: ignore[attr-defined]
                assert len(timers) >= 5
                monitor.update([])
                assert all(timer is not None and timer.cancelled() for timer in timers)
            # They were told, those whose handshake was over.
            await eventually(lambda: sum(c.ended is not None for c in site.connections) >= 5)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)

    run(story(), loop_factory)


def test_another_question_keeps_the_state(tls: Certificate) -> None:
    async def story() -> None:
        async with hosting(tls, answering(503)) as site:
            slowly = replace(PATIENT, interval=3600.0, jitter=0.0)
            with watching(service(site.address, PATIENT, hold_off=60)) as (monitor, changed):
                await eventually(lambda: now(monitor).state is DOWN)
                was = now(monitor)
                assert changed == ["web"]

                # By reload another question, long before it is due.
                negotiating = replace(slowly, probe=Probe.VERSION_NEGOTIATION)
                monitor.update([service(site.address, negotiating, hold_off=60)])
                assert (now(monitor).state, now(monitor).since, now(monitor).changes) == (DOWN, was.since, 1)
                assert now(monitor).results["wrong-answer"] >= was.results["wrong-answer"]

                # The same one as often as before: it is a QUIC server after all.
                monitor.update([service(site.address, replace(negotiating, interval=0.1), hold_off=60)])
                await eventually(lambda: now(monitor).state is ACTIVE)

                # And back to the page, another one.
                health = replace(PATIENT, http3=Http3Config(path="/other"))
                monitor.update([service(site.address, health, hold_off=60)])
                assert now(monitor).state is ACTIVE
                await eventually(lambda: now(monitor).state is DOWN)
                assert site.requests[-1][b":path"] == b"/other"

    run(story())


def test_probes_of_the_earlier_kind_are_no_failures_of_the_later_one() -> None:
    async def story() -> None:
        async with serving(None) as server:
            health = replace(HASTY, fall=1, timeout=0.5, interval=0.4, jitter=0.0)
            with watching(service(server.address, health, hold_off=60)) as (monitor, _):
                await eventually(lambda: server.received)
                server.answer = answers
                negotiating = replace(health, probe=Probe.VERSION_NEGOTIATION, interval=0.05)
                monitor.update([service(server.address, negotiating, hold_off=60)])
                await eventually(lambda: now(monitor).results["answered"] >= 20)
                assert (now(monitor).state, now(monitor).changes) == (ACTIVE, 0)

    run(story())


WITHOUT = """
import sys
sys.modules["aioquic"] = None
from lb import health, http3
print(http3.missing())
"""


def test_without_aioquic_its_probe_says_what_is_missing_and_the_other_one_works() -> None:
    assert missing() is None
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "probe: http3 needs aioquic, which is not installed: pip install 'quiclb[http3]'\n"


def test_aioquic_is_imported_by_who_needs_it_only() -> None:
    wanted = "import sys, lb.health; print('aioquic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", wanted], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
