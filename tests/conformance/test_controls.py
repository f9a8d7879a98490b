"""The reference server passes, and each server that is wrong in one respect fails the check that is meant for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from backend.routable import Identity
from lb.address import Address
from lb.cid import CidConfig, Codec
from lb.conformance.client import ExaminationError
from lb.conformance.examination import Examination
from lb.conformance.judgement import Status
from lb.conformance.observed import Origin
from lb.conformance.subject import tokens_of
from lb.reset_scheme import Scheme
from tests.conformance import servers
from tests.conformance.servers import Place, examined, made_by, of, plan

pytestmark = pytest.mark.e2e

NOT_ASKED = {"reset-after-restart", "rotation", "rotation-old"}


@pytest.mark.parametrize(
    ("config", "retry"),
    [
        (servers.SINGLE_PASS, False),
        (servers.FOUR_PASS, True),
        (servers.PLAINTEXT, False),
        (servers.RANDOM_LOW_BITS, False),
        (servers.APPENDED, True),
    ],
)
def test_the_reference_server_passes(config: CidConfig, retry: bool) -> None:
    place = Place(config, retry=retry)
    seen, statuses = asyncio.run(examined(place, plan()))
    not_applicable = set() if retry else {"retry"}
    not_applicable |= set() if config.key else {"nonce-start"}
    assert of(statuses, Status.FAILED) == set()
    assert of(statuses, Status.SKIPPED) == NOT_ASKED | not_applicable
    assert len(seen.cids) > 80


def test_the_cid_of_a_preferred_address_is_looked_at_too() -> None:
    seen, statuses = asyncio.run(examined(Place(is_preferring=True), plan()))
    assert of(statuses, Status.FAILED) == set()
    assert any(each.origin is Origin.PREFERRED_ADDRESS and each.token is not None for each in seen.cids)


def test_the_reference_server_passes_a_restart_and_a_rotation_too() -> None:
    async def story() -> None:
        place = Place(retry=True)
        seen, statuses = await examined(place, plan(restart=place.restart, rotate=place.rotate))
        assert of(statuses, Status.FAILED) == set()
        assert of(statuses, Status.SKIPPED) == set()
        assert seen.rotation is not None
        assert len(seen.rotation.later) > 20
        assert any(each.after_restart for each in seen.cids)

    asyncio.run(story())


class Wrong(NamedTuple):
    """A server, the checks that it has to fail, and those that cannot be made on it."""

    name: str
    place: Callable[[], Place]
    fails: set[str]
    skips: set[str] = set()


def wrong_cids(make: Callable[[CidConfig], Callable[[], bytes]], config: CidConfig = servers.SINGLE_PASS) -> Any:
    return lambda: Place(config, spoil=made_by(make, config))


WRONG = [
    Wrong(
        "random octets in place of the routing block",
        wrong_cids(servers.random_block),
        {"routable"},
        {"nonce-start", "reset-tokens"},
    ),
    Wrong(
        "random CIDs", wrong_cids(servers.random_octets), {"routable", "first-octet"}, {"nonce-start", "reset-tokens"}
    ),
    Wrong("unroutable CIDs", wrong_cids(servers.unroutable), {"routable"}, {"nonce-start", "reset-tokens"}),
    Wrong("another server's ID", wrong_cids(servers.other_server), {"routable"}, {"nonce-start", "reset-tokens"}),
    Wrong(
        "an old draft's cipher",
        wrong_cids(servers.old_cipher, servers.FOUR_PASS),
        {"routable"},
        {"nonce-start", "reset-tokens"},
    ),
    Wrong(
        "another server's ID in preferred_address",
        lambda: Place(is_preferring=True, twist=servers.with_a_foreign_second_cid),
        {"routable"},
    ),
    Wrong("nonces that come twice", wrong_cids(servers.each_nonce_twice, servers.APPENDED), {"nonce-unique"}),
    Wrong("a counter to be seen", wrong_cids(servers.counted_from(None), servers.PLAINTEXT), {"cid-pattern"}),
    Wrong("an encrypted counter from zero", wrong_cids(servers.counted_from(0)), {"nonce-start"}),
    Wrong(
        "low bits that stay the same",
        wrong_cids(servers.low_bits(lambda _: 16), servers.RANDOM_LOW_BITS),
        {"first-octet"},
    ),
    Wrong(
        "low bits that are a counter",
        wrong_cids(servers.low_bits(lambda n: n % 32), servers.RANDOM_LOW_BITS),
        {"first-octet"},
    ),
    Wrong(
        "low bits that are not the length",
        wrong_cids(servers.low_bits(lambda n: 15), servers.RANDOM_LOW_BITS),
        {"first-octet"},
    ),
    Wrong("resets of other servers' connections", lambda: Place(make=servers.ForeignResets), {"reset-foreign"}),
    Wrong("resets with wrong tokens", lambda: Place(make=servers.WrongResets), {"reset"}),
    Wrong("no resets", lambda: Place(make=servers.NoResets), {"reset"}, {"reset-size"}),
    Wrong("resets that are too large", lambda: Place(make=servers.LargeResets), {"reset-size"}),
    Wrong("resets with long headers", lambda: Place(make=servers.LongHeaderResets), {"reset-size"}),
    Wrong("random tokens", lambda: Place(make=servers.RandomTokens), {"reset-tokens"}),
    Wrong("one token for all", lambda: Place(make=servers.OneToken), {"reset-tokens", "token-unique"}),
    Wrong("no token in the handshake", lambda: Place(twist=servers.without_token), {"reset-tokens"}),
    Wrong("Retry packets with random CIDs", lambda: Place(make=servers.RandomRetries, retry=True), {"retry"}),
    Wrong("more CIDs than clients take", lambda: Place(twist=servers.beyond_the_limit), {"cid-limit"}),
    Wrong("no CIDs for those that are retired", lambda: Place(twist=servers.without_refills), {"cid-pool"}),
    Wrong(
        "no migration",
        lambda: Place(twist=servers.with_parameter(b"\x0c\x00")),
        {"migration-allowed"},
        {"active-migration", "path-response"},
    ),
    Wrong(
        "connections tied to addresses",
        lambda: Place(twist=servers.tied_to_its_address),
        {"nat-rebinding", "active-migration"},
        {"path-challenge", "path-response"},
    ),
    Wrong("no PATH_RESPONSE", lambda: Place(twist=servers.without_path_responses), {"path-response"}),
    Wrong("no PATH_CHALLENGE", lambda: Place(twist=servers.without_validation), {"path-challenge"}),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, dict[str, Status] | BaseException]:
    """What became of those wrong servers whose tests are run: four at a time, since each waits more than it works."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec"))
    chosen = [wrong for item in tests if isinstance(wrong := item.callspec.params.get("wrong"), Wrong)]
    places = asyncio.Semaphore(4)

    async def outcome(wrong: Wrong) -> dict[str, Status]:
        async with places:
            _, statuses = await examined(wrong.place(), plan(quiet=1.5))
        return statuses

    async def all_of_them() -> dict[str, dict[str, Status] | BaseException]:
        found = await asyncio.gather(*map(outcome, chosen), return_exceptions=True)
        return dict(zip((wrong.name for wrong in chosen), found, strict=True))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_wrong_server_fails_the_check_that_is_meant(
    wrong: Wrong, outcomes: dict[str, dict[str, Status] | BaseException]
) -> None:
    statuses = outcomes[wrong.name]
    if isinstance(statuses, BaseException):
        raise statuses
    place = wrong.place()
    assert of(statuses, Status.FAILED) == wrong.fails
    skips = (
        NOT_ASKED
        | wrong.skips
        | (set() if place.retry else {"retry"})
        | (set() if place.config.key else {"nonce-start"})
    )
    assert of(statuses, Status.SKIPPED) == skips


