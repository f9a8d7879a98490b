"""Rotation: which changes of CID configurations are refused, and what is said about each config ID."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.cid import CONFIG_IDS, CidConfig, ConfigId
from lb.keys import Phase, RotationConfig, ServiceConfig
from lb.rotation import Rotation, SlotView, views_of
from lb.routing import CidSlot
from tests.builders import service

GUARD = 10.0
ACTIVE, PREPARED, RETIRING = Phase.ACTIVE, Phase.PREPARED, Phase.RETIRING


def cid_slot(config_id: int, key: int = 1, reset: int | None = 1, **lengths: Any) -> CidSlot:
    """A configuration that differs from others by its keys."""
    config = CidConfig(ConfigId(config_id), 4, 12, bytes([key]) * 16)
    return CidSlot(replace(config, **lengths), None if reset is None else bytes([reset]) * 32)


def configured(*slots: tuple[CidSlot, Phase], guard: float = GUARD, name: str = "web") -> list[ServiceConfig]:
    """A fleet of one service."""
    made = replace(service(slots=tuple(slot for slot, _ in slots)), name=name)
    phases = {slot.config.config_id: phase for slot, phase in slots}
    return [
        ServiceConfig(
            service=made,
            rotation=RotationConfig(guard=guard),
            phases=phases,
            key_files={config_id: Path(f"cid-{config_id}.key") for config_id in phases},
        )
    ]


class Story:
    """A balancer's rotation, its counters and its clock."""

    def __init__(self, *slots: tuple[CidSlot, Phase], guard: float = GUARD) -> None:
        self.now = 1000.0
        self.counts = [0] * len(CONFIG_IDS)
        self.rotation = Rotation(configured(*slots, guard=guard), self.now, lambda path: 7.0)

    def packets(self, config_id: int) -> None:
        self.counts[config_id] += 3
        self.look()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.look()

    def look(self) -> None:
        self.rotation.observe({"web": self.counts}, self.now)

    def refused(self, *slots: tuple[CidSlot, Phase], guard: float = GUARD) -> list[str]:
        return [str(error) for error in self.rotation.refuse(configured(*slots, guard=guard), self.now)]

    def reload(self, *slots: tuple[CidSlot, Phase], guard: float = GUARD) -> None:
        assert self.refused(*slots, guard=guard) == []
        self.force(*slots, guard=guard)

    def force(self, *slots: tuple[CidSlot, Phase], guard: float = GUARD) -> None:
        self.rotation.adopt(configured(*slots, guard=guard), self.now)

    def view(self, config_id: int) -> SlotView:
        return self.rotation.views(self.now)["web"][ConfigId(config_id)]


def test_a_rotation_from_the_first_key_to_the_second() -> None:
    story = Story((cid_slot(0), ACTIVE))
    story.packets(0)
    story.reload((cid_slot(0), ACTIVE), (cid_slot(1, 2), PREPARED))
    assert story.view(1) == SlotView("prepared", 0, None, GUARD, 0.0, True, "single-pass", 7.0)

    story.reload((cid_slot(1, 2), ACTIVE), (cid_slot(0), RETIRING))
    story.wait(4)
    story.packets(0)
    story.wait(9)
    assert story.view(0) == SlotView("retiring", 6, 9.0, GUARD, 1.0, False, "single-pass", 7.0)
    assert len(story.refused((cid_slot(1, 2), ACTIVE))) == 1

    story.wait(1)
    assert story.view(0).may_be_freed
    story.reload((cid_slot(1, 2), ACTIVE))
    assert story.view(0) == SlotView("free", 6, 10.0, GUARD, 0.0, True, None, None)
    story.reload((cid_slot(1, 2), ACTIVE), (cid_slot(0, 3), PREPARED))  # another key, another life
    assert story.view(0) == SlotView("prepared", 6, None, GUARD, 0.0, True, "single-pass", 7.0)


def test_all_config_ids_of_all_services_are_in_the_view() -> None:
    views = Story((cid_slot(3), ACTIVE)).rotation.views(1000.0)
    assert set(views) == {"web"}
    assert list(views["web"]) == list(CONFIG_IDS)
    assert {view.phase for config_id, view in views["web"].items() if config_id != 3} == {"free"}
    assert views["web"][ConfigId(3)] == SlotView("active", 0, None, GUARD, None, False, "single-pass", 7.0)


