"""UdpEngine between real sockets: who gets which octets, from where, and what is counted."""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lb.address import Address
from lb.engine import Drop
from lb.reset import reset_token, server_reset_key
from lb.router import RouterLimits, Verdict
from lb.routing import Backend, BackendState, FourTuple, RoutingTable, Service
from lb.sockets import MSG_ERRQUEUE, SOL_UDP, UDP_GRO, UDP_SEGMENT, listening_port, upstream_port
from lb.upstream import PORT_REST, ServicePolicy
from tests.builders import RESET_KEY, long, server_id, short
from tests.fleet import Fleet, eventually, free_port, quiet, udp_socket

DOWN = BackendState.DOWN


@pytest.mark.parametrize("backend_host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("vip", ["127.0.0.1", "::1"])
def test_either_family_reaches_backends_of_either_family(vip: str, backend_host: str) -> None:
    with Fleet(listen=[vip], backend_hosts=[backend_host]) as fleet, fleet.client(vip) as client:
        for backend in range(3):
            fleet.round_trip(client, short(fleet.cid(backend)), backend)

        assert fleet.verdicts() == {Verdict.CID: 3}


@pytest.mark.parametrize(("vip", "asked"), [("0.0.0.0", "127.0.0.2"), ("0.0.0.0", "127.0.0.1"), ("::", "::1")])
def test_a_wildcard_listener_answers_from_the_address_that_was_asked(vip: str, asked: str) -> None:
    with Fleet(listen=[vip]) as fleet, fleet.client("127.0.0.3" if vip == "0.0.0.0" else "::1") as client:
        fleet.round_trip(client, short(fleet.cid(1)), 1, to=(asked, fleet.vip.port))


def test_one_client_socket_may_have_connections_to_many_backends_at_once() -> None:
    with Fleet(8) as fleet, fleet.client() as client:
        cids = [fleet.cid(i) for i in range(8)]
        first = [fleet.round_trip(client, short(cid), i) for i, cid in enumerate(cids)]
        second = [fleet.round_trip(client, short(cid), i) for i, cid in enumerate(cids)]

        assert first == second
        assert fleet.counters().flows == 8


def test_a_client_that_moves_keeps_its_backend_and_is_counted() -> None:
    with Fleet(4) as fleet:
        cids = [fleet.cid(i) for i in range(4)]
        with fleet.client() as client:
            before = [fleet.round_trip(client, short(cid), i) for i, cid in enumerate(cids)]
        with fleet.client("127.0.0.9") as client:
            after = [fleet.round_trip(client, short(cid), i) for i, cid in enumerate(cids)]

        assert not set(before) & set(after)  # the backend sees a rebinding, as it should
        web = fleet.counters().services["web"]
        # Of each address's four connections the ring would have sent one where it belongs, and broken the others.
        assert (web.moves, web.rescued) == (8, 6)


def test_handshakes_go_where_the_ring_says_and_stay_there() -> None:
    with Fleet(4) as fleet, fleet.client() as client:
        home = fleet.table().fallback(FourTuple("127.0.0.1", client.getsockname()[1], *fleet.vip))
        assert home is not None
        initial = long(b"chosen!!", b"scid")
        for _ in range(2):
            fleet.round_trip(client, initial, home)
        fleet.round_trip(client, short(fleet.cid(home)), home)

        assert fleet.verdicts() == {Verdict.FALLBACK: 1, Verdict.TABLE_SCID: 1, Verdict.CID: 1}
        assert fleet.counters().services["web"].moves == 0


def train(sock: socket.socket, datagrams: list[bytes], size: int, to: Address) -> None:
    """Send datagrams of `size` octets (the last may be shorter) as one train."""
    sock.sendmsg(datagrams, [(SOL_UDP, UDP_SEGMENT, size.to_bytes(2, "little"))], 0, to)


def test_a_train_arrives_as_a_train_octet_for_octet() -> None:
    with Fleet(2) as fleet, fleet.client() as client:
        backend = fleet.backends[1]
        backend.setsockopt(SOL_UDP, UDP_GRO, 1)
        client.setsockopt(SOL_UDP, UDP_GRO, 1)
        cid = fleet.cid(1)
        fleet.round_trip(client, short(cid), 1)
        datagrams = [short(cid, 1200)[:-1] + bytes([i]) for i in range(9)] + [short(cid, 77)]
        train(client, datagrams, 1200, fleet.vip)
        got, control, _, upstream = backend.recvmsg(65536, 64)

        assert got == b"".join(datagrams)
        assert [(k, int.from_bytes(v, "little")) for _, k, v in control] == [(UDP_GRO, 1200)]
        train(backend, datagrams, 1200, upstream)
        got, control, _, _ = client.recvmsg(65536, 64)
        assert got == b"".join(datagrams)
        assert [(k, int.from_bytes(v, "little")) for _, k, v in control] == [(UDP_GRO, 1200)]
        b1 = fleet.counters().services["web"].backends["b1"]
        assert (b1.datagrams_to, b1.datagrams_from) == (11, 11)
        assert b1.octets_to == 60 + 9 * 1200 + 77


def test_a_train_whose_cids_change_is_split_where_they_do() -> None:
    with Fleet(3) as fleet, fleet.client() as client:
        cids = [fleet.cid(i) for i in range(3)]
        order = [0, 0, 1, 2, 2, 2, 0, 1]
        datagrams = [short(cids[b], 500)[:-1] + bytes([i]) for i, b in enumerate(order)]
        for _ in range(2):  # once while the flows are new, once by their shortcuts
            train(client, datagrams, 500, fleet.vip)
            for b in range(3):
                expected = [d for d, at in zip(datagrams, order, strict=True) if at == b]
                assert [fleet.backends[b].recv(65536) for _ in expected] == expected
        assert quiet(*fleet.backends)
        assert fleet.verdicts() == {Verdict.CID: 16}


def test_a_train_of_which_the_shortcut_takes_the_rest_is_counted_by_what_decided() -> None:
    with Fleet(2) as fleet, fleet.client() as client:
        home = fleet.table().fallback(FourTuple("127.0.0.1", client.getsockname()[1], *fleet.vip))
        assert home is not None
        cid = fleet.cid(home)
        fleet.round_trip(client, short(cid), home)
        train(client, [short(b"\xe3abc", 500), short(cid, 500), short(cid, 500)], 500, fleet.vip)
        eventually(lambda: sum(fleet.verdicts().values()) == 4)

        assert fleet.verdicts() == {Verdict.CID: 3, Verdict.FALLBACK: 1}
        assert fleet.counters().services["web"].config_ids[0] == 3


def test_an_empty_datagram_of_a_backend_is_not_lost_in_a_run() -> None:
    with Fleet(1) as fleet, fleet.client() as client:
        port = fleet.round_trip(client, short(fleet.cid(0)), 0)
        sent = [b"a" * 1200, b"", b"b" * 1200, b"c" * 1200, b"", b""] * 8
        for datagram in sent:
            fleet.backends[0].sendto(datagram, port)

        assert [client.recv(2000) for _ in sent] == sent


def test_a_burst_of_single_datagrams_leaves_in_order_and_complete() -> None:
    with Fleet(2) as fleet, fleet.client() as client:
        cid = fleet.cid(0)
        sizes = [1200, 1200, 1200, 300, 1200, 1350, 1350, 1200, 21, 1200]
        datagrams = [short(cid, size)[:-1] + bytes([i]) for i, size in enumerate(sizes)]
        for datagram in datagrams:
            client.sendto(datagram, fleet.vip)

        assert [fleet.backends[0].recv(65536) for _ in datagrams] == datagrams


def test_ecn_and_traffic_class_are_carried_both_ways() -> None:
    with Fleet(2) as fleet, fleet.client() as client:
        backend = fleet.backends[0]
        for sock in (client, backend):
            sock.setsockopt(socket.SOL_IP, socket.IP_RECVTOS, 1)
        cid = fleet.cid(0)
        for tos in (0x02, 0x01, 0x00, 0x03, 0xB8):
            client.setsockopt(socket.SOL_IP, socket.IP_TOS, tos)
            client.sendto(short(cid), fleet.vip)
            _, control, _, upstream = backend.recvmsg(2000, 64)
            assert [v[0] for _, _, v in control] == [tos]
            backend.setsockopt(socket.SOL_IP, socket.IP_TOS, tos ^ 1)
            backend.sendto(b"reply", upstream)
            _, control, _, _ = client.recvmsg(2000, 64)
            assert [v[0] for _, _, v in control] == [tos ^ 1]


def test_the_traffic_class_crosses_families() -> None:
    with Fleet(1, listen=["::1"]) as fleet, fleet.client("::1") as client:
        fleet.backends[0].setsockopt(socket.SOL_IP, socket.IP_RECVTOS, 1)
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 0x02)
        client.sendto(short(fleet.cid(0)), fleet.vip)
        _, control, _, _ = fleet.backends[0].recvmsg(2000, 64)

        assert [v[0] for _, _, v in control] == [0x02]


