"""lb/healthcheck.py: what a backend's answers, and its silence, make of it. Virtual time throughout."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lb.config import HealthConfig, Probe
from lb.healthcheck import CLEARED_BY, COOL_DOWN, MOST_CONNECTIONS, RESULTS, HealthCheck
from lb.routing import BackendState

ACTIVE, DOWN = BackendState.ACTIVE, BackendState.DOWN
STEADY = HealthConfig(interval=1.0, timeout=0.5, fall=3, rise=2, jitter=0.0, suspect_interval=0.02)
HOLD_OFF = 5.0


class Fate(NamedTuple):
    """What becomes of a probe, and after how many seconds."""

    how: str  # answer, wrong, refuse, lose, unsent, no-route
    delay: float = 0.0


ANSWER, LOSE, REFUSE = Fate("answer", 0.01), Fate("lose"), Fate("refuse", 0.001)
WRONG = Fate("wrong", 0.01)
Behaviour = Callable[[float], Fate]  # by the time of sending


def check(config: HealthConfig = STEADY, hold_off: float = HOLD_OFF, start: float = 0.0) -> HealthCheck:
    return HealthCheck(config, hold_off, start=start, random=random.Random(1).random)


class World:
    """A backend, a network and a clock around one check."""

    def __init__(self, subject: HealthCheck, behaviour: Behaviour, suspicions: Iterable[float] = ()) -> None:
        self.check = subject
        self.behaviour = behaviour
        self.now = 0.0
        self.sent: list[float] = []
        self.replies: list[float] = []
        self.history = [(0.0, ACTIVE, False)]
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, int]] = []
        for when in suspicions:
            self._at(when, "suspect", 0)

    def run(self, until: float) -> World:
        while True:
            wakeup = max(self.now, self.check.wakeup())
            when = min(wakeup, self._events[0][0]) if self._events else wakeup
            if when > until:
                return self
            self.now = when
            if self._events and self._events[0][0] <= when:
                _, _, how, probe = heapq.heappop(self._events)
                self._happen(how, probe)
            else:
                probe_sent = self.check.poll(self.now)
                if probe_sent is not None:
                    self._send(probe_sent)
            self._remember()

    def states(self) -> list[tuple[float, str]]:
        return [(round(t, 3), "dead" if dead else state.name.lower()) for t, state, dead in self.history]

    def _send(self, probe: int) -> None:
        self.sent.append(self.now)
        fate = self.behaviour(self.now)
        if fate.how in ("unsent", "no-route"):
            self._happen(fate.how, probe)
        elif fate.how != "lose":
            self._at(self.now + fate.delay, fate.how, probe)

    def _at(self, when: float, how: str, probe: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), how, probe))

    def _happen(self, how: str, probe: int) -> None:
        match how:
            case "answer":
                self.replies.append(self.now)
                self.check.on_reply(probe, self.now)
            case "wrong":
                self.replies.append(self.now)
                self.check.on_wrong(probe, "status 503", self.now)
            case "refuse":
                self.check.on_refused(probe, self.now)
            case "unsent" | "no-route":
                self.check.on_unsent(probe, self.now, no_route=how == "no-route")
            case "suspect":
                self.check.suspect(self.now)

    def _remember(self) -> None:
        now = (self.check.state, self.check.dead)
        if self.history[-1][1:] != now:
            self.history.append((self.now, *now))


def until(*changes: tuple[float, Fate]) -> Behaviour:
    """Each fate is that of probes sent before its time; the last one's time does not matter."""

    def behaviour(now: float) -> Fate:
        return next((fate for end, fate in changes if now < end), changes[-1][1])

    return behaviour


FOREVER = float("inf")


