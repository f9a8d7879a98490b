"""lb/health.py: probes over real sockets, against servers that answer, babble, sleep, or are not there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import uvloop
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from hypothesis import given
from hypothesis import strategies as st

from lb.address import Address
from lb.cid import ConfigId
from lb.config import HealthConfig, Probe, ResetConfig, ServiceConfig
from lb.health import HealthMonitor
from lb.healthcheck import RESULTS, BackendHealth
from lb.negotiation import is_answer, probe_datagram
from lb.packet import parse_header
from lb.probing import LATE_ANSWERS, RETIRED_SOCKETS
from lb.routing import Backend, BackendState, Service
from tests.builders import deterministic_random

ACTIVE, DOWN = BackendState.ACTIVE, BackendState.DOWN
HASTY = HealthConfig(interval=0.1, timeout=0.08, fall=3, rise=2, jitter=0.1, suspect_interval=0.005)
PATIENT = replace(HASTY, timeout=10.0)
NEVER = HealthConfig(interval=3600, timeout=10, suspect_interval=0.005)  # after the first probe, that is
DEADLINE = 20.0  # seconds for things to come about on a busy machine


def service(address: Address, health: HealthConfig = HASTY, hold_off: float = 0.3, name: str = "b") -> ServiceConfig:
    backend = Backend(name, address, {ConfigId(0): frozenset()})
    return ServiceConfig(
        service=Service("web", (Address("127.0.0.1", 443),), (), (backend,)),
        health=health,
        resets=ResetConfig(hold_off=hold_off),
    )


def negotiation(probe: bytes, versions: bytes = bytes.fromhex("00000001 6b3343cf")) -> bytes:
    """The Version Negotiation packet that answers a probe (RFC 8999, section 6)."""
    header = parse_header(probe)
    assert header is not None
    assert header.scid is not None
    cids = bytes([len(header.scid)]) + header.scid + bytes([len(header.dcid)]) + header.dcid
    return b"\xca" + bytes(4) + cids + versions


class FakeServer(asyncio.DatagramProtocol):
    """Answers datagrams with whatever `answer` makes of them, or keeps them while that is None."""

    def __init__(self, answer: Callable[[bytes], list[bytes]] | None) -> None:
        self.answer = answer
        self.received: list[tuple[bytes, Any]] = []
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))
        if self.answer is not None:
            self.send(self.answer(data), addr)

    def send(self, datagrams: list[bytes], addr: Any) -> None:
        # Not the transport's sendto, which swallows empty datagrams.
        with socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno())) as sock:
            for datagram in datagrams:
                sock.sendto(datagram, addr)

    @property
    def address(self) -> Address:
        return Address(*self.transport.get_extra_info("sockname")[:2])


def answers(datagram: bytes) -> list[bytes]:
    return [negotiation(datagram)]


def ignores(_datagram: bytes) -> list[bytes]:
    return []


@contextlib.asynccontextmanager
async def serving(
    answer: Callable[[bytes], list[bytes]] | None, at: Address | None = None
) -> AsyncIterator[FakeServer]:
    loop = asyncio.get_running_loop()
    server = FakeServer(answer)
    transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=at or ("127.0.0.1", 0))
    try:
        yield server
    finally:
        transport.close()
        await asyncio.sleep(0)


@contextlib.contextmanager
def watching(*services: ServiceConfig) -> Iterator[tuple[HealthMonitor, list[str]]]:
    """A monitor at work, and the list of what it said has changed."""
    changed: list[str] = []
    monitor = HealthMonitor(services, changed.append)
    monitor.start()
    try:
        yield monitor, changed
    finally:
        monitor.stop()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - it is the outside that is waited for
            await asyncio.sleep(0.002)


def now(monitor: HealthMonitor, backend: str = "b") -> BackendHealth:
    return monitor.snapshot()["web"][backend]


def closed_port(host: str = "127.0.0.1") -> Address:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        return Address(*sock.getsockname()[:2])


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, object]]]:
    return [(r.msg, r.fields) for r in caplog.records if hasattr(r, "fields")]


LOOPS = pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])


def run(story: Awaitable[None], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
    async def main() -> None:
        await story

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


@pytest.mark.parametrize("seed", range(50))
def test_a_probe_is_what_a_server_has_to_answer(seed: int) -> None:
    probe = probe_datagram(deterministic_random(str(seed)))
    header = parse_header(probe.datagram)
    assert header is not None
    assert (header.is_long, header.dcid, header.scid) == (True, probe.dcid, probe.scid)
    assert len(probe.datagram) == 1200
    assert probe.datagram[0] & 0xC0 == 0xC0
    assert [octet & 0x0F for octet in probe.datagram[1:5]] == [0x0A] * 4
    assert 8 <= len(probe.dcid) <= 20
    assert len(probe.scid) == 8


def test_probes_differ_in_every_random_part() -> None:
    random = deterministic_random()
    probes = [probe_datagram(random) for _ in range(200)]
    assert len({p.scid for p in probes}) == 200
    assert {len(p.dcid) for p in probes} == set(range(8, 21))
    assert len({p.datagram[1:5] for p in probes}) > 190
    assert len({p.datagram[0] for p in probes}) > 40


PROBE = probe_datagram(deterministic_random())
D, S = bytes([len(PROBE.dcid)]) + PROBE.dcid, bytes([len(PROBE.scid)]) + PROBE.scid
V1 = b"\0\0\0\1"


@pytest.mark.parametrize(
    ("datagram", "expected"),
    [
        pytest.param(b"\x80" + bytes(4) + S + D + V1, True, id="one version"),
        pytest.param(b"\xff" + bytes(4) + S + D + V1 * 300, True, id="many versions"),
        pytest.param(b"\x80" + bytes(4) + S + D, False, id="no version"),
        pytest.param(b"\x80" + bytes(4) + S + D + V1 + b"\0", False, id="a version and a bit"),
        pytest.param(b"\x80" + bytes(4) + D + S + V1, False, id="CIDs not exchanged"),
        pytest.param(b"\x80" + V1 + S + D + V1, False, id="another version"),
        pytest.param(b"\x00" + bytes(4) + S + D + V1, False, id="a short header"),
        pytest.param(b"\x80" + bytes(4) + S + b"\0" + V1, False, id="no source CID"),
        pytest.param(b"\x80" + bytes(4) + S, False, id="truncated"),
        pytest.param(b"", False, id="empty"),
        pytest.param(PROBE.datagram, False, id="an echo"),
    ],
)
def test_only_the_version_negotiation_that_was_asked_for_is_an_answer(datagram: bytes, expected: bool) -> None:
    assert is_answer(datagram, PROBE.dcid, PROBE.scid) is expected


@given(st.binary(max_size=64))
def test_no_datagram_makes_is_answer_raise(datagram: bytes) -> None:
    assert not is_answer(datagram, PROBE.dcid, PROBE.scid)


@LOOPS
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_server_that_answers_stays_active(loop_factory: Any, host: str) -> None:
    async def story() -> None:
        async with serving(answers, Address(host, 0)) as server:
            with watching(service(server.address, PATIENT)) as (monitor, changed):
                await eventually(lambda: now(monitor).results["answered"] >= 3)
                seen = now(monitor)
                assert (seen.state, seen.dead, seen.changes, seen.ignored, changed) == (ACTIVE, False, 0, 0, [])
                assert seen.round_trip is not None
                assert 0 < seen.round_trip < 1
                assert monitor.states("web") == {"b": ACTIVE}
                assert monitor.dead("web") == frozenset()
                # All from one port.
                assert len({addr for _, addr in server.received}) == 1

    run(story(), loop_factory)


@LOOPS
def test_an_answer_is_heard_at_once_even_by_a_socket_that_heard_an_error_before(loop_factory: Any) -> None:
    async def story() -> None:
        address = closed_port()
        with watching(service(address, replace(PATIENT, interval=0.5, jitter=0, fall=1000))) as (monitor, _):
            await eventually(lambda: now(monitor).results["refused"])
            async with serving(answers, address):
                await eventually(lambda: now(monitor).results["answered"])
                round_trip = now(monitor).round_trip
                assert round_trip is not None
                assert round_trip < 0.4  # and not when the next probe is due

    run(story(), loop_factory)


@LOOPS
def test_what_comes_after_an_error_is_heard_without_another_probe(loop_factory: Any) -> None:
    async def story() -> None:
        address = closed_port()
        with watching(service(address, replace(NEVER, jitter=0.0), hold_off=60)) as (monitor, _):
            await eventually(lambda: now(monitor).results["refused"])
            prober = monitor._probers["web"]["b"]
            assert prober is not None
            port = prober._probes._sockets[-1]._socket.getsockname()
            async with serving(answers, address) as server:
                server.send([b"hello"], port)
                await eventually(lambda: now(monitor).ignored == 1)

    run(story(), loop_factory)


def test_a_real_quic_server_is_active() -> None:
    async def story() -> None:
        quic = await serve("127.0.0.1", 0, configuration=QuicConfiguration(is_client=False))
        address = Address(*quic._transport.get_extra_info("sockname"))  # type: ignore[union-attr]
        with watching(service(address, PATIENT)) as (monitor, _):
            await eventually(lambda: now(monitor).results["answered"] >= 2)
        quic.close()

    run(story())


@LOOPS
def test_a_silent_server_goes_down_then_dead_and_comes_back(
    loop_factory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with serving(ignores) as server:
            with watching(service(server.address)) as (monitor, changed):
                await eventually(lambda: now(monitor).dead)
                assert monitor.states("web") == {"b": DOWN}
                assert monitor.dead("web") == {"b"}
                assert now(monitor).results["answered"] == 0
                ports = {addr for _, addr in server.received}
                assert len(ports) > 1, "a server that is down is asked from other ports too"
                server.answer = answers
                await eventually(lambda: now(monitor).state is ACTIVE)
                assert (now(monitor).dead, now(monitor).changes) == (False, 2)
                assert set(changed) == {"web"}

    run(story(), loop_factory)
    named = {"service": "web", "backend": "b"}
    assert events(caplog) == [
        ("backend-down", {**named, "reason": "timeout"}),
        ("backend-dead", {**named, "hold_off": 0.3}),
        ("backend-answering", named),
        ("backend-up", named),
    ]


def test_a_server_that_thaws_within_the_hold_off_is_never_dead(caplog: pytest.LogCaptureFixture) -> None:
    """It answers all at once what it was asked while it was frozen: too late to be healthy, not to be alive."""
    caplog.set_level(logging.INFO)

    async def story() -> None:
        async with serving(None) as server:
            with watching(service(server.address, hold_off=2.0)) as (monitor, _):
                await eventually(lambda: now(monitor).state is DOWN)
                for round_ in range(1, 4):
                    await eventually(lambda: len(server.received) >= 10 * round_)  # noqa: B023
                    for datagram, addr in server.received[:-1]:
                        server.send(answers(datagram), addr)

    run(story())
    assert [name for name, _ in events(caplog)] == ["backend-down"]


@pytest.mark.parametrize(
    "babble",
    [
        pytest.param(lambda d: [d], id="echo"),
        pytest.param(lambda _: [b""], id="empty"),
        pytest.param(lambda _: [os.urandom(1200)], id="random"),
        pytest.param(lambda d: [negotiation(d, b"")], id="no versions"),
        pytest.param(lambda d: [negotiation(d)[:-1]], id="truncated"),
        pytest.param(lambda d: [negotiation(d).replace(b"\xca", b"\x4a", 1)], id="short header"),
        pytest.param(lambda _: [b"\xc0" * 50] * 200, id="a flood"),
    ],
)
def test_garbage_is_counted_and_is_no_answer(babble: Callable[[bytes], list[bytes]]) -> None:
    async def story() -> None:
        async with serving(babble) as server:
            with watching(service(server.address)) as (monitor, _):
                await eventually(lambda: now(monitor).dead)
                seen = now(monitor)
                assert seen.ignored > 0
                assert seen.results["answered"] == 0
                assert seen.round_trip is None

    run(story())


def test_an_answer_counts_once() -> None:
    async def story() -> None:
        async with serving(lambda d: [negotiation(d)] * 3) as server:
            with watching(service(server.address)) as (monitor, _):
                await eventually(lambda: now(monitor).results["answered"] >= 2)
                await eventually(lambda: now(monitor).ignored >= 4)
                seen = now(monitor)
                assert seen.results["answered"] <= len(server.received)
                assert seen.ignored <= 2 * len(server.received)

    run(story())


def test_answers_from_another_port_never_arrive() -> None:
    async def story() -> None:
        async with serving(ignores) as server, serving(ignores) as impostor:
            server.answer = lambda d: impostor.send(answers(d), server.received[-1][1]) or []  # type: ignore[func-returns-value]
            with watching(service(server.address)) as (monitor, _):
                await eventually(lambda: now(monitor).state is DOWN)
                assert (now(monitor).results["answered"], now(monitor).ignored) == (0, 0)

    run(story())


@LOOPS
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_closed_port_is_refused_and_found_out_at_once_if_suspected(
    loop_factory: Any, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With probes an hour apart it takes the suspicion to bring it down, and `fall` refusals."""
    caplog.set_level(logging.DEBUG)

    async def story() -> None:
        async with serving(answers, Address(host, 0)) as server:
            address = server.address
            config = service(address, replace(NEVER, jitter=0.0), hold_off=60)
            with watching(config) as (monitor, changed):
                await eventually(lambda: now(monitor).results["answered"] == 1)
                server.transport.close()
                await asyncio.sleep(0)
                await eventually(lambda: _is_closed(address))
                monitor.suspect("web", "b")
                monitor.suspect("web", "b")
                monitor.suspect("web", "no such backend")
                monitor.suspect("no such service", "b")
                await eventually(lambda: changed == ["web"])
                seen = now(monitor)
                assert (seen.state, seen.dead) == (DOWN, False)
                assert seen.results == dict.fromkeys(RESULTS, 0) | {"answered": 1, "refused": 3}

    run(story(), loop_factory)
    named = {"service": "web", "backend": "b"}
    assert [e for e in events(caplog) if e[0] != "log"] == [
        ("backend-suspect", named),
        ("backend-down", {**named, "reason": "refused"}),
    ]