def test_datagrams_are_never_fragmented_and_too_long_ones_are_named() -> None:
    for is_ipv6, host, option in ((False, "127.0.0.1", (socket.SOL_IP, 10)), (True, "::1", (socket.IPPROTO_IPV6, 23))):
        port = upstream_port(is_ipv6, buffer=1 << 20)
        to = (host, 9, 0, 0) if is_ipv6 else (host, 9)
        assert port.sock.getsockopt(*option) == 3  # PROBE: DF is set
        assert port.send([bytes(65530)], 65530, 1, 0, to, []) == Drop.TOO_LARGE
        assert port.send([bytes(60000)], 60000, 1, 0, to, []) is None
        port.close()


def test_a_train_that_the_kernel_refuses_leaves_singly() -> None:
    """65 segments are more than it takes; whatever the reason, nothing may be lost of it."""
    with udp_socket() as receiver:
        port = upstream_port(False, buffer=1 << 20)
        views = [bytes([i]) * 10 for i in range(200)]
        drop = port.send(views, 10, 200, 0, receiver.getsockname(), [])

        assert drop is None
        assert [receiver.recv(100) for _ in views] == views
        port.close()


def test_datagrams_of_every_size_leave_whole_after_trains_of_another() -> None:
    """A train leaves its segment size on the socket; what follows must not be cut by it, nor refused for it."""
    with udp_socket() as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        port = upstream_port(False, buffer=1 << 20)
        to = receiver.getsockname()
        sent = []
        for size, count in ((1200, 4), (1300, 1), (600, 3), (600, 1), (599, 1), (601, 1), (1200, 2), (7, 1), (9000, 1)):
            datagrams = [os.urandom(size) for _ in range(count)]
            assert port.send([b"".join(datagrams)], size, count, 0, to, []) is None
            sent += datagrams

        assert [receiver.recv(65536) for _ in sent] == sent
        port.close()


