"""A client that moves, and one that only seems to: what a server says where, and what that costs it."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

import pytest
from aioquic.quic.packet import QuicErrorCode

from backend.paths import ALLOWANCES, LONGEST_DOUBT, Budget, Doubts, Expense, PathEvent, Paths, PreferredAddress
from backend.routable import MOST_SENT
from lb.address import Address
from tests.backend.hostile import (
    AT_OWN,
    HOME,
    OWN,
    RTT,
    SERVER,
    SOCKET,
    Duel,
    Where,
    new_cid,
    packet,
    path_challenge,
    ping,
    retire,
)
from tests.test_backend import DEADLINE, connect, scenario, serve, until

ELSEWHERE: Where = ("203.0.113.7", 50000, SOCKET)
REBOUND: Where = (HOME[0], 40001, SOCKET)
PATIENCE = 5.0  # seconds; more than any validation takes
MOST_PATHS = 8  # aioquic's


def stranger(i: int) -> Where:
    return (f"203.0.{113 + i // 250}.{i % 250 + 1}", 1024 + i, SOCKET)


def most(expense: Expense, seconds: float) -> float:
    """What an allowance comes to in that time."""
    return ALLOWANCES[expense].at_once + ALLOWANCES[expense].per_second * seconds


# Anti-amplification


def test_who_answers_no_challenge_is_sent_three_times_what_came_from_there_at_most() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    duel = Duel()
    duel.download(3_000_000)
    shares = []
    for _ in range(300):
        where = stranger(chance.randrange(12))
        frame = chance.choice([ping(), path_challenge()])
        duel.send(duel.packet(frame, size=chance.choice([0, 60, 300, 1200])), where)
        duel.advance(chance.choice([0.0, 0.01, 0.3, 2.0]))
        shares += [duel.said[where] / heard for where, heard in duel.heard.items() if where != HOME]
    assert 2 < max(shares) <= 3
    assert duel.downloaded == 3_000_000


def test_it_holds_during_the_handshake_for_an_address_that_is_silent_after_its_initial() -> None:
    duel = Duel(is_connected=False)
    duel.owned = set()
    duel.advance(60.0)
    assert 1200 <= duel.said[HOME] <= 3 * duel.heard[HOME]


def test_a_handshake_packet_from_elsewhere_proves_nothing() -> None:
    """The client reads the server's Initial at home, and has its Finished come from its victim's address."""
    duel = Duel(is_connected=False)
    duel.advance(0.0)
    duel.home = ELSEWHERE
    duel.until(1.0, lambda: duel.server._handshake_complete)
    assert (duel.active.addr, duel.active.is_validated) == (ELSEWHERE, False)
    duel.download(1_000_000)
    duel.advance(PATIENCE)
    assert 0 < duel.said[ELSEWHERE] <= 3 * duel.heard[ELSEWHERE]


def test_a_client_that_moves_during_its_handshake_finishes_it() -> None:
    duel = Duel(is_connected=False)
    duel.advance(0.0)
    duel.home = ELSEWHERE
    duel.owned.add(ELSEWHERE)
    duel.advance(PATIENCE)
    assert (duel.active.addr, duel.active.is_validated) == (ELSEWHERE, True)
    duel.download(200_000)
    duel.until(PATIENCE, lambda: duel.downloaded == 200_000)


def test_a_close_counts_towards_the_three_times() -> None:
    duel = Duel()
    duel.send(duel.packet(ping()), ELSEWHERE)
    room = 3 * duel.heard[ELSEWHERE] - duel.said[ELSEWHERE]
    assert duel.active.addr == ELSEWHERE
    assert room < 30
    duel.server.close(error_code=1, reason_phrase="goodbye")
    duel._server_speaks()
    assert duel.said[ELSEWHERE] <= 3 * duel.heard[ELSEWHERE]


def test_a_close_is_said_to_a_client_that_has_proved_its_address() -> None:
    duel = Duel()
    duel.server.close(error_code=1, reason_phrase="goodbye")
    duel.advance(1.0)
    assert duel.client._close_event is not None
    assert duel.client._close_event.reason_phrase == "goodbye"


# Migration


def test_a_nat_that_rebinds_is_noticed_asked_and_followed_in_mid_download() -> None:
    duel = Duel()
    duel.download(2_000_000)
    duel.until(PATIENCE, lambda: duel.downloaded > 500_000)
    window = duel.server._loss.congestion_window
    duel.home, duel.owned = REBOUND, {REBOUND}
    duel.client.send_ping(1)
    duel.until(PATIENCE, lambda: duel.downloaded == 2_000_000)
    assert (duel.active.addr, duel.active.is_validated) == (REBOUND, True)
    assert duel.counts == {PathEvent.MIGRATED: 1, PathEvent.VALIDATED: 1}
    assert duel.server._loss.congestion_window >= window // 2  # it is the same network


def test_a_client_that_moves_every_second_is_followed_every_time() -> None:
    duel = Duel()
    for i in range(30):
        duel.download(100_000)
        duel.home = stranger(i)
        duel.owned = {duel.home}
        duel.client.change_connection_id()
        duel.client.send_ping(1)
        duel.advance(1.0)
        assert (duel.active.addr, duel.active.is_validated) == (duel.home, True)
        assert duel.client_cids() == 8
    assert duel.counts == {PathEvent.MIGRATED: 30, PathEvent.VALIDATED: 30}
    assert len(duel.server._network_paths) <= MOST_PATHS
    assert duel.downloaded == 30 * 100_000


def test_another_host_is_another_network_of_which_nothing_is_known() -> None:
    duel = Duel()
    duel.download(3_000_000)
    duel.until(PATIENCE, lambda: duel.server._loss.congestion_window > 50_000)
    duel.home, duel.owned = ELSEWHERE, {ELSEWHERE}
    duel.client.send_ping(1)
    duel.until(PATIENCE, lambda: duel.paths.counts[PathEvent.VALIDATED])
    assert duel.server._loss.congestion_window <= 10 * 1200 + 3 * duel.heard[ELSEWHERE]
    duel.until(PATIENCE, lambda: duel.downloaded == 3_000_000)


def test_without_an_answer_it_goes_back_to_where_there_was_one() -> None:
    duel = Duel()
    duel.held = []  # the honest one is silent
    duel.send(duel.packet(ping()), ELSEWHERE)
    assert duel.active.addr == ELSEWHERE
    duel.advance(PATIENCE)
    assert duel.active.addr == HOME
    assert duel.paths.counts[PathEvent.FAILED] == 1
    assert ELSEWHERE not in {path.addr for path in duel.server._network_paths}


def test_after_a_failure_it_stays_for_a_while_and_after_a_success_it_forgets_the_failures() -> None:
    duel = Duel()

    def moves_at_once(where: Where) -> bool:
        duel.send(duel.packet(ping()), where)
        return duel.active is duel.path_at(where)

    duel.held = []
    for doubted in (0.5, 1.0):
        assert moves_at_once(ELSEWHERE)
        duel.until(PATIENCE, lambda: duel.active.addr == HOME)
        assert not moves_at_once(stranger(1))
        duel.advance(doubted + RTT)

    duel.held = None
    duel.home, duel.owned = REBOUND, {REBOUND}
    assert moves_at_once(REBOUND)
    duel.advance(1.0)
    assert duel.active.is_validated

    duel.held = []
    assert moves_at_once(ELSEWHERE)
    duel.until(PATIENCE, lambda: duel.active.addr == REBOUND)
    duel.advance(0.5 + RTT)
    assert moves_at_once(stranger(1))


def test_the_clients_path_challenge_is_answered_where_it_came_from_and_moves_nothing() -> None:
    duel = Duel()
    duel.owned.add(ELSEWHERE)
    before = duel.said[ELSEWHERE]
    duel.send(duel.packet(path_challenge(), size=1200), ELSEWHERE)
    assert duel.server.responses == 1
    assert duel.said[ELSEWHERE] - before >= 1200
    assert duel.active.addr == HOME


# Replays


def test_a_copy_that_comes_after_its_original_is_nothing() -> None:
    duel = Duel()
    data = duel.packet(ping())
    duel.send(data)
    duel.send(data, ELSEWHERE)
    duel.advance(1.0)
    assert duel.said[ELSEWHERE] == 0
    assert [path.addr for path in duel.server._network_paths] == [HOME]


def test_a_copy_that_is_quicker_does_not_keep_the_connection_from_a_client_that_only_listens() -> None:
    """Nothing is due from the client; it is the PATH_CHALLENGE on the path that was left which has it speak."""
    duel = Duel()
    data = duel.packet(ping())
    began = duel.now
    duel.send(data, ELSEWHERE)
    duel.send(data)
    assert duel.active.addr == ELSEWHERE
    duel.until(PATIENCE, lambda: duel.active.addr == HOME)
    assert duel.now - began < 2 * RTT + 0.03  # and not three PTO; 25 ms is the delay of its acknowledgement
    assert duel.said[ELSEWHERE] <= 3 * duel.heard[ELSEWHERE]
    duel.advance(PATIENCE)
    assert duel.active.addr == HOME
    assert PathEvent.FAILED not in duel.counts


def test_who_copies_everything_quicker_takes_nothing_for_long() -> None:
    """Each of the client's packets comes from another address first. The download goes on, if not as fast."""
    duel = Duel()
    duel.download(500_000)
    attempts = 0
    duel.held = []
    while duel.downloaded < 500_000:
        duel.advance(RTT / 4)
        for data in duel.held:
            duel.send(data, ELSEWHERE)
            duel.send(data)
        attempts += len(duel.held)
        duel.held.clear()
        assert duel.now < 1000.0 + 120.0
    assert attempts > 100
    assert duel.said[ELSEWHERE] <= 3 * duel.heard[ELSEWHERE]
    assert duel.paths.counts[PathEvent.LIMITED] > 0


