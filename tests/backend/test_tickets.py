"""Session tickets and early data: what is resumed, where, by whom, and how often."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aioquic.h3.connection import H3Connection
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from hypothesis import given
from hypothesis import strategies as st

from backend.app import Http3Protocol, Request
from backend.clients.transfer import Transfer
from backend.demo.stage import Play, Stage
from backend.seal import OVERHEAD, Kind, Seal
from backend.server import Outcome
from backend.tickets import (
    FRESHNESS,
    TICKET_LIFETIME,
    EarlyVerdict,
    Promises,
    Session,
    Tickets,
    TicketVerdict,
)
from backend.tokens import MAX_CLOCK_SKEW
from lb.address import Address
from tests.backend.returning import GTLSCLIENT, LIBRARIES, gtls_visit, visit
from tests.backend.test_tokens import Clock, tokens_now
from tests.e2e.theatre import perform
from tests.test_backend import DEADLINE, Backend, Program, running, scenario, serve, until

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
NOW = 1_800_000_000.0
V1, V2 = 1, 0x6B3343CF
SUITE = 0x1302
SECRET = bytes(range(48))
PROMISES = Promises(8, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 128, 128, 0)
ISSUED = (V1, SUITE, SECRET, "h3", PROMISES)
BINDER = bytes(range(100, 148))


def tickets(clock: Clock | None = None, *keys: bytes, early_data: bool = True, **options: Any) -> Tickets:
    """A server's, that was started an hour ago."""
    clock = clock or Clock(NOW)
    now, clock.now = clock.now, clock.now - 3600
    made = Tickets(Seal(keys or [KEY], os.urandom), clock, early_data=early_data, **options)
    clock.now = now
    return made


def test_a_session_is_encoded_as_it_is_written_down() -> None:
    session = Session(0x0102, 0x03, V1, SUITE, b"secret", "h3", b"app", PROMISES)
    limits = "08" + 4 * "80100000" + 2 * "4080" + "00"
    encoded = "000000000000010200000003000000011302067365637265740268330361707001" + limits
    assert session.encode().hex() == encoded
    assert Session.decode(session.encode()) == session
    assert SECRET.hex() not in repr(session._replace(secret=SECRET))
    assert repr(SECRET) not in repr(session._replace(secret=SECRET))


limits = st.integers(0, (1 << 62) - 1)
sessions = st.builds(
    Session,
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 16) - 1),
    st.binary(max_size=64),
    st.text(max_size=8),
    st.binary(max_size=64),
    st.none() | st.builds(Promises, *(limits for _ in Promises._fields)),
)


@given(sessions)
def test_every_session_comes_out_of_its_ticket_again(session: Session) -> None:
    assert Session.decode(session.encode()) == session


def test_any_server_resumes_from_a_ticket_of_any_other() -> None:
    ticket, age_add = tickets().issue(*ISSUED)
    assert tickets().open(ticket, V1) == Session(int(NOW * 1000), age_add, V1, SUITE, SECRET, "h3", b"", PROMISES)


def opened(checker: Tickets, ticket: bytes, version: int = V1) -> Any:
    """The verdict on a ticket, which is counted; None if it is good."""
    session = checker.open(ticket, version)
    assert (session is None) is (checker.counts.total() == 1)
    return next(iter(checker.counts), None)


def test_a_ticket_is_refused_for_every_reason_there_is() -> None:
    ticket, _ = tickets().issue(*ISSUED)
    flipped = bytes([ticket[-1] ^ 1])
    assert opened(tickets(), ticket) is None
    assert opened(tickets(), os.urandom(64)[:63] + b"\0") in (TicketVerdict.FOREIGN, TicketVerdict.UNKNOWN_KEY)
    assert opened(tickets(), ticket[: OVERHEAD - 1]) is TicketVerdict.TRUNCATED
    assert opened(tickets(), ticket[:-1]) is TicketVerdict.FORGED
    assert opened(tickets(), ticket[:-1] + flipped) is TicketVerdict.FORGED
    assert opened(tickets(), ticket + bytes(60_000)) is TicketVerdict.OVERSIZED
    assert opened(tickets(None, OTHER_KEY), ticket) is TicketVerdict.UNKNOWN_KEY
    assert opened(tickets(None, OTHER_KEY, KEY), ticket) is None
    assert opened(tickets(), ticket, V2) is TicketVerdict.WRONG_VERSION
    assert opened(tickets(Clock(NOW + TICKET_LIFETIME - 1)), ticket) is None
    assert opened(tickets(Clock(NOW + TICKET_LIFETIME + 1)), ticket) is TicketVerdict.EXPIRED
    assert opened(tickets(Clock(NOW - MAX_CLOCK_SKEW - 1)), ticket) is TicketVerdict.NOT_YET


