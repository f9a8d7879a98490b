"""The engine on a real interface: what it forwards, what it follows, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest

from lb.address import Address
from lb.engine import Counters
from lb.forward import Attach, Forward
from lb.reset import reset_token, server_reset_key
from lb.router import RouterLimits, Verdict
from lb.routing import Backend, BackendState, CidSlot, RoutingTable, Service
from lb.upstream import ServicePolicy
from lb.xdp.attachment import Attachment
from lb.xdp.engine import XdpEngine, XdpSettings
from lb.xdp.libbpf import attached
from tests import namespaces
from tests.builders import CONFIG, RESET_KEY, cid_of, long, server_id, short
from tests.xdp import bpf

VIP = Address("10.99.0.1", 443)
HOSTS = {"a": "10.77.0.11", "b": "10.77.0.12"}
CLIENT = "10.77.0.100"
PATIENCE = 5.0  # seconds that something may take to happen
LOCAL = "10.77.0.1"


@pytest.fixture
def network() -> Iterator[tuple[str, str]]:
    """A balancer's namespace, and one with everybody else, on one cable."""
    reason = bpf.missing() or namespaces.missing()
    if reason:
        pytest.skip(reason)
    with namespaces.namespaces("engine", "others") as (balancer, others):
        namespaces.sysctl(balancer, {"ipv6.conf.all.disable_ipv6": 1})
        namespaces.sysctl(others, {"ipv6.conf.all.disable_ipv6": 1})
        _cable(balancer, others)
        yield balancer, others


@pytest.fixture
def pins() -> Iterator[Path]:
    directory = Path(f"/sys/fs/bpf/quiclb-test-{time.monotonic_ns()}")
    yield directory
    with contextlib.suppress(FileNotFoundError):
        for pin in directory.iterdir():
            pin.unlink()
        directory.rmdir()


def service(*names: str, host_of: Mapping[str, str] = HOSTS) -> Service:
    backends = tuple(
        Backend(name, Address(host_of[name], 443), {CONFIG.config_id: frozenset([server_id("ab".index(name))])})
        for name in names
    )
    return Service("web", (VIP,), (CidSlot(CONFIG, RESET_KEY),), backends, "a seed")


class Scene:
    """An engine, two backends and a client, all real."""

    def __init__(self, pins: Path, others: str) -> None:
        self.suspected: list[tuple[str, str]] = []
        self.reachable: dict[tuple[str, str], bool] = {}
        self.settings = XdpSettings(
            interface="e0",
            forward=Forward.NAT,
            attach=Attach.GENERIC,
            pin_directory=pins,
            flows=1024,
            table_entries=1024,
            idle_timeout=60.0,
            new_flow_timeout=10.0,
        )
        self.policies = {"web": ServicePolicy(router=RouterLimits(), push_rate=1000, silence=0.1)}
        with namespaces.inside(others):
            self.backends = {name: _socket(Address(host, 443)) for name, host in HOSTS.items()}
            self.client = _socket(Address(CLIENT, 0))
            self.other_client = _socket(Address(CLIENT, 0))

    def engine(self) -> XdpEngine:
        return XdpEngine(
            self.settings,
            self.policies,
            suspect=lambda service, backend: self.suspected.append((service, backend)),
            on_reachable=lambda service, backend, there: self.reachable.update({(service, backend): there}),
        )

    @contextlib.asynccontextmanager
    async def running(self, table: RoutingTable) -> AsyncIterator[XdpEngine]:
        engine = self.engine()
        await engine.start([table])
        try:
            yield engine
        finally:
            await engine.stop()

    def close(self) -> None:
        for sock in (*self.backends.values(), self.client, self.other_client):
            sock.close()


@pytest.fixture
def scene(network: tuple[str, str], pins: Path) -> Iterator[Scene]:
    balancer, others = network
    made = Scene(pins, others)
    with namespaces.inside(balancer):
        yield made
        index = socket.if_nametoindex("e0")
        place = Attachment("e0", index, pins)
        place.detach()
        place.close()
    made.close()


def _socket(address: Address) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(address)
    made.setblocking(False)
    return made


