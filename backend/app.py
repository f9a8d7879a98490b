"""The HTTP/3 application: a few resources by which a balancer can be watched at work.

    GET  /               a word of welcome
    GET  /whoami         JSON: who answers, by which connection IDs, and the client's address as seen here
    GET  /bytes/N        N octets
    GET  /slow/SECONDS   a numbered line every 50 ms
    GET  /status/CODE    that status, for health checks to be tested with
    PUT  /upload         (or POST) JSON: how many octets came, and their SHA-256

In early data (0-RTT), which anybody may replay, GET and HEAD are answered at once; whatever may change something waits
until the client has finished the handshake, or where a proxy has forwarded it early, is Too Early (RFC 8470).

It is a test and demonstration server: `/whoami` tells a server ID to whoever asks, which a real one would not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import aioquic
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.buffer import encode_uint_var
from aioquic.h3.connection import ErrorCode, FrameType, H3Connection, encode_frame
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic import events
from aioquic.quic.connection import NetworkAddress

from backend.routable import RoutableConnection
from lb.address import Address
from lb.cid import ServerId, config_id_of

log = logging.getLogger(__name__)

# Ours.
MAX_BYTES = 1 << 34  # of one /bytes
MAX_SECONDS = 3600.0  # of one /slow
TICK = 0.05  # seconds between the lines of /slow
CHUNK = bytes(range(256)) * 256  # 64 KiB
BUFFER_HIGH = 4 * len(CHUNK)  # octets of a stream that wait for an acknowledgement before its writer pauses
BUFFER_LOW = BUFFER_HIGH // 2

# What its SETTINGS promise to clients that come back with 0-RTT: they are aioquic's own, one set in each version.
SETTINGS = f"h3 of aioquic {aioquic.__version__}".encode()


@dataclass(frozen=True, slots=True)
class Site:
    """What the server says about itself."""

    name: str
    server_id: ServerId | None


@dataclass(slots=True)
class Request:
    """A request whose headers have come; its body is counted as it comes, and kept nowhere."""

    method: str
    path: str
    connection: RoutableConnection
    is_early: bool = False  # it came before the handshake's end
    was_early_elsewhere: bool = False  # says a proxy, and that it can be told so
    octets: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    is_complete: asyncio.Event = field(default_factory=asyncio.Event)

    def feed(self, data: bytes, is_last: bool) -> None:
        self.octets += len(data)
        self.digest.update(data)
        if is_last:
            self.is_complete.set()


class Response(NamedTuple):
    """A status and a body, at once or in chunks; `length` is the body's, where chunks do not say."""

    status: int
    content_type: str
    body: bytes | AsyncIterator[bytes]
    length: int | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Route(NamedTuple):
    """Who answers to a path, and for which methods.

    `parse` reads the path's second segment, and raises ValueError; without it there must be none.
    """

    methods: tuple[str, ...]
    answer: Callable[[Site, Request, Any], Awaitable[Response]]
    parse: Callable[[str], float] | None = None


async def answer(site: Site, request: Request) -> Response:
    """The response to any request at all."""
    first, slash, argument = request.path.partition("?")[0].removeprefix("/").partition("/")
    route = ROUTES.get(first)
    if route is None or bool(slash) != bool(route.parse):
        return text(404, f"no such resource; there are {', '.join(f'/{each}' for each in ROUTES)}")
    if request.was_early_elsewhere and request.method not in _READ:
        return text(425, "a proxy has forwarded this before it knew that nobody replays it")
    if request.method not in route.methods:
        allowed = ", ".join(route.methods)
        return text(405, f"expected {allowed}")._replace(headers=((b"allow", allowed.encode()),))
    try:
        parsed = route.parse(argument) if route.parse else None
    except ValueError as error:
        return text(400, str(error))
    return await route.answer(site, request, parsed)


def text(status: int, line: str) -> Response:
    return Response(status, "text/plain; charset=utf-8", f"{line}\n".encode())


def as_json(value: object) -> Response:
    return Response(200, "application/json", json.dumps(value).encode() + b"\n")


async def _welcome(site: Site, request: Request, _: None) -> Response:
    return text(200, f"This is {site.name}, a backend of quiclb.")


async def _whoami(site: Site, request: Request, _: None) -> Response:
    quic = request.connection
    host, port, *_scope = quic.get_peer_address() or ("", 0)
    return as_json(
        {
            "name": site.name,
            "server_id": site.server_id.hex() if site.server_id is not None else None,
            "config_id": config_id_of(quic.host_cid),
            "cids": [cid.hex() for cid in quic.cids],
            "dcid": quic.host_cid.hex(),  # that the client used last
            "connection": quic.original_destination_connection_id.hex(),  # stays the same, whatever moves
            "client": str(Address(host, port)),
            "resumed": quic.tls.session_resumed,
            "early": request.is_early,
        }
    )