def test_a_view_can_be_made_again_of_what_the_api_says_of_it() -> None:
    view = Story((cid_slot(3), ACTIVE)).view(3)
    said = {name.replace("_", "-"): value for name, value in view._asdict().items()}
    assert views_of([{"config-id": 3, "packets-per-second": 1.5, **said}]) == {3: view}


@pytest.mark.parametrize("phase", [ACTIVE, PREPARED])
@pytest.mark.parametrize("guard", [GUARD, 0.0], ids=["guarded", "unguarded"])
@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (cid_slot(0, 2), "key"),
        (cid_slot(0, reset=2), "reset key"),
        (cid_slot(0, nonce_length=6, server_id_length=5), "server-id-length and nonce-length"),
        (cid_slot(0, appended_length=2), "appended-length"),
    ],
)
def test_a_slot_in_use_does_not_change_however_long_it_is_quiet(
    phase: Phase, guard: float, changed: CidSlot, what: str
) -> None:
    story = Story((cid_slot(0), phase))
    story.wait(1000)
    assert story.refused((changed, phase), guard=guard) == [
        f"services[0].cid-configs[0]: config ID 0 is in use and has another {what}: "
        "expected a free config ID for the new configuration"
    ]


def test_what_decoding_does_not_depend_on_may_change() -> None:
    story = Story((cid_slot(0), ACTIVE))
    story.packets(0)
    encoding = CidSlot(replace(cid_slot(0).config, encodes_length=False), cid_slot(0).reset_key)
    assert story.refused((encoding, ACTIVE)) == []
    assert story.refused((cid_slot(0, reset=None), ACTIVE)) == []


def test_resets_come_back_with_the_key_that_they_had() -> None:
    story = Story((cid_slot(0), ACTIVE))
    story.reload((cid_slot(0, reset=None), ACTIVE))
    assert "another reset key" in story.refused((cid_slot(0, reset=2), ACTIVE))[0]
    story.reload((cid_slot(0, reset=1), ACTIVE))


def test_a_configuration_that_packets_come_with_cannot_be_taken_out_of_the_file_unless_the_file_says_so() -> None:
    story = Story((cid_slot(0), ACTIVE), (cid_slot(1, 2), RETIRING))
    story.wait(5)
    story.packets(0)
    story.packets(1)
    story.wait(2)
    assert story.refused((cid_slot(0), ACTIVE)) == [
        "services[0].cid-configs: nothing for config ID 1, which is retiring and in use (the latest packet came 2s "
        "ago): it is free in 8s if no more come; with services[0].rotation.guard 0s it goes all the same, and so do "
        "its connections"
    ]
    (reason,) = story.refused((cid_slot(1, 2), RETIRING))
    assert "config ID 0, which is active and in use (the latest packet came 2s ago): expected it to stay" in reason
    story.reload(guard=0.0)


def test_at_the_start_everything_counts_as_seen_just_now() -> None:
    story = Story((cid_slot(0), ACTIVE), (cid_slot(1, 2), RETIRING))
    assert "clients may hold connection IDs of it" in story.refused((cid_slot(0), ACTIVE))[0]
    story.wait(GUARD)
    story.reload((cid_slot(0), ACTIVE))


def test_a_prepared_configuration_that_nobody_has_used_can_go_at_once() -> None:
    story = Story((cid_slot(0), ACTIVE))
    story.reload((cid_slot(0), ACTIVE), (cid_slot(1, 2), PREPARED))
    assert story.view(1).may_be_freed
    story.reload((cid_slot(0), ACTIVE))
    story.reload((cid_slot(0), ACTIVE), (cid_slot(1, 3), PREPARED))


def test_the_guard_time_of_a_configuration_begins_when_servers_stop_to_issue_it() -> None:
    story = Story((cid_slot(0), ACTIVE), (cid_slot(1, 2), PREPARED))
    story.wait(100)
    story.reload((cid_slot(0), RETIRING), (cid_slot(1, 2), ACTIVE))
    assert (story.view(0).free_in, story.view(0).last_packet) == (GUARD, None)