TRUE, _AGE_ADD = tickets().issue(*ISSUED)


@given(st.data())
def test_no_forged_ticket_is_resumed_from_or_leaves_anything_behind(data: st.DataObject) -> None:
    ticket = bytearray(TRUE)
    how = data.draw(st.sampled_from(["bits", "cut", "more", "anything"]))
    if how == "bits":
        for bit in data.draw(st.sets(st.integers(0, 8 * len(ticket) - 1), min_size=1, max_size=4)):
            ticket[bit // 8] ^= 1 << bit % 8
    elif how == "cut":
        del ticket[data.draw(st.integers(0, len(ticket) - 1)) :]
    elif how == "more":
        ticket += data.draw(st.binary(min_size=1, max_size=2000))
    else:
        ticket[:] = data.draw(st.binary(max_size=2000))
    checker = tickets()
    assert opened(checker, bytes(ticket)) is not None
    assert len(checker._accepted) == 0


# Early data.


def early(checker: Tickets, **other: Any) -> EarlyVerdict:
    """What a server says to early data that comes with a ClientHello of now."""
    session = other.pop("session", None) or tickets().open(TRUE, V1)
    assert session
    how: dict[str, Any] = {"age": 0.0, "binder": BINDER, "version": V1, "alpn": "h3", "promises": PROMISES} | other
    obfuscated = (int(how["age"] * 1000) + session.age_add) % 2**32
    before = checker.early_counts.copy()
    accepted = checker.accepts_early(session, obfuscated, how["binder"], how["version"], how["alpn"], how["promises"])
    [verdict] = (checker.early_counts - before).elements()
    assert accepted is (verdict is EarlyVerdict.ACCEPTED)
    return verdict


def test_early_data_is_accepted_once_by_a_server_and_by_another_once_again() -> None:
    """What cannot be prevented without a memory that all servers share, and is said in docs/tokens.md."""
    a, b = tickets(), tickets()
    assert [early(each) for each in (a, a, b, b, a)] == [
        EarlyVerdict.ACCEPTED,
        EarlyVerdict.REPLAYED,
        EarlyVerdict.ACCEPTED,
        EarlyVerdict.REPLAYED,
        EarlyVerdict.REPLAYED,
    ]
    assert early(a, binder=BINDER[::-1]) is EarlyVerdict.ACCEPTED  # the same client comes back


def test_early_data_is_refused_for_every_reason_there_is() -> None:
    ticket, _ = tickets(early_data=False).issue(*ISSUED)
    plain = tickets().open(ticket, V1)
    assert early(tickets(early_data=False)) is EarlyVerdict.OFF
    assert early(tickets(), session=plain) is EarlyVerdict.NOT_PROMISED
    assert early(tickets(), version=V2) is EarlyVerdict.WRONG_VERSION
    assert early(tickets(), alpn="h3-29") is EarlyVerdict.WRONG_PROTOCOL
    assert early(tickets(application=b"other settings")) is EarlyVerdict.WRONG_PROTOCOL
    assert early(tickets(Clock(NOW + FRESHNESS + 1))) is EarlyVerdict.STALE
    assert early(tickets(Clock(NOW + 3600)), age=3600 - FRESHNESS - 1) is EarlyVerdict.STALE
    assert early(tickets(Clock(NOW + 3600)), age=3600 - FRESHNESS + 1) is EarlyVerdict.ACCEPTED
    assert early(tickets(Clock(NOW + 3600)), age=3600 + FRESHNESS + 1) is EarlyVerdict.STALE
    young = Tickets(Seal([KEY], os.urandom), Clock(NOW + 5), early_data=True)
    assert early(young, age=4.9) is EarlyVerdict.FORGOTTEN  # its predecessor may have had it
    assert early(young, age=5.1) is EarlyVerdict.ACCEPTED


@pytest.mark.parametrize("limit", Promises._fields)
def test_a_server_that_allows_less_than_the_client_may_rely_on_takes_no_early_data(limit: str) -> None:
    """RFC 9000, section 7.4.1."""
    promised, _ = tickets().issue(*ISSUED[:4], PROMISES._replace(max_datagram_frame_size=1200))
    session = tickets().open(promised, V1)
    now = PROMISES._replace(max_datagram_frame_size=1200)
    assert early(tickets(), session=session, promises=now) is EarlyVerdict.ACCEPTED
    more = now._replace(**{limit: getattr(now, limit) + 1})
    assert early(tickets(), session=session, promises=more) is EarlyVerdict.ACCEPTED
    less = now._replace(**{limit: getattr(now, limit) - 1})
    assert early(tickets(), session=session, promises=less) is EarlyVerdict.REDUCED_LIMITS


def test_the_memory_of_early_data_is_bounded_and_fails_closed() -> None:
    clock = Clock(NOW)
    checker = tickets(clock, remembered=20)
    binders = [i.to_bytes(32) for i in range(100)]
    for i, binder in enumerate(binders):
        clock.now = NOW + i / 1000
        assert early(checker, binder=binder, age=i / 1000) is EarlyVerdict.ACCEPTED
        assert len(checker._accepted) <= 20
    again = {early(checker, binder=binder, age=i / 1000) for i, binder in enumerate(binders)}
    assert again == {EarlyVerdict.REPLAYED, EarlyVerdict.FORGOTTEN}


# With real clients.

pytestmark = pytest.mark.e2e


class Site(Http3Protocol):
    """Notes which requests it has answered."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.answered: list[tuple[str, bool]] = []

    async def _respond(self, http: H3Connection, stream_id: int, request: Request) -> None:
        await super()._respond(http, stream_id, request)
        self.answered.append((f"{request.method} {request.path}", request.is_early))


class Member(Backend):
    """A server of the fleet."""

    @property
    def tickets(self) -> Tickets:
        assert self.server.tickets
        return self.server.tickets


def equipment(early_data: bool = True, *keys: bytes) -> Tickets:
    return Tickets(Seal(keys or [KEY], os.urandom), time.time, early_data=early_data)


@contextlib.asynccontextmanager
async def fleet(*equipped: Tickets, retry: bool = False) -> AsyncIterator[list[Member]]:
    """Servers that share a key and nothing else."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            Member(
                *await stack.enter_async_context(serve(protocol=Site, tokens=tokens_now(), tickets=own, retry=retry))
            )
            for own in equipped or (equipment(), equipment())
        ]


