"""libcurl with ngtcp2 and OpenSSL, as the wheels of pycurl have it."""

from __future__ import annotations

import pycurl

from backend.clients.threaded import CancelledInThreadError, Request, ThreadedSession
from backend.clients.transfer import ConnectionEndedError
from backend.clients.visitor import Wishes
from lb.address import Address

# Ours.
SERVER_NAME = "localhost"
CONNECT_TIMEOUT = 5  # seconds
POLL = 0.05  # seconds from one look at whether it was told to end to the next


class PycurlVisitor:
    """Its sessions share what TLS keeps for the next time."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._share = pycurl.CurlShare()
        self._share.setopt(pycurl.SH_SHARE, pycurl.LOCK_DATA_SSL_SESSION)

    async def open(self, server: Address, *paths: str) -> ThreadedSession:
        curl, multi = pycurl.Curl(), pycurl.CurlMulti()
        curl.setopt(pycurl.SHARE, self._share)
        curl.setopt(pycurl.RESOLVE, [f"{SERVER_NAME}:{server.port}:{_bracketed(server.host)}"])
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_3ONLY)
        curl.setopt(pycurl.SSL_VERIFYPEER, 0)
        curl.setopt(pycurl.SSL_VERIFYHOST, 0)
        curl.setopt(pycurl.SSL_OPTIONS, pycurl.SSLOPT_EARLYDATA)
        curl.setopt(pycurl.CONNECTTIMEOUT, CONNECT_TIMEOUT)
        curl.setopt(pycurl.NOSIGNAL, 1)

        def get(request: Request) -> None:
            curl.setopt(pycurl.URL, f"https://{SERVER_NAME}:{server.port}{request.path}")
            curl.setopt(pycurl.WRITEFUNCTION, request.feed)
            multi.add_handle(curl)
            try:
                _perform(multi, request)
            finally:
                multi.remove_handle(curl)
            request.status(curl.getinfo(pycurl.RESPONSE_CODE))
            # Negative: octets that were sent early and refused. Zero: none were.
            if early := curl.getinfo(pycurl.EARLYDATA_SENT_T):
                session.early = early > 0

        def forget() -> None:
            multi.close()
            curl.close()

        session = ThreadedSession(paths, get, forget)
        return await session.start()

    async def close(self) -> None:
        self._share.close()


def _perform(multi: pycurl.CurlMulti, request: Request) -> None:
    """Do what there is to do until the request is answered. Raises ConnectionEndedError or CancelledInThreadError."""
    while True:
        multi.perform()
        _, done, failed = multi.info_read()
        for _, code, reason in failed:
            raise ConnectionEndedError(f"curl {code}: {reason}")
        if done:
            return
        if request.is_cancelled:
            raise CancelledInThreadError
        multi.select(POLL)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