def test_noise_with_a_connection_id_from_a_thousand_ports_costs_the_connection_nothing() -> None:
    duel = Duel()
    cid = duel.client._peer_cid.cid
    for i in range(1000):
        duel.send((b"\x40" + cid).ljust(1200, b"\xaa"), stranger(i))
    assert duel.server._network_paths == [duel.active]
    assert sum(duel.said[stranger(i)] for i in range(1000)) == 0
    assert duel.counts == {}
    duel.home, duel.owned = REBOUND, {REBOUND}
    duel.client.send_ping(1)
    duel.advance(1.0)
    assert (duel.active.addr, duel.active.is_validated) == (REBOUND, True)


# Storms


def test_a_storm_of_a_thousand_addresses_costs_little_and_leaves_the_connection_alive() -> None:
    duel = Duel()
    began = duel.now
    for i in range(1000):
        duel.send(duel.packet(ping(), size=1200), stranger(i))
        duel.advance(0.001)
        assert len(duel.server._network_paths) <= MOST_PATHS
        assert duel.server._network_paths[0].addr in (HOME, *map(stranger, range(i + 1)))
    attempts = most(Expense.VALIDATION, duel.now - began)
    reached = [i for i in range(1000) if duel.said[stranger(i)]]
    assert ALLOWANCES[Expense.VALIDATION].at_once <= len(reached) <= attempts
    assert duel.server.challenges <= 3 * attempts  # each may be lost, and asked again
    assert duel.paths.counts[PathEvent.LIMITED] >= 1000 - attempts

    duel.advance(PATIENCE)
    assert duel.active.addr == HOME
    duel.download(300_000)
    duel.until(PATIENCE, lambda: duel.downloaded == 300_000)
    duel.home, duel.owned = REBOUND, {REBOUND}
    duel.client.send_ping(1)
    duel.until(PATIENCE, lambda: duel.active.addr == REBOUND and duel.active.is_validated)