@pytest.fixture(params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@scenario
async def test_a_client_resumes_on_another_server_and_is_answered_before_the_handshake_is_over(library: str) -> None:
    async with fleet() as (a, b):
        async with visit(library, a.address, "/whoami") as first:
            assert [answer["resumed"] for answer in await first.answers()] == [False]
            ticket = await first.given_ticket()
        async with visit(library, b.address, "/whoami", ("/upload", b"x" * 1000), ticket=ticket) as again:
            whoami, upload = await again.answers()
        assert (whoami["resumed"], whoami["early"], upload["octets"]) == (True, True, 1000)
        assert b.tickets.counts == {TicketVerdict.RESUMED: 1}
        assert b.tickets.early_counts == {EarlyVerdict.ACCEPTED: 1}


@pytest.mark.skipif(GTLSCLIENT is None, reason="gtlsclient is not installed (Debian: apt-get install ngtcp2-client)")
@scenario
async def test_gtlsclient_resumes_on_another_server_too(tmp_path: Path) -> None:
    async with fleet() as (a, b):
        first, _ = await gtls_visit(a.address, "/whoami", tmp_path)
        again, _ = await gtls_visit(b.address, "/whoami", tmp_path)
        assert (first["resumed"], again["resumed"], again["early"]) == (False, True, True)
        assert b.tickets.early_counts == {EarlyVerdict.ACCEPTED: 1}


@scenario
async def test_with_a_token_the_first_flight_is_answered_even_where_others_are_sent_away_by_retry() -> None:
    async with fleet(retry=True) as (a, b):
        async with visit("aioquic", a.address, "/whoami") as first:
            await first.answers()
            ticket, [token] = await first.given_ticket(), await first.given_token()
        async with visit("aioquic", b.address, "/whoami", ticket=ticket, token=token) as again:
            [answer] = await again.answers()
            assert (answer["resumed"], answer["early"]) == (True, True)
        assert b.server.outcomes == {Outcome.ACCEPTED: 1}


@scenario
async def test_early_data_survives_a_retry(tmp_path: Path) -> None:
    """Of clients that send it again. aioquic, as a client, does not."""
    async with fleet(retry=True) as (a, b):
        async with visit("qh3", a.address, "/whoami") as first:
            await first.answers()
            ticket = await first.given_ticket()
        async with visit("qh3", b.address, "/whoami", ticket=ticket) as again:
            answers = await again.answers()
        if GTLSCLIENT:
            await gtls_visit(a.address, "/whoami", tmp_path)
            answers.append((await gtls_visit(b.address, "/whoami", tmp_path))[0])
        assert {(answer["resumed"], answer["early"]) for answer in answers} == {(True, True)}
        assert b.server.outcomes[Outcome.ACCEPTED] == len(answers)
        assert b.server.outcomes[Outcome.RETRIED] >= len(answers)  # a ClientHello may take two Initials


@scenario
async def test_without_early_data_a_session_is_resumed_all_the_same(library: str) -> None:
    async with fleet(equipment(), equipment(False)) as (a, b):
        async with visit(library, a.address, "/whoami") as first:
            await first.answers()
            ticket = await first.given_ticket()
        async with visit(library, b.address, "/whoami", ticket=ticket) as again:
            [answer] = await again.answers()
            assert (answer["resumed"], answer["early"]) == (True, False)
            assert (await again.given_ticket()).max_early_data_size is None
        assert b.tickets.early_counts == {EarlyVerdict.OFF: 1}


@scenario
async def test_a_ticket_of_a_retired_key_costs_its_client_a_full_handshake_and_nothing_else(library: str) -> None:
    async with fleet(equipment(), equipment(True, OTHER_KEY)) as (a, b):
        async with visit(library, a.address, "/whoami") as first:
            await first.answers()
            ticket = await first.given_ticket()
        async with visit(library, b.address, "/whoami", ticket=ticket) as again:
            [answer] = await again.answers()
            assert (answer["resumed"], answer["early"]) == (False, False)
        assert b.tickets.counts == {TicketVerdict.UNKNOWN_KEY: 1}
        assert b.tickets.early_counts == {}


MANGLED: dict[str, tuple[Callable[[bytes], bytes], TicketVerdict]] = {
    "a bit": (lambda ticket: ticket[:-1] + bytes([ticket[-1] ^ 1]), TicketVerdict.FORGED),
    "cut": (lambda ticket: ticket[:20], TicketVerdict.TRUNCATED),
    "longer": (lambda ticket: ticket + bytes(5000), TicketVerdict.OVERSIZED),
    "another make's": (lambda ticket: bytes(64), TicketVerdict.FOREIGN),
    "a token": (lambda ticket: bytes([Kind.NEW_TOKEN]) + ticket[1:], TicketVerdict.FOREIGN),
}


@pytest.mark.parametrize("how", MANGLED)
@scenario
async def test_a_mangled_ticket_costs_its_client_a_full_handshake_and_the_server_nothing(how: str) -> None:
    mangle, verdict = MANGLED[how]
    async with fleet() as (a, b):
        async with visit("aioquic", a.address, "/whoami") as first:
            await first.answers()
            ticket = await first.given_ticket()
        ticket.ticket = mangle(ticket.ticket)
        async with visit("aioquic", b.address, "/whoami", ticket=ticket) as again:
            [answer] = await again.answers()
            assert (answer["resumed"], answer["early"]) == (False, False)
        assert (b.tickets.counts, b.tickets.early_counts) == ({verdict: 1}, {})
        assert len(b.tickets._accepted) == 0


@scenario
async def test_a_session_of_one_version_of_quic_is_not_resumed_by_another() -> None:
    """RFC 9369, section 5."""
    async with fleet() as (a, b):
        async with visit("aioquic", a.address, "/whoami", supported_versions=[V2]) as first:
            await first.answers()
            ticket = await first.given_ticket()
        async with visit("aioquic", b.address, "/whoami", ticket=ticket, supported_versions=[V1]) as again:
            [answer] = await again.answers()
            assert (answer["resumed"], answer["early"]) == (False, False)
        async with visit("aioquic", b.address, "/whoami", ticket=ticket, supported_versions=[V2]) as again:
            [answer] = await again.answers()
            assert (answer["resumed"], answer["early"]) == (True, True)
        assert b.tickets.counts == {TicketVerdict.WRONG_VERSION: 1, TicketVerdict.RESUMED: 1}


@scenario
async def test_a_stolen_ticket_is_worth_nothing_without_its_secret() -> None:
    async with fleet() as (a, b):
        async with visit("aioquic", a.address, "/whoami") as first:
            await first.answers()
            ticket = await first.given_ticket()
        ticket.resumption_secret = bytes(len(ticket.resumption_secret))
        with pytest.raises(ConnectionError):
            async with visit("aioquic", b.address, "/whoami", ticket=ticket):
                pass
        assert b.tickets.counts == {TicketVerdict.NOT_RESUMED: 1}
        assert b.server.outcomes == {Outcome.ACCEPTED: 1}
        assert len(b.tickets._accepted) == 0


@scenario
async def test_what_changes_something_waits_for_the_handshake(library: str) -> None:
    """RFC 8470, section 3."""
    async with fleet() as (a, b):
        async with visit(library, a.address, "/whoami") as first:
            await first.answers()
            ticket = await first.given_ticket()
        async with visit(library, b.address, ("/upload", b"x"), "/whoami", ticket=ticket) as again:
            await again.answers()
            assert b.server.connections
            [protocol] = [connection.protocol for connection in b.server.connections]
            assert isinstance(protocol, Site)
            assert protocol.answered == [("GET /whoami", True), ("POST /upload", True)]


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/upload", 425), ("GET", "/whoami", 200)])
@scenario
async def test_what_a_proxy_forwards_early_is_too_early_if_it_changes_something(
    method: str, path: str, status: int
) -> None:
    """RFC 8470, section 5.1: this server cannot wait for the end of a handshake that is another's."""
    async with fleet() as (a, _), visit("aioquic", a.address, "/whoami") as proxy:
        await proxy.answers()
        stream_id = proxy.client._quic.get_next_available_stream_id()
        transfer = proxy.client._transfers[stream_id] = Transfer(path)
        headers = {":method": method, ":scheme": "https", ":authority": "localhost", ":path": path, "early-data": "1"}
        proxy.client._http.send_headers(stream_id, [(n.encode(), v.encode()) for n, v in headers.items()], True)
        proxy.client._transmit()
        with contextlib.suppress(ValueError):  # which a status other than 200 is
            await transfer.complete()
        assert transfer.status == status


def first_flight(ticket: Any, server: Address) -> list[bytes]:
    """What a client says before it has an answer: early data with a POST and a GET."""
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=["h3"], server_name="localhost", verify_mode=0, session_ticket=ticket
    )
    quic = QuicConnection(configuration=configuration)
    quic.connect(server, now=0.0)
    http = H3Connection(quic)
    for method, path in (("POST", "/upload"), ("GET", "/whoami")):
        headers = {":method": method, ":scheme": "https", ":authority": "localhost", ":path": path}
        stream_id = quic.get_next_available_stream_id()
        http.send_headers(stream_id, [(name.encode(), value.encode()) for name, value in headers.items()], True)
    return [data for data, _ in quic.datagrams_to_send(now=0.0)]