@pytest.mark.parametrize(
    ("behaviour", "suspicions", "states"),
    [
        pytest.param(until((FOREVER, ANSWER)), [], [(0, "active")], id="answers"),
        # Probes at 0, 1 and 2; the third times out at 2.5.
        pytest.param(until((FOREVER, LOSE)), [], [(0, "active"), (2.5, "down"), (7.5, "dead")], id="silent"),
        pytest.param(until((FOREVER, REFUSE)), [], [(0, "active"), (2.001, "down"), (7.001, "dead")], id="refuses"),
        # Two failures are not three.
        pytest.param(until((1.5, LOSE), (2.5, ANSWER), (4.5, LOSE), (9, ANSWER)), [], [(0, "active")], id="nearly"),
        # Suspected at 3.2: probes at 3.2, 3.22, 3.24.
        pytest.param(
            until((3.1, ANSWER), (FOREVER, LOSE)),
            [3.2],
            [(0, "active"), (3.74, "down"), (8.74, "dead")],
            id="silent and suspected",
        ),
        pytest.param(
            until((3.1, ANSWER), (FOREVER, REFUSE)),
            [3.2],
            [(0, "active"), (3.241, "down"), (8.241, "dead")],
            id="refuses and suspected",
        ),
        pytest.param(until((FOREVER, ANSWER)), [0.5, 3, 9], [(0, "active")], id="suspected for nothing"),
        # Down at 2.5; the probe at 4 is answered, the next one follows 20 ms later.
        pytest.param(
            until((3.5, LOSE), (FOREVER, ANSWER)), [], [(0, "active"), (2.5, "down"), (4.03, "active")], id="returns"
        ),
        # One answer, at 4.01, and silence again: the hold-off begins anew.
        pytest.param(
            until((3.5, LOSE), (4.005, ANSWER), (FOREVER, LOSE)),
            [],
            [(0, "active"), (2.5, "down"), (9.01, "dead")],
            id="a last sign of life",
        ),
        # Asked at the last moment, at 7.0, as the hold-off would end at 7.5.
        pytest.param(
            until((6.9, LOSE), (7.005, ANSWER), (FOREVER, LOSE)),
            [],
            [(0, "active"), (2.5, "down"), (12.01, "dead")],
            id="alive at the last moment",
        ),
        # Every answer is 0.2 s later than allowed: down it is, and alive.
        pytest.param(until((FOREVER, Fate("answer", 0.7))), [], [(0, "active"), (2.5, "down")], id="too slow"),
        pytest.param(
            until((8.5, LOSE), (FOREVER, ANSWER)),
            [],
            [(0, "active"), (2.5, "down"), (7.5, "dead"), (9.01, "down"), (9.03, "active")],
            id="back from the dead",
        ),
        # Not the answer that is wanted, but an answer: down, and never dead.
        pytest.param(until((FOREVER, WRONG)), [], [(0, "active"), (2.01, "down")], id="says 503"),
        pytest.param(
            until((3.5, WRONG), (FOREVER, LOSE)),
            [],
            [(0, "active"), (2.01, "down"), (8.01, "dead")],
            id="says 503 a last time at 3.01",
        ),
        pytest.param(
            until((8.5, LOSE), (FOREVER, WRONG)),
            [],
            [(0, "active"), (2.5, "down"), (7.5, "dead"), (9.01, "down")],
            id="back from the dead with 503",
        ),
        pytest.param(
            until((1.5, WRONG), (2.5, ANSWER), (4.5, WRONG), (9, ANSWER)), [], [(0, "active")], id="nearly 503"
        ),
        pytest.param(until((FOREVER, Fate("wrong", 0.7))), [], [(0, "active"), (2.5, "down")], id="says 503 too late"),
        # What could not be asked is not evidence.
        pytest.param(until((FOREVER, Fate("unsent"))), [1], [(0, "active")], id="nothing can be sent"),
        pytest.param(
            until((3, LOSE), (FOREVER, Fate("unsent"))), [], [(0, "active"), (2.5, "down")], id="nor when it is down"
        ),
        pytest.param(
            until((FOREVER, Fate("no-route"))), [], [(0, "active"), (2, "down")], id="no way there, but not dead"
        ),
    ],
)
def test_states(behaviour: Behaviour, suspicions: list[float], states: list[tuple[float, str]]) -> None:
    assert World(check(), behaviour, suspicions).run(30).states() == states


