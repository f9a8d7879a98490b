"""FlowTable: bounded, aged, and not to be emptied by a flood."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lb.flows import FlowTable


def test_an_entry_lives_for_its_lifetime_and_no_longer() -> None:
    table = FlowTable[str](10)
    table.put("k", "a", now=0, lifetime=10)

    assert [table.get("k", 9.9), table.get("k", 10.0), table.get("other", 0)] == ["a", None, None]


def test_seen_again_it_lives_longer_but_a_shorter_lifetime_takes_nothing_away() -> None:
    table = FlowTable[str](10)
    table.put("k", "a", now=0, lifetime=100)
    table.put("k", "a", now=50, lifetime=10)

    assert table.get("k", 99) == "a"


def test_another_decision_replaces_the_first_and_its_lifetime() -> None:
    table = FlowTable[str](10)
    table.put("k", "a", now=0, lifetime=100)
    table.put("k", "b", now=1, lifetime=10)

    assert [table.get("k", 10.9), table.get("k", 11.0)] == ["b", None]


def test_a_flood_pushes_out_itself_and_not_what_is_in_use() -> None:
    table = FlowTable[int](100)
    used = range(20)
    for key in used:
        table.put(key, "used", now=0, lifetime=1000)
    for key in range(1000, 11000):
        table.put(key, "flood", now=1, lifetime=1000)
        table.get(key % 20, 1)

    assert len(table) == 100
    assert [table.get(key, 2) for key in used] == ["used"] * 20


def test_sweeping_frees_what_has_expired_and_nothing_else() -> None:
    table = FlowTable[int](100)
    for key in range(50):
        table.put(key, "v", now=0, lifetime=10 if key % 2 else 100)
    table.sweep(now=50, steps=50)

    assert len(table) == 25
    assert [table.get(key, 50) for key in range(4)] == ["v", None, "v", None]


def test_a_table_without_room_remembers_nothing() -> None:
    table = FlowTable[int](0)
    table.put(1, "v", now=0, lifetime=10)

    assert (len(table), table.get(1, 0)) == (0, None)


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "sweep"]), st.integers(0, 30), st.floats(0, 5)), max_size=200))
def test_never_over_capacity_and_never_an_answer_that_was_not_given(steps: list[tuple[str, int, float]]) -> None:
    """Against a dict that never forgets: what the table knows, the dict knows the same."""
    table, naive, now = FlowTable[int](8), dict[int, tuple[str, float]](), 0.0
    for number, (what, key, wait) in enumerate(steps):
        now += wait
        if what == "put":
            table.put(key, str(number), now, 3.0)
            naive[key] = str(number), now + 3.0
        elif what == "sweep":
            table.sweep(now, key)
        else:
            found = table.get(key, now)
            assert found is None or (found == naive[key][0] and now < naive[key][1])
        assert len(table) <= 8
