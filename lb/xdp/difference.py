"""The writes that turn one image into another, in an order in which no packet sees a half-made table.

Whatever a packet finds, it finds all that it refers to: things are there before they are referred to, and no longer
referred to before they go. A change within one element is one that a packet may see either way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from lb.xdp.image import (
    BACKEND_NAMES,
    BACKENDS,
    CID_CONFIGS,
    DNAT_RETURNS,
    LISTENERS,
    RESET_KEYS,
    RINGS,
    SERVERS,
    SERVICE_NAMES,
    Entries,
    Image,
    next_generation,
)
from lb.xdp.layout import BACKEND, CID_CONFIG, U32_KEY, Algorithm

# Names of maps, as in maps.h.
BACKEND_COUNT = "backend_count"
SERVICE_COUNT = "service_count"
GENERATION = ".data.generation"

_NOBODY = bytes(4)
_ALGORITHM = CID_CONFIG.offsets["algorithm"]
_INCARNATION = slice(BACKEND.offsets["incarnation"], BACKEND.offsets["incarnation"] + 4)


class Step(NamedTuple):
    """Writes to one map, in any order. To delete from an array is to write zeros.

    Keys of `rings` are ring indexes, and values what their only element gets.
    """

    map: str
    updates: Entries
    deletes: Collection[bytes] = ()


class _Changes(NamedTuple):
    """What is to be written to one map, what it replaces, and what is to go."""

    updates: Entries
    replaced: Entries
    deletes: list[bytes]


def difference(before: Image, after: Image) -> list[Step]:
    """What to write, in order. Nothing for equal images."""
    backends = _changes(before, after, BACKENDS)
    occupied = {key: value for key, value in backends.updates.items() if value[_INCARNATION] != _NOBODY}
    freed = {key: value for key, value in backends.updates.items() if value[_INCARNATION] == _NOBODY}
    newcomers = [
        key
        for key, value in occupied.items()
        if backends.replaced.get(key, bytes(len(value)))[_INCARNATION] != value[_INCARNATION]
    ]
    reset_keys = _changes(before, after, RESET_KEYS)
    servers = _changes(before, after, SERVERS)
    cid_configs = _changes(before, after, CID_CONFIGS)
    rings = _changes(before, after, RINGS)
    listeners = _changes(before, after, LISTENERS)
    dnat_returns = _changes(before, after, DNAT_RETURNS)
    backend_names = _changes(before, after, BACKEND_NAMES)
    service_names = _changes(before, after, SERVICE_NAMES)

    steps = [
        # What is new, from the bottom up.
        Step(SERVICE_NAMES, service_names.updates),
        Step(BACKEND_NAMES, backend_names.updates),
        Step(SERVICE_COUNT, {}, list(service_names.updates)),
        Step(BACKEND_COUNT, {}, newcomers),
        Step(RESET_KEYS, reset_keys.updates),  # before the backends that are dead now
        Step(BACKENDS, occupied),
        Step(SERVERS, servers.updates),
        # No packet shall be decoded with half a key.
        Step(CID_CONFIGS, {key: _disabled(value) for key, value in cid_configs.updates.items()}),
        Step(CID_CONFIGS, cid_configs.updates),
        Step(RINGS, rings.updates),  # nobody uses that ring yet
        Step(DNAT_RETURNS, dnat_returns.updates),
        Step(LISTENERS, listeners.updates),
        Step(LISTENERS, {}, listeners.deletes),
    ]
    if before.generation != after.generation:
        # The program caches what it looks up. Nothing is to go that a cached listener leads to, ...
        steps.append(_generation(next_generation(before.generation)))
    steps += [
        Step(CID_CONFIGS, {}, cid_configs.deletes),
        Step(SERVERS, {}, servers.deletes),
    ]
    if before.generation != after.generation:
        # ... and no server ID that was decoded meanwhile is to be remembered.
        steps.append(_generation(after.generation))
    steps += [
        Step(BACKENDS, freed, backends.deletes),
        Step(RESET_KEYS, {}, reset_keys.deletes),
        Step(DNAT_RETURNS, {}, dnat_returns.deletes),
        Step(BACKEND_NAMES, {}, backend_names.deletes),
        Step(SERVICE_NAMES, {}, service_names.deletes),
    ]
    return [step for step in steps if step.updates or step.deletes]


def overfull(before: Image, steps: Collection[Step], capacities: Mapping[str, int]) -> str | None:
    """The first map that has no room for the steps, and what it would need; None if all have."""
    for step in steps:
        room = capacities[step.map]
        if len(step.updates) + before.count(step.map) <= room:
            continue
        needed = len(before.entries(step.map).keys() | step.updates.keys())
        if needed > room:
            return f"map {step.map} has room for {room} entries, and {needed} are needed"
    return None


def _changes(before: Image, after: Image, name: str) -> _Changes:
    """Parts that both images have are the same in both, and are not looked at."""
    old, new = before.maps.get(name, ()), after.maps.get(name, ())
    kept = {id(part) for part in old} & {id(part) for part in new}
    gone = _merged([part for part in old if id(part) not in kept])
    come = _merged([part for part in new if id(part) not in kept])
    return _Changes(
        {key: value for key, value in come.items() if gone.get(key) != value} if gone else come,
        gone,
        [key for key in gone if key not in come],
    )


def _merged(parts: Sequence[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    merged: dict[bytes, bytes] = {}
    for part in parts:
        merged.update(part)
    return merged


def _generation(number: int) -> Step:
    return Step(GENERATION, {U32_KEY.pack(0): U32_KEY.pack(number)})


def _disabled(config: bytes) -> bytes:
    return config[:_ALGORITHM] + bytes((Algorithm.NONE,)) + config[_ALGORITHM + 1 :]
