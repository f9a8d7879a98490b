"""One connection of a client, and what it may cost: octets, seconds, and one request.

The only file that knows aiohttp. The head of a request is held back until it is complete, so that its length and the
time that it takes have bounds of ours.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from logging import getLogger
from typing import Any

from aiohttp import web

from lb.admin.access import Peer
from lb.admin.http import Problem, Request, Response

logger = getLogger(__name__)

MAX_HEAD = 8192  # octets of request line and headers
LINGER = 1.0  # seconds for a client to stop sending what is not wanted
_ALWAYS = (
    ("Server", "quiclb"),
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)

Answer = Callable[[Request], Awaitable[Response]]


class Connections:
    """Connections that one `answer` is for. To be made on the event loop that they are on.

    A request has `patience` seconds to come, and its answer as many to be taken.
    """

    def __init__(self, answer: Answer, patience: float) -> None:
        self._answer = answer
        self._patience = patience
        self._server = web.Server(self._handle)

    async def serve(self, sock: socket.socket, peer: Peer, tls: ssl.SSLContext | None) -> None:
        """One connection, from its first octet to its last."""
        connection = _Connection(self._server, self._patience, peer)
        loop = asyncio.get_running_loop()
        times = {"ssl_handshake_timeout": self._patience, "ssl_shutdown_timeout": LINGER} if tls else {}
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: connection, sock, ssl=tls, **times)
        except OSError:  # no TLS, or not in time: the client's own loss
            sock.close()
            return
        try:
            await connection.gone
        finally:
            transport.abort()

    async def stop(self, grace: float) -> None:
        """End those connections that no request came by, and those that are answered once they are, or after `grace`
        seconds."""
        self._server.pre_shutdown()
        await self._server.shutdown(grace)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, _Connection)  # noqa: S101 - no others are made
        path, _, query = request.raw_path.partition("?")
        if not request.body_exists:
            connection.disarm()

        async def body(most: int) -> bytes:
            octets = await _body(request, most)
            connection.disarm()
            return octets

        asked = Request(request.method, path, query, request.headers, connection.peer(), body)
        response = await self._answer(asked)
        connection.arm()
        return _web(response)


class _Connection(web.RequestHandler):
    """aiohttp's, with bounds."""

    __slots__ = ("_deadline", "_head", "_patience", "_peer", "gone")

    def __init__(self, server: web.Server, patience: float, peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            tcp_keepalive=False,
            access_log=None,  # type: ignore[arg-type] # its own default is None too, in all but name
            logger=logger,
            max_line_size=MAX_HEAD,
            max_field_size=MAX_HEAD,
            lingering_time=LINGER,
            auto_decompress=False,
        )
        self.gone: asyncio.Future[None] = loop.create_future()
        self._patience = patience
        self._peer = peer
        self._head: bytearray | None = bytearray()  # as far as it has come; None once it is complete
        self._deadline: asyncio.TimerHandle | None = None

    def arm(self) -> None:
        """Cut the client off unless something happens in time."""
        self.disarm()
        if self.transport is not None:
            self._deadline = self._loop.call_later(self._patience, self.transport.abort)

    def disarm(self) -> None:
        """It did."""
        if self._deadline is not None:
            self._deadline.cancel()

    def peer(self) -> Peer:
        """Who is at the other end, by TLS as well."""
        certificate = None if self.transport is None else self.transport.get_extra_info("peercert")
        return self._peer._replace(common_name=_common_name(certificate or {}))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.arm()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.disarm()
        super().connection_lost(exc)
        if not self.gone.done():
            self.gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._head is None:
            super().data_received(data)
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if max(end, 0 if end >= 0 else len(self._head)) > MAX_HEAD:
            self._refuse(Problem(431, "the header is too large"))
        elif end >= 0:
            head, self._head = bytes(self._head), None
            super().data_received(head)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Says less than aiohttp would, in the log too: anybody can send what is not HTTP."""
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("cannot answer", exc_info=exc)
            return _web(Problem(500, "see the log").response())
        return _web(Problem(400, "that is not HTTP/1.1").response())

    def _refuse(self, problem: Problem) -> None:
        """Answer without aiohttp. The client may still be sending: to close at once would take the answer back."""
        self._head = bytearray()
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.pause_reading()
        self.transport.write(encode(problem.response()))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.disarm()
        self._deadline = self._loop.call_later(LINGER, self.transport.abort)


def encode(response: Response) -> bytes:
    """An answer as it is on the wire."""
    headers = (
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        ("Connection", "close"),
        *_ALWAYS,
        *response.headers,
    )
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}", *(f"{n}: {v}" for n, v in headers)]
    return "\r\n".join([*lines, "", ""]).encode() + response.body


async def _body(request: web.BaseRequest, most: int) -> bytes:
    """Raises Problem if it is longer than that, or no body at all."""
    too_long = Problem(413, f"the body is longer than {most} octets")
    if (request.content_length or 0) > most:
        raise too_long
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # as aiohttp's own does: what counts is the answer
    octets = bytearray()
    try:
        async for part in request.content.iter_any():
            octets += part
            if len(octets) > most:
                raise too_long
    except (web.RequestPayloadError, OSError):
        raise Problem(400, "the body is broken") from None
    return bytes(octets)


def _web(response: Response) -> web.Response:
    made = web.Response(status=response.status, body=response.body)
    made.headers["Content-Type"] = response.content_type
    for name, value in (*_ALWAYS, *response.headers):
        made.headers.add(name, value)
    made.force_close()
    return made


def _common_name(certificate: Any) -> str | None:
    """Of a certificate that was verified. Two are none: it would not be clear whose it is."""
    names = [value for parts in certificate.get("subject", ()) for name, value in parts if name == "commonName"]
    return names[0] if len(names) == 1 else None
