"""Addresses that come and go for real: clients on the other end of a cable, in a network namespace of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from backend.clients.fleet import LIBRARIES, missing
from backend.clients.gtlsclient import GtlsClient
from backend.clients.transfer import Move, slow_body
from backend.demo.stage import Play, Stage
from tests import namespaces
from tests.e2e.theatre import Theatre, moves, theatre

pytestmark = pytest.mark.e2e

BALANCER = "10.77.0.1"
WIFI, CELLULAR = "10.77.0.2", "10.77.0.3"
ENOUGH = 10  # octets of a slow download: it is on its way
LEAD = 1.0  # seconds for a new address to come up before gtlsclient, which cannot be told when, goes there


@dataclass(frozen=True, slots=True)
class Cable:
    """Two namespaces with a cable between them; balancers and backends on the one end, clients on the other."""

    servers: str
    clients: str

    def take(self, address: str) -> None:
        """Give the clients another address, the preferred one from now on."""
        namespaces.ip(
            self.clients,
            f"address add {address}/32 dev eth0",
            f"route replace 10.77.0.0/24 dev eth0 src {address}",
        )

    def lose(self, address: str) -> None:
        namespaces.ip(self.clients, f"address delete {address}/32 dev eth0")

    def addresses(self) -> list[str]:
        """Those that the clients have."""
        command = [namespaces.IP, "-n", self.clients, "-json", "-4", "address", "show", "dev", "eth0"]
        links = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return [each["local"] for link in links for each in link.get("addr_info", ())]


@pytest.fixture
def cable() -> Iterator[Cable]:
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    with namespaces.namespaces("servers", "clients") as (servers, clients):
        namespaces.ip(servers, f"link add eth0 type veth peer name eth0 netns {clients}")
        namespaces.ip(servers, "link set eth0 up", f"address add {BALANCER}/24 dev eth0")
        namespaces.ip(clients, "link set eth0 up")
        made = Cable(servers, clients)
        made.take(WIFI)
        yield made


@pytest.fixture
def behind(cable: Cable) -> Iterator[Theatre]:
    """A balancer and its backends at one end of the cable."""
    with namespaces.inside(cable.servers), theatre(Play(host=BALANCER)) as made:
        yield made


def test_gtlsclient_walks_from_one_network_to_another_and_the_first_one_is_gone(cable: Cable, behind: Theatre) -> None:
    reason = missing(GtlsClient.name)
    if reason is not None:
        pytest.skip(reason)

    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        with namespaces.inside(cable.clients):
            client = await GtlsClient.start(balancer.address, "/slow/3", move=Move.MIGRATION, move_after=LEAD)
        async with client:
            (transfer,) = client.transfers
            await transfer.reached(ENOUGH)
            cable.take(CELLULAR)
            while not await moves(balancer):
                await transfer.reached(len(transfer.body) + 1)
            cable.lose(WIFI)
            assert cable.addresses() == [CELLULAR]
            assert not transfer.is_over
            assert await transfer.complete() == slow_body(3)

        assert await moves(balancer) == 1

    behind.play(scene)


@pytest.mark.parametrize("move", [Move.NAT_REBINDING, Move.MIGRATION])
def test_a_client_loses_its_address_first_and_gets_another_later(
    cable: Cable, behind: Theatre, library: str, move: Move
) -> None:
    async def scene(stage: Stage) -> None:
        balancer = stage.balancers["one"]
        with namespaces.inside(cable.clients):
            async with await LIBRARIES[library].connect(balancer.address, local=WIFI) as client:
                before = await client.whoami()
                transfer = client.begin("/slow/3")
                await transfer.reached(ENOUGH)
                cable.lose(WIFI)
                assert cable.addresses() == []
                cable.take(CELLULAR)
                await (client.migrate(CELLULAR) if move is Move.MIGRATION else client.rebind(CELLULAR))
                assert await transfer.complete() == slow_body(3)
                after = await client.whoami()

        assert client.local.host == CELLULAR
        assert (after["name"], after["connection"]) == (before["name"], before["connection"])
        assert (after["dcid"] != before["dcid"]) == (move is Move.MIGRATION)
        assert await moves(balancer) == 1

    behind.play(scene)