async def send_again(flight: list[bytes], eve: socket.socket, victim: Member) -> tuple[EarlyVerdict, list[Any]]:
    """What a server makes of a flight that it may have had before, and which of its requests it answers."""
    before = victim.tickets.early_counts.copy()
    for data in flight:
        eve.sendto(data, victim.address)
    await until(lambda: victim.tickets.early_counts != before)
    [verdict] = (victim.tickets.early_counts - before).elements()
    [connection] = victim.server.connections
    site = connection.protocol
    assert isinstance(site, Site)
    if verdict is EarlyVerdict.ACCEPTED:
        await until(lambda: site.answered)
    victim.server._abandon(connection)
    return verdict, site.answered


@scenario
async def test_somebody_who_sends_a_first_flight_again_has_it_read_once_by_each_server_and_changes_nothing() -> None:
    """The whole truth about replays: not one more than there are servers, and only of what may be repeated."""
    async with fleet() as (a, b):
        async with visit("aioquic", a.address, "/whoami") as first:
            await first.answers()
            flight = first_flight(await first.given_ticket(), a.address)
        for connection in list(a.server.connections):
            a.server._abandon(connection)
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as eve:
            get = [("GET /whoami", True)]
            assert await send_again(flight, eve, a) == (EarlyVerdict.ACCEPTED, get)  # it may be the client itself
            assert await send_again(flight, eve, a) == (EarlyVerdict.REPLAYED, [])
            assert await send_again(flight, eve, b) == (EarlyVerdict.ACCEPTED, get)
            assert await send_again(flight, eve, b) == (EarlyVerdict.REPLAYED, [])
            assert await send_again(flight, eve, a) == (EarlyVerdict.REPLAYED, [])


