"""Flows: their numbers, their ages, and who goes first when there is no room."""

from __future__ import annotations

from random import Random
from typing import Any, cast

from lb.address import Address
from lb.silence import SilenceWatch
from lb.upstream import PORT_REST, SAMPLE, Flow, Flows, Member, Ports, Upstream, most_idle

MEMBER = Member("web", "b0", Address("192.0.2.1", 443))


class FakeUpstream:
    def __init__(self, since: float = float("-inf")) -> None:
        self.flows: dict[bytes, Flow] = {}
        self.since = since


def flow(seen: float, *, established: bool = True) -> Flow:
    upstream = FakeUpstream()
    made = Flow(cast("Any", None), b"client", ("198.51.100.1", 1), None, MEMBER, cast("Upstream", upstream))
    made.seen, made.established = seen, established
    upstream.flows[MEMBER.raw] = made
    return made


def test_numbers_are_used_again_and_stay_below_the_count() -> None:
    flows = Flows(4)
    made = [flow(i) for i in range(4)]
    for one in made:
        flows.add(one)
    assert ([f.number for f in made], flows.is_full) == ([0, 1, 2, 3], True)
    flows.remove(made[1])
    another = flow(9)
    flows.add(another)

    assert (another.number, made[1].number, flows.count) == (1, -1, 4)
    assert list(flows) == [made[0], another, made[2], made[3]]


def test_established_flows_live_longer_than_young_ones() -> None:
    flows = Flows(10)
    made = [flow(seen, established=established) for seen in (0.0, 50.0, 95.0) for established in (True, False)]
    for one in made:
        flows.add(one)

    assert flows.expired(100.0, 6, idle=60.0, young=10.0) == [made[0], made[1], made[3]]


def test_a_sweep_goes_round_a_few_at_a_time() -> None:
    flows = Flows(10)
    made = [flow(0.0) for _ in range(5)]
    for one in made:
        flows.add(one)

    assert [flows.expired(99.0, 2, idle=1.0, young=1.0) for _ in range(3)] == [made[:2], made[2:4], [made[4], made[0]]]


def test_the_oldest_young_flow_goes_first_then_the_most_idle_established_one() -> None:
    flows = Flows(10)
    old, idle, young_1, young_2 = flow(5.0), flow(1.0), flow(2.0, established=False), flow(0.0, established=False)
    for one in (old, young_1, idle, young_2):
        flows.add(one)
    flows.establish(young_2)

    assert flows.victim() is young_1
    flows.remove(young_1)
    assert flows.victim() is young_2
    flows.remove(young_2)
    assert flows.victim() is idle


def test_nobody_goes_where_there_is_nobody() -> None:
    assert Flows(1).victim() is None
    assert most_idle(MEMBER, [cast("Upstream", FakeUpstream())], 0) is None


def test_for_a_backends_port_a_young_flow_goes_before_an_established_one() -> None:
    made = [flow(3.0), flow(1.0), flow(9.0, established=False), flow(2.0)]
    pool = [f.upstream for f in made]

    assert most_idle(MEMBER, pool, 0) is made[2]
    made[2].established = True
    assert [most_idle(MEMBER, pool, start) for start in (0, 2)] == [made[1]] * 2


def test_no_port_is_handed_out_twice_or_before_it_has_rested() -> None:
    for seed in range(50):
        random = Random(seed)
        pool = [cast("Upstream", FakeUpstream()) for _ in range(6)]
        ports, now = Ports(), 0.0
        in_use = set(random.sample(pool, random.randrange(6)))  # by flows of a dead process
        rests_until = dict.fromkeys(pool, 0.0)
        for carried in in_use:
            ports.carry_on(carried)
        for _ in range(200):
            now += random.random()
            if random.random() < 0.4 and in_use:
                back = random.choice(sorted(in_use, key=id))
                in_use.remove(back)
                ports.give_back(back, now)
                rests_until[back] = now + PORT_REST
            elif random.random() < 0.9:
                taken = ports.take(pool, now)
                if taken is None:
                    assert all(port in in_use or rests_until[port] > now for port in pool), f"seed {seed}"
                    if len(pool) < 12:
                        pool.append(cast("Upstream", FakeUpstream()))
                        rests_until[pool[-1]] = 0.0
                    continue
                assert taken not in in_use, f"seed {seed}"
                assert rests_until[taken] <= now, f"seed {seed}"
                in_use.add(taken)
            else:
                early = ports.take_early()
                assert early not in in_use, f"seed {seed}"
                if early is not None:
                    in_use.add(early)


def test_who_gives_up_a_port_is_looked_for_everywhere_in_the_end() -> None:
    pool = [flow(float(i)).upstream for i in range(4 * SAMPLE)]
    ports = Ports()
    asked = [ports.victim(MEMBER, pool) for _ in range(4)]

    assert {found.seen for found in asked if found} == {0.0, 1.0 * SAMPLE, 2.0 * SAMPLE, 3.0 * SAMPLE}


def test_silence_is_suspicious_only_under_traffic_and_after_some_time() -> None:
    watch = SilenceWatch()
    asked = [
        watch.suspicious(sent, heard, now, patience=0.5)
        for sent, heard, now in (
            (0, 0, 0.0),
            (0, 0, 9.0),  # nothing sent, nothing missed
            (4, 0, 9.1),
            (20, 0, 9.4),  # too soon
            (20, 0, 9.7),  # too long
            (20, 0, 9.8),  # said already
            (40, 0, 10.4),  # again
            (60, 1, 11.0),  # heard
            (70, 1, 11.2),
        )
    ]

    assert asked == [False, False, False, False, True, False, True, False, False]
