"""Tokens: what they prove, to whom, how often and how long; by themselves, and with real clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted
from aioquic.quic.packet import QuicErrorCode, QuicProtocolVersion
from hypothesis import given
from hypothesis import strategies as st

from backend.__main__ import quic_configuration
from backend.resumable import ResumableConnection
from backend.routable import IssuedCid
from backend.seal import OVERHEAD, Kind, Seal
from backend.server import Outcome
from backend.tokens import (
    MAX_CLOCK_SKEW,
    NEW_TOKEN_LIFETIME,
    RETRY_LIFETIME,
    Binding,
    Proof,
    Tokens,
    TokenVerdict,
    kind_of,
)
from lb.address import Address
from tests.backend.returning import visit
from tests.test_backend import CERTIFICATE, Backend, identity, initial, scenario, serve, until, unverified

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
ADDRESS = ("192.0.2.1", 4433)
V1, V2 = QuicProtocolVersion.VERSION_1, QuicProtocolVersion.VERSION_2
ORIGINAL, RETRY_SOURCE = b"original", b"a retry's source"
NOW = 1_800_000_000.0


class Clock:
    """The wall clock of one server."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def tokens(clock: Clock | None = None, *keys: bytes, **options: Any) -> Tokens:
    return Tokens(Seal(keys or [KEY], os.urandom), clock or Clock(), **options)


def retry_token(maker: Tokens) -> bytes:
    return maker.for_retry(ADDRESS, V1, ORIGINAL, RETRY_SOURCE)


def verdict(
    checker: Tokens, token: bytes, address: Any = ADDRESS, version: int = V1, dcid: bytes = RETRY_SOURCE
) -> Any:
    """What becomes of a token, which is used if it is good; exactly one thing is counted."""
    before = checker.counts[kind_of(token)].copy()
    total = sum(counts.total() for counts in checker.counts.values())
    proof = checker.check(token, address, version, dcid)
    if proof:
        checker.use(proof)
    [counted] = checker.counts[kind_of(token)] - before
    assert sum(counts.total() for counts in checker.counts.values()) == total + 1
    assert (proof is not None) is (counted is TokenVerdict.ACCEPTED)
    return counted


def remembered(checker: Tokens) -> int:
    return sum(len(memory) for memory in checker._used.values())


def test_a_retry_token_proves_the_address_and_says_the_original_dcid_to_every_server() -> None:
    proof = tokens().check(retry_token(tokens()), ADDRESS, V1, RETRY_SOURCE)
    assert proof
    assert (proof.kind, proof.original, proof.made_at) == (Kind.RETRY_TOKEN, ORIGINAL, NOW)


def test_a_token_for_later_is_good_for_any_connection_from_its_address() -> None:
    token = tokens().for_later(ADDRESS, V1)
    assert verdict(tokens(), token, ("192.0.2.1", 1), dcid=b"anything") is TokenVerdict.ACCEPTED
    assert isinstance(tokens().check(token, ADDRESS, V1, b""), Proof)


