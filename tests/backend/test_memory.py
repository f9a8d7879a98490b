"""The memory of what was used: it is small, and it never takes a used thing for a new one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backend.memory import Memory, Recall

LIFETIME = 80.0
CAPACITY = 10

# A thing: which one, how long ago it was made when it comes, and how long after the one before it comes.
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 30), st.floats(-5, LIFETIME), st.floats(0, LIFETIME)), min_size=1, max_size=60
)


@given(ARRIVALS)
def test_it_never_takes_a_used_thing_for_a_new_one_nor_grows(arrivals: list[tuple[int, float, float]]) -> None:
    memory = Memory(LIFETIME, CAPACITY)
    used: set[tuple[bytes, float]] = set()  # the naive memory, which forgets nothing
    now = 1_000_000.0
    for name, age, pause in arrivals:
        now += pause
        mark, made_at = name.to_bytes(8), now - age
        recall = memory.recall(mark, made_at)
        if (mark, made_at) in used:
            assert recall is not Recall.NEW
        if recall is Recall.NEW:
            memory.add(mark, made_at, now)
            used.add((mark, made_at))
            assert memory.recall(mark, made_at) is not Recall.NEW
        assert len(memory) <= CAPACITY
    for mark, made_at in used:
        if now - made_at <= LIFETIME:
            assert memory.recall(mark, made_at) is not Recall.NEW


def test_all_is_new_once_and_then_used() -> None:
    memory = Memory(LIFETIME, CAPACITY)
    for i in range(CAPACITY):
        assert memory.recall(i.to_bytes(8), 100.0 + i) is Recall.NEW
        memory.add(i.to_bytes(8), 100.0 + i, 120.0)
        assert memory.recall(i.to_bytes(8), 100.0 + i) is Recall.USED
    assert len(memory) == CAPACITY


def test_when_it_is_full_what_was_made_first_is_refused_and_what_is_made_later_is_not() -> None:
    memory = Memory(LIFETIME, CAPACITY)
    for i in range(CAPACITY):
        memory.add(i.to_bytes(8), 100.0 + 5 * i, 150.0)
    memory.add(b"one more", 149.0, 150.0)
    assert memory.recall(bytes(8), 100.0) is Recall.FORGOTTEN
    assert memory.recall(b"as early", 100.0) is Recall.FORGOTTEN
    assert memory.recall(b"one more", 149.0) is Recall.USED
    assert memory.recall(b"another", 149.0) is Recall.NEW


def test_what_is_over_makes_room() -> None:
    memory = Memory(LIFETIME, CAPACITY)
    for i in range(CAPACITY):
        memory.add(i.to_bytes(8), 100.0 + i, 110.0)
    now = 110.0 + 2 * LIFETIME
    memory.add(b"a newer one", now, now)
    assert len(memory) == 1
    assert memory.recall(bytes(8), 100.0) is Recall.FORGOTTEN  # even if the clock were put back


def test_of_the_time_before_it_began_it_knows_nothing_and_says_so() -> None:
    memory = Memory(LIFETIME, CAPACITY, since=1000.0)
    assert memory.recall(b"before", 999.9) is Recall.FORGOTTEN
    assert memory.recall(b"after", 1000.1) is Recall.NEW