def test_a_storm_of_addresses_that_answer_is_limited_too() -> None:
    duel = Duel()
    began = duel.now
    for i in range(300):
        duel.home = stranger(i)
        duel.owned = {duel.home}
        duel.client.send_ping(1)
        duel.advance(0.03)
    assert duel.paths.counts[PathEvent.VALIDATED] <= most(Expense.VALIDATION, duel.now - began)
    assert duel.paths.counts[PathEvent.LIMITED] > 100
    assert len(duel.server._network_paths) <= MOST_PATHS
    duel.advance(PATIENCE)
    duel.client.send_ping(1)
    duel.advance(PATIENCE)
    assert (duel.active.addr, duel.active.is_validated) == (duel.home, True)


def test_two_addresses_in_turns_are_attempts_as_well() -> None:
    """Each promotion of an address that has not answered would be another PATH_CHALLENGE."""
    duel = Duel()
    for i in range(400):
        duel.send(duel.packet(ping(), size=1200), stranger(i % 2))
    assert 2 < duel.server.challenges <= most(Expense.VALIDATION, 0)
    assert duel.paths.counts[PathEvent.LIMITED] > 100


def test_what_a_source_may_begin_is_limited_over_all_connections() -> None:
    paths = Paths(source_rate=3)
    duels = [Duel(paths=paths) for _ in range(5)]
    for duel in duels:
        duel.now = 2000.0
        duel.send(duel.packet(ping()), ELSEWHERE)
    assert [duel.active.addr for duel in duels] == 3 * [ELSEWHERE] + 2 * [HOME]
    duels[4].send(duels[4].packet(ping()), ("198.18.0.1", 1, SOCKET))
    assert duels[4].active.addr[0] == "198.18.0.1"
    assert paths.counts[PathEvent.LIMITED] == 2


