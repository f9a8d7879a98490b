"""What a machine lacks for the engine is said beforehand, all of it, each thing in words that help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lb.forward import Forward
from lb.xdp import requirements
from lb.xdp.plane import XdpSettings
from tests import namespaces
from tests.namespaces import inside, ip, sysctl
from tests.xdp import bpf

SETTINGS = XdpSettings(
    interface="eth0",
    forward=Forward.NAT,
    pin_directory=Path("/sys/fs/bpf/quiclb"),
    flows=1000,
    table_entries=1000,
    idle_timeout=60.0,
    new_flow_timeout=10.0,
)
IPV4, IPV6 = ("10.55.0.11",), ("fd55::11",)


@pytest.fixture
def here() -> Iterator[str]:
    """A namespace that this thread is in. Its eth0 has addresses of both families, and nothing is forwarded."""
    reason = namespaces.missing() or bpf.missing()
    if reason:
        pytest.skip(reason)
    with namespaces.namespaces("here", "there") as (name, there):
        ip(name, f"link add eth0 type veth peer name eth0 netns {there}", "addr add 10.55.0.1/24 dev eth0")
        ip(name, "addr add fd55::1/64 dev eth0 nodad", "link set eth0 up")
        ip(there, "link set eth0 up")
        sysctl(name, {"ipv4.conf.eth0.forwarding": 0, "ipv6.conf.eth0.forwarding": 0})
        with inside(name):
            yield name


@pytest.mark.parametrize("forward", [Forward.NAT, Forward.L2, Forward.IPIP, Forward.GUE])
def test_a_machine_that_has_everything_lacks_nothing(here: str, forward: Forward) -> None:
    settings = replace(SETTINGS, forward=forward)
    assert requirements.missing(settings, IPV4 + IPV6) == []
    assert requirements.load(settings).name == "quiclb"


def test_an_interface_that_is_not_there_is_named(here: str) -> None:
    settings = replace(SETTINGS, interface="eth9")
    assert requirements.missing(settings, IPV4) == ["no such network interface: eth9"]
    with pytest.raises(OSError, match="no such network interface: eth9"):
        requirements.load(settings)


def test_an_interface_that_is_down_is_said_to_be(here: str) -> None:
    ip(here, "link set eth0 down")
    assert requirements.missing(SETTINGS, IPV4) == ["eth0 is down: ip link set eth0 up"]


def test_an_interface_without_mac_addresses_will_not_do(here: str) -> None:
    settings = replace(SETTINGS, interface="lo", forward=Forward.L2)
    assert requirements.missing(settings, IPV4) == ["lo has no MAC address: expected an Ethernet interface"]


@pytest.mark.parametrize("forward", [Forward.NAT, Forward.IPIP, Forward.GUE])
def test_backends_have_to_be_sent_to_from_an_address_of_their_family(here: str, forward: Forward) -> None:
    settings = replace(SETTINGS, forward=forward)
    ip(here, "addr del fd55::1/64 dev eth0")
    assert requirements.missing(settings, IPV4) == []
    assert requirements.missing(settings, IPV4 + IPV6) == [
        "eth0 has no IPv6 address to send to backends from: expected one, or one in xdp.source"
    ]


def test_what_is_sent_from_an_address_of_somebody_elses_does_not_come_back(here: str) -> None:
    settings = replace(SETTINGS, source=("10.55.0.99",))
    assert requirements.missing(settings, IPV4) == [
        "10.55.0.99 is not an address of eth0, and answers of backends would not come back to it"
    ]
    assert requirements.missing(replace(settings, forward=Forward.IPIP), IPV4) == []  # none come back


def test_the_router_of_backends_has_to_forward(here: str) -> None:
    """What they use, that is: who forwards IPv6 takes no router advertisements any more."""
    settings = replace(SETTINGS, forward=Forward.DNAT)
    said = "net.{}.conf.eth0.forwarding is 0: expected 1, with dnat the balancer is its backends' router"
    assert requirements.missing(settings, IPV4) == [said.format("ipv4")]
    assert requirements.missing(settings, IPV4 + IPV6) == [said.format("ipv4"), said.format("ipv6")]
    sysctl(here, {"ipv4.conf.eth0.forwarding": 1})
    assert requirements.missing(settings, IPV4) == []


def test_a_pin_needs_a_file_system_that_can_hold_it(here: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, pin_directory=tmp_path)
    assert requirements.missing(settings, IPV4) == [
        f"{tmp_path} is not in a BPF file system: mount -t bpf bpf /sys/fs/bpf"
    ]


def test_everything_is_said_at_once(here: str, tmp_path: Path) -> None:
    ip(here, "link set eth0 down", "addr flush dev eth0")
    settings = replace(SETTINGS, source=("10.55.0.99",), pin_directory=tmp_path)
    assert len(requirements.missing(settings, IPV4 + IPV6)) == 4
