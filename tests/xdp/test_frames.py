"""What frames are measured by: vectors of others, the kernel's judgement, and every bit that could be wrong."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from lb.forward import Forward
from tests import namespaces
from tests.xdp.cases import INTERFACE, ROUTER, WAYS, Way
from tests.xdp.expectations import by_family
from tests.xdp.forwarding import SHAPES, datagram, in_tunnel, ip
from tests.xdp.frames import (
    ECHO_REQUEST,
    ICMPV6_ECHO_REQUEST,
    Ethernet,
    FrameError,
    Icmp,
    Icmp6,
    IPv4,
    Raw,
    Udp,
    fragments,
    internet_checksum,
    parse,
)

LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def test_the_checksum_of_rfc_1071() -> None:
    """Section 3: the sum is ddf2. An odd octet counts as if a zero followed."""
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2 ^ 0xFFFF
    assert internet_checksum(b"\x01") == internet_checksum(b"\x01\x00") == 0xFEFF


def test_an_ipv4_header_that_others_have_made() -> None:
    """The example of https://en.wikipedia.org/wiki/Internet_checksum."""
    header = bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")
    assert bytes(IPv4("192.168.0.1", "192.168.0.199", Raw(17, bytes(95))))[:20] == header


@by_family
@pytest.mark.parametrize("size", [0, 1, 2, 7, 100, 1001])
def test_the_kernel_takes_our_datagrams_and_no_others(way: Way, size: int) -> None:
    reason = namespaces.missing()
    if reason:
        pytest.skip(reason)
    host, payload = LOOPBACK[way.client], bytes(i & 0xFF for i in range(1, size + 1))
    family = socket.AF_INET6 if way.client == 6 else socket.AF_INET
    with (
        namespaces.namespaces("frames") as (name,),
        namespaces.inside(name),
        socket.socket(family, socket.SOCK_DGRAM) as receiver,
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender,
    ):
        receiver.bind((host, 0))
        receiver.settimeout(5)
        datagram_for_it = Udp(4000, receiver.getsockname()[1], payload)
        right = ip(host, host, datagram_for_it)
        checksum = int.from_bytes(bytes(right)[-size - 2 :][:2] if size else bytes(right)[-2:])
        for packet in (ip(host, host, replace(datagram_for_it, checksum=checksum ^ 0x0100)), right):
            sender.sendto(bytes(packet), (host, 0))
        # The wrong one was first, and loopback keeps the order.
        assert receiver.recvfrom(2000)[:2] == (payload, (host, 4000, 0, 0)[: 4 if way.client == 6 else 2])
        receiver.setblocking(False)
        with pytest.raises(BlockingIOError):
            receiver.recv(2000)


@by_family
def test_the_kernel_answers_our_pings(way: Way) -> None:
    reason = namespaces.missing()
    if reason:
        pytest.skip(reason)
    host, body = LOOPBACK[way.client], b"odd"
    echo = (
        Icmp6(ICMPV6_ECHO_REQUEST, 0, 0x12345678, body) if way.client == 6 else Icmp(ECHO_REQUEST, 0, 0x12345678, body)
    )
    family = socket.AF_INET6 if way.client == 6 else socket.AF_INET
    with (
        namespaces.namespaces("frames") as (name,),
        namespaces.inside(name),
        socket.socket(family, socket.SOCK_RAW, echo.protocol) as receiver,
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender,
    ):
        receiver.settimeout(5)
        sender.sendto(bytes(ip(host, host, echo)), (host, 0))
        heard = [receiver.recv(2000)[-11:] for _ in range(2)]  # what was asked, and the answer
    answer = replace(echo, type=129 if way.client == 6 else 0)
    assert heard == [message.octets_between(host, host) for message in (echo, answer)]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.service)
def test_what_is_built_is_read_back(way: Way) -> None:
    for shape in SHAPES:
        if shape.family not in (None, way.client):
            continue
        frame = shape.change(datagram(way, b"payload"))
        assert parse(bytes(frame)) == frame
        for forward in (Forward.IPIP, Forward.GUE):
            host = way.vip.host if way.client == way.backend else LOOPBACK[way.backend]
            tunnelled = replace(frame, packet=in_tunnel(forward, frame.ip, host, 0x2345))
            assert parse(bytes(tunnelled)) == tunnelled


@by_family
def test_fragments_make_the_packet(way: Way) -> None:
    packet = datagram(way, bytes(range(100))).ip
    pieces = [parse(bytes(Ethernet(INTERFACE, ROUTER, piece))).ip for piece in fragments(packet, 48)]
    octets = b"".join(piece.content.octets for piece in pieces if isinstance(piece.content, Raw))

    assert len(pieces) == 3
    assert octets == packet.content.octets_between(packet.source, packet.destination)


@by_family
def test_no_wrong_bit_goes_unnoticed(way: Way) -> None:
    """Whichever is flipped: the frame is refused, or it is another one. One whose checksum says none is such."""
    frame = datagram(way, b"payload")
    octets = bytes(frame)
    for bit in range(8 * len(octets)):
        changed = bytearray(octets)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            seen = parse(bytes(changed))
        except FrameError:
            continue
        assert seen != frame
        assert bytes(seen) == changed