@pytest.mark.parametrize(
    ("datagram", "verdict"),
    [
        (b"", Verdict.EMPTY),
        (b"\xc0", Verdict.MALFORMED),
        (b"\x40", Verdict.FALLBACK),
        (long(b"", b""), Verdict.FALLBACK),
        (b"\x55" * 60000, Verdict.FALLBACK),
    ],
)
def test_every_datagram_is_counted_once(datagram: bytes, verdict: Verdict) -> None:
    with Fleet() as fleet, fleet.client() as client:
        client.sendto(datagram, fleet.vip)
        eventually(fleet.verdicts)

        assert fleet.verdicts() == {verdict: 1}


def test_stale_octets_in_a_buffer_are_not_part_of_a_short_datagram() -> None:
    """A datagram cut inside its CID must not be completed by the one that was in the buffer before."""
    with Fleet() as fleet, fleet.client() as client:
        cid = fleet.cid(1)
        for _ in range(130):  # fill every buffer
            fleet.round_trip(client, short(cid), 1)
        for _ in range(70):
            client.sendto(short(cid)[:10], fleet.vip)
        eventually(lambda: sum(fleet.verdicts().values()) == 200)

        assert fleet.verdicts()[Verdict.CID] == 130
        assert fleet.counters().services["web"].unroutable[3] == 70


