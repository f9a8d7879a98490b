"""HealthCheck: is a backend alive, and if not, for how long has it been silent? It decides; others ask.

What cannot be asked is not evidence: a probe that never left, or a balancer that was stopped itself, must not end
anybody's connections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lb.config import HealthConfig, Probe
from lb.routing import BackendState

RESULTS = ("answered", "wrong-answer", "timeout", "refused", "unsent")  # what becomes of a probe
CLEARED_BY = 2  # answers that end a suspicion
MOST_CONNECTIONS = 8  # probes on their way at a time, where each is a connection with its keys and buffers
COOL_DOWN = 0.5  # seconds, at least, from the end of a suspicion to the next one


class HealthCheck:
    """One backend's state: ACTIVE until `fall` probes in a row fail, DOWN until `rise` in a row are answered.

    "In a row" is in the order in which the probes were sent, whenever their outcomes become known: with several
    on their way, an answer to a later one outweighs the loss of an earlier one.

    `dead` is set once it has been DOWN without one sign of life for `hold_off` seconds. An answer that is too late
    to count as a success, or that is not the wanted one, is a sign of life all the same.

    The caller calls `poll` whenever `wakeup()` says (and oftener if it likes), sends what it asks for, and reports
    outcomes. All times are seconds of one clock that only goes forward; `random()` is uniform in [0, 1).
    """

    def __init__(self, config: HealthConfig, hold_off: float, *, start: float, random: Callable[[], float]) -> None:
        self.config = config
        self.hold_off = hold_off
        self.state = BackendState.ACTIVE
        self.dead = False
        self.changes = 0  # of `state`
        self.since: float | None = None  # when it changed
        self.results = dict.fromkeys(RESULTS, 0)
        self.reason = ""  # of the latest failure: `timeout`, `refused`, `no-route`, or what is wrong with an answer
        self._random = random
        self._start = start
        self._last_sent = float("-inf")
        self._spread = 1.0
        self._probes = 0
        self._deadlines: dict[int, float] = {}  # of the probes on their way, in the order of sending
        # The latest outcomes in the order of sending, as far as they are equal, and the probe that broke the row.
        self._run: list[int] = []
        self._run_answered = True
        self._broken_at = 0
        # While DOWN: the latest sign of life, or of our own inability to look for one, and whether any probe has
        # failed since.
        self._quiet_since = 0.0
        self._unanswered = False
        self._asked = 0  # probes since then, while DOWN
        self._suspected: float | None = None  # since when
        self._suspect_from = 0  # the first probe that may clear the suspicion
        self._calm_until = float("-inf")
        self._suspect_next = False  # suspected again before that

    def begin_down(self, now: float) -> None:
        """A process before this one found the backend DOWN. So it is until it answers; nobody knows for how long."""
        self.state = BackendState.DOWN
        self._begin_hold_off(now)

    def wakeup(self) -> float:
        """When `poll` has to be called next. It may be in the past."""
        times = [self._next_probe(), *list(self._deadlines.values())[:1]]
        if self.state is BackendState.DOWN and self._unanswered and not self.dead:
            times.append(self._quiet_since + self.hold_off)
        if self._suspect_next:
            times.append(self._calm_until)
        return min(times)

    def poll(self, now: float) -> int | None:
        """Do what time alone brings about. Returns the number of a probe to be sent at once, or None.

        Answers that are waiting somewhere should be reported first.
        """
        for probe in self.overdue(now):
            self._failed(probe, now, "timeout", "timeout")
        if self._suspected is not None and now >= self._suspected + self._suspicion_length():
            self._calm_down(now)
        if self._suspect_next and now >= self._calm_until:
            self._suspect_next = False
            self.suspect(now)
        if self.state is BackendState.DOWN and self._unanswered and now >= self._quiet_since + self.hold_off:
            self.dead = True
        if now < self._next_probe():
            return None
        self._probes += 1
        self._asked += 1
        self._last_sent = now
        self._spread = 1 + self.config.jitter * (2 * self._random() - 1)
        self._deadlines[self._probes] = now + self.config.timeout
        return self._probes

    def overdue(self, now: float) -> list[int]:
        """The probes that will have timed out when `poll` is called now."""
        self._forgive(now - self.wakeup(), now)
        return [probe for probe, deadline in self._deadlines.items() if deadline <= now]

    def on_reply(self, probe: int, now: float) -> None:
        """The backend answered a probe, in time or not."""
        self.on_sign_of_life(now)
        if self._deadlines.pop(probe, None) is None:
            return  # it has failed already; that stands
        self.results["answered"] += 1
        self._outcome(probe, True)
        if self.state is BackendState.DOWN and self._row(True) >= self.config.rise:
            self._change(BackendState.ACTIVE, now)
        if self._suspected is not None:
            answered = sum(1 for p in self._run if p >= self._suspect_from) if self._run_answered else 0
            if answered >= CLEARED_BY:
                self._calm_down(now)

    def on_wrong(self, probe: int, reason: str, now: float) -> None:
        """The backend answered a probe, but that is not the answer of a healthy one."""
        if probe in self._deadlines:
            self._failed(probe, now, "wrong-answer", reason)
        self.on_sign_of_life(now)

    def on_sign_of_life(self, now: float) -> None:
        """The backend sent something that only a living one can send: it is not dead, and the hold-off begins anew."""
        self.dead = False
        self._begin_hold_off(now)

    def on_refused(self, probe: int, now: float) -> None:
        """The network returned a probe: nobody listens there."""
        if probe in self._deadlines:
            self._failed(probe, now, "refused", "refused")

    def on_unsent(self, probe: int, now: float, *, no_route: bool = False) -> None:
        """A probe could not be sent. That is evidence of nothing, and so the hold-off begins anew.

        With `no_route` it counts as a failure: the clients' datagrams do not get there either.
        """
        if probe not in self._deadlines:
            return
        if no_route:
            self._failed(probe, now, "unsent", "no-route")
        else:
            del self._deadlines[probe]
            self.results["unsent"] += 1
        self._begin_hold_off(now)

    def awaits(self, probe: int) -> bool:
        """Whether nothing has become of a probe yet."""
        return probe in self._deadlines

    def suspect(self, now: float) -> bool:
        """Something looks wrong. Brings the next probes forward, and that is all.

        Returns whether it did: not if it did a moment ago, nor if the backend is DOWN anyway.
        """
        if self.state is not BackendState.ACTIVE or self._suspected is not None:
            return False
        if now < self._calm_until:
            self._suspect_next = True
            return False
        self._suspected = now
        self._suspect_from = self._probes + 1
        return True

    def doubt(self, now: float) -> None:
        """The silence so far may have been our own: the hold-off begins anew, also for the dead."""
        self.dead = False
        self._begin_hold_off(now)

    def reconfigure(self, config: HealthConfig, hold_off: float, now: float) -> None:
        """Go on by other rules. If another question is asked, what became of the earlier ones counts no more."""
        if config.probe is not self.config.probe:
            self._deadlines.clear()
            self._run.clear()
            if not self.dead:
                self._begin_hold_off(now)
        self.config = config
        self.hold_off = hold_off

    def _next_probe(self) -> float:
        config = self.config
        rising = self.state is BackendState.DOWN and self._row(True) > 0
        if rising or self._suspected is not None:  # before the start, too
            due = self._last_sent + min(config.suspect_interval, config.interval)
        else:
            due = max(self._last_sent + self._interval() * self._spread, self._start)
            if self.state is BackendState.DOWN and not self.dead:
                # Nobody is declared dead without having been asked at the last moment.
                last_question = self._quiet_since + self.hold_off - config.timeout
                if self._last_sent < last_question < due:
                    due = last_question
        if config.probe is Probe.HTTP3 and len(self._deadlines) >= MOST_CONNECTIONS:
            due = max(due, min(self._deadlines.values()))
        return due

    def _interval(self) -> float:
        """Longer and longer while nobody answers, if there is something that it may grow to."""
        config = self.config
        if self.state is BackendState.ACTIVE or config.max_interval is None:
            return config.interval
        doublings = min(self._asked, 30)  # 20 of them make hours of 10 ms
        return max(config.interval, min(config.interval * 2.0**doublings, config.max_interval))

    def _forgive(self, late: float, now: float) -> None:
        """A balancer that was stopped, or starved, for longer than a probe may take has not been listening."""
        if late > self.config.timeout:
            self._begin_hold_off(now)
            self._deadlines = dict.fromkeys(self._deadlines, now + self.config.timeout)

    def _failed(self, probe: int, now: float, result: str, reason: str) -> None:
        del self._deadlines[probe]
        self.results[result] += 1
        self._outcome(probe, False)
        self.reason = reason
        self._unanswered = True
        if self.state is BackendState.ACTIVE and self._row(False) >= self.config.fall:
            self._change(BackendState.DOWN, now)
            self._begin_hold_off(now)
            self._calm_down(now)
            self._suspect_next = False

    def _begin_hold_off(self, now: float) -> None:
        self._quiet_since = now
        self._unanswered = False
        self._asked = 0

    def _change(self, state: BackendState, now: float) -> None:
        self.state = state
        self.since = now
        self.changes += 1

    def _outcome(self, probe: int, answered: bool) -> None:
        if answered is self._run_answered:
            if probe > self._broken_at:
                enough = max(self.config.fall, self.config.rise, CLEARED_BY)
                self._run = sorted([*self._run, probe])[-enough:]
            return
        later = [p for p in self._run if p > probe]
        if later:
            self._run = later
            self._broken_at = max(self._broken_at, probe)
        else:
            self._broken_at = max(self._run, default=0)
            self._run = [probe]
            self._run_answered = answered

    def _row(self, answered: bool) -> int:
        return len(self._run) if self._run_answered is answered else 0

    def _suspicion_length(self) -> float:
        """Long enough for `fall` probes to fail, however they are answered in between."""
        return self.config.fall * self.config.suspect_interval + 2 * self.config.timeout

    def _calm_down(self, now: float) -> None:
        """End a suspicion. The next one may not begin before as much time has passed as this one took."""
        if self._suspected is not None:
            self._calm_until = now + max(COOL_DOWN, now - self._suspected)
            self._suspected = None


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """What is known about one backend at one moment. `results` counts probes by what became of them.

    `since` is when the state changed, by the monotonic clock; None if it never did. `reason` is why the latest probe
    that failed did so; empty if none did.
    """

    state: BackendState = BackendState.ACTIVE
    dead: bool = False
    changes: int = 0  # of state
    results: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(RESULTS, 0))
    ignored: int = 0  # datagrams that answer no probe
    round_trip: float | None = None  # seconds, of the latest answer; with `probe: http3` of the whole exchange
    since: float | None = None
    reason: str = ""


HealthSnapshot = dict[str, dict[str, BackendHealth]]  # by service and backend