# A process, and several through a balancer.


def test_a_key_is_rolled_under_a_running_server(tmp_path: Path) -> None:
    """At SIGHUP, in three steps; a file that is wrong changes nothing."""
    path = tmp_path / "token.keys"
    (tmp_path / "server.yaml").write_text("name: a\n")

    def write(*keys: str) -> None:
        path.write_text("".join(f"{key}\n" for key in keys))
        path.chmod(0o600)

    old, new = KEY.hex(), OTHER_KEY.hex()
    log: list[str] = []

    def read_log(process: subprocess.Popen[str]) -> None:
        assert process.stderr
        for line in process.stderr:
            log.append(line)  # noqa: PERF402 - as it comes

    async def story(program: Program) -> None:
        async def comes_back(ticket: Any = None) -> tuple[bool, Any]:
            async with visit("aioquic", program.addresses[0], "/whoami", ticket=ticket) as client:
                [answer] = await client.answers()
                return answer["resumed"], await client.given_ticket()

        async def have(*keys: str, word: str = "event=token-keys") -> None:
            write(*keys)
            so_far = len(log)
            program.process.send_signal(signal.SIGHUP)
            await until(lambda: any(word in line for line in log[so_far:]))

        _, by_old = await comes_back()
        await have(old, new)
        assert (await comes_back(by_old))[0]
        await have(new, old)
        assert (await comes_back(by_old))[0]
        _, by_new = await comes_back()
        await have(new, old[:-1], word="reload-refused")
        assert any("reload-refused" in line and "line 2" in line for line in log)
        assert [(await comes_back(ticket))[0] for ticket in (by_old, by_new)] == [True, True]
        await have(new)
        assert [(await comes_back(ticket))[0] for ticket in (by_old, by_new)] == [False, True]

    write(old)
    with running(tmp_path, "--token-key-file", "token.keys") as program:
        reading = threading.Thread(target=read_log, args=[program.process])
        reading.start()
        try:
            asyncio.run(asyncio.wait_for(story(program), DEADLINE))
        finally:
            program.process.terminate()
            reading.join()
    assert [key for key in (old, new) if key in "".join(log)] == []