def test_nobody_is_dead_without_having_been_asked_at_the_last_moment() -> None:
    """However long the interval is: down at 20.5, and its hold-off ends at 25.5."""
    world = World(check(replace(STEADY, interval=10.0)), until((FOREVER, LOSE))).run(30)
    assert world.sent == [0, 10, 20, 25.0]
    assert world.states() == [(0, "active"), (20.5, "down"), (25.5, "dead")]


def test_a_hold_off_in_which_nothing_could_be_sent_proves_nothing() -> None:
    config = replace(STEADY, interval=1.0, timeout=1.0, fall=1)
    world = World(check(config, hold_off=1.0), until((FOREVER, Fate("no-route")))).run(30)
    assert world.check.state is DOWN
    assert [dead for _, _, dead in world.history if dead] == []


def test_an_answer_to_a_later_probe_outweighs_the_loss_of_earlier_ones() -> None:
    """A burst of loss under suspicion: the lost probes time out last, all in a row, and change nothing."""
    world = World(check(), until((3.1, ANSWER), (3.27, LOSE), (FOREVER, ANSWER)), [3.2]).run(20)
    assert world.states() == [(0, "active")]
    assert world.check.results["timeout"] >= STEADY.fall


@given(
    outcomes=st.permutations(range(1, 13)).flatmap(
        lambda order: st.lists(st.booleans(), min_size=12, max_size=12).map(
            lambda oks: list(zip(order, oks, strict=True))
        )
    ),
    fall=st.integers(1, 5),
    rise=st.integers(1, 5),
)
def test_rows_are_counted_in_the_order_of_sending(outcomes: list[tuple[int, bool]], fall: int, rise: int) -> None:
    """In whatever order the outcomes of overlapping probes become known, the naive count says the same."""
    config = replace(STEADY, fall=fall, rise=rise, interval=0.01, timeout=10.0)
    subject = check(config)
    while (probe := subject.poll(now := subject.wakeup())) is None or probe < len(outcomes):
        pass
    state = ACTIVE
    known: dict[int, bool] = {}
    for probe, answered in outcomes:
        known[probe] = answered
        if answered:
            subject.on_reply(probe, now)
        else:
            subject.on_refused(probe, now)
        in_order = [known[p] for p in sorted(known)]
        row = len(list(itertools.takewhile(answered.__eq__, reversed(in_order))))
        if state is ACTIVE and not answered and row >= fall:
            state = DOWN
        elif state is DOWN and answered and row >= rise:
            state = ACTIVE
        assert subject.state is state


FATES = st.one_of(
    st.builds(Fate, st.just("answer"), st.floats(0, 2)),
    st.builds(Fate, st.just("wrong"), st.floats(0, 2)),
    st.builds(Fate, st.just("refuse"), st.floats(0, 0.4)),
    st.sampled_from([LOSE, LOSE, LOSE, Fate("unsent"), Fate("no-route")]),
)
CONFIGS = st.builds(
    HealthConfig,
    interval=st.floats(0.05, 3),
    timeout=st.floats(0.05, 1),
    fall=st.integers(1, 4),
    rise=st.integers(1, 4),
    jitter=st.floats(0, 0.5),
    suspect_interval=st.floats(0.01, 0.2),
    max_interval=st.none() | st.floats(0.05, 10),
    probe=st.sampled_from([Probe.VERSION_NEGOTIATION, Probe.HTTP3]),
)


def test_who_is_doubted_to_be_dead_is_dead_after_another_hold_off() -> None:
    world = World(check(), lambda _: LOSE).run(20)
    seen = [world.check.dead]
    world.check.doubt(20.0)
    seen.append(world.check.dead)
    seen += [world.run(20 + wait).check.dead for wait in (HOLD_OFF - 0.01, HOLD_OFF + STEADY.timeout)]

    assert seen == [True, False, False, True]


