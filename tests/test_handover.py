"""Handover: a successor has every socket and every flow, and nobody outside can tell. Real sockets, on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.address import Address
from lb.engine import Counters
from lb.handover import Channel, Handover, Sockets, Taking, is_trusted, sockets_of
from lb.mmsg import raw_address, socket_address
from lb.nat import Followed, Nat, UdpLimits
from lb.returnpath import LivePaths, ReturnPath, ReturnPaths
from lb.router import RouterLimits, Verdict
from lb.routing import BackendState, RoutingTable
from lb.sockets import adopted, listening_port
from lb.upstream import Flow, Listener, Member, RunningService, ServicePolicy
from tests.builders import deterministic_random, long, service, short
from tests.fleet import Fleet, eventually, quiet, udp_socket

STEPS = ("connected", "sockets", "ready", "mine")


@contextmanager
def takeover(fleet: Fleet, directory: Path, *, like: Fleet | None = None, **options: Any) -> Iterator[Fleet]:
    """The successor of a fleet, which has ended. It has the configuration of `like`, or the same."""
    successor = Fleet(runtime=directory, of=like or fleet, take_over=True, **options)
    try:
        assert fleet.handed_over.wait(5)
        fleet.stop()
        yield successor
    finally:
        successor.stop()


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await story()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# What it is for.


def test_a_successor_has_all_flows_and_nobody_can_tell(tmp_path: Path) -> None:
    with Fleet(3, runtime=tmp_path) as fleet:
        clients = [udp_socket() for _ in range(20)]
        flows = [(client, short(fleet.cid(i % 3)), i % 3) for i, client in enumerate(clients)]
        seen_as = [fleet.round_trip(*flow) for flow in flows]
        with takeover(fleet, tmp_path) as successor:
            # Those that only receive first: they say nothing, and get their download all the same.
            for (client, _, backend), port in zip(flows, seen_as, strict=True):
                fleet.backends[backend].sendto(b"more", port)
                assert client.recv(100) == b"more"
            assert [successor.round_trip(*flow) for flow in flows] == seen_as

            counters = successor.counters()
            assert (counters.flows, counters.flows_restored, counters.flows_evicted) == (20, 20, 0)
            assert counters.services["web"].moves == 0
        for client in clients:
            client.close()


def test_successors_have_successors(tmp_path: Path) -> None:
    with Fleet(1, runtime=tmp_path) as first, first.client() as client:
        seen_as = first.round_trip(client, short(first.cid(0)), 0)
        with (
            takeover(first, tmp_path) as second,
            takeover(second, tmp_path) as third,
            takeover(third, tmp_path) as fourth,
        ):
            assert fourth.round_trip(client, short(first.cid(0)), 0) == seen_as


def test_every_datagram_of_a_load_arrives_exactly_once(tmp_path: Path) -> None:
    """Numbered, both ways, through takeovers and tables that change all the time."""
    count, flows = 6000, 16
    with Fleet(2, runtime=tmp_path) as fleet:
        clients = [udp_socket() for _ in range(flows)]
        cids = [fleet.cid(i % 2) for i in range(flows)]
        for sock in (*clients, *fleet.backends):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        arrived: list[list[int]] = [[], []]
        answers: list[list[int]] = [[] for _ in clients]
        received = threading.Semaphore(0)

        def answer(backend: int) -> None:
            sock = fleet.backends[backend]
            while True:
                datagram, peer = sock.recvfrom(2000)
                number = int.from_bytes(datagram[-4:])
                if number == 0:
                    return
                arrived[backend].append(number)
                sock.sendto(datagram, peer)

        def listen(client: int) -> None:
            while len(answers[client]) < count // flows:
                answers[client].append(int.from_bytes(clients[client].recv(2000)[-4:]))
                received.release()

        threads = [threading.Thread(target=answer, args=(i,)) for i in range(2)]
        threads += [threading.Thread(target=listen, args=(i,)) for i in range(flows)]
        for thread in threads:
            thread.start()

        def send() -> None:
            for number in range(1, count + 1):
                flow = number % flows
                clients[flow].sendto(short(cids[flow], 100)[:-4] + number.to_bytes(4), fleet.vip)
                if number > 200:  # so many are under way: no buffer is too small for them
                    assert received.acquire(timeout=5)

        sender = threading.Thread(target=send)
        sender.start()
        running: list[Fleet] = [fleet]
        while sender.is_alive():
            successor = Fleet(runtime=tmp_path, of=fleet, take_over=True)
            assert running[-1].handed_over.wait(5)
            running.pop().stop()
            running.append(successor)
            for _ in range(5):
                successor.apply(successor.table())
        sender.join()
        for thread in threads[2:]:
            thread.join()
        for backend in fleet.backends:
            with udp_socket() as sock:
                sock.sendto(bytes(4), backend.getsockname())
        for thread in threads[:2]:
            thread.join()
        running[-1].stop()

        expected = list(range(1, count + 1))
        assert sorted(number for numbers in arrived for number in numbers) == expected
        assert sorted(number for numbers in answers for number in numbers) == expected
        for client in clients:
            client.close()


def test_a_connection_whose_cids_say_nothing_stays_where_it_is(tmp_path: Path) -> None:
    """Its Initial's CID was the client's own choice: the 4-tuple is all there is, and the router knows it."""
    with Fleet(4, runtime=tmp_path) as fleet, fleet.client() as client:
        client.sendto(long(b"chosen!!", b"scid"), fleet.vip)
        (home,) = [i for i, backend in enumerate(fleet.backends) if not quiet(backend)]
        _, seen_as = fleet.backends[home].recvfrom(2000)
        with takeover(fleet, tmp_path) as successor:
            client.sendto(short(b"\xff" * 8), fleet.vip)

            assert fleet.backends[home].recvfrom(2000)[1] == seen_as
            assert successor.verdicts() == {Verdict.TABLE_FLOW: 1}


def test_a_crash_forgets_them_no_more_than_a_handover_does(tmp_path: Path) -> None:
    with Fleet(4, runtime=tmp_path) as fleet, fleet.client() as client:
        client.sendto(long(b"chosen!!", b"scid"), fleet.vip)
        eventually(fleet.verdicts)
        fleet.stop()
        with Fleet(runtime=tmp_path, of=fleet) as successor:
            client.sendto(short(b"\xff" * 8), fleet.vip)
            assert eventually(successor.verdicts) == {Verdict.TABLE_FLOW: 1}


def test_a_wildcard_listener_goes_on_answering_from_where_it_was_asked(tmp_path: Path) -> None:
    with Fleet(1, listen=["0.0.0.0"], runtime=tmp_path) as fleet, fleet.client() as client:
        asked = ("127.0.0.2", fleet.vip.port)
        seen_as = fleet.round_trip(client, short(fleet.cid(0)), 0, to=asked)
        with takeover(fleet, tmp_path):
            fleet.backends[0].sendto(b"more", seen_as)
            assert client.recvfrom(100) == (b"more", asked)


def test_a_kept_port_is_not_given_to_another_client_at_once(tmp_path: Path) -> None:
    """Late replies to a flow that ended just before the handover must not reach a new client."""
    with Fleet(1, runtime=tmp_path, sockets=10) as fleet, fleet.client() as old, fleet.client() as new:
        seen_as = fleet.round_trip(old, short(fleet.cid(0)), 0)
        fleet.apply(RoutingTable.build(service(1, members=(), listen=fleet.service.listen)))
        with takeover(fleet, tmp_path, sockets=10) as successor:
            assert successor.round_trip(new, short(fleet.cid(0)), 0) != seen_as


def test_with_less_room_whoever_is_established_stays(tmp_path: Path) -> None:
    with Fleet(2, runtime=tmp_path) as fleet:
        young = [udp_socket() for _ in range(6)]
        for client in young:
            client.sendto(short(fleet.cid(0)), fleet.vip)
        eventually(lambda: fleet.counters().flows == 6)
        established = [udp_socket() for _ in range(4)]
        seen_as = [fleet.round_trip(client, short(fleet.cid(1)), 1) for client in established]
        with takeover(fleet, tmp_path, flows=5) as successor:
            assert (successor.counters().flows, successor.counters().flows_evicted) == (5, 5)
            assert [successor.round_trip(c, short(fleet.cid(1)), 1) for c in established] == seen_as
        for client in (*young, *established):
            client.close()


def test_with_fewer_sockets_the_flows_of_those_that_are_too_many_go(tmp_path: Path) -> None:
    with Fleet(1, runtime=tmp_path) as fleet:
        clients = [udp_socket() for _ in range(6)]
        for client in clients:
            fleet.round_trip(client, short(fleet.cid(0)), 0)
        with takeover(fleet, tmp_path, sockets=4) as successor:
            counters = successor.counters()
            assert (counters.sockets, counters.flows, counters.flows_evicted) == (4, 4, 2)
        for client in clients:
            client.close()


def test_what_the_new_configuration_does_not_have_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Fleet(1, listen=["127.0.0.1", "127.0.0.2"], runtime=tmp_path) as fleet:
        kept, gone = fleet.service.listen
        smaller = Fleet(1, runtime=tmp_path / "other")
        smaller.stop()
        smaller.backends[0].close()
        smaller.service = service(1, listen=(kept,))
        with takeover(fleet, tmp_path, like=smaller):
            assert [r.__dict__["fields"]["address"] for r in caplog.records if r.message == "socket-unused"] == [gone]
            udp_socket(*gone).close()
            with pytest.raises(OSError, match="in use"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(kept)


# When it fails.


async def take_until(path: Path, step: str) -> Taking:
    """Be a successor that gets as far as `step`."""
    taking = await Taking.connect(path)
    assert taking is not None
    taking.close_files()
    if step != "connected":
        (await taking.sockets()).close()
        if step != "sockets":
            (await taking.ready())[1].close()
            if step == "mine":
                await taking.mine()
    return taking


@pytest.mark.parametrize("step", STEPS)
def test_a_successor_that_ends_too_soon_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    with Fleet(1, runtime=tmp_path) as fleet, fleet.client() as client, fleet.client() as another:
        seen_as = fleet.round_trip(client, short(fleet.cid(0)), 0)

        async def story() -> None:
            taking = await take_until(tmp_path / "handover-0.sock", step)
            if step in ("ready", "mine"):
                await asyncio.to_thread(eventually, lambda: not fleet.engine._timers)
                client.sendto(short(fleet.cid(0)), fleet.vip)
                assert await asyncio.to_thread(quiet, fleet.backends[0])  # it waits in the socket
            if step == "mine":
                await asyncio.to_thread(fleet.handed_over.wait, 5)
            taking.close()

        run(story)
        if step in ("ready", "mine"):
            assert fleet.backends[0].recvfrom(100)[1] == seen_as
        assert fleet.round_trip(client, short(fleet.cid(0)), 0) == seen_as
        assert fleet.handed_over.is_set() == (step == "mine")
        eventually(lambda: [r.message for r in caplog.records] == ["handover-failed"])
        fleet.round_trip(another, short(fleet.cid(0)), 0)
        fleet.apply(fleet.table())
        fleet.handed_over.clear()
        with takeover(fleet, tmp_path) as successor:  # the next one gets everything
            assert successor.counters().flows == 2


def test_a_successor_that_ends_after_it_began_gives_everything_back(tmp_path: Path) -> None:
    with Fleet(1, runtime=tmp_path) as fleet, fleet.client() as client:
        seen_as = fleet.round_trip(client, short(fleet.cid(0)), 0)
        successor = Fleet(runtime=tmp_path, of=fleet, take_over=True)
        assert successor.round_trip(client, short(fleet.cid(0)), 0) == seen_as
        successor.stop()
        assert fleet.round_trip(client, short(fleet.cid(0)), 0) == seen_as
        eventually((tmp_path / "handover-0.sock").exists)
        fleet.stop()
        with Fleet(runtime=tmp_path, of=fleet) as later:  # the file is its own again
            assert later.counters().flows_restored == 1


def test_a_successor_that_is_too_slow_is_told_and_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lb.handover.PAUSE_PATIENCE", 0.2)
    with Fleet(1, runtime=tmp_path) as fleet, fleet.client() as client:

        async def story() -> None:
            taking = await take_until(tmp_path / "handover-0.sock", "ready")
            await asyncio.to_thread(fleet.round_trip, client, short(fleet.cid(0)), 0)
            with pytest.raises(OSError, match="cannot take over"):
                await taking.mine()
            taking.close()

        run(story)
        assert not fleet.handed_over.is_set()


def test_a_successor_that_cannot_listen_fails_and_its_predecessor_goes_on(tmp_path: Path) -> None:
    with Fleet(1, runtime=tmp_path) as fleet, fleet.client() as client, udp_socket() as taken:
        other = Fleet(1, runtime=tmp_path / "other")
        other.stop()
        other.service = service(1, listen=(fleet.vip, Address(*taken.getsockname())))
        with pytest.raises(OSError, match="cannot listen"):
            Fleet(runtime=tmp_path, of=other, take_over=True)
        fleet.round_trip(client, short(fleet.cid(0)), 0)
        for sock in other.backends:
            sock.close()


def test_nobody_to_take_over_from_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"handover-0\.sock: No such file"):
        Fleet(1, runtime=tmp_path, take_over=True)
    with Fleet(1, runtime=tmp_path) as fleet:
        os.rename(tmp_path / "handover-0.sock", tmp_path / "kept")
        fleet.stop()
        os.rename(tmp_path / "kept", tmp_path / "handover-0.sock")  # as if it had been killed
        with pytest.raises(ConnectionRefusedError, match="cannot take over"):
            Fleet(runtime=tmp_path, of=fleet, take_over=True)


def test_only_one_at_a_time(tmp_path: Path) -> None:
    with Fleet(1, runtime=tmp_path) as fleet:

        async def story() -> None:
            first = await take_until(tmp_path / "handover-0.sock", "connected")
            with pytest.raises(OSError, match="another process is about to take over"):
                await Taking.connect(tmp_path / "handover-0.sock")
            (await first.sockets()).close()
            first.close()

        run(story)
        assert not fleet.handed_over.is_set()


def test_who_has_no_file_cannot_be_followed(tmp_path: Path) -> None:
    class Bare:
        def files(self) -> None:
            return None

        def sockets(self) -> Sockets:
            return Sockets([], [])

        def records(self) -> int:
            return 0

        async def pause(self) -> None: ...
        def resume(self) -> None: ...
        def handed_over(self) -> None: ...

    async def story() -> None:
        handover = Handover(tmp_path / "handover-0.sock", Bare())
        handover.serve()
        with pytest.raises(OSError, match="it has no return path file"):
            await Taking.connect(tmp_path / "handover-0.sock")
        await handover.stop()
        assert not os.listdir(tmp_path)

    run(story)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ({"what": "take-over", "version": 2}, "it speaks version 1"),
        ({"what": "mine"}, None),
        ({"what": ["take-over"]}, None),
        ({}, None),
        (b"\xff\xff", None),
        ([1], None),
    ],
)
def test_who_speaks_otherwise_gets_nothing(tmp_path: Path, said: object, answer: str | None) -> None:
    with Fleet(1, runtime=tmp_path) as fleet, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        sock.connect(str(tmp_path / "handover-0.sock"))
        sock.send(said if isinstance(said, bytes) else json.dumps(said).encode())
        octets, descriptors, _, _ = socket.recv_fds(sock, 1000, 10)

        assert descriptors == []
        assert (json.loads(octets)["reason"] if octets else None) == answer
        with fleet.client() as client:
            fleet.round_trip(client, short(fleet.cid(0)), 0)


def test_descriptors_and_messages_arrive_together_or_not_at_all() -> None:
    async def story() -> None:
        ours, theirs = (Channel(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        reading, writing = os.pipe()
        await ours.send("sockets", [reading, writing], listening=1)
        message, descriptors = await theirs.receive("sockets", patience=5)
        assert (message, len(descriptors)) == ({"what": "sockets", "listening": 1}, 2)
        assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
        os.write(descriptors[1], b"x")
        assert os.read(reading, 1) == b"x"
        with pytest.raises(TimeoutError, match="no word"):
            await theirs.receive("sockets", patience=0.01)
        await ours.send("mine")
        assert theirs.last_word("mine")
        with pytest.raises(BrokenPipeError):
            await ours.send("mine")
        theirs.close()
        with pytest.raises(ConnectionResetError, match="is gone"):
            await ours.receive("more", patience=5)
        ours.close()
        for descriptor in (reading, writing, *descriptors):
            os.close(descriptor)

    run(story)


@pytest.mark.parametrize(
    ("peer", "ours", "trusted"), [(0, 0, True), (0, 1000, True), (1000, 1000, True), (1000, 0, False), (1, 2, False)]
)
def test_only_root_and_the_same_user_are_trusted(peer: int, ours: int, trusted: bool) -> None:
    assert is_trusted(peer, ours) is trusted


@pytest.mark.skipif(os.geteuid() != 0, reason="it needs root, to be somebody else")
def test_another_user_is_refused_even_where_the_directory_lets_it_in(tmp_path: Path) -> None:
    with Fleet(1, runtime=tmp_path):
        for place in (tmp_path, *tmp_path.parents):
            if place != Path("/tmp") and place.is_relative_to("/tmp"):
                place.chmod(0o755)
        (tmp_path / "handover-0.sock").chmod(0o777)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(4711)
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                    sock.connect(str(tmp_path / "handover-0.sock"))
                    sock.send(b'{"what": "take-over", "version": 1}')
                    status = 0 if json.loads(sock.recv(1000))["reason"] == "user 4711 may not have this" else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_socket_is_its_owners_alone_and_goes_with_it(tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 100) / ("b" * 100)  # longer than a socket's address may be
    with Fleet(1, runtime=deep) as fleet:
        assert (deep / "handover-0.sock").stat().st_mode & 0o777 == 0o600
        with takeover(fleet, deep) as successor:
            assert (deep / "handover-0.sock").exists()
            successor.stop()
            assert not (deep / "handover-0.sock").exists()


def test_whom_a_worker_succeeds(tmp_path: Path) -> None:
    for name in ("handover-0.sock", "handover-1.sock", "handover-4.sock", "handover-x.sock", "handover-2.new-sock"):
        (tmp_path / name).touch()

    def numbers(worker: int, workers: int) -> list[int]:
        return [int(path.stem.partition("-")[2]) for path in sockets_of(tmp_path, worker, workers)]

    assert [numbers(i, 1) for i in range(1)] == [[0, 1, 4]]
    assert [numbers(i, 3) for i in range(3)] == [[0], [1, 4], []]
    assert sockets_of(tmp_path / "not", 0, 2) == [tmp_path / "not" / "handover-0.sock"]
    assert sockets_of(tmp_path / "not", 1, 2) == []


# Flows that begin and end meanwhile.


class Half:
    """The flows of one process, without its packets."""

    def __init__(self, paths: ReturnPaths, backends: int, *, flows: int = 40, sockets: int = 12) -> None:
        limits = UdpLimits(flows=flows, sockets=sockets, idle_timeout=60, new_flow_timeout=10, socket_buffer=1 << 16)
        self.nat = Nat(limits, Counters(), lambda _: None)
        self.nat.return_paths = paths
        address = Address("127.0.0.1", 0)
        table = RoutingTable.build(service(backends, listen=(address,)))
        policy = ServicePolicy(router=RouterLimits(), push_rate=0, silence=0)
        self.service = RunningService(table, policy, deterministic_random())
        self.service.members = [Member("web", b.name, b.address) for b in table.backends]
        self.listener = Listener(address, [listening_port(address, buffer=1 << 16, shared=False)], self.service)
        self.nat.set_backends(self.service.members)
        self.now = 0.0

    def begin(self, client: int, backend: int) -> Flow | None:
        key = raw_address(Address("192.0.2.1", client))
        flow = self.listener.flows.get(key)
        while flow is not None:
            if flow.member is self.service.members[backend]:
                return flow
            flow = flow.sibling
        self.now += 0.5
        return self.nat.begin(self.listener, key, socket_address(key), None, self.service.members[backend], self.now)

    def flows(self) -> set[tuple[object, ...]]:
        return {
            (flow.client, flow.member.name, flow.upstream.address.port, flow.cid, flow.established)
            for flow in self.nat.flows
        }

    def check(self) -> None:
        """Every flow is found from both sides, and is alone at its port and backend."""
        assert len({(f.upstream.address.port, f.member.name) for f in self.nat.flows}) == self.nat.flows.count
        for flow in self.nat.flows:
            assert flow.upstream.flows[flow.member.raw] is flow
        assert sum(member.flows for member in self.service.members) == self.nat.flows.count

    def close(self) -> None:
        self.listener.port.close()
        self.nat.close()


# (what, which client or which of the flows, which backend)
DEED = st.tuples(
    st.sampled_from(["begin", "begin", "begin", "end", "establish", "cid"]), st.integers(1, 30), st.integers(0, 2)
)


def do(half: Half, what: str, which: int, backend: int) -> None:
    flows = list(half.nat.flows)
    if what == "begin":
        half.begin(which, backend)
    elif flows:
        flow = flows[which % len(flows)]
        if what == "end":
            half.nat.end(flow, half.now)
        else:
            if what == "establish":
                half.nat.flows.establish(flow)
            else:
                flow.cid = bytes([which]) * 17
            half.nat.remember(flow)


@settings(max_examples=60)
@given(rounds=st.lists(st.lists(DEED, max_size=25), min_size=2, max_size=4), afterwards=st.lists(DEED, max_size=40))
def test_whatever_begins_and_ends_meanwhile_both_have_the_same_flows(
    tmp_path_factory: pytest.TempPathFactory,
    rounds: list[list[tuple[str, int, int]]],
    afterwards: list[tuple[str, int, int]],
) -> None:
    directory = tmp_path_factory.mktemp("half")
    old_paths = ReturnPaths(directory / "flows-0.map", 40)
    old = Half(old_paths, 3)
    new = Half(ReturnPaths(directory / "flows-0.map", 40, lock=old_paths.lock), 3)
    live = LivePaths(old_paths.descriptor)
    followed: dict[int, Followed] = {}
    early: list[tuple[int, ReturnPath | None]] = []
    listeners = {Address("127.0.0.1", old.listener.port.address.port): new.listener, old.listener.address: new.listener}
    sent = 0
    try:
        for deeds in rounds:
            for deed in deeds:
                do(old, *deed)
            changes = [*early, *live.changes(live.capacity)]
            if deeds and deeds[0][1] % 2:  # sometimes a flow is known before its socket
                early = new.nat.follow(changes, followed, listeners, new.now)
                changes, early = early, []
            upstreams = old.nat.upstreams[sent:]
            sent += len(upstreams)
            new.nat.adopt_ports((adopted(socket.socket(fileno=os.dup(u.descriptor))) for u in upstreams), new.now)
            early = new.nat.follow(changes, followed, listeners, new.now)
            assert early == []
        assert new.flows() == old.flows()
        new.check()
        new.nat.forget_ports()
        new.now = old.now
        for deed in afterwards:  # and it goes on by itself
            do(new, *deed)
        new.check()
    finally:
        live.close()
        old.close()
        new.close()


def test_a_live_file_tells_what_changed_and_only_that(tmp_path: Path) -> None:
    path = ReturnPath(
        1, Address("192.0.2.1", 1), Address("192.0.2.2", 2), Address("192.0.2.3", 3), 0, None, None, False
    )
    file = ReturnPaths(tmp_path / "flows.map", 5000)
    live = LivePaths(file.descriptor)
    assert (live.capacity, live.changes(5000)) == (5000, [])
    random = Random(1)
    model: dict[int, ReturnPath] = {}
    for _ in range(20):
        changed: dict[int, ReturnPath | None] = {}
        for number in random.sample(range(5000), 10):
            before = model.pop(number, None)
            if before is None:
                model[number] = path._replace(local_port=random.randrange(1, 65536))
                file.write(number, model[number])
            else:
                file.clear(number)
            changed[number] = model.get(number)
        assert dict(live.changes(5000)) == changed
        assert live.changes(5000) == []
    file.write(4999, path)
    assert live.changes(1) == []
    assert live.changes(5000) == [(4999, path)]
    live.close()
    file.close()


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    with open(tmp_path / "file", "rb") as file, pytest.raises(OSError, match="not a file of this version"):
        LivePaths(file.fileno())


def test_a_file_put_back_says_what_it_said(tmp_path: Path) -> None:
    path = ReturnPath(1, Address("192.0.2.1", 1), Address("192.0.2.2", 2), Address("192.0.2.3", 3), 0, None, None, True)
    file = ReturnPaths(tmp_path / "flows.map", 10)
    file.commit()
    file.write(3, path)
    assert file.is_in_place()
    other = ReturnPaths(tmp_path / "flows.map", 20, lock=file.lock)
    other.commit()
    assert not file.is_in_place()
    other.close()
    file.reclaim()
    file.write(4, path)
    assert file.is_in_place()
    file.close()
    later = ReturnPaths(tmp_path / "flows.map", 10, patience=0)
    assert list(later.remembered()) == [path, path]
    later.close()


# Sockets that a service manager has, and flows that are logged.


def test_a_socket_that_somebody_bound_for_us_is_used_and_others_are_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[tuple[Address, int | None]] = []
    with Fleet(1) as pattern, pattern.client() as client, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as foreign:
        pattern.stop()
        bound, useless = udp_socket(port=pattern.vip.port), udp_socket()
        datagram = short(pattern.cid(0))
        client.sendto(datagram, pattern.vip)  # before anybody is there
        inherited = [bound, useless, foreign]
        fleet = Fleet(of=pattern, inherited=inherited, keep=lambda address, number: kept.append((address, number)))

        assert fleet.backends[0].recv(100) == datagram
        assert kept == [(fleet.vip, bound.fileno())]
        assert (useless.fileno(), foreign.fileno()) == (-1, -1)
        assert [r.message for r in caplog.records] == ["socket-unused"] * 2
        fleet.apply(RoutingTable.build(service(1, listen=())))
        assert kept[1:] == [(fleet.vip, None)]
        fleet.stop()


@pytest.mark.parametrize(
    ("share", "chances", "logged"), [(0.0, [], 0), (0.5, [0.4, 0.6, 0.1, 0.5], 2), (1.0, [0.9] * 4, 4)]
)
def test_a_share_of_new_flows_is_logged_and_no_server_id_is(
    caplog: pytest.LogCaptureFixture, share: float, chances: list[float], logged: int
) -> None:
    caplog.set_level(logging.INFO)
    left = iter(chances)
    with Fleet(4, log_flows=share, chance=lambda: next(left)) as fleet, fleet.client() as client:
        cids = [fleet.cid(i) for i in range(4)]
        for i, cid in enumerate(cids):
            for _ in range(2):
                fleet.round_trip(client, short(cid), i)

        flows = [r.__dict__["fields"] for r in caplog.records if r.message == "flow"]
        assert len(flows) == logged
        where = Address(*client.getsockname())
        for fields in flows:
            backend = fields.pop("backend")
            assert backend in ("b0", "b1", "b2", "b3")
            assert fields == {"client": where, "service": "web", "verdict": "cid", "is_move": True}
        text = " ".join(str(r.__dict__) for r in caplog.records)
        assert not [cid for cid in cids if cid.hex() in text or cid[1:5].hex() in text]


def test_tables_that_change_all_the_time_lose_no_datagram() -> None:
    with Fleet(2) as fleet, fleet.client() as client:
        cid = fleet.cid(0)
        fleet.backends[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        tables = [fleet.table(), fleet.table(b1=BackendState.DRAINING)]
        arrived = set()
        for number in range(600):
            client.sendto(short(cid, 100)[:-4] + number.to_bytes(4), fleet.vip)
            fleet.apply(tables[number % 2])
        for _ in range(600):
            arrived.add(int.from_bytes(fleet.backends[0].recv(200)[-4:]))
        assert arrived == set(range(600))
