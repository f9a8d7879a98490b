"""Next hops follow the kernel's routes and neighbour table, in namespaces that are joined by a wire."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from lb.xdp.image import NextHop
from lb.xdp.interface import driver, is_native_capable
from lb.xdp.neighbours import Neighbours
from lb.xdp.netlink import Netlink
from tests import namespaces
from tests.namespaces import inside, ip

PATIENCE = 10.0  # seconds until the kernel must have noticed
OURS, THEIRS = "02:00:00:00:00:01", "02:00:00:00:00:02"


class Wire:
    """`lb` and `far`, and between them eth0 and eth0."""

    def __init__(self, lb: str, far: str) -> None:
        self.lb, self.far = lb, far
        ip(
            lb,
            f"link add eth0 address {OURS} type veth peer name eth0 netns {far} address {THEIRS}",
            f"link add eth1 type veth peer name eth1 netns {far}",
            "link set eth0 up",
            "link set eth1 up",
            "address add 10.0.0.1/24 dev eth0",
            "address add 2001:db8:f::1/64 dev eth0 nodad",
            "address add 10.9.0.1/24 dev eth1",
        )
        ip(
            far,
            "link set eth0 up",
            "link set eth1 up",
            "address add 10.0.0.2/24 dev eth0",
            "address add 2001:db8:f::2/64 dev eth0 nodad",
        )


@pytest.fixture
def wire() -> Iterator[Wire]:
    reason = namespaces.missing()
    if reason:
        pytest.skip(reason)
    with namespaces.namespaces("lb", "far") as (lb, far):
        yield Wire(lb, far)


@pytest.fixture
def neighbours(wire: Wire) -> Iterator[Neighbours]:
    with inside(wire.lb):
        made = Neighbours("eth0")
    yield made
    made.close()


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def settle(neighbours: Neighbours, *hosts: str) -> None:
    now = time.monotonic()
    neighbours.set_hosts(hosts, now)
    neighbours.wait(PATIENCE, now)


def until(neighbours: Neighbours, holds: Callable[[], bool]) -> None:
    """Follow until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, (neighbours.hops, neighbours.reasons)
        neighbours.wait_for_news(0.1)
        neighbours.follow(time.monotonic())


@pytest.mark.parametrize("host", ["10.0.0.2", "2001:db8:f::2"])
def test_somebody_on_the_link_is_found_and_followed_to_another_mac_address(
    wire: Wire, neighbours: Neighbours, host: str
) -> None:
    settle(neighbours, host)
    assert neighbours.hops == {host: NextHop(mac(THEIRS), 1500)}
    assert neighbours.reasons == {}
    before = neighbours.hops
    other = "02:00:00:00:00:99"
    ip(wire.far, "link set eth0 down", f"link set eth0 address {other}", "link set eth0 up")
    ip(wire.far, "address replace 2001:db8:f::2/64 dev eth0 nodad")
    ip(wire.lb, f"neighbour replace {host} lladdr {other} dev eth0 nud stale")
    until(neighbours, lambda: neighbours.hops == {host: NextHop(mac(other), 1500)})
    assert before == {host: NextHop(mac(THEIRS), 1500)}


@pytest.mark.parametrize(("host", "gateway"), [("10.7.0.1", "10.0.0.2"), ("2001:db8:7::1", "2001:db8:f::2")])
def test_who_is_behind_a_gateway_has_its_mac_address_and_the_mtu_of_the_route(
    wire: Wire, neighbours: Neighbours, host: str, gateway: str
) -> None:
    settle(neighbours, host)
    assert neighbours.hops == {}
    assert host in neighbours.reasons
    ip(wire.lb, f"route add {host} via {gateway} mtu 1400")
    until(neighbours, lambda: neighbours.hops == {host: NextHop(mac(THEIRS), 1400)})
    ip(wire.lb, f"route delete {host}")
    until(neighbours, lambda: neighbours.hops == {})


def test_there_is_a_reason_for_everybody_without_a_next_hop(wire: Wire, neighbours: Neighbours) -> None:
    settle(neighbours, "10.0.0.77", "10.9.0.5", "10.0.0.1", "198.51.100.1", "10.0.0.2")
    assert neighbours.reasons == {
        "10.0.0.77": "nobody answers for 10.0.0.77 on eth0",
        "10.9.0.5": "the route to 10.9.0.5 is not over eth0",
        "10.0.0.1": "10.0.0.1 is an address of this machine",
        "198.51.100.1": "there is no route to 198.51.100.1: Network is unreachable",
    }
    assert neighbours.hops.keys() == {"10.0.0.2"}


def test_who_comes_later_is_found_and_who_goes_is_missed(wire: Wire, neighbours: Neighbours) -> None:
    settle(neighbours, "10.0.0.3")
    assert neighbours.reasons == {"10.0.0.3": "nobody answers for 10.0.0.3 on eth0"}
    ip(wire.far, "address add 10.0.0.3/24 dev eth0")
    until(neighbours, lambda: "10.0.0.3" in neighbours.hops)
    ip(wire.lb, "link set eth0 down")
    until(neighbours, lambda: "10.0.0.3" in neighbours.reasons)
    ip(wire.lb, "link set eth0 up")
    until(neighbours, lambda: "10.0.0.3" in neighbours.hops)


def test_a_table_that_was_flushed_costs_nobody_his_next_hop(wire: Wire, neighbours: Neighbours) -> None:
    settle(neighbours, "10.0.0.2")
    hops = neighbours.hops
    ip(wire.lb, "neighbour flush all")
    with inside(wire.lb), Netlink() as netlink:
        deadline = time.monotonic() + PATIENCE
        while not any(known.host == "10.0.0.2" and known.mac for known in netlink.neighbours()):
            assert time.monotonic() < deadline
            neighbours.follow(time.monotonic())
            assert neighbours.hops == hops


def test_many_hosts_are_resolved_together(wire: Wire, neighbours: Neighbours) -> None:
    ip(wire.lb, "route add 10.64.0.0/10 via 10.0.0.2")
    hosts = [f"10.64.{i >> 8}.{i & 255}" for i in range(4096)]
    settle(neighbours, *hosts)
    assert neighbours.hops == dict.fromkeys(hosts, NextHop(mac(THEIRS), 1500))


def test_an_interface_is_described(wire: Wire, neighbours: Neighbours) -> None:
    found = neighbours.interface
    assert (found.name, found.mac, found.mtu, found.is_up) == ("eth0", mac(OURS), 1500, True)
    assert found.is_ethernet
    assert found.global_addresses == ("10.0.0.1", "2001:db8:f::1")
    assert set(found.global_addresses) <= set(found.addresses)
    with inside(wire.lb):
        assert driver("eth0") == "veth"
        assert driver("lo") is None
        assert is_native_capable(found.index) in (True, None)
    ip(wire.lb, "address add 10.0.0.9/24 dev eth0", "link set eth0 mtu 1400")
    until(neighbours, lambda: neighbours.interface.mtu == 1400 and "10.0.0.9" in neighbours.interface.addresses)


def test_an_interface_that_is_not_there_is_named(wire: Wire) -> None:
    with inside(wire.lb), pytest.raises(OSError, match="no such network interface: eth7"):
        Neighbours("eth7")
