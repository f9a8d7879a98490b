"""lb/httpserver.py: what a client can get from it, and how little it can take."""

from __future__ import annotations

import contextlib
import errno
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lb.address import Address
from lb.httpserver import MAX_CONNECTIONS, MAX_REQUEST, HttpServer, Request, Response

LOOPBACK = Address("127.0.0.1", 0)
DEADLINE = 20.0


def echo(request: Request) -> Response:
    if request.path == "/broken":
        raise RuntimeError("boom")
    if request.path == "/missing":
        return Response(404, b"no\n")
    return Response(200, f"{request.path} {request.headers.get('accept', '')}".encode())


@contextlib.contextmanager
def serving(
    respond: Callable[[Request], Response] = echo, address: Address = LOOPBACK, patience: float = 10.0
) -> Iterator[HttpServer]:
    server = HttpServer(address, respond, patience=patience)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def ask(server: HttpServer, octets: bytes) -> bytes:
    """All that comes back for the octets, until the server closes."""
    with socket.create_connection(server.address, timeout=DEADLINE) as sock:
        sock.sendall(octets)
        answer = b""
        while part := sock.recv(65536):
            answer += part
        return answer


def threads() -> int:
    return sum(t.name.startswith("http") for t in threading.enumerate())


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_get_and_head(host: str) -> None:
    with serving(address=Address(host, 0)) as server:
        assert server.address.port != 0
        for method, body in (("GET", b"/x text/html"), ("HEAD", b"")):
            client = http.client.HTTPConnection(server.address.host, server.address.port, timeout=DEADLINE)
            client.request(method, "/x?name=value", headers={"Accept": "text/html"})
            response = client.getresponse()
            assert (response.status, response.reason, response.read()) == (200, "OK", body)
            assert response.getheader("Content-Length") == "12"
            assert response.getheader("Content-Type") == "text/plain; charset=utf-8"
            client.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", 200),
        (b"GET /missing HTTP/1.1\r\n\r\n", 404),
        (b"GET /broken HTTP/1.1\r\n\r\n", 500),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"DELETE / HTTP/1.1\r\n\r\n", 405),
        (b"get / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\xff\xfe\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\xff: \xfe\r\nno colon\r\n\r\n", 200),
        (b"GET /" + b"a" * 2 * MAX_REQUEST, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 2 * MAX_REQUEST, 431),
    ],
)
def test_statuses(request_: bytes, status: int) -> None:
    with serving() as server:
        answer = ask(server, request_)
        assert re.match(rb"HTTP/1\.1 (\d+) ", answer)[1] == str(status).encode()  # type: ignore[index]
        # And the next one is served.
        assert ask(server, b"GET /after HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n/after ")


def test_repeated_headers_are_joined() -> None:
    with serving() as server:
        assert ask(server, b"GET / HTTP/1.1\r\nAccept: a\r\naCCEPT:b\r\n\r\n").endswith(b"/ a, b")


@pytest.mark.parametrize("request_", [b"", b"GET / HTTP/1.1\r\n", b"GET / HT"])
def test_a_client_that_does_not_finish_is_cut_off(request_: bytes) -> None:
    with serving(patience=0.2) as server:
        assert ask(server, request_) == b""
        eventually(lambda: threads() == 1)


def test_a_client_that_drips_is_cut_off() -> None:
    """An octet now and then does not buy more time."""
    with serving(patience=0.3) as server, socket.create_connection(server.address, timeout=DEADLINE) as sock:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < began + DEADLINE:
                sock.settimeout(0.01)
                sock.sendall(b"a")
                with contextlib.suppress(TimeoutError):
                    assert sock.recv(1) == b""
                    break
        assert time.monotonic() < began + DEADLINE / 2


def test_a_client_that_does_not_read_is_cut_off() -> None:
    large = Response(200, bytes(64 << 20))
    with serving(lambda _: large, patience=0.2) as server, socket.create_connection(server.address) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        eventually(lambda: threads() > 1)
        eventually(lambda: threads() == 1)


def test_connections_are_bounded_and_more_are_turned_away() -> None:
    with serving() as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(server.address)) for _ in range(MAX_CONNECTIONS)]
        eventually(lambda: threads() == 1 + MAX_CONNECTIONS)
        assert ask(server, b"").startswith(b"HTTP/1.1 503 ")
        assert threads() == 1 + MAX_CONNECTIONS
        held[0].close()
        eventually(lambda: threads() == MAX_CONNECTIONS)
        assert ask(server, b"GET /x HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_a_port_in_use_is_named() -> None:
    with serving() as server:
        second = HttpServer(server.address, echo)
        with pytest.raises(OSError, match=re.escape(f"{server.address}: Address already in use")) as raised:
            second.start()
        assert raised.value.errno == errno.EADDRINUSE
        second.stop()


def test_stop_cuts_off_frees_the_port_and_may_be_repeated() -> None:
    with serving() as server:
        address = server.address
        with socket.create_connection(address, timeout=DEADLINE) as sock:
            eventually(lambda: threads() == 2)
            server.stop()
            assert sock.recv(1) == b""
        server.stop()
    eventually(lambda: threads() == 0)
    with serving(address=address) as again:
        assert again.address == address