def test_nothing_that_follows_an_established_flow_raises() -> None:
    """Empty, tiny and greased datagrams, alone and in trains, from a client whose shortcut is set."""
    with Fleet() as fleet, fleet.client() as client:
        cid = fleet.cid(1)
        fleet.round_trip(client, short(cid), 1)
        for datagram in (b"", b"\x41", b"\x41" + cid, b"\xff", short(cid, 18)):
            client.sendto(datagram, fleet.vip)
        for size in (1, 2, 17, 18, 19):
            train(client, [short(cid)[:size]] * 5 + [b"\x41"], size, fleet.vip)
        client.sendto(short(cid), fleet.vip)
        eventually(lambda: sum(fleet.verdicts().values()) == 37)

        assert fleet.verdicts()[Verdict.CID] == 2 + 2 + 5 + 5
        assert fleet.verdicts()[Verdict.EMPTY] == 1


def test_a_dead_servers_client_is_answered_with_its_reset() -> None:
    with Fleet() as fleet, fleet.client() as client:
        fleet.apply(fleet.table(["b1"], b1=DOWN))
        cid = fleet.cid(1)
        client.sendto(short(cid), fleet.vip)
        reply, source = client.recvfrom(2000)

        assert reply[-16:] == reset_token(server_reset_key(RESET_KEY, 0, server_id(1)), cid)  # type: ignore[arg-type]
        assert (len(reply) < 60, source) == (True, tuple(fleet.vip))
        assert fleet.verdicts() == {Verdict.RESET: 1}


def test_when_a_server_is_declared_dead_silent_clients_are_told_once_and_others_never() -> None:
    with Fleet() as fleet, fleet.client() as one, fleet.client() as two, fleet.client() as other:
        cids = fleet.cid(1), fleet.cid(1)
        latest = fleet.cid(1)
        for client, cid in ((one, cids[0]), (one, latest), (two, cids[1])):
            fleet.round_trip(client, short(cid), 1)
        fleet.round_trip(other, short(fleet.cid(2)), 2)
        fleet.apply(fleet.table(b1=DOWN))
        assert quiet(one, two, other)
        fleet.apply(fleet.table(["b1"], b1=DOWN))

        key = server_reset_key(RESET_KEY, 0, server_id(1))  # type: ignore[arg-type]
        assert one.recv(2000)[-16:] == reset_token(key, latest)
        assert two.recv(2000)[-16:] == reset_token(key, cids[1])
        fleet.apply(fleet.table(["b1"], b1=DOWN))
        assert quiet(one, two, other)
        assert fleet.counters().services["web"].resets_pushed == 2
        assert fleet.counters().flows == 1


def test_pushed_resets_are_paced_and_stop_if_the_server_rises() -> None:
    with Fleet(push_rate=100) as fleet:
        clients = [udp_socket() for _ in range(40)]
        for client in clients:
            fleet.round_trip(client, short(fleet.cid(1)), 1)
        fleet.apply(fleet.table(["b1"], b1=DOWN))
        eventually(lambda: fleet.counters().services["web"].resets_pushed)
        fleet.apply(fleet.table())

        told = fleet.counters().services["web"].resets_pushed
        assert 0 < told < 40
        assert quiet(fleet.backends[1], seconds=0.2)
        assert fleet.counters().services["web"].resets_pushed == told
        for client in clients:
            client.close()


def test_few_pushed_resets_a_second_are_few() -> None:
    with Fleet(push_rate=20) as fleet:
        clients = [udp_socket() for _ in range(5)]
        for client in clients:
            fleet.round_trip(client, short(fleet.cid(1)), 1)
        begun = time.monotonic()
        fleet.apply(fleet.table(["b1"], b1=DOWN))
        eventually(lambda: fleet.counters().services["web"].resets_pushed == 5)

        assert time.monotonic() - begun >= 4 / 20
        for client in clients:
            client.close()


def test_a_client_that_got_no_further_than_long_headers_is_told_too() -> None:
    """Its last flight may have been a Handshake and a 1-RTT packet in one datagram: a long header comes first."""
    with Fleet() as fleet, fleet.client() as client:
        cid = fleet.cid(1)
        fleet.round_trip(client, long(cid, b"scid"), 1)
        fleet.apply(fleet.table(["b1"], b1=DOWN))

        assert client.recv(2000)[-16:] == reset_token(server_reset_key(RESET_KEY, 0, server_id(1)), cid)  # type: ignore[arg-type]


