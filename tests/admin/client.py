"""Asks the API as a client would: one request, one connection, over TCP, TLS or a unix socket."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lb.address import Address

DEADLINE = 20.0
JSON = "application/json"


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]  # by name in lower case, repeated ones joined
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class _Connection(http.client.HTTPConnection):
    def __init__(self, where: Path | Address, tls: ssl.SSLContext | None) -> None:
        super().__init__("localhost", timeout=DEADLINE)
        self._where, self._tls = where, tls

    def connect(self) -> None:
        self.sock = connect(self._where)
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname="localhost")


def connect(where: Path | Address) -> socket.socket:
    if isinstance(where, Address):
        return socket.create_connection(where, timeout=DEADLINE)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(str(where))
    return sock


def ask(
    where: Path | Address,
    method: str,
    path: str,
    given: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """`given` is sent as JSON; octets as they are."""
    sent = dict(headers or {})
    body = None
    if given is not None:
        body = given if isinstance(given, bytes) else json.dumps(given).encode()
        sent.setdefault("Content-Type", JSON)
    connection = _Connection(where, tls)
    try:
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        found: dict[str, str] = {}
        for name, value in response.getheaders():
            before = found.get(name.lower())
            found[name.lower()] = value if before is None else f"{before}, {value}"
        return Answer(response.status, found, response.read())
    finally:
        connection.close()


def raw(where: Path | Address, octets: bytes) -> bytes:
    """All that comes back for these octets, until the server closes or cuts off."""
    with connect(where) as sock:
        answer = b""
        try:
            sock.sendall(octets)
            while part := sock.recv(65536):
                answer += part
        except ConnectionError:
            pass
        return answer


def status_of(octets: bytes) -> int:
    """0 if there was no answer."""
    return int(octets.split(b" ", 2)[1]) if octets.startswith(b"HTTP/1.") else 0