def test_what_was_freed_by_force_takes_no_other_configuration_for_the_guard_time() -> None:
    story = Story((cid_slot(0), ACTIVE), (cid_slot(1, 2), RETIRING))
    story.packets(1)
    story.wait(3)
    story.force((cid_slot(0), ACTIVE))
    story.wait(4)
    assert story.view(1)[:6] == ("free", 3, 7.0, GUARD, 6.0, False)
    assert story.refused((cid_slot(0), ACTIVE)) == []
    assert story.refused((cid_slot(0), ACTIVE), (cid_slot(1, 9), PREPARED)) == [
        "services[0].cid-configs[1]: config ID 1 was freed while it was in use and has another key: it is free in 6s"
    ]
    assert story.refused((cid_slot(0), ACTIVE), (cid_slot(1, 2), RETIRING)) == []  # as it was
    story.wait(6)
    story.reload((cid_slot(0), ACTIVE), (cid_slot(1, 9), PREPARED))


def test_a_service_that_comes_back_within_the_guard_time_is_remembered() -> None:
    story = Story((cid_slot(0), ACTIVE))
    story.packets(0)
    story.rotation.adopt(configured((cid_slot(0, 5), ACTIVE), name="other"), story.now)
    assert "freed while it was in use" in story.refused((cid_slot(0, 2), ACTIVE))[0]
    story.wait(GUARD)
    story.rotation.adopt(configured((cid_slot(0, 5), ACTIVE), name="other"), story.now)
    assert set(story.rotation.views(story.now)) == {"other"}
    assert story.refused((cid_slot(0, 2), ACTIVE)) == []


def test_counters_that_begin_anew_count_as_packets() -> None:
    story = Story((cid_slot(0), ACTIVE), (cid_slot(1, 2), RETIRING))
    story.packets(1)
    story.wait(GUARD)
    story.counts[1] = 1  # a worker was started again
    story.look()
    assert not story.view(1).may_be_freed


def test_counters_that_nobody_looks_at_free_nothing() -> None:
    story = Story((cid_slot(0), ACTIVE), (cid_slot(1, 2), RETIRING))
    story.now += 1000
    assert not story.view(1).may_be_freed


steps = st.one_of(
    st.tuples(st.just("packets"), st.integers(0, 2)),
    st.tuples(st.just("wait"), st.integers(1, 6)),
    st.tuples(
        st.sampled_from(["reload", "reload", "force"]),
        st.dictionaries(st.integers(0, 2), st.tuples(st.integers(1, 3), st.sampled_from(list(Phase))), max_size=3),
    ),
)


@given(st.lists(steps, max_size=40))
def test_no_connection_id_ever_means_something_else_within_the_guard_time(orders: list[tuple[str, object]]) -> None:
    """Whatever is asked for in which order: packets of clients that are not idle are decoded as they were made.

    By force they may find nothing, and even then no other configuration.
    """
    story = Story((cid_slot(0), ACTIVE))
    in_force = {0: 1}  # config ID to key
    latest: dict[int, tuple[int, float]] = {}  # config ID to the key of its latest packet, and when that was
    lost: set[int] = set()  # config IDs that were freed by force
    for do, what in orders:
        if do == "packets":
            assert isinstance(what, int)
            if what in in_force:
                latest[what] = in_force[what], story.now
                story.packets(what)
        elif do == "wait":
            assert isinstance(what, int)
            story.wait(what)
        else:
            assert isinstance(what, dict)
            slots = [(cid_slot(config_id, key, key), phase) for config_id, (key, phase) in what.items()]
            reasons = story.refused(*slots)
            if do == "force":
                reasons = [reason for reason in reasons if "nothing for config ID" not in reason]
                lost |= in_force.keys() - what.keys()
            if reasons:
                continue
            story.force(*slots)
            in_force = {config_id: key for config_id, (key, _) in what.items()}
            for config_id, (key, at) in latest.items():
                if story.now - at < GUARD:
                    assert in_force.get(config_id, key if config_id in lost else None) == key
