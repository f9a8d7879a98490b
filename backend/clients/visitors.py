"""All clients that there are, by name: how each is made, what it is made of, and what it cannot do."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backend.adapters.registry import Feature
from backend.clients import chromium, gtlsclient
from backend.clients.fleet import LIBRARIES, LibrarySession
from backend.clients.gtlsclient import GtlsClient
from backend.clients.http3 import Http3Client
from backend.clients.transfer import Move
from backend.clients.visitor import Visitor, Wishes
from lb.address import Address


class LibraryVisitor:
    """aioquic or qh3."""

    def __init__(self, library: type[Http3Client], wishes: Wishes) -> None:
        self._library = library
        self._wishes = wishes
        self._tickets: list[Any] = []

    async def open(self, server: Address, *paths: str) -> LibrarySession:
        after = self._wishes.migrates_after
        return await LibrarySession.start(
            self._library,
            server,
            paths,
            move=None if after is None else Move.MIGRATION,
            move_after=after or 0.0,
            quic_v2=self._wishes.quic_v2,
            tickets=self._tickets,
        )

    async def close(self) -> None:
        """There is nothing to close."""


class GtlsVisitor:
    """gtlsclient, once for each session."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._memory = tempfile.TemporaryDirectory(prefix="gtlsclient-")

    async def open(self, server: Address, *paths: str) -> GtlsClient:
        after = self._wishes.migrates_after
        return await GtlsClient.start(
            server,
            *paths,
            move=None if after is None else Move.MIGRATION,
            move_after=after or 0.0,
            memory=Path(self._memory.name),
        )

    async def close(self) -> None:
        self._memory.cleanup()


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A client. `made_of` is what it is, with versions; `missing` why it cannot be used here, None if it can.

    One that `migrates_when_cut_off` is not told to migrate: it does when nothing goes through any more. One that
    `keeps_connections` connects anew only when it has to.
    """

    name: str
    made_of: Callable[[], str]
    visitor: Callable[[Wishes], Visitor]
    missing: Callable[[], str | None]
    cannot: Mapping[Feature, str] = field(default_factory=dict)
    migrates_when_cut_off: bool = False
    keeps_connections: bool = False


def _installed(module: str) -> Callable[[], str | None]:
    return lambda: None if find_spec(module) else f"{module} is not installed (pip install -e .[interop])"


def _later(module: str, name: str) -> Callable[[Wishes], Visitor]:
    """A visitor whose module is imported when it is needed: what it needs may not be installed."""

    def visit(wishes: Wishes) -> Visitor:
        visitor: Visitor = getattr(import_module(f"backend.clients.{module}"), name)(wishes)
        return visitor

    return visit


def _library(name: str) -> Client:
    return Client(
        name=name,
        made_of=lambda: f"{name} {metadata.version(name)}",
        visitor=lambda wishes: LibraryVisitor(LIBRARIES[name], wishes),
        missing=_installed(name),
    )


def _first_version(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    said = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - words of our own
    found = re.search(r"\d+(\.\d+)+", said.stdout + said.stderr)
    return found[0] if found else ""


def _gtlsclient() -> str:
    version = _first_version("dpkg-query", "-W", "-f=${Version}", "ngtcp2-client")
    return f"ngtcp2 {version} with GnuTLS".replace("  ", " ")


def _curl(module: str, attribute: str, *parts: str) -> Callable[[], str]:
    def made_of() -> str:
        said: str = getattr(import_module(module), attribute)
        found = [word.replace("/", " ") for word in said.split() if word.partition("/")[0] in parts]
        return f"{module} {metadata.version(module)}: {', '.join(found)}"

    return made_of


_NO_MIGRATION = "has no active migration"
_NO_QUIC_V2 = "cannot be told to speak QUIC v2"

CLIENTS: Mapping[str, Client] = {
    client.name: client
    for client in (
        *map(_library, LIBRARIES),
        Client(
            name="niquests",
            made_of=lambda: f"niquests {metadata.version('niquests')} on qh3 {metadata.version('qh3')}",
            visitor=_later("niquests_client", "NiquestsVisitor"),
            missing=_installed("niquests"),
            cannot={
                Feature.ACTIVE_MIGRATION: f"niquests {_NO_MIGRATION}",
                Feature.QUIC_V2: f"niquests {_NO_QUIC_V2}",
                Feature.EARLY_DATA_ELSEWHERE: "niquests keeps no session tickets",
            },
        ),
        Client(
            name="gtlsclient",
            made_of=_gtlsclient,
            visitor=GtlsVisitor,
            missing=lambda: None if gtlsclient.available() else "gtlsclient is not installed (Debian: ngtcp2-client)",
            cannot={Feature.QUIC_V2: "ngtcp2 0.12 knows a draft of QUIC v2 only"},
        ),
        Client(
            name="curl_cffi",
            made_of=_curl("curl_cffi", "__curl_version__", "libcurl", "ngtcp2", "BoringSSL"),
            visitor=_later("curl_cffi_client", "CurlCffiVisitor"),
            missing=_installed("curl_cffi"),
            cannot={
                Feature.ACTIVE_MIGRATION: f"libcurl {_NO_MIGRATION}",
                Feature.QUIC_V2: f"libcurl {_NO_QUIC_V2}",
                Feature.EARLY_DATA_ELSEWHERE: "libcurl with BoringSSL sends no early data over QUIC",
            },
        ),
        Client(
            name="pycurl",
            made_of=_curl("pycurl", "version", "libcurl", "ngtcp2", "OpenSSL"),
            visitor=_later("pycurl_client", "PycurlVisitor"),
            missing=_installed("pycurl"),
            cannot={
                Feature.ACTIVE_MIGRATION: f"libcurl {_NO_MIGRATION}",
                Feature.QUIC_V2: f"libcurl {_NO_QUIC_V2}",
            },
        ),
        Client(
            name="chromium",
            made_of=lambda: f"Chromium {_first_version(chromium.PROGRAM, '--version')}",
            visitor=chromium.ChromiumVisitor,
            missing=chromium.missing,
            migrates_when_cut_off=True,
            keeps_connections=True,
        ),
    )
}