@pytest.mark.parametrize(
    ("after", "fails"),
    [
        ("no resets", {"reset-after-restart"}),
        ("the same nonces", {"nonce-unique"}),
        ("other reset keys", {"reset-after-restart", "reset-tokens"}),
    ],
)
def test_a_server_that_forgets_more_than_its_connections_fails(after: str, fails: set[str]) -> None:
    async def story() -> None:
        place = Place(spoil=made_by(servers.counted_from(1 << 90), servers.SINGLE_PASS))

        async def restart() -> None:
            await place.stop()
            if after != "the same nonces":
                place.spoil = lambda identity: None
            if after == "no resets":
                place.make = servers.NoResets
            if after == "other reset keys":
                place.reset_key = servers.NEW_RESET_KEY
            await place.start()

        _, statuses = await examined(place, plan(restart=restart))
        assert of(statuses, Status.FAILED) == fails

    asyncio.run(story())


def test_a_server_that_is_not_restarted_by_its_command_fails() -> None:
    async def nothing() -> None:
        pass

    _, statuses = asyncio.run(examined(Place(), plan(restart=nothing)))
    assert of(statuses, Status.FAILED) == {"reset-after-restart"}


def test_a_server_that_is_not_up_again_fails() -> None:
    async def story() -> None:
        place = Place()
        seen, statuses = await examined(place, plan(restart=place.stop, restart_within=0.5))
        assert of(statuses, Status.FAILED) == {"reset-after-restart"}
        assert seen.restart is not None
        assert seen.restart.error == "not up again 0.5 s after the restart"

    asyncio.run(story())