async def _bytes(site: Site, request: Request, count: int) -> Response:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(count // len(CHUNK)):
            yield CHUNK
        yield CHUNK[: count % len(CHUNK)]

    return Response(200, "application/octet-stream", body(), count)


async def _slow(site: Site, request: Request, seconds: float) -> Response:
    async def body() -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        start = loop.time()
        for tick in range(round(seconds / TICK)):
            yield b"%d\n" % tick
            await asyncio.sleep(start + (tick + 1) * TICK - loop.time())
        yield b"end\n"

    return Response(200, "text/plain; charset=utf-8", body())


async def _status(site: Site, request: Request, code: int) -> Response:
    return Response(code, "text/plain; charset=utf-8", b"")  # some of them must not have a body


async def _upload(site: Site, request: Request, _: None) -> Response:
    await request.is_complete.wait()
    return as_json({"octets": request.octets, "sha256": request.digest.hexdigest()})


def _octet_count(written: str) -> int:
    if not (written.isascii() and written.isdigit()) or len(written) > 20 or int(written) > MAX_BYTES:
        raise ValueError(f"expected a number of octets from 0 to {MAX_BYTES}")
    return int(written)


def _status_code(written: str) -> int:
    if not (written.isascii() and written.isdigit()) or len(written) != 3 or not 200 <= int(written) < 600:
        raise ValueError("expected a status code from 200 to 599")
    return int(written)


def _seconds(written: str) -> float:
    try:
        seconds = float(written)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_SECONDS:  # false for a NaN too
        raise ValueError(f"expected a number of seconds from 0 to {MAX_SECONDS:g}")
    return seconds


_READ = ("GET", "HEAD")
ROUTES = {
    "": Route(_READ, _welcome),
    "whoami": Route(_READ, _whoami),
    "bytes": Route(_READ, _bytes, _octet_count),
    "slow": Route(_READ, _slow, _seconds),
    "status": Route(_READ, _status, _status_code),
    "upload": Route(("POST", "PUT"), _upload),
}


class Http3Protocol(QuicConnectionProtocol):
    """One connection's requests, each answered by a task that ends with its stream."""

    def __init__(self, connection: RoutableConnection, site: Site) -> None:
        super().__init__(connection)
        self._connection = connection
        self._site = site
        self._http: H3Connection | None = None
        self._is_confirmed = asyncio.Event()  # the handshake is: nobody has replayed it
        self._requests: dict[int, Request] = {}  # whose bodies are wanted, by stream ID
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._paused: dict[int, asyncio.Future[None]] = {}
        self._end_of_requests = 0  # the least stream ID of a request that has not come
        self._is_leaving = False
        self._on_over: Callable[[], None] | None = None

    @property
    def connection(self) -> RoutableConnection:
        return self._connection

    def go_away(self, on_over: Callable[[], None]) -> None:
        """Answer what was asked for and nothing else (GOAWAY; RFC 9114, section 5.2), and then close the connection.

        `on_over` is called when it is closed, by either side.
        """
        self._is_leaving = True
        self._on_over = on_over
        self._say_go_away()
        self.transmit()  # with CONNECTION_CLOSE aioquic sends nothing else any more
        self._close_if_done()

    def close(self, error_code: int = ErrorCode.H3_NO_ERROR, reason_phrase: str = "") -> None:
        self._over()
        self._end_tasks()
        super().close(error_code, reason_phrase)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has given the connection up: nothing of it may run on."""
        self._over()
        self._end_tasks()
        for handle in (self._timer, self._transmit_task):
            if handle is not None:
                handle.cancel()

    def datagram_received(self, data: bytes | str, addr: NetworkAddress) -> None:
        super().datagram_received(data, addr)
        # Acknowledgements come in datagrams, and make room.
        for stream_id, pause in self._paused.items():
            if not pause.done() and self._connection.unacknowledged(stream_id) <= BUFFER_LOW:
                pause.set_result(None)
        if self._is_leaving:
            self._close_if_done()

    def quic_event_received(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.ProtocolNegotiated):
            self._http = H3Connection(self._connection)
            self._say_go_away()
        elif isinstance(event, events.HandshakeCompleted):
            self._is_confirmed.set()
        elif isinstance(event, events.ConnectionTerminated):
            self._over()
            self._end_tasks()
        elif isinstance(event, events.StopSendingReceived):
            self._end_task(event.stream_id)  # aioquic has reset our side already
        elif isinstance(event, events.StreamReset) and event.stream_id in self._tasks:
            self._end_task(event.stream_id)
            self._connection.reset_stream(event.stream_id, ErrorCode.H3_REQUEST_CANCELLED)
        if self._http is not None:
            for http_event in self._http.handle_event(event):
                self._http_event_received(self._http, http_event)

    def _http_event_received(self, http: H3Connection, event: H3Event) -> None:
        stream_id = getattr(event, "stream_id", -1)
        if isinstance(event, HeadersReceived) and any(name == b":method" for name, _ in event.headers):
            if self._is_leaving and stream_id >= self._end_of_requests:
                # The client may ask another server, since nothing was done about it (RFC 9114, section 4.1.1).
                self._connection.reset_stream(stream_id, ErrorCode.H3_REQUEST_REJECTED)
                self._connection.stop_stream(stream_id, ErrorCode.H3_REQUEST_REJECTED)
                return
            self._end_of_requests = max(self._end_of_requests, stream_id + 4)
            headers = dict(event.headers)
            request = Request(
                headers[b":method"].decode("ascii", "replace"),
                headers.get(b":path", b"").decode("ascii", "replace"),
                self._connection,
                is_early=not self._is_confirmed.is_set(),
                was_early_elsewhere=headers.get(b"early-data") == b"1",
            )
            request.feed(b"", event.stream_ended)
            self._requests[stream_id] = request
            task = self._tasks[stream_id] = asyncio.create_task(self._respond(http, stream_id, request))
            task.add_done_callback(partial(self._task_done, stream_id))
        elif stream_id in self._requests and isinstance(event, DataReceived | HeadersReceived):
            data = event.data if isinstance(event, DataReceived) else b""  # or trailers
            self._requests[stream_id].feed(data, event.stream_ended)

    async def _respond(self, http: H3Connection, stream_id: int, request: Request) -> None:
        if request.method not in _READ:
            await self._is_confirmed.wait()
        response = await answer(self._site, request)
        body = response.body
        length = len(body) if isinstance(body, bytes) else response.length
        headers = [
            (b":status", b"%d" % response.status),
            (b"content-type", response.content_type.encode()),
            *response.headers,
        ]
        if length is not None and request.method != "HEAD":
            # To HEAD it would be allowed as well, but aioquic's own client takes it for a body that did not come.
            headers.append((b"content-length", b"%d" % length))

        if request.method == "HEAD":
            http.send_headers(stream_id, headers, end_stream=True)
        elif isinstance(body, bytes):
            http.send_headers(stream_id, headers)
            http.send_data(stream_id, body, end_stream=True)
        else:
            http.send_headers(stream_id, headers)
            async with contextlib.aclosing(body) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    http.send_data(stream_id, chunk, end_stream=False)
                    self._transmit_soon()
                    await self._drained(stream_id)
            http.send_data(stream_id, b"", end_stream=True)
        self._transmit_soon()

    async def _drained(self, stream_id: int) -> None:
        """Wait until the client has acknowledged enough of a stream for more to be written."""
        if self._connection.unacknowledged(stream_id) < BUFFER_HIGH:
            return
        pause = self._paused[stream_id] = self._loop.create_future()
        try:
            await pause
        finally:
            del self._paused[stream_id]

    def _task_done(self, stream_id: int, task: asyncio.Task[None]) -> None:
        self._requests.pop(stream_id, None)
        self._tasks.pop(stream_id, None)
        if not task.cancelled() and (error := task.exception()):
            log.error("request-failed", exc_info=error)
            self._connection.reset_stream(stream_id, ErrorCode.H3_INTERNAL_ERROR)
            self._transmit_soon()

    def _say_go_away(self) -> None:
        # aioquic's H3Connection has no word for it.
        if self._is_leaving and self._http is not None and self._http._local_control_stream_id is not None:
            frame = encode_frame(FrameType.GOAWAY, encode_uint_var(self._end_of_requests))
            self._connection.send_stream_data(self._http._local_control_stream_id, frame)

    def _close_if_done(self) -> None:
        """Close the connection if its client has all that it asked for."""
        if self._is_confirmed.is_set() and not self._tasks and not self._connection.is_sending:
            self.close()

    def _over(self) -> None:
        on_over, self._on_over = self._on_over, None
        if on_over is not None:
            on_over()

    def _end_task(self, stream_id: int) -> None:
        if stream_id in self._tasks:
            self._tasks[stream_id].cancel()

    def _end_tasks(self) -> None:
        for task in self._tasks.values():
            task.cancel()
