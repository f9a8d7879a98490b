"""HealthMonitor: asks the backends whether they live, and reports to a `HealthCheck` each.

A QUIC server has to answer a long enough packet of a version that it does not speak with a Version Negotiation
packet (RFC 9000, section 6.1), whatever it serves and without keeping any state.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random as random_module
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lb.address import Address
from lb.config import HealthConfig, Probe, ServiceConfig
from lb.healthcheck import BackendHealth, HealthCheck, HealthSnapshot
from lb.log import event
from lb.packet import LONG_HEADER, parse_header
from lb.routing import BackendState

logger = logging.getLogger(__name__)

# The specification's.
FIXED_BIT = 0x40  # RFC 9000, section 17.2: servers may drop packets without it
RESERVED_VERSION = 0x0A0A0A0A  # RFC 9000, section 15: versions 0x?a?a?a?a force negotiation
RESERVED_MASK = 0x0F0F0F0F
MIN_INITIAL = 1200  # RFC 9000, section 14.1: shorter ones need not be answered
VERSION_LENGTH = 4

# Ours.
SCID_LENGTH = 8
RETIRED_SOCKETS = 4  # per backend, that listen for late answers
LATE_ANSWERS = 256  # per socket, that would still be recognised
RECEIVE_LIMIT = 64  # datagrams at a time, so that a babbling backend does not hold up the others
RECEIVE_SIZE = 2048

# Errors of a send that say: no way there from here. All others say something about this machine only.
NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN})
# Errors of a receive that Linux makes of ICMP messages about a port, a protocol or a host.
REFUSED = NO_ROUTE | {errno.ECONNREFUSED, errno.ENOPROTOOPT, errno.EACCES}


class ProbePacket(NamedTuple):
    """A probe as it is on the wire, and the CIDs that its answer must return."""

    datagram: bytes
    dcid: bytes
    scid: bytes


def probe_datagram(random: Callable[[int], bytes]) -> ProbePacket:
    """A packet of a reserved version, padded to 1200 octets. `random(n)` returns n random octets."""
    octets = random(6)
    first_octet = LONG_HEADER | FIXED_BIT | octets[0] & 0x3F
    version = int.from_bytes(octets[1:5]) & ~RESERVED_MASK | RESERVED_VERSION
    # QUIC v1 servers may ignore a first DCID of less than 8 octets (RFC 9000, section 7.2).
    dcid = random(8 + octets[5] % 13)
    scid = random(SCID_LENGTH)
    head = bytes((first_octet,)) + version.to_bytes(VERSION_LENGTH)
    head += bytes((len(dcid),)) + dcid + bytes((len(scid),)) + scid
    return ProbePacket(head + random(MIN_INITIAL - len(head)), dcid, scid)


def is_answer(datagram: bytes, probe: ProbePacket) -> bool:
    """Whether a datagram is the Version Negotiation packet that answers a probe (RFC 8999, section 6)."""
    header = parse_header(datagram)
    if header is None or not header.is_long or header.dcid != probe.scid or header.scid != probe.dcid:
        return False
    if datagram[1 : 1 + VERSION_LENGTH] != bytes(VERSION_LENGTH):
        return False
    versions = len(datagram) - (1 + VERSION_LENGTH + 1 + len(header.dcid) + 1 + len(header.scid))
    return versions > 0 and versions % VERSION_LENGTH == 0


class HealthMonitor:
    """Probes the backends of all services. To be used from its event loop only.

    `on_change(service)` is called when `states` or `dead` would answer otherwise than before, not for what
    `update` does. `random` should be unpredictable: whoever guesses a probe's CIDs can answer in its place.
    """

    def __init__(
        self,
        services: Sequence[ServiceConfig],
        on_change: Callable[[str], None],
        *,
        random: random_module.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_change = on_change
        self._random = random or random_module.SystemRandom()
        self._clock = clock
        self._probers: dict[str, dict[str, _Prober | None]] = {}
        self._running = False
        self.update(services)

    def start(self) -> None:
        """Begin to probe. Raises RuntimeError outside an event loop."""
        asyncio.get_running_loop()
        self._running = True
        for prober in self._all():
            prober.start()

    def stop(self) -> None:
        """Probe no more, and close every socket. States stay readable."""
        self._running = False
        for prober in self._all():
            prober.stop()

    def update(self, services: Sequence[ServiceConfig]) -> None:
        """Take over a new configuration. Backends that keep name and address keep their state."""
        old = self._probers
        new: dict[str, dict[str, _Prober | None]] = {}
        kept: set[_Prober] = set()
        for config in services:
            probers = new.setdefault(config.service.name, {})
            known = old.get(config.service.name, {})
            for backend in config.service.backends:
                prober = None
                if config.health.probe is not Probe.NONE:
                    prober = known.get(backend.name)
                    if prober is not None and prober.address == backend.address:
                        kept.add(prober)
                        prober.reconfigure(config.health, config.resets.hold_off)
                    else:
                        prober = self._prober(config, backend.name, backend.address)
                probers[backend.name] = prober
        gone = [prober for prober in self._all() if prober not in kept]
        self._probers = new
        for prober in gone:
            prober.stop()

    def suspect(self, service: str, backend: str) -> None:
        """Look at a backend more closely for a moment. Names that are not (or no longer) known are ignored."""
        prober = self._probers.get(service, {}).get(backend)
        if prober is not None:
            prober.suspect()

    def doubt(self, service: str) -> None:
        """Begin the hold-offs of a service anew: what all of its backends failed at may have been our doing."""
        for prober in self._probers.get(service, {}).values():
            if prober is not None:
                prober.doubt()

    def states(self, service: str) -> dict[str, BackendState]:
        """ACTIVE or DOWN for every backend of a service, by name; empty for a service that is not known (yet)."""
        probers = self._probers.get(service, {})
        return {name: p.check.state if p else BackendState.ACTIVE for name, p in probers.items()}

    def dead(self, service: str) -> frozenset[str]:
        """The backends that have been DOWN, and silent, for as long as the hold-off."""
        return frozenset(name for name, p in self._probers.get(service, {}).items() if p and p.check.dead)

    def snapshot(self) -> HealthSnapshot:
        """Everything that is counted. Cheap enough for every scrape."""
        return {
            service: {name: p.snapshot() if p else BackendHealth() for name, p in probers.items()}
            for service, probers in self._probers.items()
        }

    def _all(self) -> list[_Prober]:
        return [p for probers in self._probers.values() for p in probers.values() if p is not None]

    def _prober(self, config: ServiceConfig, backend: str, address: Address) -> _Prober:
        # The backends of a fleet are not all asked at the same moment, nor by all balancers.
        start = self._clock() + self._random.random() * config.health.interval * config.health.jitter
        check = HealthCheck(config.health, config.resets.hold_off, start=start, random=self._random.random)
        service = config.service.name
        prober = _Prober(
            service, backend, address, check, lambda: self._on_change(service), self._random.randbytes, self._clock
        )
        if self._running:
            prober.start()
        return prober


class _ProbeSocket:
    """A connected UDP socket and its probes: the kernel sorts out other senders, and reports ICMP errors."""

    def __init__(self, address: Address, now: float, on_readable: Callable[[_ProbeSocket], None]) -> None:
        """Raises OSError."""
        self.opened = self.last_sent = now
        self.sent: dict[bytes, tuple[int, ProbePacket, float]] = {}  # unanswered, by SCID; when
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

    def send(self, probe: int, packet: ProbePacket, now: float) -> None:
        """Raises OSError."""
        # Anew for every probe: libuv no longer watches a socket that an ICMP error came in by.
        self._loop.remove_reader(self._socket)
        self._loop.add_reader(self._socket, self._on_readable, self)
        self._socket.send(packet.datagram)
        self.last_sent = now
        self.sent[packet.scid] = (probe, packet, now)
        if len(self.sent) > LATE_ANSWERS:
            del self.sent[next(iter(self.sent))]

    def receive(self) -> bytes:
        """One datagram. Raises OSError, BlockingIOError if there is none."""
        return self._socket.recv(RECEIVE_SIZE)

    def take(self, datagram: bytes) -> tuple[int, float] | None:
        """The probe that a datagram answers, and when it was sent. Every probe is answered once."""
        header = parse_header(datagram)
        probe, packet, sent = self.sent.get(header.dcid, _NO_PROBE) if header else _NO_PROBE
        if not is_answer(datagram, packet):
            return None
        del self.sent[packet.scid]
        return probe, sent

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()


_NO_PROBE = (0, ProbePacket(b"", b"", b"none"), 0.0)  # its SCID is not one of ours


class _Prober:
    """One backend's probes on the wire.

    While all is well they leave from one port. While the backend is DOWN the port changes now and then: what is
    stuck may be a NAT's or a firewall's memory of the old one. Old sockets stay open as long as a late
    answer may still show that the backend lives.
    """

    def __init__(
        self,
        service: str,
        backend: str,
        address: Address,
        check: HealthCheck,
        on_change: Callable[[], None],
        random: Callable[[int], bytes],
        clock: Callable[[], float],
    ) -> None:
        self.address = address
        self.check = check
        self._names = {"service": service, "backend": backend}
        self._on_change = on_change
        self._random = random
        self._clock = clock
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._sockets: list[_ProbeSocket] = []  # the last one is in use
        self._told = (check.state, check.dead)
        self._trouble: int | None = None  # the errno that was logged, until a probe can be sent again
        self._ignored = 0
        self._round_trip: float | None = None

    def start(self) -> None:
        self._running = True
        self._arm()

    def stop(self) -> None:
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    def reconfigure(self, config: HealthConfig, hold_off: float) -> None:
        self.check.config = config
        self.check.hold_off = hold_off
        self._arm()

    def suspect(self) -> None:
        if self.check.suspect(self._clock()):
            event(logger, logging.DEBUG, "backend-suspect", **self._names)
        self._arm()

    def doubt(self) -> None:
        self.check.doubt(self._clock())
        self._told = (self.check.state, self.check.dead)
        self._arm()

    def snapshot(self) -> BackendHealth:
        check = self.check
        return BackendHealth(
            check.state, check.dead, check.changes, dict(check.results), self._ignored, self._round_trip
        )

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            delay = max(0.0, self.check.wakeup() - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        # What has been answered while we were busy elsewhere has not timed out.
        for sock in self._sockets:
            self._drain(sock)
        now = self._clock()
        self._retire(now)
        probe = self.check.poll(now)
        if probe is not None:
            self._send(probe, now)
        self._settle()

    def _readable(self, sock: _ProbeSocket) -> None:
        self._drain(sock)
        self._settle()

    def _settle(self) -> None:
        """Look ahead, then tell of what has changed: whoever is told may raise, or stop us."""
        self._arm()
        (was, was_dead), (state, dead) = self._told, (self.check.state, self.check.dead)
        if (was, was_dead) == (state, dead):
            return
        self._told = (state, dead)
        if was is not state:
            if state is BackendState.DOWN:
                event(logger, logging.WARNING, "backend-down", **self._names, reason=self.check.reason)
            else:
                event(logger, logging.INFO, "backend-up", **self._names)
        if dead:
            event(logger, logging.WARNING, "backend-dead", **self._names, hold_off=self.check.hold_off)
        elif was_dead and state is BackendState.DOWN:
            event(logger, logging.INFO, "backend-answering", **self._names)
        self._on_change()

    def _drain(self, sock: _ProbeSocket) -> None:
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
                continue
            answered = sock.take(datagram)
            if answered is None:
                self._ignored += 1
                continue
            probe, sent = answered
            now = self._clock()
            self._round_trip = now - sent
            self.check.on_reply(probe, now)

    def _refused(self, sock: _ProbeSocket) -> None:
        # The error does not say which probe. They are refused in the order in which they were sent.
        waiting = next((probe for probe, _, _ in sock.sent.values() if self.check.awaits(probe)), None)
        if waiting is not None:
            self.check.on_refused(waiting, self._clock())

    def _send(self, probe: int, now: float) -> None:
        packet = probe_datagram(self._random)
        try:
            sock = self._socket(now)
            try:
                sock.send(probe, packet, now)
            except ConnectionRefusedError:  # of an earlier probe; this one has not left yet
                self._refused(sock)
                sock.send(probe, packet, now)
        except ConnectionRefusedError:
            self.check.on_refused(probe, now)
        except OSError as error:
            self._log_trouble(error)
            self.check.on_unsent(probe, now, no_route=error.errno in NO_ROUTE)
        else:
            self._trouble = None

    def _socket(self, now: float) -> _ProbeSocket:
        """The socket for the next probe. Raises OSError."""
        keep = self.check.hold_off / RETIRED_SOCKETS if self.check.state is BackendState.DOWN else float("inf")
        # After trouble the route, and with it the socket's own address, may be another one.
        if not self._sockets or self._trouble is not None or now - self._sockets[-1].opened > keep:
            try:
                self._sockets.append(_ProbeSocket(self.address, now, self._readable))
            except OSError:
                if not self._sockets:
                    raise
        return self._sockets[-1]

    def _retire(self, now: float) -> None:
        """Close old sockets, except the one in use."""
        for sock in self._sockets[:-1]:
            too_late = now - sock.last_sent > self.check.hold_off + self.check.config.timeout
            if too_late or len(self._sockets) > RETIRED_SOCKETS + 1:
                self._sockets.remove(sock)
                sock.close()

    def _log_trouble(self, error: OSError) -> None:
        if error.errno != self._trouble:
            self._trouble = error.errno
            event(logger, logging.WARNING, "probe-error", **self._names, error=error.strerror or str(error))
