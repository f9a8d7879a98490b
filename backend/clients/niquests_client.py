"""niquests, which looks like requests and speaks HTTP/3 by qh3."""

from __future__ import annotations

import contextlib
import warnings

import niquests
import urllib3.exceptions

from backend.clients.threaded import Request, ThreadedSession
from backend.clients.visitor import Wishes
from lb.address import Address

# Ours.
SERVER_NAME = "localhost"
TIMEOUT = 20.0  # seconds without one octet


class NiquestsVisitor:
    """Each session is one of its sessions: nothing that it keeps for the next time concerns QUIC."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes

    async def open(self, server: Address, *paths: str) -> ThreadedSession:
        session = niquests.Session(
            disable_http1=True, disable_http2=True, disable_ipv4=server.is_ipv6, disable_ipv6=not server.is_ipv6
        )
        # There is nobody to tell it by Alt-Svc.
        session.quic_cache_layer[SERVER_NAME, server.port] = (SERVER_NAME, server.port)

        def get(request: Request) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
                url = f"https://{SERVER_NAME}:{server.port}{request.path}"
                response = session.get(url, verify=False, timeout=TIMEOUT, stream=True)
            request.status(response.status_code or 0)
            for chunk in response.iter_content(-1):
                request.feed(chunk)

        def forget() -> None:
            with contextlib.suppress(Exception):
                session.close()

        return await ThreadedSession(paths, get, forget).start()

    async def close(self) -> None:
        """There is nothing to close."""
