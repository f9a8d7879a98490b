"""Which service has which index, and which backend which slot: numbers that stay while those who have them stay.

A number that is given back is the last one to be given out again, and a slot never sees the same incarnation twice:
what the kernel remembers of a slot's former occupant cannot be mistaken for the present one.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from lb.address import Address
from lb.xdp.layout import MAX_SERVICES

K = TypeVar("K")


class Occupant(NamedTuple):
    """A backend as flows know it. At another address it is another one."""

    service: str
    backend: str
    address: Address


class Slot(NamedTuple):
    """A place in the map of backends. `incarnation` is another number for everybody who was ever there."""

    number: int
    incarnation: int


class NoRoomError(OSError):
    """More services or backends than the maps were made for."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Who has which number. `capacity` is the number of backends' slots."""

    capacity: int
    services: Mapping[str, int] = field(default_factory=dict)
    backends: Mapping[Occupant, Slot] = field(default_factory=dict)
    incarnations: Mapping[int, int] = field(default_factory=dict)  # the last one of every slot that was ever taken
    service_hand: int = 0  # where the search for a free number goes on
    backend_hand: int = 0

    def with_only(self, services: Collection[str], occupants: Collection[Occupant]) -> Allocation:
        """What becomes of it when these, and no others, are there. Raises NoRoomError."""
        names, service_hand = _assign(self.services, services, self.service_hand, MAX_SERVICES, "services")
        taken = {occupant: slot.number for occupant, slot in self.backends.items()}
        numbers, backend_hand = _assign(taken, occupants, self.backend_hand, self.capacity, "backends")
        incarnations = dict(self.incarnations)
        backends = {}
        for occupant, number in numbers.items():
            slot = self.backends.get(occupant)
            if slot is None:
                incarnations[number] = incarnations.get(number, 0) % 0xFFFFFFFF + 1
                slot = Slot(number, incarnations[number])
            backends[occupant] = slot
        return Allocation(self.capacity, names, backends, incarnations, service_hand, backend_hand)


def _assign(
    before: Mapping[K, int], wanted: Collection[K], hand: int, capacity: int, what: str
) -> tuple[dict[K, int], int]:
    """A number for each, its old one if it had one, and where to look for the next.

    Numbers of those who leave are not given out at once: there is a moment in which both are there.
    """
    taken = set(before.values())
    newcomers = [one for one in wanted if one not in before]
    if len(taken) + len(newcomers) > capacity:
        raise NoRoomError(
            errno.ENOSPC, f"{len(taken) + len(newcomers)} {what}, those that leave included, and room for {capacity}"
        )
    found = {one: before[one] for one in wanted if one in before}
    for one in newcomers:
        while hand in taken:
            hand = (hand + 1) % capacity
        found[one] = hand
        taken.add(hand)
        hand = (hand + 1) % capacity
    return found, hand