@settings(max_examples=100, deadline=None)
@given(
    config=CONFIGS,
    spare=st.floats(0, 4),
    fates=st.lists(st.tuples(st.floats(0, 15), FATES), min_size=1, max_size=6),
    suspicions=st.lists(st.floats(0, 15), max_size=20),
)
def test_nobody_is_dead_before_a_whole_hold_off_of_silence(
    config: HealthConfig, spare: float, fates: list[tuple[float, Fate]], suspicions: list[float]
) -> None:
    hold_off = config.timeout + spare
    world = World(check(config, hold_off), until(*sorted(fates)), suspicions).run(20)
    slack = 1e-6
    for position, (when, state, dead) in enumerate(world.history):
        if not dead:
            continue
        assert state is DOWN
        went_down = max(world.history[i + 1][0] for i in range(position) if world.history[i][1] is ACTIVE)
        assert when - went_down >= hold_off - slack
        assert not [t for t in world.replies if when - hold_off + slack < t <= when]
        # It was asked in that time.
        assert [t for t in world.sent if when - hold_off - slack <= t]


@settings(max_examples=50, deadline=None)
@given(config=CONFIGS, fates=st.lists(st.tuples(st.floats(0, 8), FATES), min_size=1, max_size=6))
def test_a_stream_of_suspicions_makes_no_flood(config: HealthConfig, fates: list[tuple[float, Fate]]) -> None:
    """However often it is suspected, a backend is asked at most once per `suspect_interval`.

    One question more may come before it is declared dead.
    """
    seconds = 10.0
    suspicions = [i * 0.02 for i in range(int(seconds / 0.02))]
    world = World(check(config), until(*sorted(fates)), suspicions).run(seconds)
    fastest = min(config.suspect_interval, config.interval * (1 - config.jitter))
    hasty = [b for a, b in itertools.pairwise(world.sent) if b - a < fastest - 1e-6]
    assert len(hasty) <= seconds / HOLD_OFF


def test_a_healthy_backend_under_a_stream_of_suspicions_is_asked_a_few_times_per_cool_down() -> None:
    seconds = 20
    suspicions = [i * 0.01 for i in range(seconds * 100)]
    world = World(check(), until((FOREVER, ANSWER)), suspicions).run(seconds)
    assert world.states() == [(0, "active")]
    rounds = seconds / COOL_DOWN
    assert len(world.sent) <= rounds * (CLEARED_BY + 1) + seconds / STEADY.interval


def test_a_suspicion_while_calm_is_not_forgotten() -> None:
    """A backend that dies just after a false alarm is found out when the cool-down ends, not at leisure."""
    world = World(check(), until((3.3, ANSWER), (FOREVER, REFUSE)), [3.1, 3.4]).run(6)
    assert world.states()[-1][1] == "down"
    assert world.states()[-1][0] < 3.4 + COOL_DOWN + 3 * STEADY.suspect_interval


def test_a_suspicion_does_not_wait_for_the_first_probe() -> None:
    """That may be long in coming: a part of the interval, so that not all are asked at once."""
    subject = check(replace(STEADY, interval=3600.0), start=360.0)
    world = World(subject, until((FOREVER, REFUSE)), [1.0]).run(5)
    assert world.sent == pytest.approx([1.0, 1.02, 1.04])
    assert subject.state is DOWN


def test_suspecting_the_suspected_or_the_fallen_changes_nothing() -> None:
    subject = check()
    assert subject.suspect(0.0)
    assert not subject.suspect(0.0)
    world = World(subject, until((FOREVER, REFUSE))).run(1)
    assert world.check.state is DOWN
    assert not subject.suspect(1.0)


@pytest.mark.parametrize("stalled_for", [1.0, 60.0])
def test_a_balancer_that_was_stopped_itself_has_no_evidence(stalled_for: float) -> None:
    subject = check()
    World(subject, until((FOREVER, LOSE))).run(3.0)
    assert subject.state is DOWN
    resumed = 7.4 + stalled_for
    for now in (resumed, resumed + HOLD_OFF - 0.01):
        subject.poll(now)
        assert not subject.dead


def test_probes_in_flight_while_the_balancer_was_stopped_get_their_time() -> None:
    subject = check(replace(STEADY, fall=1))
    probe = subject.poll(0.0)
    assert probe == 1
    subject.poll(100.0)
    assert subject.state is ACTIVE
    subject.on_reply(probe, 100.2)
    assert subject.results == dict.fromkeys(RESULTS, 0) | {"answered": 1}