def test_a_client_whose_cids_were_its_own_choice_is_told_nothing() -> None:
    with Fleet() as fleet, fleet.client() as client:
        home = fleet.table().fallback(FourTuple("127.0.0.1", client.getsockname()[1], *fleet.vip))
        assert home is not None
        fleet.round_trip(client, long(b"chosen!!", b"scid"), home)
        fleet.apply(fleet.table([f"b{home}"], **{f"b{home}": DOWN}))

        assert quiet(client)


def test_a_vanished_backend_port_makes_a_suspect_and_harms_nobody_else() -> None:
    """ICMP errors surface on a socket that other backends share."""
    with Fleet(3) as fleet, fleet.client() as client:
        for backend in range(3):
            fleet.round_trip(client, short(fleet.cid(backend)), backend)
        fleet.backends[0].close()
        dead, alive = fleet.cid(0), fleet.cid(1)
        for _ in range(50):
            client.sendto(short(dead), fleet.vip)
            fleet.round_trip(client, short(alive), 1)

        assert set(eventually(lambda: fleet.suspects)) == {"b0"}
        counters = fleet.counters()
        assert counters.services["web"].backends["b0"].unreachable > 0
        assert counters.services["web"].backends["b1"].datagrams_from == 51
        assert counters.failures[Drop.BUFFER_FULL] == 0


def said_all(fleet: Fleet) -> bool:
    """None of the engine's sockets has anything to report, so that it sleeps."""
    epoll = fleet.engine._epoll
    assert epoll is not None
    return not epoll.poll(0)


@pytest.mark.parametrize(("vip", "backend_host", "size"), [("127.0.0.1", "::1", 65507), ("::1", "::1", 65527)])
def test_a_datagram_too_long_to_be_sent_on_does_not_keep_the_engine_awake(
    vip: str, backend_host: str, size: int
) -> None:
    """The kernel queues an error for it that receiving does not report. Fragments can make such a datagram anywhere."""
    with Fleet(1, listen=[vip], backend_hosts=[backend_host]) as fleet, fleet.client(vip) as client:
        cid = fleet.cid(0)
        fleet.round_trip(client, short(cid), 0)
        client.sendto(short(cid, size), fleet.vip)
        eventually(lambda: fleet.counters().failures[Drop.TOO_LARGE] == 1)

        eventually(lambda: said_all(fleet))
        assert fleet.counters().services["web"].backends["b0"].unreachable == 0
        assert fleet.suspects == []


def test_an_error_that_a_send_was_told_of_does_not_keep_the_engine_awake() -> None:
    with Fleet(2) as fleet, fleet.client() as client:
        for backend in range(2):
            fleet.round_trip(client, short(fleet.cid(backend)), backend)
        fleet.backends[0].close()
        dead, alive = short(fleet.cid(0)), short(fleet.cid(1))
        for _ in range(20):  # in one batch: the second is sent after the error of the first has come back
            for datagram in (dead, alive) * 4:
                client.sendto(datagram, fleet.vip)
            for _ in range(4):
                fleet.backends[1].recv(2000)

        eventually(lambda: said_all(fleet))
        assert set(fleet.suspects) == {"b0"}


def test_a_backend_that_answers_nothing_is_suspected_one_that_is_idle_is_not() -> None:
    with Fleet(2, silence=0.2) as fleet, fleet.client() as client:
        cid = fleet.cid(0)
        fleet.round_trip(client, short(fleet.cid(1)), 1)

        def keep_sending() -> list[str]:
            for _ in range(4):
                client.sendto(short(cid), fleet.vip)
            return fleet.suspects

        eventually(keep_sending)
        assert set(fleet.suspects) == {"b0"}