def test_a_command_that_fails_is_what_the_report_says() -> None:
    async def refuse() -> None:
        raise ExaminationError("--restart: exit status 3")

    async def story() -> None:
        seen, statuses = await examined(Place(), plan(restart=refuse, rotate=refuse))
        assert of(statuses, Status.FAILED) == {"reset-after-restart", "rotation"}
        assert seen.restart is not None
        assert seen.restart.error == "--restart: exit status 3"

    asyncio.run(story())


async def ignored(place: Place) -> None:
    """SIGHUP means nothing to it."""


async def for_new_connections(place: Place) -> None:
    place.identity.switch(Codec(servers.NEW), servers.SERVER_ID, servers.NEW_RESET_KEY)


async def without_retiring(place: Place) -> None:
    """Clients get new CIDs for those that they retire, and are not asked to."""
    await for_new_connections(place)
    for connection in place.server.connections:
        connection._remote_active_connection_id_limit += 1
        connection._replenish_connection_ids()
        connection.protocol.transmit()


async def with_the_old_key(place: Place) -> None:
    """It rotates to a configuration that is not the one in the file."""
    place.identity.switch(Codec(servers.STALE_KEY), servers.SERVER_ID, servers.NEW_RESET_KEY)
    place.server.renew_cids()


async def forgetting_at_once(place: Place) -> None:
    old = list(place.server._by_cid)
    await place.rotate()
    for cid in old:
        place.server._by_cid.pop(cid, None)


@pytest.mark.parametrize(
    ("rotate", "fails"),
    [
        (ignored, {"rotation"}),
        (for_new_connections, {"rotation"}),
        (without_retiring, {"rotation"}),
        (with_the_old_key, {"rotation"}),
        (forgetting_at_once, {"rotation-old"}),
    ],
)
def test_a_server_that_rotates_wrongly_fails(rotate: Callable[[Place], Any], fails: set[str]) -> None:
    async def story() -> None:
        place = Place()
        how = plan(rotate=lambda: rotate(place), within=1.0, timeout=2.0)
        _, statuses = await examined(place, how)
        assert of(statuses, Status.FAILED) == fails

    asyncio.run(story())


def test_a_server_that_makes_tokens_in_another_way_needs_another_scheme() -> None:
    async def story() -> None:
        nginx = tokens_of(Scheme.NGINX, bytes(range(20)), "127.0.0.1")

        def spoil(identity: Identity) -> None:
            identity.reset_token = nginx  # type: ignore[method-assign,assignment]

        _, statuses = await examined(Place(spoil=spoil), plan(), replace(servers.subject(), token=nginx))
        assert of(statuses, Status.FAILED) == set()
        _, statuses = await examined(Place(spoil=spoil), plan())
        assert of(statuses, Status.FAILED) == {"reset-tokens", "reset"}

    asyncio.run(story())


def test_an_examination_ends_with_its_deadline() -> None:
    how = plan(connections=1_000_000, deadline=1.0)
    seen, statuses = asyncio.run(examined(Place(), how))
    assert not seen.is_complete
    assert statuses["completed"] is Status.FAILED


def test_a_server_that_is_not_there_is_an_error_of_one_line() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))  # it hears, and says nothing
        silent = Address(*taken.getsockname())

        async def story() -> None:
            with pytest.raises(ExaminationError, match=r"^no handshake within 0\.3 s$"):
                await Examination(silent, servers.subject(), plan(timeout=0.3)).run()

        asyncio.run(story())

    async def refused() -> None:
        with pytest.raises(ExaminationError, match=r"^no handshake: Connection refused$"):
            await Examination(silent, servers.subject(), plan(timeout=5.0)).run()

    asyncio.run(refused())
