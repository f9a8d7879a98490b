"""Probes: how one backend is asked, whatever it is asked: by which sockets, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from lb.address import Address
from lb.healthcheck import HealthCheck
from lb.log import event
from lb.routing import BackendState

logger = logging.getLogger("lb.health")

# Ours.
RETIRED_SOCKETS = 4  # per backend, that listen for late answers
LATE_ANSWERS = 256  # per socket, that would still be recognised
RECEIVE_LIMIT = 64  # datagrams at a time, so that a babbling backend does not hold up the others
RECEIVE_SIZE = 1 << 16

# Errors of a send that say: no way there from here. All others say something about this machine only.
NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN})
# Errors of a receive that Linux makes of ICMP messages about a port, a protocol or a host.
REFUSED = NO_ROUTE | {errno.ECONNREFUSED, errno.ENOPROTOOPT, errno.EACCES}


class Sent(NamedTuple):
    """A probe that has left: its number, when that was, and its DCID if the answer has to return it."""

    probe: int
    at: float
    dcid: bytes = b""


class Surroundings(NamedTuple):
    """What probes need besides a backend to ask.

    `on_news` is called after something was reported to the check outside of the calls of its owner. `random(n)` is n
    octets. `names` are what the log calls the backend by.
    """

    on_news: Callable[[], None]
    random: Callable[[int], bytes]
    clock: Callable[[], float]
    names: dict[str, str]


class ProbeSocket:
    """A connected UDP socket and its probes: the kernel sorts out other senders, and reports ICMP errors."""

    def __init__(self, address: Address, now: float, on_readable: Callable[[ProbeSocket], None]) -> None:
        """Raises OSError."""
        self.opened = self.last_sent = now
        self._sent: dict[bytes, Sent] = {}  # by the CID that answers go to
        self._loop = asyncio.get_running_loop()
        self._on_readable = on_readable
        family, kind, _, _, sockaddr = socket.getaddrinfo(
            *address, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
        )[0]
        self._socket = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(sockaddr)
        except OSError:
            self._socket.close()
            raise

    @property
    def is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def watch(self) -> None:
        """Listen. To be said again for every probe and after every error.

        libuv no longer watches a socket that an ICMP error came in by.
        """
        self._loop.remove_reader(self._socket)
        self._loop.add_reader(self._socket, self._on_readable, self)

    def send(self, datagram: bytes, now: float) -> None:
        """Raises OSError: ConnectionRefusedError may be about an earlier datagram, and this one has not left."""
        self._socket.send(datagram)
        self.last_sent = now

    def receive(self) -> bytes:
        """One datagram. Raises OSError, BlockingIOError if there is none."""
        return self._socket.recv(RECEIVE_SIZE)

    def expect(self, cid: bytes, sent: Sent) -> None:
        """Recognise a probe's answer by the CID that it goes to, from now on and for long."""
        self._sent[cid] = sent
        if len(self._sent) > LATE_ANSWERS:
            del self._sent[next(iter(self._sent))]

    def expected(self, cid: bytes) -> Sent | None:
        return self._sent.get(cid)

    def forget(self, cid: bytes) -> None:
        del self._sent[cid]

    def probes(self) -> list[int]:
        """Those that are recognised, in the order in which they were sent."""
        return [sent.probe for sent in self._sent.values()]

    def close(self) -> None:
        if self.is_open:
            self._loop.remove_reader(self._socket)
            self._socket.close()


class Probes(ABC):
    """One backend's probes on the wire. What becomes of them is reported to `check`.

    While all is well they leave from one port. While the backend is DOWN the port changes now and then: what is
    stuck may be a NAT's or a firewall's memory of the old one. Old sockets stay open as long as a late
    answer may still show that the backend lives.
    """

    def __init__(self, address: Address, check: HealthCheck, around: Surroundings) -> None:
        self.address = address
        self.ignored = 0  # datagrams that answer no probe
        self.round_trip: float | None = None  # seconds
        self._check = check
        self._on_news, self._random, self._clock, self._names = around
        self._sockets: list[ProbeSocket] = []  # the last one is in use
        self._trouble: int | None = None  # the errno that was logged, until a probe can be sent again

    def send(self, probe: int, now: float) -> None:
        """Ask; if that is not possible, say so to the check."""
        try:
            sock = self._socket(now)
            sock.watch()
            self._ask(probe, sock, now)
        except OSError as error:
            self._unsent(probe, error, now)
        else:
            self._trouble = None

    def listen(self) -> None:
        """Report what has been answered while we were busy elsewhere: that has not timed out."""
        for sock in list(self._sockets):
            self._drain(sock)

    def expire(self, probe: int, now: float) -> None:  # noqa: B027 - most have nothing to say
        """A probe's time is over: whatever there is to report of it is to be reported now."""

    def retire(self, now: float) -> None:
        """Close old sockets, except the one in use."""
        for sock in self._sockets[:-1]:
            too_late = now - sock.last_sent > self._check.hold_off + self._check.config.timeout
            if too_late or len(self._sockets) > RETIRED_SOCKETS + 1:
                self._sockets.remove(sock)
                sock.close()

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    @abstractmethod
    def _ask(self, probe: int, sock: ProbeSocket, now: float) -> None:
        """Send a probe, and have the socket expect its answer. Raises OSError."""

    @abstractmethod
    def _hear(self, sock: ProbeSocket, datagram: bytes) -> bool:
        """Make of a datagram what it is, if it answers a probe. Returns whether it does."""

    def _transmit(self, sock: ProbeSocket, datagram: bytes, now: float) -> None:
        """Raises OSError, ConnectionRefusedError only if this datagram, too, is refused at once."""
        try:
            sock.send(datagram, now)
        except ConnectionRefusedError:  # of an earlier probe; this one has not left yet
            self._refused(sock)
            sock.send(datagram, now)

    def _unsent(self, probe: int, error: OSError, now: float) -> None:
        if isinstance(error, ConnectionRefusedError):
            self._check.on_refused(probe, now)
        else:
            self._log_trouble(error)
            self._check.on_unsent(probe, now, no_route=error.errno in NO_ROUTE)

    def _readable(self, sock: ProbeSocket) -> None:
        self._drain(sock)
        self._on_news()

    def _drain(self, sock: ProbeSocket) -> None:
        for _ in range(RECEIVE_LIMIT):
            try:
                datagram = sock.receive()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in REFUSED:
                    self._refused(sock)
                else:
                    self._log_trouble(error)
                sock.watch()
                continue
            if not self._hear(sock, datagram):
                self.ignored += 1

    def _refused(self, sock: ProbeSocket) -> None:
        # The error does not say which probe. They are refused in the order in which they were sent.
        waiting = next((probe for probe in sock.probes() if self._check.awaits(probe)), None)
        if waiting is not None:
            self._check.on_refused(waiting, self._clock())

    def _socket(self, now: float) -> ProbeSocket:
        """The socket for the next probe. Raises OSError."""
        keep = self._check.hold_off / RETIRED_SOCKETS if self._check.state is BackendState.DOWN else float("inf")
        # After trouble the route, and with it the socket's own address, may be another one.
        if not self._sockets or self._trouble is not None or now - self._sockets[-1].opened > keep:
            try:
                self._sockets.append(ProbeSocket(self.address, now, self._readable))
            except OSError:
                if not self._sockets:
                    raise
        return self._sockets[-1]

    def _log_trouble(self, error: OSError) -> None:
        if error.errno != self._trouble:
            self._trouble = error.errno
            event(logger, logging.WARNING, "probe-error", **self._names, error=error.strerror or str(error))
