"""What is bounded: new flows, resets, memory, samples."""

from __future__ import annotations

import struct
import time
from collections import Counter

import pytest

from lb.engine import Drop
from lb.forward import Forward
from lb.router import Verdict
from lb.xdp.layout import SAMPLE, SAMPLING, U32_KEY, Sampling
from lb.xdp.libbpf import MapType, RingBuffer, possible_cpus
from tests.builders import short
from tests.xdp.bpf import NO_LIMITS, Action, Balancer
from tests.xdp.cases import DEAD, UNROUTABLE, WEB, A, Way, cid
from tests.xdp.expectations import ROUTABLE, TABLES, Loaded, by_family, by_forward, ready, table_of
from tests.xdp.forwarding import datagram

# In the order of `way.client`: a client, its neighbour in the same /24 or /56, and one elsewhere.
CLIENTS = {
    4: ("198.51.100.7", "198.51.100.250", "198.51.101.7"),
    6: ("2001:db8:c::7", "2001:db8:c:ff::8", "2001:db8:c:100::7"),
}


TICK = 0.01  # seconds: the program's clock is a coarse one


def from_client(way: Way, number: int, payload: bytes, port: int) -> bytes:
    return bytes(datagram(way, payload, port=port).with_ip(source=CLIENTS[way.client][number]))


def verdicts(balancer: Balancer, service: str, frames: list[bytes]) -> list[Verdict]:
    """What each became. No frame may become two things."""
    told = []
    for frame in frames:
        counted = balancer.run(frame).counted
        (verdict,) = (verdict for verdict in Verdict if f"{service} {verdict.name}" in counted)
        told.append(verdict)
    return told


def within(allowed: int, rate: float, began: float) -> bool:
    """Whether a bucket that held one second's worth, and has been filling since, can have said yes so often."""
    return rate <= allowed <= rate * (1 + TICK + time.monotonic() - began) + 1


@by_family
@pytest.mark.usefixtures("one_cpu")
def test_new_flows_are_limited_by_source_prefix(way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, Forward.L2)
    balancer.refill()
    balancer.apply(TABLES[Forward.L2], NO_LIMITS._replace(new_flows_rate=3))
    began = time.monotonic()
    ports = range(1000, 1010)
    same_prefix = [from_client(way, i % 2, UNROUTABLE, port) for i, port in enumerate(ports)]
    told = verdicts(balancer, way.service, same_prefix)
    counted = Counter(told)
    assert set(counted) == {Verdict.FALLBACK, Verdict.NEW_FLOW_LIMIT}
    assert within(counted[Verdict.FALLBACK], 3, began)

    # Neither flows that are known, nor routable CIDs, nor anybody else.
    first = same_prefix[0]
    others = [first, from_client(way, 0, ROUTABLE, 2000), from_client(way, 2, UNROUTABLE, 2000)]
    assert verdicts(balancer, way.service, others) == [Verdict.TABLE_FLOW, Verdict.CID, Verdict.FALLBACK]


@by_family
@pytest.mark.usefixtures("one_cpu")
def test_a_flow_that_is_refused_is_dropped_and_not_remembered(way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, Forward.L2)
    balancer.refill()
    balancer.apply(TABLES[Forward.L2], NO_LIMITS._replace(new_flows_rate=1))
    frames = [from_client(way, 0, UNROUTABLE, port) for port in range(3000, 3020)]
    outcomes = [balancer.run(frame) for frame in frames]
    refused = next(i for i, outcome in enumerate(outcomes) if f"{way.service} NEW_FLOW_LIMIT" in outcome.counted)

    assert outcomes[refused].action is Action.DROP
    assert outcomes[refused].frame == frames[refused]
    assert outcomes[refused].counted == {
        f"{way.service} NEW_FLOW_LIMIT": 1,
        f"{way.service} unroutable UNKNOWN_SERVER": 1,
    }
    balancer.apply(TABLES[Forward.L2])
    assert verdicts(balancer, way.service, [frames[refused]] * 2) == [Verdict.FALLBACK, Verdict.TABLE_FLOW]


@by_family
@pytest.mark.parametrize(("rate", "prefix_rate"), [(4, 0), (0, 4), (90, 4)])
@pytest.mark.usefixtures("one_cpu")
def test_resets_are_limited(way: Way, rate: float, prefix_rate: float, loaded: Loaded) -> None:
    """By source prefix and in all. What is kept back is dropped and counted."""
    balancer = ready(loaded, Forward.L2)
    balancer.refill()
    balancer.apply(TABLES[Forward.L2], NO_LIMITS._replace(reset_rate=rate, reset_prefix_rate=prefix_rate))
    frames = [from_client(way, i % 2, short(cid(DEAD)), 4000 + i) for i in range(12)]
    began = time.monotonic()
    told = verdicts(balancer, way.service, frames)
    counted = Counter(told)

    assert set(counted) == {Verdict.RESET, Verdict.RESET_LIMITED}
    assert within(counted[Verdict.RESET], 4, began)
    elsewhere = verdicts(balancer, way.service, [from_client(way, 2, short(cid(DEAD)), 5000)])
    assert elsewhere == ([Verdict.RESET] if prefix_rate else [Verdict.RESET_LIMITED])