WRONG: dict[str, tuple[dict[str, Any], TokenVerdict, TokenVerdict]] = {
    "nothing": ({}, TokenVerdict.ACCEPTED, TokenVerdict.ACCEPTED),
    "address": ({"address": ("192.0.2.2", 4433)}, TokenVerdict.WRONG_ADDRESS, TokenVerdict.WRONG_ADDRESS),
    "family": ({"address": ("2001:db8::1", 4433, 0, 0)}, TokenVerdict.WRONG_ADDRESS, TokenVerdict.WRONG_ADDRESS),
    "port": ({"address": ("192.0.2.1", 4434)}, TokenVerdict.WRONG_PORT, TokenVerdict.ACCEPTED),
    "connection ID": ({"dcid": ORIGINAL}, TokenVerdict.WRONG_CID, TokenVerdict.ACCEPTED),
    "version": ({"version": V2}, TokenVerdict.WRONG_VERSION, TokenVerdict.WRONG_VERSION),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_token_is_good_for_what_it_was_made_for_only(case: str) -> None:
    how, of_retry, of_later = WRONG[case]
    checker = tokens()
    assert verdict(checker, retry_token(tokens()), **how) is of_retry
    assert verdict(checker, tokens().for_later(ADDRESS, V1), **how) is of_later
    assert remembered(checker) == [of_retry, of_later].count(TokenVerdict.ACCEPTED)


@pytest.mark.parametrize(
    ("kind", "lifetime"), [(Kind.RETRY_TOKEN, RETRY_LIFETIME), (Kind.NEW_TOKEN, NEW_TOKEN_LIFETIME)]
)
def test_a_token_is_good_from_now_until_it_expires_by_every_servers_clock(kind: Kind, lifetime: float) -> None:
    maker = tokens()
    token = retry_token(maker) if kind is Kind.RETRY_TOKEN else maker.for_later(ADDRESS, V1)
    for off, expected in {
        -MAX_CLOCK_SKEW - 1: TokenVerdict.NOT_YET,
        -MAX_CLOCK_SKEW + 1: TokenVerdict.ACCEPTED,
        lifetime - 1: TokenVerdict.ACCEPTED,
        lifetime + 1: TokenVerdict.EXPIRED,
    }.items():
        assert verdict(tokens(Clock(NOW + off)), token) is expected


def test_tokens_of_a_retired_key_and_of_other_fleets_are_refused() -> None:
    for token in (retry_token(tokens()), tokens().for_later(ADDRESS, V1)):
        checker = tokens(None, OTHER_KEY)
        assert verdict(checker, token) is TokenVerdict.UNKNOWN_KEY
        assert verdict(tokens(None, OTHER_KEY, KEY), token) is TokenVerdict.ACCEPTED
        assert remembered(checker) == 0


def test_a_token_is_accepted_once_by_each_server_and_by_another_once_again() -> None:
    """What cannot be prevented without a memory that all servers share, and is said in docs/tokens.md."""
    for make in (retry_token, lambda maker: maker.for_later(ADDRESS, V1)):
        a, b = tokens(), tokens()
        token = make(a)
        assert [verdict(each, token) for each in (a, a, b, b, a)] == [
            TokenVerdict.ACCEPTED,
            TokenVerdict.REPLAYED,
            TokenVerdict.ACCEPTED,
            TokenVerdict.REPLAYED,
            TokenVerdict.REPLAYED,
        ]


def test_a_token_that_made_no_connection_is_not_used_up() -> None:
    checker = tokens()
    token = retry_token(checker)
    for _ in range(3):
        assert checker.check(token, ADDRESS, V1, RETRY_SOURCE)
    assert remembered(checker) == 0
    assert verdict(checker, token) is TokenVerdict.ACCEPTED


def test_used_tokens_are_remembered_within_a_bound_and_refused_beyond_it() -> None:
    clock = Clock()
    checker = tokens(clock, remembered=50)
    used = []
    for _ in range(200):
        clock.now += 1
        used.append(checker.for_later(ADDRESS, V1))
        assert verdict(checker, used[-1]) is TokenVerdict.ACCEPTED
        assert remembered(checker) <= 50
    verdicts = Counter(verdict(checker, token) for token in used)
    assert set(verdicts) == {TokenVerdict.REPLAYED, TokenVerdict.FORGOTTEN}
    clock.now += 1
    assert verdict(checker, checker.for_later(ADDRESS, V1)) is TokenVerdict.ACCEPTED


def test_without_the_port_a_retry_token_follows_its_client_to_another() -> None:
    checker = tokens(binding=Binding.ADDRESS)
    assert verdict(checker, retry_token(tokens()), ("192.0.2.1", 1)) is TokenVerdict.ACCEPTED
    assert verdict(checker, retry_token(tokens()), ("192.0.2.2", 4433)) is TokenVerdict.WRONG_ADDRESS


def test_tokens_for_later_can_be_off() -> None:
    checker = tokens(offers_new_tokens=False)
    assert verdict(checker, tokens().for_later(ADDRESS, V1)) is TokenVerdict.OFF
    assert verdict(checker, retry_token(tokens())) is TokenVerdict.ACCEPTED


TRUE = {"retry": retry_token(tokens()), "later": tokens().for_later(ADDRESS, V1)}


@given(st.sampled_from(sorted(TRUE)), st.data())
def test_no_forgery_is_accepted_or_leaves_anything_behind(kind: str, data: st.DataObject) -> None:
    token = bytearray(TRUE[kind])
    how = data.draw(st.sampled_from(["bits", "cut", "more", "mix", "anything"]))
    if how == "bits":
        for bit in data.draw(st.sets(st.integers(0, 8 * len(token) - 1), min_size=1, max_size=4)):
            token[bit // 8] ^= 1 << bit % 8
    elif how == "cut":
        del token[data.draw(st.integers(0, len(token) - 1)) :]
    elif how == "more":
        token += data.draw(st.binary(min_size=1, max_size=1200))
    elif how == "mix":
        at = data.draw(st.integers(1, len(token) - 1))
        token[at:] = TRUE["later" if kind == "retry" else "retry"][at:]
    else:
        token[:] = data.draw(st.binary(min_size=1, max_size=1300))
    checker = tokens()
    assert verdict(checker, bytes(token)) not in (TokenVerdict.ACCEPTED, TokenVerdict.REPLAYED)
    assert remembered(checker) == 0


def test_nobody_can_see_in_a_token_whose_it_is_or_that_two_are_one_clients() -> None:
    """An observer could otherwise follow a client that moves (RFC 9000, section 8.1.3)."""
    one, other = (tokens().for_later(ADDRESS, V1) for _ in range(2))
    assert bytes(map(int, ADDRESS[0].split("."))) not in one
    assert [i for i in range(5, len(one) - 7) if one[i : i + 8] == other[i : i + 8]] == []
    assert len(one) == OVERHEAD + 8 + 4 + 5


# With real clients.

pytestmark = pytest.mark.e2e


@contextlib.asynccontextmanager
async def fleet(**options: Any) -> AsyncIterator[tuple[Backend, Backend]]:
    """Two servers that share a key and nothing else."""
    async with serve(tokens=tokens_now(), **options) as a, serve(tokens=tokens_now(), **options) as b:
        yield a, b


def tokens_now() -> Tokens:
    return Tokens(Seal([KEY], os.urandom), time.time)


def accepted(backend: Backend, kind: Kind) -> int:
    assert backend.server.tokens
    return backend.server.tokens.counts[kind][TokenVerdict.ACCEPTED]


class Hand:
    """A client whose datagrams are carried by hand, to whomever the test likes."""

    def __init__(self, quic: QuicConnection, server: Address) -> None:
        self.quic = quic
        self.server = server
        self.terminated: ConnectionTerminated | None = None
        self.is_connected = False
        self.sent: list[bytes] = []
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(("127.0.0.1", 0))
        self._loop = asyncio.get_running_loop()
        quic.connect(server, now=self._loop.time())

    def close(self) -> None:
        self._sock.close()

    def send(self, to: Address) -> None:
        """Carry what the client has to say."""
        for data, _ in self.quic.datagrams_to_send(now=self._loop.time()):
            self.sent.append(data)
            self._sock.sendto(data, to)

    async def receive(self) -> bytes:
        """Give it one datagram, as if it came from whom it believes to be speaking to."""
        data = await self._loop.sock_recv(self._sock, 65536)
        self.quic.receive_datagram(data, self.server, now=self._loop.time())
        while event := self.quic.next_event():
            self.is_connected |= isinstance(event, HandshakeCompleted)
        self.terminated = self.quic._close_event  # which aioquic tells when it has been silent for long enough
        return data

    async def shake(self, to: Address) -> None:
        """Go on until there is a connection, or none."""
        self.send(to)
        while not (self.is_connected or self.terminated):
            await self.receive()
            self.send(to)


@pytest.fixture
def quic() -> QuicConnection:
    return unverified()


@contextlib.contextmanager
def by_hand(quic: QuicConnection, server: Address) -> Iterator[Hand]:
    with contextlib.closing(Hand(quic, server)) as hand:
        yield hand


@scenario
async def test_a_client_that_one_server_sent_away_by_retry_is_taken_by_another(quic: QuicConnection) -> None:
    async with fleet(retry=True) as (a, b):
        with by_hand(quic, a.address) as client:
            client.send(a.address)
            await client.receive()  # the Retry
            await client.shake(b.address)
            assert client.is_connected
        assert a.server.outcomes == Counter({Outcome.RETRIED: 1})
        assert b.server.outcomes == Counter({Outcome.ACCEPTED: 1})
        assert accepted(b, Kind.RETRY_TOKEN) == 1


@scenario
async def test_a_server_that_sends_no_retry_itself_takes_those_that_another_has_sent_away(quic: QuicConnection) -> None:
    async with fleet() as (_, b), serve(tokens=tokens_now(), retry=True) as strict:
        with by_hand(quic, strict.address) as client:
            client.send(strict.address)
            await client.receive()
            await client.shake(b.address)
            assert client.is_connected


@scenario
async def test_a_bad_retry_token_is_told_so_at_once_and_costs_no_state(quic: QuicConnection) -> None:
    async with serve(tokens=tokens_now(), retry=True) as stranger, fleet(retry=True) as (a, _):
        assert stranger.server.tokens
        stranger.server.tokens._seal.switch([OTHER_KEY])
        with by_hand(quic, stranger.address) as client:
            client.send(stranger.address)
            await client.receive()
            await client.shake(a.address)
            assert client.terminated
            assert client.terminated.error_code == QuicErrorCode.INVALID_TOKEN
        assert a.server.tokens
        assert a.server.tokens.counts[Kind.RETRY_TOKEN] == {TokenVerdict.UNKNOWN_KEY: 1}
        assert a.server.outcomes == {Outcome.INVALID_TOKEN: 1}
        assert (a.server.connections, a.server._by_cid, remembered(a.server.tokens)) == (set(), {}, 0)


@scenario
async def test_a_retry_token_makes_one_connection_and_no_second(quic: QuicConnection) -> None:
    """What anybody has seen on the way and sends again, from the same address even."""
    async with fleet(retry=True) as (a, _):
        with by_hand(quic, a.address) as client:
            client.send(a.address)
            await client.receive()
            retried = len(client.sent)
            await client.shake(a.address)
            await until(lambda: a.connection._handshake_confirmed)
            a.server._abandon(a.connection)  # it is over
            client._sock.sendto(client.sent[retried], a.address)
            await until(lambda: a.server.outcomes[Outcome.INVALID_TOKEN])
        assert a.server.tokens
        assert a.server.tokens.counts[Kind.RETRY_TOKEN] == {TokenVerdict.ACCEPTED: 1, TokenVerdict.REPLAYED: 1}
        assert a.server.connections == set()


@scenario
async def test_a_token_for_later_saves_the_retry_on_another_server_once() -> None:
    async with fleet(retry=True) as (a, b):
        async with visit("aioquic", a.address, "/whoami") as first:
            token = (await first.given_token())[-1]
        for expected in ({Outcome.ACCEPTED: 1}, {Outcome.ACCEPTED: 2, Outcome.RETRIED: 1}):
            async with visit("aioquic", b.address, "/whoami", token=token) as again:
                [answer] = await again.answers()
                assert answer["name"] == "a"
            assert b.server.outcomes == expected
        assert b.server.tokens
        assert b.server.tokens.counts[Kind.NEW_TOKEN] == {TokenVerdict.ACCEPTED: 1, TokenVerdict.REPLAYED: 1}


@scenario
async def test_whoever_has_proved_his_address_is_held_to_no_limit_of_three_times(quic: QuicConnection) -> None:
    async with fleet() as (a, b):
        async with visit("aioquic", a.address, "/whoami") as first:
            token = (await first.given_token())[-1]
        for given, is_validated in ((token, True), (token, False), (b"", False)):
            configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], verify_mode=0, token=given)
            with by_hand(QuicConnection(configuration=configuration), b.address) as client:
                client.send(b.address)
                await client.receive()
                [connection] = b.server.connections
                assert connection._network_paths[0].is_validated is is_validated
                b.server._abandon(connection)


