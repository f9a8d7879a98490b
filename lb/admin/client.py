"""The API's client: what the command asks a running balancer, over a unix socket, TCP or TLS."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

from lb.errors import QuicLbError

# Ours.
PATIENCE = 30.0  # seconds; an upgrade starts a whole process
MAX_ANSWER = 64 << 20  # octets; a fleet of 4096 backends takes 4 MiB
MAX_PORT = 65535
UNIX = "unix:"
HTTPS = "https://"


class UnreachableError(QuicLbError):
    """There was no answer, or none of a balancer's."""


class RefusedError(QuicLbError):
    """The balancer answered that it will not: the status, what was wrong, and all the reasons."""

    def __init__(self, status: int, error: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.reasons = reasons


class Where(NamedTuple):
    """Where a balancer's API is: a unix socket's path, or a host and a port."""

    path: Path | None
    host: str = "localhost"
    port: int = 0
    is_tls: bool = False

    @classmethod
    def parse(cls, text: str) -> Where:
        """Read `unix:PATH`, `HOST:PORT` or `https://HOST:PORT`. Raises ValueError."""
        if text.startswith(UNIX):
            if text == UNIX:
                raise ValueError(f"{text!r}: expected a path behind unix:")
            return cls(Path(text.removeprefix(UNIX)))
        is_tls = text.startswith(HTTPS)
        host, colon, port = text.removeprefix(HTTPS).rstrip("/").rpartition(":")
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        is_port = port.isascii() and port.isdigit() and len(port) <= len(str(MAX_PORT)) and 0 < int(port) <= MAX_PORT
        if not colon or not is_port or "/" in host or not _is_host(host):
            raise ValueError(f"{text!r}: expected unix:PATH, HOST:PORT or https://HOST:PORT")
        return cls(None, host, int(port), is_tls)

    def __str__(self) -> str:
        if self.path is not None:
            return f"{UNIX}{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{HTTPS if self.is_tls else ''}{host}:{self.port}"


class Client:
    """Asks one balancer. Each question is a connection of its own."""

    def __init__(
        self, where: Where, *, token: str | None = None, tls: ssl.SSLContext | None = None, patience: float = PATIENCE
    ) -> None:
        """`tls` is what to trust and to show, with an https address; the system's certificates without it."""
        self.where = where
        self._token = token
        self._tls = tls
        self._patience = patience

    def state(self) -> dict[str, Any]:
        """GET /v1/state."""
        return self._object("GET", "/v1/state")

    def backend(self, service: str, backend: str) -> dict[str, Any]:
        """One backend of the state."""
        return self._object("GET", _backend_path(service, backend))

    def change(self, service: str, backend: str, change: Mapping[str, Any]) -> dict[str, Any]:
        """Change what is said about a backend. Returns what it is then."""
        return self._object("PATCH", _backend_path(service, backend), change)

    def reload(self) -> dict[str, Any]:
        """Have the file read again."""
        return self._object("POST", "/v1/reload", {})

    def upgrade(self) -> dict[str, Any]:
        """Have the process replaced by what is installed now."""
        return self._object("POST", "/v1/upgrade", {})

    def rotation(self) -> dict[str, Any]:
        """Every service's config IDs."""
        return self._object("GET", "/v1/rotation")

    def rotate(self, service: str, step: Mapping[str, Any]) -> dict[str, Any]:
        """Take a step of a rotation."""
        return self._object("POST", f"/v1/services/{quote(service, safe='')}/rotation", step)

    def explain(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Ask where something would go; `lb.explain` says what may be given."""
        return self._object("POST", "/v1/explain", given)

    def _object(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Raises UnreachableError and RefusedError."""
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        connection = self._connection()
        try:
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            answer = connection.getresponse()
            octets = answer.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            self._unreachable(error)
        finally:
            connection.close()
        if len(octets) > MAX_ANSWER:
            raise UnreachableError(f"{self.where}: its answer is too long")
        try:
            value = json.loads(octets)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UnreachableError(f"{self.where}: answers with status {answer.status}, and not as a balancer does")
        if answer.status >= http.client.BAD_REQUEST:
            raise _refusal(answer.status, value)
        return value

    def _connection(self) -> http.client.HTTPConnection:
        where = self.where
        if where.path is not None:
            return _UnixConnection(where.path, self._patience)
        if where.is_tls:
            context = self._tls or ssl.create_default_context()
            return http.client.HTTPSConnection(where.host, where.port, timeout=self._patience, context=context)
        return http.client.HTTPConnection(where.host, where.port, timeout=self._patience)

    def _unreachable(self, error: OSError | http.client.HTTPException) -> NoReturn:
        match error:
            case FileNotFoundError():
                why = "no balancer is there"
            case ConnectionRefusedError():
                why = "no balancer answers there"
            case ConnectionResetError():
                why = "the connection was ended without an answer"
            case PermissionError():
                why = "permission denied: it is its owner's and root's alone"
            case ssl.SSLCertVerificationError():
                why = f"its certificate is not trusted: {error.verify_message}"
            case ssl.SSLError():
                why = f"TLS failed: {error.reason or error}"
            case TimeoutError():
                why = f"no answer within {self._patience:g}s"
            case OSError():
                why = error.strerror or str(error) or type(error).__name__
            case _:
                why = "it does not speak HTTP"
        raise UnreachableError(f"{self.where}: {why}") from None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _is_host(text: str) -> bool:
    """Whether a resolver can be asked for it, which raises what is no OSError for what is no name."""
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return bool(text) and text.isprintable() and " " not in text


def _backend_path(service: str, backend: str) -> str:
    return f"/v1/services/{quote(service, safe='')}/backends/{quote(backend, safe='')}"


def _refusal(status: int, value: Mapping[str, Any]) -> RefusedError:
    error, reasons = value.get("error"), value.get("reasons")
    texts = reasons if isinstance(reasons, list) else []
    return RefusedError(
        status, error if isinstance(error, str) else f"status {status}", tuple(str(reason) for reason in texts)
    )