NEIGHBOURS = {
    4: [f"198.51.{i}.7" for i in range(64)],
    6: [f"2001:db8:c:{i}00::7" for i in range(64)],
}


@by_family
@pytest.mark.usefixtures("one_cpu")
def test_neighbouring_prefixes_do_not_lift_each_others_limit(way: Way, loaded: Loaded) -> None:
    """Prefixes share buckets by hash, and who finds another's fills it: neighbours, who are one owner's, must not."""
    balancer = ready(loaded, Forward.L2)
    for limits, payload, yes in (
        (NO_LIMITS._replace(reset_prefix_rate=1), short(cid(DEAD)), Verdict.RESET),
        (NO_LIMITS._replace(new_flows_rate=1), UNROUTABLE, Verdict.FALLBACK),
    ):
        balancer.refill()
        balancer.apply(TABLES[Forward.L2], limits)
        began = time.monotonic()
        told = [
            verdicts(balancer, way.service, [bytes(datagram(way, payload, port=port).with_ip(source=host))])[0]
            for port in range(1000, 1006)
            for host in NEIGHBOURS[way.client]
        ]
        seconds = time.monotonic() - began
        assert told.count(yes) <= 64 * (1 + seconds + TICK) + 10  # two in 64 may share a bucket


def with_small_map(name: str, forward: Forward) -> Balancer:
    """A balancer one of whose maps takes one element and then no more: a plain hash does not forget."""
    return Balancer(forward, kinds={name: MapType.HASH}, sizes={name: 1})


@by_forward
@by_family
def test_a_4_tuple_table_that_is_full_is_counted_and_done_without(forward: Forward, way: Way, loaded: Loaded) -> None:
    """Whoever finds no room goes where the ring says, each time anew."""
    loaded(forward)
    balancer = with_small_map("flows", forward)
    try:
        balancer.apply(TABLES[forward])
        frames = [bytes(datagram(way, UNROUTABLE, port=port)) for port in (1001, 1002, 1002, 1001)]
        outcomes = [balancer.run(frame) for frame in frames]
        table = table_of(forward, WEB[way])
        told = [
            ([v for v in Verdict if f"{way.service} {v.name}" in o.counted], o.action, o.counted.get(Drop.MAP_FULL, 0))
            for o in outcomes
        ]
        assert told == [
            ([Verdict.FALLBACK], Action.TX, 0),
            ([Verdict.FALLBACK], Action.TX, 1),
            ([Verdict.FALLBACK], Action.TX, 1),
            ([Verdict.TABLE_FLOW], Action.TX, 0),
        ]
        home = table.fallback(way.flow(1002))
        assert home is not None
        for outcome in outcomes[1:3]:
            assert outcome.counted[f"{way.service}/{table.backends[home].name} datagrams_to"] == 1
    finally:
        balancer.close()


@by_family
@pytest.mark.parametrize("name", ["nat_in", "nat_out"])
def test_nat_maps_that_are_full(name: str, way: Way, loaded: Loaded) -> None:
    """Without state there would be no way back: the packet is dropped, and the flow that is there goes on."""
    loaded(Forward.NAT)
    balancer = with_small_map(name, Forward.NAT)
    try:
        balancer.apply(TABLES[Forward.NAT])
        frames = [bytes(datagram(way, ROUTABLE, port=port)) for port in (1001, 1002, 1001)]
        outcomes = [balancer.run(frame) for frame in frames]
        assert [(o.action, o.counted.get(Drop.NO_SOCKET, 0)) for o in outcomes] == [
            (Action.TX, 0),
            (Action.DROP, 1),
            (Action.TX, 0),
        ]
        assert outcomes[1].frame == frames[1]
    finally:
        balancer.close()


@by_forward
def test_a_table_smaller_than_the_flows_forgets_the_idlest(forward: Forward, loaded: Loaded) -> None:
    loaded(forward)
    balancer = Balancer(forward, sizes={"flows": 64})
    try:
        balancer.apply(TABLES[forward])
        way = Way(4, 4)
        for port in range(1000, 2000):
            outcome = balancer.run(bytes(datagram(way, UNROUTABLE, port=port)))
            assert outcome.action is Action.TX
            assert outcome.counted[f"{way.service} FALLBACK"] == 1
        assert len(dict(balancer.maps["flows"].items())) <= 64
    finally:
        balancer.close()