def test_a_flood_of_path_challenges_is_answered_in_measure() -> None:
    duel = Duel()
    began = duel.now
    for _ in range(500):
        duel.send(duel.packet(*10 * [path_challenge()]))
        duel.advance(0.002)
    allowed = most(Expense.PATH_RESPONSE, duel.now - began)
    assert ALLOWANCES[Expense.PATH_RESPONSE].at_once <= duel.server.responses <= allowed
    assert duel.paths.counts[PathEvent.CHALLENGE_IGNORED] >= 5000 - allowed
    assert len(duel.active.remote_challenges) == 0
    duel.advance(1.0)
    answered = duel.server.responses
    duel.send(duel.packet(path_challenge()))
    assert duel.server.responses == answered + 1


def test_a_flood_of_path_challenges_from_a_victims_address_is_within_three_times() -> None:
    duel = Duel()
    for _ in range(500):
        duel.send(duel.packet(path_challenge()), ELSEWHERE)
    duel.advance(1.0)
    assert duel.said[ELSEWHERE] <= 3 * duel.heard[ELSEWHERE]
    assert duel.server.responses <= most(Expense.PATH_RESPONSE, 1.0)


def test_a_client_whose_own_connection_ids_are_all_gone_breaks_its_connection_and_nothing_else() -> None:
    duel = Duel()
    duel.server._peer_cid_available.clear()
    duel.send(duel.packet(new_cid(1, 1, bytes(8))))  # the server has it, and has put it by for a path
    duel.advance(1.0)
    assert duel.ended[0].error_code == QuicErrorCode.PROTOCOL_VIOLATION


def test_acknowledgements_that_nobody_acknowledges_do_not_pile_up() -> None:
    duel = Duel()
    duel.held = []
    for _ in range(1500):
        duel.send(duel.packet(ping()))
        duel.advance(0.03)
    assert len(duel.server._loss.spaces[2].sent_packets) <= MOST_SENT
    duel.held = None
    duel.download(100_000)
    duel.until(PATIENCE, lambda: duel.downloaded == 100_000)