def test_established_connections_survive_a_flood_of_initials_from_everywhere() -> None:
    limits = RouterLimits(table_entries=100, new_flows_rate=0)
    with Fleet(flows=100, sockets=100, router=limits) as fleet:
        clients = [udp_socket() for _ in range(20)]
        cids = [fleet.cid(i % 3) for i in range(20)]
        for i, (client, cid) in enumerate(zip(clients, cids, strict=True)):
            fleet.round_trip(client, short(cid), i % 3)
        for sock in fleet.backends:
            sock.close()
        flood = [udp_socket(f"127.0.1.{i}") for i in range(1, 251)]
        sent = 20
        for i, sock in enumerate(flood * 4):
            sock.sendto(long(os.urandom(8), os.urandom(4)), fleet.vip)
            sock.sendto(short(os.urandom(17)), fleet.vip)
            clients[i % 20].sendto(short(cids[i % 20]), fleet.vip)
            sent += 3
            if i % 50 == 0:  # no faster than it can take: what is lost before it would prove nothing
                eventually(lambda: sum(fleet.verdicts().values()) >= sent)  # noqa: B023 - called at once
        eventually(lambda: sum(fleet.verdicts().values()) == sent)
        counters = fleet.counters()

        assert (counters.flows, counters.flow_limit) == (100, 100)
        assert counters.flows_evicted > 500
        assert len({flow.client for flow in fleet.engine._nat.flows} & {c.getsockname() for c in clients}) == 20
        assert counters.services["web"].moves == 20  # none had to begin again
        for sock in [*clients, *flood]:
            sock.close()


def test_at_the_socket_limit_an_old_flow_goes_and_the_newest_comes() -> None:
    with Fleet(2, sockets=3) as fleet:
        clients = [udp_socket() for _ in range(8)]
        for client in clients:
            fleet.round_trip(client, short(fleet.cid(0)), 0)
        counters = fleet.counters()

        assert (counters.flows, counters.flows_evicted, counters.sockets) == (3, 5, 3)
        assert clients[-1].getsockname() in {flow.client for flow in fleet.engine._nat.flows}
        for client in clients:
            client.close()


def test_backends_of_one_family_leave_sockets_for_those_of_the_other() -> None:
    with Fleet(2, backend_hosts=["127.0.0.1", "::1"], sockets=6) as fleet:
        clients = [udp_socket() for _ in range(8)]
        for client in clients:
            fleet.round_trip(client, short(fleet.cid(0)), 0)
        for client in clients[:3]:
            fleet.round_trip(client, short(fleet.cid(1)), 1)
        counters = fleet.counters()

        assert (counters.flows, counters.flows_evicted, counters.sockets) == (6, 5, 6)
        for client in clients:
            client.close()


def test_without_descriptors_for_a_moment_it_is_without_sockets_for_a_moment() -> None:
    with Fleet(1) as fleet, fleet.client() as client:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        next_free = os.open(os.devnull, os.O_RDONLY)
        os.close(next_free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, before[1]))
            client.sendto(short(fleet.cid(0)), fleet.vip)
            eventually(lambda: fleet.counters().failures[Drop.NO_SOCKET] == 1)
            assert fleet.counters().socket_limit == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

        def gets_through() -> bool:
            client.sendto(short(fleet.cid(0)), fleet.vip)
            return not quiet(fleet.backends[0], seconds=0.05)

        eventually(gets_through)
        assert fleet.counters().socket_limit == 200


