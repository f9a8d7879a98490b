"""The xdp engine from one end to the other: in every forward mode, in the driver and behind it, on a switch of network
namespaces, for real clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Iterator

import pytest

from backend.clients.fleet import LIBRARIES
from backend.clients.relay import NatRelay
from backend.clients.transfer import StatelessResetError, slow_body
from backend.demo import lan
from backend.demo.lan import CLIENTS_V6, MTU, SERVERS, SERVERS_V6, VIP, VIP_V6, Xdp
from backend.demo.stage import SERVICE, Play, Stage
from lb.address import Address
from lb.forward import Forward
from tests import namespaces
from tests.builders import short
from tests.e2e import echo
from tests.e2e.theatre import Theatre, divert, moves, placed, session, theatre, whoami

pytestmark = pytest.mark.e2e

BACKENDS = ("a", "b")
HOLD_OFF = 0.5  # seconds
PROMPT = 1.0  # seconds; a reset takes a round trip on a machine that is not busy
ENOUGH = 10  # octets of a slow download: it is on its way
DOWNLOAD = 400_000  # octets
RELOADS = 6
CALLERS = 8
MORE = 200  # answers
RETRY = 0.05  # seconds to the next datagram, while a network changes
ECHO, ECHO_V6 = Address(VIP, echo.PORT), Address(VIP_V6, echo.PORT)

# The first is what some tests are content with: pytest sets a stage once for all tests whose lists begin alike.
STAGES = [
    pytest.param(Xdp(forward=forward, attach=attach), id=f"{forward.name.lower()}-{attach}")
    for forward in Forward
    for attach in ("native", "generic")
]
everywhere = pytest.mark.parametrize("xdp", STAGES, indirect=True)
in_nat = pytest.mark.parametrize("xdp", STAGES[:2], indirect=True)
in_native_nat = pytest.mark.parametrize("xdp", STAGES[:1], indirect=True)

# linux/in.h, linux/in6.h
IP_MTU_DISCOVER, IP_RECVERR, IP_MTU = 10, 11, 14
IPV6_MTU_DISCOVER, IPV6_MTU, IPV6_RECVERR = 23, 24, 25
PMTUDISC_DO = 2  # as TCP and QUIC do: never fragment, and believe ICMP
IPV4_HEADER, IPV6_HEADER, UDP_HEADER = 20, 40, 8


@pytest.fixture(scope="module")
def xdp(request: pytest.FixtureRequest) -> Iterator[Theatre]:
    """Two balancers with the same configuration, two backends, and an echo beside each."""
    reason = lan.missing()
    if reason is not None:
        pytest.skip(reason)
    with theatre(Play(backends=BACKENDS, hold_off=HOLD_OFF, xdp=request.param), "one", "two") as made:

        async def add_echoes(stage: Stage) -> None:
            for balancer in stage.balancers.values():
                await stage.reload(balancer, echo.service(stage, *BACKENDS))

        made.play(add_echoes)
        yield made


@everywhere
def test_a_client_of_either_family_is_answered_by_the_backend_whose_server_id_it_is_given(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        assert balancer.address_v6 is not None
        for address in (balancer.address, balancer.address_v6):
            for name, server in stage.servers.items():
                async with placed("aioquic", address, name, f"/bytes/{DOWNLOAD}") as client:
                    assert (await whoami(client))["server_id"] == server.server_id.hex()
                    assert len(await client.transfers[1].complete()) == DOWNLOAD

    xdp.play(scene)


@everywhere
def test_a_download_survives_a_nat_that_rebinds(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with (
            await NatRelay.open(balancer.address) as nat,
            session("aioquic", nat.address, f"/bytes/{DOWNLOAD}") as client,
        ):
            await client.transfers[0].reached(DOWNLOAD // 3)
            await divert(nat, client, nat.target)
            assert len(await client.transfers[0].complete()) == DOWNLOAD

    xdp.play(scene)


@everywhere
@pytest.mark.parametrize("is_ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_a_client_that_migrates_to_another_address_keeps_its_connection(xdp: Theatre, is_ipv6: bool) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        address = balancer.address_v6 if is_ipv6 else balancer.address
        assert address is not None
        here, there = (f"{CLIENTS_V6}:2", f"{CLIENTS_V6}:3") if is_ipv6 else stage.place.clients
        async with await LIBRARIES["aioquic"].connect(address, local=here) as client:
            before = await client.whoami()
            transfer = client.begin("/slow/0.5")
            await transfer.reached(1)
            await client.migrate(there)
            assert await transfer.complete() == slow_body(0.5)
            after = await client.whoami()

        assert client.local.host == there
        assert (after["name"], after["connection"]) == (before["name"], before["connection"])
        assert after["dcid"] != before["dcid"]

    xdp.play(scene)


@in_native_nat
def test_every_client_moves_as_it_likes(xdp: Theatre, stack: str) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        assert balancer.address_v6 is not None
        before = await moves(balancer)
        async with await NatRelay.open(balancer.address_v6) as nat, session(stack, nat.address, "/slow/1") as client:
            for target in (balancer.address_v6, balancer.address):
                await client.transfers[0].reached(len(client.transfers[0].body) + ENOUGH)
                await divert(nat, client, target)
            assert await client.transfers[0].complete() == slow_body(1)
        assert await moves(balancer) - before == 2

    xdp.play(scene)


@everywhere
def test_a_client_of_a_dead_backend_is_told_as_soon_as_the_hold_off_is_over(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        async with session("aioquic", balancer.address, "/whoami", "/slow/15", is_talkative=True) as client:
            victim = stage.servers[(await whoami(client))["name"]]
            await client.transfers[1].reached(ENOUGH)
            killed = await victim.child.kill()
            with pytest.raises(StatelessResetError) as reset:
                await client.transfers[1].complete()
            dead = await balancer.child.logged("backend-dead", killed, service=SERVICE, backend=victim.name)
            assert 0 < reset.value.at - dead.time < PROMPT
        async with session("aioquic", balancer.address, "/whoami") as again:
            assert (await whoami(again))["name"] != victim.name
        await _revive(stage, victim.name, killed)

    xdp.play(scene)


@in_nat
def test_a_client_that_only_listens_is_told_as_well(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        await _tell_a_silent_client(stage, "aioquic")

    xdp.play(scene)


@in_native_nat
def test_every_client_that_only_listens_is_told(xdp: Theatre, stack: str) -> None:
    async def scene(stage: Stage) -> None:
        await _tell_a_silent_client(stage, stack)

    xdp.play(scene)


@everywhere
def test_packets_flow_while_the_process_is_dead_and_its_successor_goes_on_counting(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        counted = await _echoed(stage)
        async with (
            echo.echoes(stage),
            echo.callers(ECHO, [*map(echo.cid_of, BACKENDS), *[echo.UNROUTABLE_CID] * CALLERS]) as everybody,
        ):
            async with echo.calling(everybody), session("aioquic", balancer.address, "/slow/1") as client:
                await _more_answers(everybody)
                await balancer.child.kill()
                await _more_answers(everybody)
                async with session("aioquic", balancer.address, "/whoami") as another:
                    assert (await whoami(another))["name"] in BACKENDS
                assert not balancer.child.is_running
                await stage.run(balancer)
                await _more_answers(everybody)
                assert await client.transfers[0].complete() == slow_body(1)

            assert [caller.missing() for caller in everybody] == [[]] * len(everybody)
            assert await _echoed(stage) - counted == sum(caller.sent for caller in everybody)

    xdp.play(scene)


@everywhere
def test_a_reload_under_load_loses_no_packet(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        cids = [echo.cid_of("a"), *[echo.UNROUTABLE_CID] * CALLERS]
        async with echo.echoes(stage), echo.callers(ECHO, cids) as settled, echo.callers(ECHO, cids) as later:
            await stage.reload(balancer, echo.service(stage, "a"))
            assert {await caller.ask() for caller in settled} == {"a"}
            async with echo.calling([*settled, *later]):
                for _ in range(RELOADS // 2):
                    await stage.reload(balancer, echo.service(stage, *BACKENDS))
                    await _more_answers(later)
                    await stage.reload(balancer, echo.service(stage, "a"))
                    await _more_answers(later)
            await stage.reload(balancer, echo.service(stage, *BACKENDS))

            assert [caller.missing() for caller in [*settled, *later]] == [[]] * 2 * len(cids)
            assert {name for caller in settled for name in caller.backends} == {"a"}

    xdp.play(scene)


@everywhere
def test_another_balancer_gives_every_client_the_same_backend(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        cids = [*map(echo.cid_of, BACKENDS), *[echo.UNROUTABLE_CID] * 24]
        async with echo.echoes(stage), echo.callers(ECHO, cids) as everybody:
            through_one = [await caller.ask() for caller in everybody]
            with stage.place.rerouted("two"):
                through_two = [await caller.ask() for caller in everybody]
        assert through_two == through_one
        assert set(through_one) == set(BACKENDS)

    xdp.play(scene)


@everywhere
def test_another_balancer_takes_a_download_over(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        one, two = stage.balancers["one"], stage.balancers["two"]
        before = (await two.metrics()).value("quiclb_config_id_datagrams_total", service="web")
        async with session("aioquic", one.address, "/slow/0.5") as client:
            await client.transfers[0].reached(1)
            with stage.place.rerouted("two"):
                client.speak()
                assert await client.transfers[0].complete() == slow_body(0.5)
        assert (await two.metrics()).value("quiclb_config_id_datagrams_total", service="web") > before

    xdp.play(scene)


@everywhere
def test_traffic_follows_a_backend_that_gets_another_mac_address(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        place = stage.place
        assert isinstance(place, lan.Lan)
        async with echo.echoes(stage), echo.callers(ECHO, map(echo.cid_of, BACKENDS)) as everybody:
            for first_octet in ("06", "02"):
                for name in BACKENDS:
                    mac = first_octet + place.mac(name)[2:]
                    namespaces.ip(place.namespace(name), f"link set {lan.INTERFACE} address {mac}")
                for caller in everybody:
                    await _heard_of(caller)

    xdp.play(scene)


@everywhere
def test_a_backend_that_nobody_has_seen_on_the_network_is_down_and_no_black_hole(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        hosts = [f"{SERVERS}.99"] + ([] if stage.place.splits_families else [f"{SERVERS_V6}:99"])
        async with echo.echoes(stage):
            for host in hosts:
                await stage.reload(balancer, echo.service(stage, *BACKENDS, nobody=host))
                async with echo.callers(ECHO, [echo.UNROUTABLE_CID] * 40) as everybody:
                    assert {await caller.ask() for caller in everybody} == set(BACKENDS)
                metrics = await balancer.metrics()
                states = {
                    name: metrics.value("quiclb_backend_state", service=echo.NAME, backend=name, state="active")
                    for name in (*BACKENDS, "nobody")
                }
                assert states == {"a": 1, "b": 1, "nobody": 0}
            await stage.reload(balancer, echo.service(stage, *BACKENDS))

    xdp.play(scene)


@everywhere
def test_a_sender_of_packets_that_become_too_long_is_told_how_long_they_may_be(xdp: Theatre) -> None:
    async def scene(stage: Stage) -> None:
        assert isinstance(stage.place, lan.Lan)
        async with echo.echoes(stage):
            for target in (ECHO,) if stage.place.splits_families else (ECHO, ECHO_V6):
                for name in BACKENDS:
                    longest = MTU - max(0, _growth(stage.place.xdp.forward, target, stage.servers[name].address))
                    with stage.place.rerouted("two"):
                        pass  # the kernel forgets what it has learned of the old route
                    with contextlib.closing(_finder_of_mtu(target)) as sock:
                        if longest < MTU:
                            with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)):
                                await _ask(sock, echo.cid_of(name), MTU)
                            assert _mtu(sock) == longest
                        assert await _ask(sock, echo.cid_of(name), longest) == name.encode()

    xdp.play(scene)


async def _tell_a_silent_client(stage: Stage, stack: str) -> None:
    balancer = stage.balancers["one"]
    pushed = await _pushed(stage)
    async with (
        await NatRelay.open(balancer.address) as relay,
        session(stack, relay.address, "/whoami", "/slow/15") as client,
    ):
        victim = (await whoami(client))["name"]
        await client.transfers[1].reached(ENOUGH)
        killed = await stage.servers[victim].child.kill()
        relay.is_muted = True  # whatever it says now is not heard
        dead = await balancer.child.logged("backend-dead", killed, backend=victim)
        with pytest.raises(StatelessResetError) as reset:
            await client.transfers[1].complete()
        assert 0 < reset.value.at - dead.time < PROMPT
    assert await _pushed(stage) > pushed
    await _revive(stage, victim, killed)


async def _revive(stage: Stage, backend: str, since: float) -> None:
    """Have a backend back, for both balancers."""
    await stage.restart(stage.servers[backend])
    for balancer in stage.balancers.values():
        for service in stage.services:
            await balancer.child.logged("backend-up", since, service=service, backend=backend)


async def _pushed(stage: Stage) -> float:
    return (await stage.balancers["one"].metrics()).value("quiclb_resets_total", service=SERVICE, kind="pushed")


async def _echoed(stage: Stage) -> float:
    """How many datagrams to the echoes the first balancer has counted."""
    return (await stage.balancers["one"].metrics()).value("quiclb_datagrams_total", service=echo.NAME)


async def _more_answers(everybody: Iterable[echo.Caller]) -> None:
    for caller in everybody:
        await caller.answered(len(caller.answers) + MORE // CALLERS)


async def _heard_of(caller: echo.Caller) -> None:
    """Have it ask until there is an answer."""
    enough = len(caller.answers) + 1
    while len(caller.answers) < enough:
        caller.send()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY):
                await caller.answered(enough)


def _growth(forward: Forward, client_side: Address, backend: Address) -> int:
    """By how many octets a packet is longer behind the balancer."""
    before, after = (IPV6_HEADER if address.is_ipv6 else IPV4_HEADER for address in (client_side, backend))
    return {Forward.NAT: after - before, Forward.IPIP: after, Forward.GUE: after + UDP_HEADER}.get(forward, 0)


def _finder_of_mtu(target: Address) -> socket.socket:
    """A socket that sends whole packets or none, and hears of it when one was too long."""
    sock = socket.socket(socket.AF_INET6 if target.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if target.is_ipv6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    sock.connect(target)
    return sock


def _mtu(sock: socket.socket) -> int:
    """The longest packet that the kernel would send to the peer."""
    if sock.family == socket.AF_INET6:
        return sock.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)
    return sock.getsockopt(socket.IPPROTO_IP, IP_MTU)


async def _ask(sock: socket.socket, cid: bytes, length: int) -> bytes:
    """Send an IP packet of so many octets and say who answers. Raises OSError if there is an ICMP error instead."""
    headers = (IPV6_HEADER if sock.family == socket.AF_INET6 else IPV4_HEADER) + UDP_HEADER
    sock.send(short(cid, length - headers))
    answer = await asyncio.get_running_loop().sock_recv(sock, 100)
    return answer.partition(b" ")[0]