@pytest.mark.e2e
@scenario
async def test_over_sockets_a_storm_of_ports_is_answered_within_three_times_and_the_client_goes_on() -> None:
    async with serve() as backend, connect(backend.address) as client, contextlib.AsyncExitStack() as sockets:
        _, answer = client.start("GET", "/bytes/2000000")
        await until(lambda: answer.body)
        ports = []
        for _ in range(200):
            sock = sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            sock.bind(("127.0.0.1", 0))
            sock.sendto(packet(client.quic, ping(), size=300), backend.address)
            ports.append(sock)
        await until(lambda: answer.is_complete)
        assert len(answer.body) == 2_000_000
        counts = backend.server.paths.counts
        await until(lambda: counts[PathEvent.MIGRATED] + counts[PathEvent.LIMITED] >= 200)
        assert len(backend.connection._network_paths) <= MOST_PATHS
        assert client._transport is not None
        own_port = client._transport.get_extra_info("sockname")[1]
        assert (await client.request("GET", "/whoami")).json["client"] == f"127.0.0.1:{own_port}"
        answered = [sum(map(len, drained(sock))) for sock in ports]
        assert 0 < max(answered) <= 3 * 300
        assert sum(octets > 0 for octets in answered) <= most(Expense.VALIDATION, DEADLINE)