def test_without_descriptors_it_goes_on_with_the_sockets_it_has() -> None:
    with Fleet(1, sockets=500) as fleet:
        clients = [udp_socket() for _ in range(5)]
        fleet.round_trip(clients[0], short(fleet.cid(0)), 0)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        next_free = os.open(os.devnull, os.O_RDONLY)
        os.close(next_free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, before[1]))
            for client in clients[1:]:
                fleet.round_trip(client, short(fleet.cid(0)), 0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        counters = fleet.counters()

        assert (counters.flows, counters.flows_evicted, counters.socket_limit) == (1, 4, 1)
        for client in clients:
            client.close()


def test_idle_flows_expire_and_their_ports_rest_before_they_serve_again() -> None:
    with Fleet(1, idle_timeout=0.2, new_flow_timeout=0.1) as fleet, fleet.client() as one, fleet.client() as two:
        port = fleet.round_trip(one, short(fleet.cid(0)), 0)
        eventually(lambda: fleet.counters().flows_expired == 1)

        assert fleet.counters().flows == 0
        assert fleet.round_trip(two, short(fleet.cid(0)), 0) != port
        fleet.backends[0].sendto(b"late", port)
        eventually(lambda: fleet.counters().failures[Drop.NO_FLOW] == 1)
        assert quiet(one, two)


def test_a_port_rests_for_all_services_that_share_a_backend() -> None:
    """Replies are told apart by port and backend: to give both to another service's client would mix them up."""
    with Fleet(1, idle_timeout=0.2, new_flow_timeout=0.2) as fleet, fleet.client() as one, fleet.client() as two:
        port = free_port()
        api = Service("api", (Address("127.0.0.1", port),), fleet.service.cid_slots, fleet.service.backends, "a seed")
        policy = ServicePolicy(router=RouterLimits(), push_rate=0, silence=0)
        fleet.engine.set_policies({"web": policy, "api": policy})
        fleet.call(fleet.engine.apply([fleet.table(), RoutingTable.build(api)]))
        of_one = fleet.round_trip(one, short(fleet.cid(0)), 0)
        eventually(lambda: fleet.counters().flows == 0)
        of_two = fleet.round_trip(two, short(fleet.cid(0)), 0, to=("127.0.0.1", port))

        assert of_one != of_two


def test_nothing_expires_because_the_process_was_stopped() -> None:
    class Later:
        """The loop, after a stop of 1000 seconds."""

        def __init__(self, loop: Any) -> None:
            self._loop = loop

        def time(self) -> float:
            return float(self._loop.time()) + 1000

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loop, name)

    with Fleet(1) as fleet, fleet.client() as client:
        port = fleet.round_trip(client, short(fleet.cid(0)), 0)
        fleet.engine._loop = Later(fleet.engine._loop)  # type: ignore[assignment]
        ticks = eventually(lambda: fleet.engine._stopped_for) and fleet.engine._looked_at
        eventually(lambda: fleet.engine._looked_at > ticks)

        assert fleet.round_trip(client, short(fleet.cid(0)), 0) == port
        assert fleet.counters().flows_expired == 0


def test_a_successor_carries_on_where_a_dead_process_stopped(tmp_path: Path) -> None:
    with Fleet(2, runtime=tmp_path) as fleet, fleet.client() as client, fleet.client("127.0.0.5") as other:
        seen_as = fleet.round_trip(client, short(fleet.cid(1)), 1)
        ended = fleet.round_trip(other, short(fleet.cid(0)), 0)
        fleet.stop()

        with Fleet(runtime=tmp_path, of=fleet) as successor:
            for backend, port, receiver in ((1, seen_as, client), (0, ended, other)):
                fleet.backends[backend].sendto(b"the rest of a download", port)
                assert receiver.recvfrom(2000) == (b"the rest of a download", tuple(fleet.vip))
            counters = successor.counters()
            assert (counters.flows, counters.flows_restored) == (2, 2)
            assert successor.round_trip(client, short(fleet.cid(1)), 1) == seen_as


def test_a_client_that_only_receives_is_told_even_by_a_successor(tmp_path: Path) -> None:
    with Fleet(2, runtime=tmp_path) as fleet, fleet.client() as client:
        cid = fleet.cid(1)
        fleet.round_trip(client, short(cid), 1)
        fleet.stop()
        with Fleet(runtime=tmp_path, of=fleet) as successor:
            successor.apply(successor.table(["b1"], b1=DOWN))

            assert client.recv(2000)[-16:] == reset_token(server_reset_key(RESET_KEY, 0, server_id(1)), cid)  # type: ignore[arg-type]


def test_a_successor_that_knows_of_a_death_from_the_start_tells_the_clients(tmp_path: Path) -> None:
    class Bereaved(Fleet):
        def table(self, dead: Sequence[str] = (), **states: BackendState) -> RoutingTable:
            return super().table(["b1"], b1=DOWN)

    with Fleet(2, runtime=tmp_path) as fleet, fleet.client() as client:
        cid = fleet.cid(1)
        fleet.round_trip(client, short(cid), 1)
        fleet.stop()
        with Bereaved(runtime=tmp_path, of=fleet):
            assert client.recv(2000)[-16:] == reset_token(server_reset_key(RESET_KEY, 0, server_id(1)), cid)  # type: ignore[arg-type]


