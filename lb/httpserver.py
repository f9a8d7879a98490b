"""A small HTTP server for machines and people who look: GET and HEAD, one request per connection, threads of its own.

It bounds what a client can make it hold: octets, seconds and threads. It knows no page; `respond` does.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from logging import ERROR, getLogger
from typing import NamedTuple

from lb.address import Address
from lb.log import event

logger = getLogger(__name__)

MAX_REQUEST = 8192  # octets of request line and headers
PATIENCE = 10.0  # seconds for a request to come, and again for its answer to be taken
LINGER = 0.5  # seconds for a client to close after its answer
MAX_CONNECTIONS = 8  # at a time, a thread each; more are turned away
BACKLOG = 16
_REQUEST_LINE = re.compile(r"([A-Z]+) (\S+) HTTP/1\.[01]")


class Request(NamedTuple):
    """`path` is without the query; `headers` by name in lower case, repeated ones joined with commas."""

    method: str
    path: str
    headers: Mapping[str, str]


class Response(NamedTuple):
    """`status` is one that HTTP names."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


class HttpServer:
    """`respond` is called in any of the server's threads; what it raises is logged and answered with 500."""

    def __init__(self, address: Address, respond: Callable[[Request], Response], *, patience: float = PATIENCE) -> None:
        self.address = address
        self._respond = respond
        self._patience = patience
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()  # over _open
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    def start(self) -> None:
        """Listen and serve. Raises OSError, naming the address, if that is not possible.

        If the port asked for was 0, `address` has the one that was found.
        """
        family, kind, _, _, sockaddr = socket.getaddrinfo(
            *self.address, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a former process
            if self.address.is_ipv6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(sockaddr)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"cannot serve HTTP on {self.address}: {reason}") from None
        self.address = Address(*listener.getsockname()[:2])
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name="http", daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Stop listening and cut off whoever is connected. Harmless if not started."""
        if self._listener is None or self._acceptor is None:
            return
        self._listener.shutdown(socket.SHUT_RDWR)  # Linux: wakes accept() with EINVAL
        self._acceptor.join()
        self._listener.close()
        self._listener = None
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):  # gone already
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    return
                event(logger, ERROR, "http-error", address=self.address, error=error.strerror or str(error))
                time.sleep(1)  # out of descriptors, most likely: they come back, and the log should not be full then
                continue
            if not self._begin(connection):
                with contextlib.suppress(OSError):
                    connection.setblocking(False)
                    connection.send(_encode(Response(503, b"too many connections\n")))
                connection.close()

    def _begin(self, connection: socket.socket) -> bool:
        if not self._free.acquire(blocking=False):
            return False
        with self._lock:
            self._open.add(connection)
        try:
            threading.Thread(target=self._serve, args=(connection,), name="http-request", daemon=True).start()
        except RuntimeError:  # the system has no thread to give
            self._end(connection)
            return False
        return True

    def _end(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)
        self._free.release()

    def _serve(self, connection: socket.socket) -> None:
        try:
            head = _read_head(connection, time.monotonic() + self._patience)
            answer = self._answer(head)
            connection.settimeout(self._patience)  # for all of sendall
            connection.sendall(answer)
            _linger(connection)
        except OSError:
            pass  # the client was too slow, or has gone: its own loss
        finally:
            self._end(connection)
            connection.close()

    def _answer(self, head: bytes | None) -> bytes:
        if head is None:
            return _encode(Response(431, b"the request is too large\n"))
        request = _parse(head)
        if request is None:
            return _encode(Response(400, b"that is not HTTP/1\n"))
        if request.method not in ("GET", "HEAD"):
            return _encode(Response(405, b"GET and HEAD only\n"), "Allow: GET, HEAD")
        try:
            response = self._respond(request)
        except Exception:  # one page that fails must not end the server
            logger.exception("cannot answer %s", request.path)
            response = Response(500, b"see the log\n")
        return _encode(response, body=request.method == "GET")


def _read_head(connection: socket.socket, deadline: float) -> bytes | None:
    """Request line and headers; None if they are too long. Raises OSError if they do not come in time."""
    head = b""
    while b"\r\n\r\n" not in head:
        if len(head) >= MAX_REQUEST:
            return None
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(MAX_REQUEST)
        if not part:
            raise ConnectionAbortedError
        head += part
    return head.partition(b"\r\n\r\n")[0]


def _parse(head: bytes) -> Request | None:
    line, *fields = head.decode("latin-1").split("\r\n")
    parsed = _REQUEST_LINE.fullmatch(line)
    if parsed is None:
        return None
    headers: dict[str, str] = {}
    for field in fields:
        name, _, value = field.partition(":")
        name, value = name.strip().lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Request(parsed[1], parsed[2].partition("?")[0], headers)


def _encode(response: Response, *headers: str, body: bool = True) -> bytes:
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (response.body if body else b"")


def _linger(connection: socket.socket) -> None:
    """Wait for the client to close: to close first, with octets of its unread, would take the answer back."""
    connection.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + LINGER
    while (left := deadline - time.monotonic()) > 0:
        connection.settimeout(left)
        if not connection.recv(MAX_REQUEST):
            return