BAD_TOKENS = {
    "of another make": b"a token that somebody else has made" * 3,
    "of another fleet": tokens(None, OTHER_KEY).for_later(("127.0.0.1", 1), V1),
    "of another address": Tokens(Seal([KEY], os.urandom), time.time).for_later(("127.0.0.2", 1), V1),
    "expired": Tokens(Seal([KEY], os.urandom), Clock(time.time() - NEW_TOKEN_LIFETIME - 60)).for_later(
        ("127.0.0.1", 1), V1
    ),
    "oversized": bytes([Kind.NEW_TOKEN]) + bytes(600),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
@pytest.mark.parametrize("retry", [False, True])
@scenario
async def test_a_client_with_a_bad_token_for_later_is_as_one_without(case: str, retry: bool) -> None:
    """RFC 9000, section 8.1.3: it may be from long ago, and its connection must not fail for that."""
    async with fleet(retry=retry) as (a, _):
        async with visit("aioquic", a.address, "/whoami", token=BAD_TOKENS[case]) as client:
            assert len(await client.answers()) == 1
        assert a.server.outcomes == {Outcome.ACCEPTED: 1} | ({Outcome.RETRIED: 1} if retry else {})
        assert accepted(a, Kind.NEW_TOKEN) == 0


@scenario
async def test_a_client_that_moves_to_another_address_is_given_a_token_for_it() -> None:
    async with fleet() as (a, b):
        async with visit("aioquic", a.address, "/whoami") as first:
            await first.given_token()
            await first.client.rebind("127.0.0.2")
            home, away = await first.given_token(2)
        assert b.server.tokens
        assert verdict(b.server.tokens, home, ("127.0.0.1", 1)) is TokenVerdict.ACCEPTED
        assert verdict(b.server.tokens, away, ("127.0.0.1", 1)) is TokenVerdict.WRONG_ADDRESS
        assert verdict(b.server.tokens, away, ("127.0.0.2", 1)) is TokenVerdict.ACCEPTED


@scenario
async def test_where_addresses_mean_nothing_no_tokens_for_later_are_given() -> None:
    own = Tokens(Seal([KEY], os.urandom), time.time, offers_new_tokens=False)
    async with serve(tokens=own) as a, visit("aioquic", a.address, "/whoami") as client:
        await client.answers()
        await client.client.ping()
        assert client.kept.tokens == []


@scenario
async def test_a_server_that_takes_nobody_any_more_says_so(quic: QuicConnection) -> None:
    async with fleet(retry=True) as (a, _):
        a.server.is_accepting = False
        with by_hand(quic, a.address) as client:
            await client.shake(a.address)
            assert client.terminated
            assert client.terminated.error_code == QuicErrorCode.CONNECTION_REFUSED
        assert (a.server.outcomes, a.server.connections) == ({Outcome.REFUSED: 1}, set())


@scenario
async def test_garbage_in_initials_costs_no_state_whatever_token_it_has() -> None:
    rng = random.Random(5)
    async with fleet(retry=True) as (a, _):
        assert a.server.tokens
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            sock.bind(("127.0.0.1", 0))
            good = a.server.tokens.for_later(sock.getsockname(), V1)
            for _ in range(100):
                token = bytearray(rng.choice([good[:50], TRUE["retry"][:60], b"\x01", bytes(60)]))
                token[-1] ^= rng.randrange(256)
                sock.sendto(initial(rng.randbytes(8), bytes(token)), a.address)
            sock.sendto(initial(b"whatever", good), a.address)  # an Initial that is none, with a token that is one
            await until(lambda: a.server.outcomes.total() == 101)
        assert a.server.outcomes[Outcome.INITIAL_NOT_AUTHENTIC] == 1
        assert (a.server.connections, a.server._by_cid, remembered(a.server.tokens)) == (set(), {}, 0)


def test_a_token_that_was_lost_on_the_way_is_followed_by_another() -> None:
    """Two endpoints without a network between them; everything that carried the first token is dropped."""
    got: list[bytes] = []
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], verify_mode=0)
    client = QuicConnection(configuration=configuration, token_handler=got.append)
    server = lone_server(client, tokens())
    here, there = ("192.0.2.1", 1), ("192.0.2.2", 2)
    now, is_lossy = 0.0, False
    client.connect(there, now=now)
    for _ in range(200):
        now += 0.01
        for data, _to in client.datagrams_to_send(now):
            server.receive_datagram(data, here, now)
        is_lossy = server._handshake_complete and now < 0.5
        for data, _to in server.datagrams_to_send(now):
            if not is_lossy:
                client.receive_datagram(data, there, now)
        for side in (client, server):
            timer = side.get_timer()
            if timer is not None and timer <= now:
                side.handle_timer(now)
        if is_lossy:
            assert got == []
    assert len(got) >= 1
    assert verdict(tokens(), got[0], here) is TokenVerdict.ACCEPTED


class _Issuer:
    """Gives a lone connection its CIDs."""

    def issue(self, connection: Any) -> IssuedCid:
        return IssuedCid(identity_.new_cid(), os.urandom(16))


identity_ = identity()


def lone_server(client: QuicConnection, own: Tokens) -> ResumableConnection:
    return ResumableConnection(
        _Issuer(),
        configuration=quic_configuration(identity_, CERTIFICATE),
        original_destination_connection_id=client.original_destination_connection_id,
        tokens=own,
    )