@given(config=CONFIGS, seed=st.integers(0, 1000))
def test_intervals_differ_by_the_jitter_and_no_more(config: HealthConfig, seed: int) -> None:
    subject = HealthCheck(config, HOLD_OFF, start=3.0, random=random.Random(seed).random)
    config = replace(config, timeout=0.01)
    subject.config = config
    world = World(subject, until((FOREVER, Fate("answer", 0.001)))).run(20)
    assert world.sent[0] == 3.0
    low, high = config.interval * (1 - config.jitter), config.interval * (1 + config.jitter)
    assert all(low - 1e-6 <= b - a <= high + 1e-6 for a, b in itertools.pairwise(world.sent))


def test_results_and_changes_are_counted() -> None:
    fates = until((1.5, ANSWER), (3.5, REFUSE), (4.5, LOSE), (5.5, Fate("unsent")), (FOREVER, ANSWER))
    subject = World(check(), fates).run(7.5).check
    # 0 and 1 are answered, 2 and 3 refused, 4 lost, 5 unsent; then 6, 6.02 and 7.02 are answered.
    assert subject.results == dict.fromkeys(RESULTS, 0) | {"answered": 5, "timeout": 1, "refused": 2, "unsent": 1}
    assert (subject.changes, subject.state, subject.reason) == (2, ACTIVE, "timeout")


def test_a_wrong_answer_is_a_failure_with_its_reason() -> None:
    subject = World(check(), until((1.5, WRONG), (FOREVER, ANSWER))).run(2.5).check
    assert subject.results == dict.fromkeys(RESULTS, 0) | {"answered": 1, "wrong-answer": 2}
    assert (subject.state, subject.reason, subject.since) == (ACTIVE, "status 503", None)


def test_since_is_when_the_state_changed() -> None:
    world = World(check(), until((3.5, LOSE), (FOREVER, ANSWER)))
    assert world.run(2.4).check.since is None
    assert world.run(3.9).check.since == 2.5
    assert world.run(9.0).check.since == pytest.approx(4.03)


def test_whoever_stays_down_is_asked_less_and_less_often() -> None:
    """Down at 2.5; with a hold-off of 30 seconds, so that the last question before it ends is at 32."""
    world = World(check(replace(STEADY, max_interval=8.0), hold_off=30.0), until((FOREVER, LOSE))).run(60)
    assert world.sent == [0, 1, 2, 3, 5, 9, 17, 25, 32, 40, 48, 56]
    assert world.states() == [(0, "active"), (2.5, "down"), (32.5, "dead")]


def test_the_first_answer_ends_the_back_off() -> None:
    slow = replace(STEADY, max_interval=8.0)
    world = World(check(slow), until((20, LOSE), (FOREVER, ANSWER))).run(30)
    # The next one asks for the second answer of two.
    assert [round(t, 3) for t in world.sent if t > 17] == [23, 23.02, 24.02, 25.02, 26.02, 27.02, 28.02, 29.02]

    # One that says 503 is asked as often as any other.
    world = World(check(slow), until((20, LOSE), (FOREVER, WRONG))).run(30)
    assert [round(t, 3) for t in world.sent if t > 17] == [23, 24, 25, 26, 27, 28, 29, 30]


def test_a_longest_interval_below_the_interval_is_none() -> None:
    world = World(check(replace(STEADY, max_interval=0.1)), until((FOREVER, LOSE))).run(10)
    assert [b - a for a, b in itertools.pairwise(world.sent)] == [1.0] * 10


@given(config=CONFIGS, longest=st.floats(0.05, 10), seed=st.integers(0, 1000))
def test_the_back_off_has_its_jitter_and_its_bound(config: HealthConfig, longest: float, seed: int) -> None:
    config = replace(config, max_interval=longest, timeout=0.01)
    subject = HealthCheck(config, 1000.0, start=0.0, random=random.Random(seed).random)
    world = World(subject, until((FOREVER, LOSE))).run(100)
    waits = [b - a for a, b in itertools.pairwise(world.sent)][config.fall :]
    nominal = config.interval
    for wait in waits:
        nominal = max(config.interval, min(2 * nominal, longest))
        assert nominal * (1 - config.jitter) - 1e-6 <= wait <= nominal * (1 + config.jitter) + 1e-6