def _is_closed(address: Address) -> bool:
    family = socket.AF_INET6 if address.is_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(address)
        except OSError:
            return False
    return True


def test_out_of_descriptors_is_no_evidence_against_a_backend(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        address = closed_port()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with watching(service(address, hold_off=0.05)) as (monitor, changed):
            unused = os.dup(0)
            os.close(unused)
            resource.setrlimit(resource.RLIMIT_NOFILE, (unused, hard))
            try:
                await eventually(lambda: now(monitor).results["unsent"] >= 8)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert now(monitor).results["refused"] == 0
            assert (now(monitor).state, changed) == (ACTIVE, [])
            # They are back, and so is the truth.
            await eventually(lambda: now(monitor).state is DOWN)

    run(story())
    assert [name for name, _ in events(caplog)] == ["probe-error", "backend-down"]
    assert events(caplog)[0][1] == {"service": "web", "backend": "b", "error": "Too many open files"}


NOWHERE = """
import asyncio, sys
from tests.test_health import *
async def story():
    with watching(service(Address("192.0.2.1", 443), hold_off=0.05)) as (monitor, changed):
        await eventually(lambda: now(monitor).state is DOWN)
        await eventually(lambda: now(monitor).results["unsent"] >= 10)
        print(now(monitor).state.name, now(monitor).dead, changed)
run(story())
"""


def test_a_network_without_a_route_takes_a_backend_down_but_not_for_dead() -> None:
    isolated = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not create a network namespace")
    done = subprocess.run(
        [*isolated, sys.executable, "-c", NOWHERE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "DOWN False ['web']\n"), done.stderr


def test_descriptors_stay_few_and_are_all_given_back() -> None:
    """The silent server is asked from changing ports; the late answers that are waited for are bounded too."""

    async def story() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with serving(ignores) as server:
            with watching(service(server.address, hold_off=0.04)) as (monitor, _):
                busiest = 0

                def asked_often() -> bool:
                    nonlocal busiest
                    busiest = max(busiest, len(os.listdir("/proc/self/fd")))
                    return len({addr for _, addr in server.received}) > 3 * RETIRED_SOCKETS

                await eventually(asked_often)
                prober = monitor._probers["web"]["b"]
                assert prober is not None
                assert all(len(s.probes()) <= LATE_ANSWERS for s in prober._probes._sockets)
            assert busiest - before <= RETIRED_SOCKETS + 4  # the server's own, and listdir's
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)

    run(story())


def test_a_backend_without_probes_is_active_for_ever() -> None:
    async def story() -> None:
        config = service(closed_port(), HealthConfig(probe=Probe.NONE))
        with watching(config) as (monitor, changed):
            monitor.suspect("web", "b")
            assert monitor.states("web") == {"b": ACTIVE}
            assert monitor.dead("web") == frozenset()
            assert (now(monitor), changed) == (BackendHealth(), [])

    run(story())


def test_a_reload_keeps_the_state_of_backends_that_stay() -> None:
    async def story() -> None:
        address, other = closed_port(), closed_port()
        with watching(service(address)) as (monitor, _):
            await eventually(lambda: now(monitor).dead)

            monitor.update([service(address, replace(HASTY, fall=9), hold_off=60)])
            assert (now(monitor).state, now(monitor).dead) == (DOWN, True)

            monitor.update([service(other, replace(HASTY, interval=3600))])
            assert now(monitor) == BackendHealth(), "the same name elsewhere is another backend"

            monitor.update([service(address, name="c")])
            assert monitor.states("web") == {"c": ACTIVE}
            await eventually(lambda: now(monitor, "c").state is DOWN)

            monitor.update([service(address, HealthConfig(probe=Probe.NONE), name="c")])
            assert monitor.states("web") == {"c": ACTIVE}

            monitor.update([])
            assert (monitor.states("web"), monitor.dead("web"), monitor.snapshot()) == ({}, frozenset(), {})

    run(story())


def test_a_listener_that_fails_does_not_end_the_probes() -> None:
    async def story() -> None:
        async with serving(ignores) as server:
            problems: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))

            def fail(_service: str) -> None:
                raise RuntimeError("listener")

            monitor = HealthMonitor([service(server.address)], fail)
            monitor.start()
            await eventually(lambda: now(monitor).dead)
            server.answer = answers
            await eventually(lambda: now(monitor).state is ACTIVE)
            monitor.stop()
            assert len(problems) >= 3

    run(story())


def test_start_is_spread_and_prompt() -> None:
    """Every backend is asked within the jitter of an interval, not at its end."""

    async def story() -> None:
        async with serving(answers) as server:
            with watching(service(server.address, replace(NEVER, interval=1.0, jitter=0.1))) as (monitor, _):
                await eventually(lambda: now(monitor).results["answered"] == 1)

    run(story())
