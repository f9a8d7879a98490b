"""lb/address.py: one spelling for one address."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.address import Address, packed


@pytest.mark.parametrize(
    ("text", "address", "printed"),
    [
        ("192.0.2.1:443", Address("192.0.2.1", 443), "192.0.2.1:443"),
        ("0.0.0.0:1", Address("0.0.0.0", 1), "0.0.0.0:1"),
        ("[2001:db8::1]:65535", Address("2001:db8::1", 65535), "[2001:db8::1]:65535"),
        ("[2001:DB8:0:0::1]:443", Address("2001:db8::1", 443), "[2001:db8::1]:443"),
        ("[::]:443", Address("::", 443), "[::]:443"),
    ],
)
def test_an_address_is_read_and_printed_in_one_spelling(text: str, address: Address, printed: str) -> None:
    assert Address.parse(text) == address
    assert str(address) == printed
    assert Address.parse(printed) == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected ADDRESS:PORT"),
        ("192.0.2.1", "expected ADDRESS:PORT"),
        ("192.0.2.1:", "expected ADDRESS:PORT"),
        ("192.0.2.1:0", "expected ADDRESS:PORT"),
        ("192.0.2.1:65536", "expected ADDRESS:PORT"),
        ("192.0.2.1:-1", "expected ADDRESS:PORT"),
        ("192.0.2.1:+443", "expected ADDRESS:PORT"),
        ("192.0.2.1: 443", "expected ADDRESS:PORT"),
        ("192.0.2.1:٤٤٣", "expected ADDRESS:PORT"),
        ("192.0.2.1:²", "expected ADDRESS:PORT"),
        (":443", "expected an IP address"),
        ("localhost:443", "expected an IP address"),
        ("192.0.2.256:443", "expected an IP address"),
        ("192.0.2.01:443", "expected an IP address"),
        ("192.0.2:443", "expected an IP address"),
        ("[2001:db8::1:443", "expected an IP address"),
        ("[[::1]]:443", "expected an IP address"),
        ("2001:db8::1:443", "go in brackets"),
        ("[192.0.2.1]:443", "go in brackets"),
        ("[::ffff:192.0.2.1]:443", "IPv4-mapped"),
        ("[fe80::1%eth0]:443", "an address with a zone"),
    ],
)
def test_anything_else_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Address.parse(text)


@pytest.mark.parametrize(
    ("address", "is_ipv6", "is_wildcard"),
    [
        (Address("0.0.0.0", 443), False, True),
        (Address("::", 443), True, True),
        (Address("192.0.2.1", 443), False, False),
        (Address("::1", 443), True, False),
    ],
)
def test_family_and_wildcard(address: Address, is_ipv6: bool, is_wildcard: bool) -> None:
    assert (address.is_ipv6, address.is_wildcard) == (is_ipv6, is_wildcard)


@settings(deadline=None)
@given(ip=st.ip_addresses(), port=st.integers(1, 65535))
def test_every_address_survives_being_printed_and_packs_as_ipaddress_says(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    address = Address(str(ip), port)
    if ip.version == 4:
        assert packed(address.host) == ipaddress.IPv6Address(f"::ffff:{ip}").packed
    else:
        assert packed(address.host) == ip.packed
    if ip.version == 4 or ip.ipv4_mapped is None:
        assert Address.parse(str(address)) == address


def test_a_zone_is_no_part_of_the_octets() -> None:
    assert packed("fe80::1%eth0") == packed("fe80::1")


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError:
        return
    assert Address.parse(str(address)) == address


def test_a_port_of_a_million_digits_is_a_value_error() -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which limit says so does not matter
        Address.parse("192.0.2.1:" + "9" * 1_000_000)
