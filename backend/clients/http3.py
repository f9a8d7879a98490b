"""An HTTP/3 client that can be moved, around a QUIC stack that does no I/O of its own.

aioquic and qh3 share their names, the one having begun as a fork of the other, so one driver serves both. It uses
what they publish; what differs is in `aioquic_client.py` and `qh3_client.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import ssl
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Self

from backend.clients.source import source_towards
from backend.clients.transfer import ConnectionEndedError, StatelessResetError, Transfer
from lb.address import Address

# Ours.
SERVER_NAME = "localhost"
CONNECT_TIMEOUT = 5.0  # seconds
IDLE_TIMEOUT = 30.0  # seconds
QUIC_V1, QUIC_V2 = 1, 0x6B3343CF  # RFC 9000, RFC 9369
SOCKET_BUFFER = 1 << 20  # octets: Python reads slower than a burst arrives


class Stack(NamedTuple):
    """Whose classes a client is made of."""

    name: str
    configuration: Callable[..., Any]
    connection: Callable[..., Any]
    http3: Callable[..., Any]
    quic_events: ModuleType
    http3_events: ModuleType


class Http3Client(asyncio.DatagramProtocol):
    """One connection. Its certificate is not verified: what is tested is where packets go.

    `reset_at` is when a Stateless Reset ended it, by the wall clock. `early` says whether the server took early data;
    it is None if there was none. What the server gives for the next connection is appended to `tickets`, and the last
    of them is used.
    """

    stack: ClassVar[Stack]

    def __init__(
        self,
        server: Address,
        *,
        idle_timeout: float = IDLE_TIMEOUT,
        quic_v2: bool = False,
        tickets: list[Any] | None = None,
    ) -> None:
        configuration = self.stack.configuration(
            is_client=True,
            alpn_protocols=["h3"],
            server_name=SERVER_NAME,
            verify_mode=ssl.CERT_NONE,
            idle_timeout=idle_timeout,
        )
        if quic_v2:
            configuration.original_version = QUIC_V2
            configuration.supported_versions = [QUIC_V2, QUIC_V1]
        tickets = [] if tickets is None else tickets
        if tickets:
            configuration.session_ticket = tickets[-1]
        self.server = server
        self.reset_at: float | None = None
        self.early: bool | None = None
        self._may_be_early = bool(tickets)
        self.datagrams_sent = 0
        self.ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._quic = self.stack.connection(configuration=configuration, session_ticket_handler=tickets.append)
        self._http = self.stack.http3(self._quic)  # at once, or it would miss the first events
        self._connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transfers: dict[int, Transfer] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._ping_ids = itertools.count(1)
        self._has_sent = asyncio.Event()
        self._transport: asyncio.DatagramTransport | None = None
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def connect(
        cls,
        server: Address,
        *,
        local: str | None = None,
        idle_timeout: float = IDLE_TIMEOUT,
        quic_v2: bool = False,
        tickets: list[Any] | None = None,
        at_once: Callable[[Self], None] | None = None,
    ) -> Self:
        """Connect from the address `local`. What `at_once` requests goes out as early data, if a ticket allows.

        Raises ConnectionEndedError or TimeoutError.
        """
        client = cls(server, idle_timeout=idle_timeout, quic_v2=quic_v2, tickets=tickets)
        await client._open(local)
        client._quic.connect(_sockaddr(server), now=client._now())
        if at_once is not None:
            at_once(client)
        client._transmit()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await client._connected
        except BaseException:
            client.close()
            raise
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def begin(self, path: str, body: bytes | None = None, progress: Callable[[int], None] | None = None) -> Transfer:
        """Send a GET, or with a body a POST; the response is what becomes of the transfer."""
        transfer = Transfer(path, progress)
        if self.ended.done():
            transfer.fail(self.ended.result())
            return transfer
        stream_id = self._quic.get_next_available_stream_id()
        self._transfers[stream_id] = transfer
        headers = {
            ":method": "GET" if body is None else "POST",
            ":scheme": "https",
            ":authority": SERVER_NAME,
            ":path": path,
        }
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._http.send_headers(stream_id, encoded, end_stream=body is None)
        if body is not None:
            self._http.send_data(stream_id, body, end_stream=True)
        self._transmit()
        return transfer

    async def get(self, path: str, progress: Callable[[int], None] | None = None) -> bytes:
        return await self.begin(path, progress=progress).complete()

    async def whoami(self) -> dict[str, Any]:
        """What the backend says about itself and this connection."""
        answer: dict[str, Any] = json.loads(await self.get("/whoami"))
        return answer

    async def rebind(self, local: str | None = None) -> None:
        """Go on from another port, or address too, as if a NAT had lost its mind: the connection does not know.

        What is on its way to the old port is lost. A PING follows, since a server can only answer who speaks.
        """
        await self._open(local or self.local.host)
        self.ping()

    async def migrate(self, local: str | None = None) -> None:
        """Go on from another port, or address too, and under another connection ID (RFC 9000, section 9)."""
        await self._open(local or self.local.host)
        self._quic.change_connection_id()
        self._transmit()

    def ping(self) -> asyncio.Future[None]:
        """Send a PING. The result comes with its acknowledgement."""
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        uid = next(self._ping_ids)
        self._pings[uid] = answered
        if not self.ended.done():
            self._quic.send_ping(uid)
            self._transmit()
        return answered

    async def sent(self, datagrams: int) -> None:
        """Wait until it has sent that many more."""
        enough = self.datagrams_sent + datagrams
        while self.datagrams_sent < enough:
            self._has_sent.clear()
            await self._has_sent.wait()

    @property
    def local(self) -> Address:
        """Where it sends from now."""
        if self._transport is None:
            raise RuntimeError("not connected")
        host, port, *_ = self._transport.get_extra_info("sockname")
        return Address(host, port)

    def close(self) -> None:
        """Say goodbye, once, and forget the connection."""
        if not self.ended.done():
            self._quic.close()
            self._transmit()
        self._end(ConnectionEndedError("closed by ourselves"))

    # asyncio.DatagramProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, old = transport, self._transport  # type: ignore[assignment]
        if old is not None:
            old.close()

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        if self.ended.done():
            return
        if self.is_stateless_reset(data):
            self._end_by_reset()
            return
        self._quic.receive_datagram(data, addr, now=self._now())
        self._handle_events()
        self._transmit()

    # What the stacks do differently.

    def is_stateless_reset(self, data: bytes) -> bool:
        """Whether a datagram is a reset that the stack would not notice by itself."""
        return False

    def was_reset(self, terminated: Any) -> bool:
        """Whether the stack ended the connection because it did notice one."""
        return False

    async def _open(self, local: str | None) -> None:
        family = socket.AF_INET6 if self.server.is_ipv6 else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        try:
            sock.bind((local or source_towards(self.server), 0))
        except OSError:
            sock.close()
            raise
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)

    def _transmit(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        for data, addr in self._quic.datagrams_to_send(now=self._now()):
            self._transport.sendto(data, addr)
            self.datagrams_sent += 1
            self._has_sent.set()
        if self._timer is not None:
            self._timer.cancel()
        at = self._quic.get_timer()
        self._timer = None if at is None else asyncio.get_running_loop().call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._quic.handle_timer(now=self._now())
        self._handle_events()
        if not self.ended.done():
            self._transmit()

    def _handle_events(self) -> None:
        quic, http3 = self.stack.quic_events, self.stack.http3_events
        while (event := self._quic.next_event()) is not None:
            if isinstance(event, quic.HandshakeCompleted):
                if self._may_be_early:
                    self.early = event.early_data_accepted
                if not self._connected.done():
                    self._connected.set_result(None)
            elif isinstance(event, quic.PingAcknowledged):
                answered = self._pings.pop(event.uid, None)
                if answered is not None and not answered.done():
                    answered.set_result(None)
            elif isinstance(event, quic.ConnectionTerminated):
                if self.was_reset(event):
                    self._end_by_reset()
                else:
                    reason = event.reason_phrase or f"error {event.error_code:#x}"
                    self._end(ConnectionEndedError(f"connection terminated: {reason}"))
                return
            elif isinstance(event, quic.StreamReset) and event.stream_id in self._transfers:
                error = ConnectionEndedError(f"stream reset: error {event.error_code:#x}")
                self._transfers.pop(event.stream_id).fail(error)
            for http_event in self._http.handle_event(event):
                transfer = self._transfers.get(http_event.stream_id)
                if transfer is None:
                    continue
                if isinstance(http_event, http3.HeadersReceived):
                    transfer.status = int(dict(http_event.headers).get(b":status", b"0"))
                    transfer.feed(b"", is_last=http_event.stream_ended)
                elif isinstance(http_event, http3.DataReceived):
                    transfer.feed(http_event.data, is_last=http_event.stream_ended)

    def _end_by_reset(self) -> None:
        self.reset_at = time.time()
        self._end(StatelessResetError(self.reset_at))

    def _end(self, error: Exception) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.close()
        if self.ended.done():
            return
        self.ended.set_result(error)
        for transfer in self._transfers.values():
            if not transfer.is_over:
                transfer.fail(error)
        for answered in self._pings.values():
            answered.cancel()
        if not self._connected.done():
            self._connected.set_exception(error)
            self._connected.exception()  # whoever waits for it sees it; if nobody does, that is no news

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _sockaddr(address: Address) -> tuple[Any, ...]:
    return (*address, 0, 0) if address.is_ipv6 else tuple(address)