def test_a_client_whose_server_has_died_goes_on_with_another_in_no_time(tmp_path: Path) -> None:
    """The ticket's server is killed; its clients come back through the balancer, and their first flight is answered."""

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        given = {}
        for library in LIBRARIES:
            async with visit(library, balancer.address, "/whoami") as first:
                [answer] = await first.answers()
                given[library] = (answer["name"], await first.given_ticket())
        if GTLSCLIENT:
            first_by_gtls, _ = await gtls_visit(balancer.address, "/whoami", tmp_path)

        for library, (server, ticket) in given.items():
            await kill(stage, server)
            async with visit(library, balancer.address, "/whoami", ticket=ticket) as again:
                [answer] = await again.answers()
            assert answer["name"] != server
            assert (answer["resumed"], answer["early"]) == (True, True)
            await bring_back(stage, server)

        if GTLSCLIENT:
            await kill(stage, first_by_gtls["name"])
            answer, _ = await gtls_visit(balancer.address, "/whoami", tmp_path)
            assert answer["name"] != first_by_gtls["name"]
            assert (answer["resumed"], answer["early"]) == (True, True)

    perform(scene, Play(early_data=True, backends=("a", "b")))


async def kill(stage: Stage, server: str) -> None:
    """Kill a server, and wait until the balancer sends nobody there any more."""
    balancer = stage.balancers["one"]
    since = await stage.servers[server].child.kill()
    await balancer.child.logged("backend-down", since, backend=server)
    while (await balancer.metrics()).value("quiclb_backend_ring_share_ratio", backend=server):
        pass


async def bring_back(stage: Stage, server: str) -> None:
    since = time.time()
    await stage.restart(stage.servers[server])
    await stage.balancers["one"].child.logged("backend-up", since, backend=server)