def sample(balancer: Balancer, every: int, *only: Verdict) -> None:
    wanted = sum(1 << verdict for verdict in only)
    balancer.maps["sampling"].update(U32_KEY.pack(0), SAMPLING.pack(Sampling(every, wanted)))


@by_forward
@by_family
def test_samples(forward: Forward, way: Way, loaded: Loaded) -> None:
    """Off by default. The first octets of frames as they came, of the verdicts that are asked for."""
    balancer = ready(loaded, forward)
    taken: list[bytes] = []
    frames = [
        (Verdict.CID, bytes(datagram(way, ROUTABLE))),
        (Verdict.CID, bytes(datagram(way, short(cid(A), 1000)))),
        (Verdict.FALLBACK, bytes(datagram(way, UNROUTABLE))),
        (Verdict.EMPTY, bytes(datagram(way, b""))),
        (Verdict.MALFORMED, bytes(datagram(way, b"\xc0"))),
        (Verdict.RESET_TOO_SMALL, bytes(datagram(way, short(cid(DEAD), 0)))),
        (Verdict.RESET, bytes(datagram(way, short(cid(DEAD), 200)))),
    ]
    index = balancer.index(way.service)
    with RingBuffer(balancer.maps["samples"], taken.append) as ring:
        try:
            for every, only in ((0, ()), (1, ()), (1, (Verdict.CID,)), (1, (Verdict.EMPTY, Verdict.MALFORMED))):
                sample(balancer, every, *only)
                for _, frame in frames:
                    balancer.run(frame)
                ring.consume()
                seen = [SAMPLE.unpack(octets) for octets in taken]
                taken.clear()
                wanted = [(v, f) for v, f in frames if every and (not only or v in only)]
                wanted = [(Verdict.TABLE_FLOW if v is Verdict.FALLBACK and every else v, f) for v, f in wanted]
                assert [(Verdict(found.verdict), found.service) for found in seen] == [(v, index) for v, _ in wanted]
                for found, (verdict, frame) in zip(seen, wanted, strict=True):
                    if verdict is not Verdict.RESET:  # which is written over what asked for it
                        assert found == (
                            verdict,
                            len(frame),
                            index,
                            min(len(frame), 128),
                            frame[:128].ljust(128, b"\0"),
                        )
        finally:
            sample(balancer, 0)


@by_family
def test_samples_that_nobody_takes_are_lost_and_traffic_is_not(way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, Forward.L2)
    frame = bytes(datagram(way, ROUTABLE))
    try:
        sample(balancer, 1)
        outcomes = [balancer.run(frame) for _ in range(8000)]
    finally:
        sample(balancer, 0)
        with RingBuffer(balancer.maps["samples"], lambda _: None) as ring:
            ring.consume()

    assert {outcome.action for outcome in outcomes} == {Action.TX}
    lost = [outcome.counted.get("samples_lost", 0) for outcome in outcomes]
    assert lost == sorted(lost)  # from when the buffer is full, every one
    assert set(lost) == {0, 1}


@by_family
def test_one_sample_in_so_many(way: Way, loaded: Loaded) -> None:
    balancer = ready(loaded, Forward.L2)
    frame = bytes(datagram(way, ROUTABLE))
    taken: list[bytes] = []
    with RingBuffer(balancer.maps["samples"], taken.append) as ring:
        try:
            sample(balancer, 10)
            for _ in range(4000):
                balancer.run(frame)
            ring.consume()
        finally:
            sample(balancer, 0)
    assert 250 < len(taken) < 600  # 400 of them, give or take 8 standard deviations


@by_family
@pytest.mark.usefixtures("one_cpu")
def test_a_bucket_holds_no_more_than_a_second(way: Way, loaded: Loaded) -> None:
    """However long nobody took anything out of it, and whatever its rate was before."""
    balancer = ready(loaded, Forward.L2)
    balancer.refill()
    balancer.apply(TABLES[Forward.L2], NO_LIMITS._replace(reset_rate=4))
    overfull = struct.pack("<QQ", 1000 * 10**9, 0) * possible_cpus()
    balancer.maps["reset_buckets"].update(U32_KEY.pack(balancer.index(way.service)), overfull)
    began = time.monotonic()
    told = verdicts(balancer, way.service, [from_client(way, 0, short(cid(DEAD)), 4000 + i) for i in range(40)])

    assert within(told.count(Verdict.RESET), 4, began)
