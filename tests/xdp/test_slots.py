"""Who has which number: it stays while they stay, and nobody is taken for somebody who was there before."""

from __future__ import annotations

import pytest

from lb.address import Address
from lb.xdp.slots import Allocation, NoRoomError, Occupant, Slot


def backend(name: str, host: str = "10.0.0.1") -> Occupant:
    return Occupant("web", name, Address(host, 443))


def only(before: Allocation, *occupants: Occupant) -> Allocation:
    return before.with_only({occupant.service for occupant in occupants}, occupants)


A, B, C, D = map(backend, "abcd")


def test_numbers_are_given_out_in_order_and_stay() -> None:
    first = only(Allocation(8), A, B)
    then = only(first, C, B, A)
    assert first.backends == {A: Slot(0, 1), B: Slot(1, 1)}
    assert then.backends == {A: Slot(0, 1), B: Slot(1, 1), C: Slot(2, 1)}
    assert then.services == {"web": 0}


def test_a_number_that_is_given_back_is_the_last_to_be_given_out_again() -> None:
    now = only(Allocation(4), A)
    seen = []
    for turn in range(8):
        now = only(now, backend(f"x{turn}"))
        seen += list(now.backends.values())
    assert [slot.number for slot in seen] == [1, 2, 3, 0, 1, 2, 3, 0]
    assert [slot.incarnation for slot in seen] == [1, 1, 1, 2, 2, 2, 2, 3]


def test_a_backend_at_another_address_is_another_one() -> None:
    before = only(Allocation(8), A, B)
    after = only(before, A, moved := backend("b", "10.0.0.2"))
    assert after.backends == {A: Slot(0, 1), moved: Slot(2, 1)}
    back = only(after, A, B)
    assert back.backends[B] == Slot(3, 1)


def test_who_comes_does_not_get_the_number_of_who_leaves() -> None:
    full = only(Allocation(4), A, B)
    after = only(full, C, D)
    assert {slot.number for slot in after.backends.values()} == {2, 3}
    with pytest.raises(NoRoomError, match="6 backends, those that leave included, and room for 4"):
        only(full, *map(backend, "wxyz"))


def test_there_are_as_many_services_as_rings() -> None:
    with pytest.raises(NoRoomError, match="257 services"):
        Allocation(8).with_only([f"service-{i}" for i in range(257)], [])


def test_incarnations_never_become_nobody() -> None:
    wrapped = only(Allocation(8, incarnations={0: 0xFFFFFFFF}), A)
    assert wrapped.backends == {A: Slot(0, 1)}