@pytest.mark.parametrize("interval", [0.01, 1.0])
def test_connections_to_a_silent_server_are_bounded(interval: float) -> None:
    subject = check(replace(STEADY, probe=Probe.HTTP3, interval=interval, timeout=60.0))
    world = World(subject, until((FOREVER, LOSE)), [i * 0.1 for i in range(100)]).run(59)
    assert len(world.sent) == MOST_CONNECTIONS
    assert len(world.run(61).sent) > MOST_CONNECTIONS


@given(
    config=CONFIGS,
    hold_off=st.floats(4, 20),
    down=st.floats(0.1, 0.5),
    start=st.floats(0, 5),
    silence=st.sampled_from([LOSE, REFUSE]),
)
def test_flapping_faster_than_the_hold_off_is_never_dead(
    config: HealthConfig, hold_off: float, down: float, start: float, silence: Fate
) -> None:
    """Down for up to half of the hold-off, up for long enough to be asked once: over and over."""
    config = replace(config, interval=min(config.interval, 1.0), max_interval=None, timeout=0.3)
    longest_wait = config.interval * (1 + config.jitter) + 0.01
    down_for, up_for = down * hold_off, max(longest_wait, 0.35)

    def flaps(now: float) -> Fate:
        return ANSWER if now < start or (now - start) % (down_for + up_for) >= down_for else silence

    world = World(check(config, hold_off), flaps).run(100)
    assert [dead for _, _, dead in world.history if dead] == []


def test_a_flapping_backend_that_is_never_dead_is_down_every_time() -> None:
    """The same, by hand: two seconds of silence out of three, with a hold-off of five, for a minute."""
    config = replace(STEADY, interval=0.25, timeout=0.2)
    world = World(check(config), lambda now: LOSE if now % 3 < 2 else ANSWER).run(60)
    assert world.check.changes == 40
    assert [dead for _, _, dead in world.history if dead] == []


def test_probes_of_another_kind_are_neither_failures_nor_part_of_a_row() -> None:
    subject = World(check(), until((FOREVER, LOSE))).run(2.4).check  # two failures, and a third in a moment
    subject.reconfigure(replace(STEADY, probe=Probe.HTTP3), HOLD_OFF, 2.4)
    assert not subject.awaits(3)
    world = World(subject, until((FOREVER, LOSE)))
    world.now = 2.4
    assert [state for _, state, _ in world.run(4.9).history] == [ACTIVE]
    assert world.run(5.6).check.state is DOWN  # by those of 3, 4 and 5
    assert subject.since == 5.5


def test_another_kind_of_probe_raises_nobody_from_the_dead_and_lets_the_others_wait() -> None:
    other = replace(STEADY, probe=Probe.HTTP3)
    dying = World(check(), until((FOREVER, LOSE))).run(7.4)
    dying.check.reconfigure(other, HOLD_OFF, 7.4)
    assert not dying.run(12.3).check.dead
    assert dying.run(12.5).check.dead
    dying.check.reconfigure(STEADY, HOLD_OFF, 12.5)
    assert dying.run(20).check.dead


