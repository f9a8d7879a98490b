"""Resets that nobody asked for: from the right address, and not too many at once."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from lb.address import Address
from lb.xdp.farewell import Farewell, Farewells
from tests import namespaces


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    """A namespace whose only interface is its loopback."""
    reason = namespaces.missing()
    if reason:
        pytest.skip(reason)
    with namespaces.namespaces("farewell") as (name,), namespaces.inside(name):
        yield


def receiver(host: str) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((host, 0))
    made.settimeout(5)
    return made


@pytest.mark.parametrize(("client", "vip"), [("127.0.0.1", "192.0.2.1"), ("::1", "2001:db8::1")])
def test_they_come_from_an_address_that_is_not_the_machines(client: str, vip: str) -> None:
    with receiver(client) as sock:
        farewells = Farewells()
        farewells.add([Farewell("a", Address(vip, 443), Address(*sock.getsockname()[:2]), b"gone")])
        assert farewells.send(1000, 0.0) == 1
        octets, source = sock.recvfrom(100)
        assert (octets, source[:2]) == (b"gone", (vip, 443))


def test_a_rate_holds_and_everybody_is_told_once() -> None:
    with receiver("127.0.0.1") as sock:
        client = Address(*sock.getsockname()[:2])
        farewells = Farewells()
        farewells.add(Farewell("a", Address("192.0.2.1", 443), client, bytes([number])) for number in range(100))
        sent = [farewells.send(200, tick / 8) for tick in range(8)]
        assert sent == [20, 20, 20, 20, 20, 0, 0, 0]
        assert [sock.recv(10) for _ in range(100)] == [bytes([number]) for number in range(100)]


def test_a_low_rate_is_not_none() -> None:
    with receiver("127.0.0.1") as sock:
        farewells = Farewells()
        client = Address(*sock.getsockname()[:2])
        farewells.add([Farewell("a", Address("192.0.2.1", 443), client, b"x")] * 3)
        assert [farewells.send(1, float(second)) for second in range(1, 5)] == [0, 1, 1, 1]


def test_a_client_that_cannot_be_reached_does_not_hold_up_the_others() -> None:
    with receiver("127.0.0.1") as sock:
        farewells = Farewells()
        reachable = Address(*sock.getsockname()[:2])
        vip = Address("192.0.2.1", 443)
        farewells.add([Farewell("a", vip, Address("198.51.100.9", 1), b"lost"), Farewell("a", vip, reachable, b"x")])
        assert farewells.send(1000, 0.0) == 1
        assert sock.recv(10) == b"x"
        assert not farewells


def test_nobody_is_told_that_a_backend_is_dead_when_it_no_longer_is() -> None:
    with receiver("127.0.0.1") as sock:
        client, vip = Address(*sock.getsockname()[:2]), Address("192.0.2.1", 443)
        farewells = Farewells()
        farewells.add([Farewell(name, vip, client, name.encode()) for name in ("a", "b", "a")])
        farewells.forget({"a"})
        assert farewells.send(1000, 0.0) == 1
        assert sock.recv(10) == b"b"