def drained(sock: socket.socket) -> Iterator[bytes]:
    """What waits in a socket."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield sock.recv(2000)


# Connection IDs


@pytest.mark.parametrize("limit", [2, 4, 8, 50])
def test_the_pool_is_full_whatever_the_client_changes(limit: int) -> None:
    duel = Duel(cid_limit=limit)
    full = min(8, limit)
    for _ in range(40):
        assert (len(duel.server.cids), duel.client_cids()) == (full, full)
        duel.client.change_connection_id()
        duel.advance(1.0)
    assert duel.issuer.issued == full + 40


def test_a_client_that_retires_all_the_time_takes_few_nonces_and_has_its_pool_back_in_the_end() -> None:
    duel = Duel()
    began, issued = duel.now, duel.issuer.issued
    kept = duel.client._peer_cid.cid
    duel.client._local_active_connection_id_limit = 1000  # it is not to complain
    for _ in range(1000):
        numbers = [each.sequence_number for each in duel.server._host_cids if each.cid != kept]
        duel.send(duel.packet(ping(), *map(retire, numbers), cid=kept))
        duel.advance(0.01)
        assert kept in duel.server.cids
    spent = duel.issuer.issued - issued
    assert ALLOWANCES[Expense.CONNECTION_ID].at_once <= spent <= most(Expense.CONNECTION_ID, duel.now - began)
    duel.advance(10.0)  # in which nobody says anything
    assert len(duel.server.cids) == 8
    assert duel.server._refill_at is None


def test_new_connection_ids_that_nobody_acknowledges_are_no_more_than_the_pool() -> None:
    duel = Duel()
    duel.owned = set()
    for _ in range(50):
        duel.server.renew()
        duel._server_speaks()
        duel.advance(0.5)
    assert len(duel.server.cids) == 16
    assert duel.issuer.issued == 16


def test_a_client_that_retires_nothing_is_asked_once_and_one_that_does_late_gets_the_newest() -> None:
    duel = Duel()
    duel.held = []
    for _ in range(10):
        duel.server.renew()
        duel._server_speaks()
        duel.advance(0.5)
    assert len(duel.server.cids) == 16
    held, duel.held = duel.held, None
    for data in held:
        duel.send(data)
    duel.advance(PATIENCE)
    assert (len(duel.server.cids), duel.client_cids()) == (8, 8)
    assert duel.issuer.issued == 24
    assert duel.server._host_cids[0].sequence_number == 16


# A preferred address


def preferring() -> Duel:
    preferred = PreferredAddress()
    preferred.add(OWN, AT_OWN[-1])
    return Duel(preferred=preferred)


def test_a_preferred_address_comes_with_the_second_connection_id() -> None:
    duel = preferring()
    second = duel.server._host_cids[1]
    assert (second.sequence_number, duel.issuer.issued) == (1, 8)
    assert duel.client._network_paths[1].addr == OWN
    assert duel.client._network_paths[1].peer_cid is not None
    assert duel.client._network_paths[1].peer_cid.cid == second.cid
    assert duel.client._network_paths[1].peer_cid.stateless_reset_token == second.stateless_reset_token
    assert duel.server.announced == [2, 3, 4, 5, 6, 7]


def test_at_a_preferred_address_only_probes_are_sent_until_the_client_has_answered_there() -> None:
    duel = preferring()
    duel.download(500_000)
    for _ in range(40):  # a client that asks nothing first
        duel.send(duel.packet(ping(), size=1200), AT_OWN)
        assert duel.active.addr == HOME
        duel.advance(0.005)
    assert 1 <= duel.server.challenges <= 6  # one for each PTO
    assert duel.said[AT_OWN] == 1200 * duel.server.challenges

    duel.owned.add(AT_OWN)
    duel.sockets = {OWN: AT_OWN[-1], SERVER: SOCKET}
    duel.client._network_paths[0].addr = tuple(OWN)
    duel.client.send_ping(1)
    duel.until(PATIENCE, lambda: duel.active.addr == AT_OWN)
    assert duel.active.is_validated
    said = duel.said[HOME]
    duel.until(PATIENCE, lambda: duel.downloaded == 500_000)
    assert duel.said[HOME] == said


# The policy by itself


def test_a_budget_is_spent_at_once_and_comes_back_with_time() -> None:
    for expense, (per_second, at_once) in ALLOWANCES.items():
        budget = Budget()
        assert sum(budget.allow(expense, 5.0) for _ in range(1000)) == at_once
        assert not budget.allow(expense, 5.0 + 0.9 / per_second)
        assert budget.allow(expense, 5.0 + 1.1 / per_second)
        assert sum(budget.allow(expense, 1000.0) for _ in range(1000)) == at_once


def test_doubts_double_until_a_path_is_proved() -> None:
    doubts = Doubts()
    assert doubts.are_gone(0.0)
    for i in range(10):
        doubts.failed(100.0 * i)
        wait = min(0.5 * 2**i, LONGEST_DOUBT)
        assert [doubts.are_gone(100.0 * i + each) for each in (0.0, wait - 0.01, wait)] == [False, False, True]
    doubts.failed(5000.0)
    doubts.proved()
    assert doubts.are_gone(5000.0)
    doubts.failed(6000.0)
    assert doubts.are_gone(6000.5)


def test_sources_are_prefixes_and_no_rate_is_no_limit() -> None:
    limited, unlimited = Paths(2), Paths(0)
    ipv4 = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.3.1"]
    ipv6 = ["2001:db8::1%eth0", "2001:db8::2", "2001:db8:0:1::1", "2001:db8:0:100::1"]
    for hosts in (ipv4, ipv6):
        assert [limited.allow(Budget(), Doubts(), (host, 1), 0.0) for host in hosts] == [True, True, False, True]
        assert all(unlimited.allow(Budget(), Doubts(), (host, 1), 0.0) for host in 100 * hosts)


def test_a_preferred_address_is_one_of_each_family_that_can_be_sent_to() -> None:
    preferred = PreferredAddress()
    preferred.add(Address("192.0.2.1", 443), 4)
    preferred.add(Address("2001:db8::1", 443), 6)
    for address in (Address("192.0.2.2", 443), Address("2001:db8::2", 443)):
        with pytest.raises(ValueError, match="a second preferred address of its family"):
            preferred.add(address, 5)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ValueError, match="clients cannot send there"):
            PreferredAddress().add(Address(host, 443), 5)
    assert [preferred.is_at(("192.0.2.9", 1, sock)) for sock in (4, 6, 5)] == [True, True, False]