def test_ports_of_restored_flows_that_end_are_not_given_to_two(tmp_path: Path) -> None:
    with Fleet(1, runtime=tmp_path) as fleet:
        clients = [udp_socket() for _ in range(12)]
        for client in clients[:4]:
            fleet.round_trip(client, short(fleet.cid(0)), 0)
        fleet.stop()
        with Fleet(runtime=tmp_path, of=fleet, idle_timeout=0.2, new_flow_timeout=60) as successor:
            eventually(lambda: successor.counters().flows_expired == 4)
            rested = successor.engine._now() + PORT_REST
            seen_as: list[Any] = []
            for client in clients[4:]:
                if len(seen_as) == 4:
                    eventually(lambda: successor.engine._now() > rested)
                client.sendto(short(fleet.cid(0)), fleet.vip)
                seen_as.append(fleet.backends[0].recvfrom(2000)[1])

            assert successor.counters().flows == len(set(seen_as)) == 8
        for client in clients:
            client.close()


def test_an_address_in_use_changes_nothing() -> None:
    with Fleet(2) as fleet, fleet.client() as client, udp_socket() as taken:
        address = Address(*taken.getsockname())
        wider = Service(
            "web", (*fleet.service.listen, address), fleet.service.cid_slots, fleet.service.backends, "a seed"
        )
        with pytest.raises(OSError, match=f"cannot listen on {address}") as caught:
            fleet.apply(RoutingTable.build(wider))

        assert caught.value.errno == errno.EADDRINUSE
        fleet.round_trip(client, short(fleet.cid(1)), 1)


def test_listeners_and_backends_come_and_go_with_the_table() -> None:
    with Fleet(3) as fleet, fleet.client() as client:
        flows = [fleet.round_trip(client, short(fleet.cid(i)), i) for i in range(3)]
        port = free_port()
        listen = (*fleet.service.listen, Address("127.0.0.1", port))
        backends = fleet.service.backends[1:]
        fleet.apply(RoutingTable.build(Service("web", listen, fleet.service.cid_slots, backends, "a seed")))

        assert fleet.counters().flows == 2
        assert [fleet.round_trip(client, short(fleet.cid(i)), i) for i in (1, 2)] == flows[1:]
        fleet.round_trip(client, short(fleet.cid(1)), 1, to=("127.0.0.1", port))
        fleet.apply(RoutingTable.build(Service("web", listen[1:], fleet.service.cid_slots, backends, "a seed")))
        assert fleet.counters().flows == 1
        fleet.round_trip(client, short(fleet.cid(1)), 1, to=("127.0.0.1", port))
        with udp_socket(port=fleet.vip.port):
            pass  # the old address is free again


def test_a_backend_with_another_address_is_another_backend() -> None:
    with Fleet(2) as fleet, fleet.client() as client, udp_socket() as moved:
        fleet.round_trip(client, short(fleet.cid(1)), 1)
        b0, b1 = fleet.service.backends
        there = Backend("b1", Address(*moved.getsockname()), b1.server_ids)
        fleet.apply(
            RoutingTable.build(Service("web", fleet.service.listen, fleet.service.cid_slots, (b0, there), "a seed"))
        )
        client.sendto(short(fleet.cid(1)), fleet.vip)

        assert len(moved.recv(2000)) == 60
        assert quiet(fleet.backends[1])


def test_a_port_hears_of_icmp_without_being_connected() -> None:
    port = upstream_port(False, buffer=1 << 20)
    nowhere = ("127.0.0.1", free_port())
    assert port.send([b"anybody?"], 8, 1, 0, nowhere, []) is None
    data, _, _, to = eventually(lambda: _error(port.sock))

    assert (data, to) == (b"", nowhere)
    port.close()


def _error(sock: socket.socket) -> tuple[bytes, object, int, object]:
    """What is in a socket's error queue; something empty as long as nothing is."""
    try:
        return sock.recvmsg(0, 128, MSG_ERRQUEUE)
    except BlockingIOError:
        return ()  # type: ignore[return-value]


def test_workers_may_share_an_address_and_strangers_may_not() -> None:
    address = Address("127.0.0.1", free_port())
    one, two = (listening_port(address, buffer=1 << 20, shared=True) for _ in range(2))
    one.close()
    two.close()
    alone = listening_port(address, buffer=1 << 20, shared=False)
    with pytest.raises(OSError, match="in use"):
        listening_port(address, buffer=1 << 20, shared=False)
    alone.close()
