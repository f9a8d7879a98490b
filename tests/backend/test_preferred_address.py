"""A client comes in through a balancer and goes on at the server's own address, where the balancer is nobody."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import pytest

from backend.clients.aioquic_client import AioquicClient
from backend.clients.fleet import missing
from backend.clients.gtlsclient import GtlsClient
from backend.clients.transfer import Transfer
from backend.demo.place import has_ipv6
from backend.demo.stage import SERVICE, Balancer, Play, Stage
from backend.options import arguments
from backend.paths import PathEvent
from lb.address import Address
from lb.cid import Codec
from tests.e2e.theatre import Theatre, session, theatre, whoami
from tests.test_backend import SINGLE_PASS, connect, identity, quic_client, scenario, serve, until

pytestmark = pytest.mark.e2e

# "followed" is what their makers have them do; qh3 reads the parameter and does nothing.
FOLLOWERS = ("aioquic", GtlsClient.name)
ENOUGH = 10  # octets of a slow download: it is on its way
MORE = 40  # octets of it: half a second's
STILL = 0.15  # seconds without a datagram through the balancer, while a line comes every 50 ms


@pytest.fixture(params=FOLLOWERS)
def follower(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = missing(name)
    if reason is not None:
        pytest.skip(reason)
    return name


async def forwarded(balancer: Balancer) -> float:
    return (await balancer.metrics()).value("quiclb_datagrams_total")


async def resets(balancer: Balancer) -> float:
    return (await balancer.metrics()).value("quiclb_resets_total", kind="pushed")


async def more_of(transfer: Transfer) -> None:
    """Wait for lines that the server has written after now."""
    await transfer.reached(len(transfer.body) + MORE)


async def left_alone(balancer: Balancer) -> None:
    """Wait until nothing comes through a balancer any more."""
    before = -1.0
    while (now := await forwarded(balancer)) != before:
        before = now
        await asyncio.sleep(STILL)


async def quiclb(stage: Stage, *words: str) -> None:
    path = stage.directory / "balancer-one.yaml"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lb", *words, "-c", str(path), stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0


@pytest.fixture(scope="module")
def direct() -> Iterator[Theatre]:
    with theatre(Play(backends=("a", "b"), preferred=("127.0.0.1",))) as made:
        yield made


def test_a_client_that_moved_there_does_not_notice_that_the_balancer_dies(direct: Theatre, follower: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session(follower, balancer.address, "/slow/60") as client:
            await client.transfers[0].reached(ENOUGH)
            await left_alone(balancer)
            await balancer.child.kill()
            await more_of(client.transfers[0])
        await stage.run(balancer)

    direct.play(scene)


def test_a_reset_for_the_connection_id_that_it_came_by_is_none_for_the_one_that_it_has(
    direct: Theatre, follower: str
) -> None:
    """The balancer declares the server dead, and resets its flows. Whoever has left the balancer carries on."""

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        before = await resets(balancer)
        async with session(follower, balancer.address, "/whoami", "/slow/60") as client:
            name = (await whoami(client))["name"]
            await client.transfers[1].reached(ENOUGH)
            await left_alone(balancer)
            await quiclb(stage, "fence", f"{SERVICE}/{name}")
            while await resets(balancer) == before:  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.01)
            await more_of(client.transfers[1])
            assert client.reset_at is None
        await quiclb(stage, "unfence", f"{SERVICE}/{name}")

    direct.play(scene)


def test_who_does_not_follow_stays_with_the_balancer(direct: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session("qh3", balancer.address, "/slow/0.5", "/whoami") as client:
            await client.transfers[0].complete()
            before = await forwarded(balancer)
            client.speak()
            while await forwarded(balancer) == before:  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.01)

    direct.play(scene)


@pytest.mark.skipif(not has_ipv6(), reason="there is no ::1 here")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@scenario
async def test_a_client_takes_the_address_of_its_family_and_the_server_sees_it_move(host: str) -> None:
    who = identity()
    async with serve(who, also=["::1"]) as backend:
        preferred = await backend.server.prefer([Address("127.0.0.3", 0), Address("::1", 0)])
        async with await AioquicClient.connect(backend.address._replace(host=host)) as client:
            await until(lambda: backend.server.paths.counts[PathEvent.MIGRATED])
            own = preferred[host == "::1"]
            assert Address(*client._quic._network_paths[0].addr[:2]) == own
            answer = await client.whoami()
            assert answer["client"] == str(client.local)
            second = backend.connection._host_cids[0]
            assert (second.sequence_number, second.cid) == (1, client._quic._peer_cid.cid)
            assert Codec(SINGLE_PASS).decode(second.cid) is not None
            path = backend.connection._network_paths[0]
            assert path.is_validated
            assert path.addr[-1].get_extra_info("sockname")[:2] == own
            await until(lambda: len(backend.connection.cids) == 8)
        assert backend.server.paths.counts[PathEvent.VALIDATED] == 1
        assert PathEvent.FAILED not in backend.server.paths.counts


@scenario
async def test_the_address_that_balancers_send_to_may_be_the_preferred_one() -> None:
    async with serve() as backend:
        assert await backend.server.prefer([backend.address]) == [backend.address]
        async with connect(backend.address) as client:
            assert (await client.request("GET", "/whoami")).status == 200
            assert client.quic._peer_cid_available[0].sequence_number == 1


@pytest.mark.parametrize("limit", [2, 8])
@scenario
async def test_its_connection_id_is_one_of_those_that_the_client_allows(limit: int) -> None:
    async with serve() as backend:
        await backend.server.prefer([Address("127.0.0.3", 0)])
        quic = quic_client(cid_limit=limit)
        quic._probe_preferred_address = lambda: None  # type: ignore[method-assign]  # it stays
        async with connect(backend.address, quic) as client:
            await until(lambda: len(client.cids()) == limit)
            backend.server.renew_cids()
            await until(lambda: len(backend.connection.cids) == limit and backend.connection.cids[0] in client.cids())
            assert backend.connection._host_cids[0].sequence_number == limit


@scenario
async def test_without_one_there_is_none() -> None:
    async with serve() as backend:
        assert await backend.server.prefer([]) == []
        probes: list[bool] = []
        quic = quic_client()
        quic._probe_preferred_address = lambda: probes.append(True)  # type: ignore[method-assign]
        async with connect(backend.address, quic) as client:
            await until(lambda: len(client.cids()) == 8)
        assert probes == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--preferred-address 0.0.0.0:4433", "0.0.0.0:4433: clients cannot send there"),
        ("--preferred-address 127.0.0.2:0 --preferred-address 127.0.0.3:0", "a second preferred address of its family"),
        ("--preferred-address here", "expected ADDRESS:PORT"),
        ("--path-rate nan", "nan: expected a number of times per second"),
        ("--path-rate=-1", "-1: expected a number of times per second"),
    ],
)
def test_mistakes_in_options_are_told(
    options: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["backend", "--server-config", "x", *options.split()])
    with pytest.raises(SystemExit) as ended:
        arguments()
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