class Naive(RuleBasedStateMachine):
    """The rules in their plainest form, beside the check, whatever happens in whatever order.

    Every outcome is remembered, and counted anew each time. Nothing of the suspicions, the back-off and the jitter
    matters to them.
    """

    @initialize(config=CONFIGS, spare=st.floats(0, 4), seed=st.integers(0, 99))
    def begin(self, config: HealthConfig, spare: float, seed: int) -> None:
        self.config = config
        self.hold_off = config.timeout + spare
        self.check = HealthCheck(config, self.hold_off, start=0.0, random=random.Random(seed).random)
        self.now = 0.0
        self.deadlines: dict[int, float] = {}
        self.sent = 0
        self.outcomes: dict[int, bool] = {}
        self.state = ACTIVE
        self.dead = False
        self.quiet_since = 0.0
        self.has_failed = False  # since then
        self.poll()

    def poll(self) -> None:
        if self.now - self.check.wakeup() > self.config.timeout:  # stopped, or starved
            self.quiet()
            self.deadlines = dict.fromkeys(self.deadlines, self.now + self.config.timeout)
        probe = self.check.poll(self.now)
        for late in [each for each, deadline in self.deadlines.items() if deadline <= self.now]:
            self.became(late, False)
        if self.state is DOWN and self.has_failed and self.now >= self.quiet_since + self.hold_off:
            self.dead = True
        if probe is not None:
            self.sent = probe
            self.deadlines[probe] = self.now + self.config.timeout

    def quiet(self) -> None:
        self.quiet_since, self.has_failed = self.now, False

    def lives(self) -> None:
        self.dead = False
        self.quiet()

    def became(self, probe: int, answered: bool) -> None:
        del self.deadlines[probe]
        self.outcomes[probe] = answered
        in_order = [self.outcomes[each] for each in sorted(self.outcomes)]
        row = len(list(itertools.takewhile(answered.__eq__, reversed(in_order))))
        self.has_failed |= not answered
        if self.state is ACTIVE and not answered and row >= self.config.fall:
            self.state = DOWN
            self.quiet()
        elif self.state is DOWN and answered and row >= self.config.rise:
            self.state = ACTIVE

    @rule(seconds=st.floats(0.001, 3))
    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while (wakeup := max(self.now, self.check.wakeup())) <= until:
            self.now = wakeup
            self.poll()
        self.now = until

    @rule(seconds=st.floats(0.5, 20))
    def stall(self, seconds: float) -> None:
        self.now += seconds
        self.poll()

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), is_good=st.booleans())
    def answer(self, data: st.DataObject, is_good: bool) -> None:
        """Any probe, in time or long after."""
        probe = data.draw(st.integers(1, self.sent))
        self.lives()
        if is_good:
            self.check.on_reply(probe, self.now)
        else:
            self.check.on_wrong(probe, "status 503", self.now)
        if probe in self.deadlines:
            self.became(probe, is_good)
            if not is_good:
                self.quiet()

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        probe = data.draw(st.integers(1, self.sent))
        self.check.on_refused(probe, self.now)
        if probe in self.deadlines:
            self.became(probe, False)

    @precondition(lambda self: self.deadlines)
    @rule(no_route=st.booleans())
    def cannot_send(self, no_route: bool) -> None:
        probe = max(self.deadlines)
        self.check.on_unsent(probe, self.now, no_route=no_route)
        if no_route:
            self.became(probe, False)
        else:
            del self.deadlines[probe]
        self.quiet()

    @rule()
    def sign_of_life(self) -> None:
        self.check.on_sign_of_life(self.now)
        self.lives()

    @rule()
    def doubt(self) -> None:
        self.check.doubt(self.now)
        self.lives()

    @rule()
    def suspect(self) -> None:
        self.check.suspect(self.now)

    @invariant()
    def they_agree(self) -> None:
        assert (self.check.state, self.check.dead) == (self.state, self.dead)
        assert not self.dead or self.state is DOWN
        assert [each for each in range(1, self.sent + 1) if self.check.awaits(each)] == sorted(self.deadlines)


TestNaive = Naive.TestCase
TestNaive.settings = settings(max_examples=150, stateful_step_count=60)


def test_a_backend_that_was_down_before_is_down_until_it_answers() -> None:
    subject = check()
    subject.begin_down(0.0)
    assert subject.state is DOWN
    world = World(subject, lambda _: ANSWER)
    world.history = [(0.0, DOWN, False)]
    [_, (up, state)] = world.run(until=60.0).states()
    assert state == "active"
    assert up < STEADY.interval  # the probes of a rise do not wait for the interval


def test_a_backend_that_was_down_before_is_not_dead_before_a_whole_hold_off_of_silence() -> None:
    """Nobody knows for how long it had been silent when the other process ended."""
    subject = check()
    subject.begin_down(0.0)
    world = World(subject, lambda _: LOSE)
    world.history = [(0.0, DOWN, False)]
    [_, (dead, state)] = world.run(until=600.0).states()
    assert state == "dead"
    assert dead >= HOLD_OFF
    assert subject.changes == 0