async def received(sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
    async with asyncio.timeout(PATIENCE):
        return await asyncio.get_running_loop().sock_recvfrom(sock, 2000)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not is_so():  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(0.01)


async def counted(engine: XdpEngine, is_so: Callable[[Counters], bool]) -> Counters:
    async with asyncio.timeout(PATIENCE):
        while not is_so(counters := await engine.counters()):  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(0.01)
    return counters


def test_a_datagram_gets_to_its_backend_and_the_answer_back(scene: Scene) -> None:
    async def play() -> None:
        async with scene.running(RoutingTable.build(service("a", "b"))) as engine:
            for name, number in (("a", 0), ("b", 1)):
                datagram = short(cid_of(number))
                scene.client.sendto(datagram, VIP)
                octets, source = await received(scene.backends[name])
                assert octets == datagram
                assert source[0] == LOCAL
                assert source[1] in scene.settings.nat_ports
                scene.backends[name].sendto(b"answer", source)
                assert await received(scene.client) == (b"answer", VIP)
            counters = await counted(engine, lambda c: c.flows == 2)
            web = counters.services["web"]
            assert web.verdicts[Verdict.CID] == web.config_ids[0] == 2
            assert (web.moves, web.backends["a"].datagrams_to, web.backends["a"].datagrams_from) == (2, 1, 1)
            assert engine.attach_mode == "generic"

    asyncio.run(play())


def test_packets_keep_flowing_without_the_process_and_a_successor_takes_over(scene: Scene) -> None:
    async def play() -> None:
        table = RoutingTable.build(service("a", "b"))
        async with scene.running(table):
            scene.client.sendto(short(cid_of(0)), VIP)
            _, first = await received(scene.backends["a"])
        scene.client.sendto(short(cid_of(0, 1)), VIP)
        assert (await received(scene.backends["a"]))[1] == first
        async with scene.running(table) as engine:
            scene.client.sendto(short(cid_of(0, 2)), VIP)
            assert (await received(scene.backends["a"]))[1] == first
            counters = await engine.counters()
            assert counters.services["web"].verdicts[Verdict.CID] == 3
            assert counters.services["web"].backends["a"].datagrams_to == 3

    asyncio.run(play())


def test_a_reload_while_the_process_was_away_is_obeyed(scene: Scene) -> None:
    async def play() -> None:
        async with scene.running(RoutingTable.build(service("a", "b"))):
            pass
        async with scene.running(RoutingTable.build(service("b"))):
            scene.client.sendto(short(cid_of(1)), VIP)
            await received(scene.backends["b"])
            scene.client.sendto(short(cid_of(0)), VIP)  # a's, which is nobody's now
            await received(scene.backends["b"])

    asyncio.run(play())


def test_clients_of_a_dead_backend_are_told_asked_or_not(scene: Scene) -> None:
    async def play() -> None:
        whole = service("a", "b")
        async with scene.running(RoutingTable.build(whole)) as engine:
            cid = cid_of(0)
            for client in (scene.client, scene.other_client):
                client.sendto(short(cid), VIP)
                await received(scene.backends["a"])
            await engine.apply([RoutingTable.build(whole, {"a": BackendState.DOWN}, dead={"a"})])
            token = reset_token(server_reset_key(RESET_KEY, CONFIG.config_id, server_id(0)), cid)
            for client in (scene.client, scene.other_client):
                octets, source = await received(client)
                assert (octets[-16:], source) == (token, VIP)
            scene.client.sendto(short(cid), VIP)
            octets, source = await received(scene.client)
            assert (octets[-16:], source) == (token, VIP)
            counters = await engine.counters()
            assert counters.services["web"].resets_pushed == 2
            assert counters.services["web"].verdicts[Verdict.RESET] == 1

    asyncio.run(play())


def test_a_backend_that_is_silent_under_traffic_is_suspected(scene: Scene) -> None:
    async def play() -> None:
        async with scene.running(RoutingTable.build(service("a", "b"))):
            async with asyncio.timeout(PATIENCE):
                while ("web", "a") not in scene.suspected:
                    scene.client.sendto(short(cid_of(0)), VIP)
                    await asyncio.sleep(0.01)
            assert ("web", "b") not in scene.suspected

    asyncio.run(play())


def test_a_backend_whose_socket_is_gone_is_suspected_at_once(scene: Scene) -> None:
    async def play() -> None:
        scene.backends["a"].close()
        async with scene.running(RoutingTable.build(service("a", "b"))) as engine:
            scene.client.sendto(short(cid_of(0)), VIP)
            await until(lambda: ("web", "a") in scene.suspected)
            counters = await engine.counters()
            assert counters.services["web"].backends["a"].unreachable == 1

    asyncio.run(play())


def test_a_backend_that_nobody_answers_for_is_not_a_black_hole(scene: Scene, network: tuple[str, str]) -> None:
    async def play() -> None:
        nobody = {"a": HOSTS["a"], "b": "10.77.0.99"}
        table = RoutingTable.build(service("a", "b", host_of=nobody))
        async with scene.running(table) as engine:
            await until(lambda: scene.reachable == {("web", "b"): False})
            scene.client.sendto(short(cid_of(1)), VIP)
            await counted(engine, lambda c: c.failures["unreachable"] == 1)
            namespaces.ip(network[1], "addr add 10.77.0.99/24 dev e1")
            await until(lambda: scene.reachable == {("web", "b"): True})

    asyncio.run(play())


def test_the_way_to_a_backend_is_followed_when_its_mac_address_changes(scene: Scene, network: tuple[str, str]) -> None:
    async def play() -> None:
        async with scene.running(RoutingTable.build(service("a", "b"))):
            scene.client.sendto(short(cid_of(0)), VIP)
            await received(scene.backends["a"])
            namespaces.ip(network[1], "link set e1 address 02:00:00:00:77:77")
            namespaces.ip(network[0], f"neigh replace {HOSTS['a']} lladdr 02:00:00:00:77:77 dev e0")
            async with asyncio.timeout(PATIENCE):
                while True:
                    scene.client.sendto(long(cid_of(0)), VIP)
                    with contextlib.suppress(BlockingIOError):
                        scene.backends["a"].recv(2000)
                        return
                    await asyncio.sleep(0.01)

    asyncio.run(play())


def test_flows_survive_a_change_of_our_own_mac_address(scene: Scene, network: tuple[str, str]) -> None:
    async def play() -> None:
        async with scene.running(RoutingTable.build(service("a", "b"))):
            program = attached(socket.if_nametoindex("e0"))
            scene.client.sendto(short(cid_of(0)), VIP)
            _, first = await received(scene.backends["a"])
            namespaces.ip(network[0], "link set e0 address 02:00:00:00:88:88")
            namespaces.ip(network[1], f"neigh replace {LOCAL} lladdr 02:00:00:00:88:88 dev e1")
            async with asyncio.timeout(PATIENCE):
                while True:  # what arrives in between may still be sent from the old address
                    scene.client.sendto(short(cid_of(0)), VIP)
                    _, again = await received(scene.backends["a"])
                    assert again == first
                    scene.backends["a"].sendto(b"answer", again)
                    await received(scene.client)
                    await asyncio.sleep(0.01)  # what is there already is received without a turn of the loop
                    if attached(socket.if_nametoindex("e0")) != program:
                        break
            scene.client.sendto(short(cid_of(0)), VIP)
            assert (await received(scene.backends["a"]))[1] == first

    asyncio.run(play())


def test_an_interface_that_comes_back_as_another_one_is_taken_again(scene: Scene, network: tuple[str, str]) -> None:
    async def play() -> None:
        async with scene.running(RoutingTable.build(service("a", "b"))):
            namespaces.ip(network[0], "link delete e0")
            _cable(*network)
            async with asyncio.timeout(PATIENCE):
                while True:
                    scene.client.sendto(short(cid_of(0)), VIP)
                    with contextlib.suppress(BlockingIOError):
                        scene.backends["a"].recv(2000)
                        return
                    await asyncio.sleep(0.05)

    asyncio.run(play())


def test_an_interface_that_is_not_there_is_named(network: tuple[str, str], pins: Path) -> None:
    scene = Scene(pins, network[1])
    scene.settings = XdpSettings(
        interface="e9",
        forward=Forward.NAT,
        pin_directory=pins,
        flows=1024,
        table_entries=1024,
        idle_timeout=60.0,
        new_flow_timeout=10.0,
    )

    async def play() -> None:
        await scene.engine().start([RoutingTable.build(service("a"))])

    with namespaces.inside(network[0]), pytest.raises(OSError, match="e9"):
        asyncio.run(play())
    scene.close()
    assert not pins.exists()


def _cable(balancer: str, others: str) -> None:
    """From one to the other, with everybody's addresses."""
    namespaces.ip(balancer, f"link add e0 type veth peer name e1 netns {others}")
    namespaces.ip(balancer, f"addr add {LOCAL}/24 dev e0", "link set e0 up")
    namespaces.ip(
        others,
        *(f"addr add {host}/24 dev e1" for host in (CLIENT, *HOSTS.values())),
        "link set e1 up",
        f"route add {VIP.host} via {LOCAL}",
    )
    with namespaces.inside(others):
        subprocess.run(["ethtool", "-K", "e1", "tx", "off"], stdout=subprocess.DEVNULL, check=True)
