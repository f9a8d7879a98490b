"""Token and certificate files: read at the start, and again whenever they change, so that secrets can be rotated."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from logging import ERROR, getLogger
from pathlib import Path
from typing import Generic, TypeVar

from lb.document import shown_file
from lb.keyfile import read_token
from lb.keys import AdminConfig
from lb.log import event

logger = getLogger(__name__)

T = TypeVar("T")


class Kept(Generic[T]):
    """What `read` makes of some files. It raises OSError or ValueError.

    Of files that became unusable, the latest good value stays in use if it is a `lasting` one; otherwise there is none.
    """

    def __init__(self, read: Callable[[], T], *paths: Path, lasting: bool) -> None:
        """Raises OSError that says why the files cannot be used."""
        self._read = read
        self._paths = paths
        self._lasting = lasting
        self._stamp = self._stamped()
        try:
            self._value: T | None = read()
        except (OSError, ValueError) as error:
            raise OSError(_why(error, paths)) from None

    def get(self) -> T | None:
        """The value as of now."""
        stamp = self._stamped()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._value = self._read()
            except (OSError, ValueError) as error:
                event(logger, ERROR, "admin-file-unusable", reason=_why(error, self._paths))
                if not self._lasting:
                    self._value = None
        return self._value

    def _stamped(self) -> list[tuple[int, int, int] | None]:
        """By which a file is known to be another one. None: it is not there."""
        stamps: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = os.stat(path)
            except OSError:
                stamps.append(None)
            else:
                stamps.append((status.st_ino, status.st_size, status.st_ctime_ns))  # chmod counts too
        return stamps


def kept_token(path: Path | None) -> Callable[[], str | None]:
    """Gives the token in a file. Nobody gets in by one that was deleted. Raises OSError."""
    return (lambda: None) if path is None else Kept(lambda: read_token(path), path, lasting=False).get


def kept_tls(config: AdminConfig) -> Kept[ssl.SSLContext] | None:
    """The TLS side of a server, if one is configured. Raises OSError."""
    if config.certificate_file is None or config.key_file is None:
        return None
    paths = [config.certificate_file, config.key_file, *filter(None, [config.client_ca_file])]
    return Kept(lambda: _context(*paths), *paths, lasting=True)


def _context(certificate: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, password=lambda: b"")  # rather than to ask on a terminal
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL  # whoever has none is told so in HTTP
    return context


def _why(error: Exception, paths: tuple[Path, ...]) -> str:
    if isinstance(error, ValueError):
        return str(error)  # it names the file
    names = ", ".join(shown_file(path) for path in paths)
    return f"{names}: {getattr(error, 'reason', None) or getattr(error, 'strerror', None) or error}"
