"""Rotation of CID configurations: which config IDs are in use, and which changes would break somebody's connection.

A config ID goes from *free* to *prepared* (balancers decode it), *active* (servers issue it), *retiring* (counted
until quiet) and back. The phases stand in the configuration file. What is here adds what packets say: when the last
one came, and so from when on a config ID may mean something else. Times are seconds of any monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from lb.cid import CONFIG_IDS, CidConfig, ConfigId
from lb.errors import ConfigError
from lb.keys import Phase, ServiceConfig
from lb.routing import CidSlot

FREE = "free"


class SlotView(NamedTuple):
    """One config ID of a service at one moment; times in seconds.

    `phase` is one of `lb.keys.Phase`, or "free". `packets` were routed by it since the start. `last_packet` is how long
    ago the latest one came, None if none came since the start. It `may_be_freed` once none came for `guard`, and
    that is in `free_in`, None while servers issue it. `key_age` is that of its key file, None for plaintext.

    One that is free and not yet `may_be_freed` was freed by force: until `free_in` it takes no other configuration.
    """

    phase: str
    packets: int
    last_packet: float | None
    guard: float
    free_in: float | None
    may_be_freed: bool
    algorithm: str | None
    key_age: float | None


def views_of(slots: Iterable[Mapping[str, Any]]) -> dict[ConfigId, SlotView]:
    """The views in an answer of the API. Raises KeyError if something else is in it."""
    return {
        ConfigId(slot["config-id"]): SlotView(*(slot[name.replace("_", "-")] for name in SlotView._fields))
        for slot in slots
    }


@dataclass(slots=True)
class _Slot:
    """What is known of one config ID. `slot` is what it stands for, or what it stood for when it was freed by force.

    `busy_at` is what the guard time counts from: the latest packet, or a change after which some may come. None if
    none ever could.
    """

    slot: CidSlot | None = None
    phase: Phase | None = None
    key_file: Path | None = None
    count: int = 0
    seen_at: float | None = None
    busy_at: float | None = None


class Rotation:
    """The config IDs of all services of one balancer.

    It counts what this balancer sees, and no other. At the start every configuration counts as seen just now, since
    nobody knows what came before. `key_age(path)` says how old a key file is, None if that cannot be said.
    """

    def __init__(
        self,
        services: Iterable[ServiceConfig],
        now: float,
        key_age: Callable[[Path], float | None] = lambda _: None,
    ) -> None:
        self._key_age = key_age
        self._observed_at = now
        self._guards: dict[str, float] = {}
        self._services: dict[str, dict[ConfigId, _Slot]] = {}
        self.adopt(services, now)
        for slots in self._services.values():
            for slot in slots.values():
                slot.busy_at = None if slot.slot is None else now

    def observe(self, counts: Mapping[str, Sequence[int]], now: float) -> None:
        """Take note of how many datagrams were routed so far, by service and config ID."""
        for service, counted in counts.items():
            for config_id, slot in self._services.get(service, {}).items():
                if counted[config_id] != slot.count:  # fewer, if a worker was started again
                    slot.count = counted[config_id]
                    slot.seen_at = slot.busy_at = now
        self._observed_at = now

    def adopt(self, services: Iterable[ServiceConfig], now: float) -> None:
        """These are in force from now on, whether or not they were refused."""
        new = {service.service.name: service for service in services}
        for name in self._services.keys() - new.keys():
            self._free(self._services[name], self._guards[name], now)
            if all(slot.slot is None for slot in self._services[name].values()):
                del self._services[name], self._guards[name]
        for name, service in new.items():
            self._guards[name] = service.rotation.guard
            slots = self._services.setdefault(name, {config_id: _Slot() for config_id in CONFIG_IDS})
            configured = {slot.config.config_id: slot for slot in service.service.cid_slots}
            gone = {config_id: slot for config_id, slot in slots.items() if config_id not in configured}
            self._free(gone, service.rotation.guard, now)
            for config_id, cid_slot in configured.items():
                slot, phase = slots[config_id], service.phases.get(config_id, Phase.ACTIVE)
                reset_key = cid_slot.reset_key
                if slot.slot is None or _changed(slot.slot, cid_slot):
                    slot.busy_at = slot.seen_at = None
                    slot.phase = Phase.PREPARED  # as which it begins, at least for a moment
                elif reset_key is None:  # switched off: clients hold the tokens all the same
                    reset_key = slot.slot.reset_key
                if phase is not slot.phase:
                    slot.busy_at = now  # servers may have begun to issue it, or have only now stopped
                slot.slot, slot.phase = CidSlot(cid_slot.config, reset_key), phase
                slot.key_file = service.key_files.get(config_id)

    def refuse(self, services: Sequence[ServiceConfig], now: float) -> list[ConfigError]:
        """Why these may not be the next ones: CIDs that clients hold would come to mean something else.

        A guard time that they bring counts: with `guard: 0s` a config ID is free as soon as it is out of the file.
        """
        return [
            ConfigError(f"services[{i}].cid-configs{where}", message)
            for i, service in enumerate(services)
            for where, message in self._refuse(service, f"services[{i}].rotation.guard", now)
        ]

    def views(self, now: float) -> dict[str, dict[ConfigId, SlotView]]:
        """Every config ID of every service."""
        return {
            name: {config_id: self._view(slot, self._guards[name], now) for config_id, slot in slots.items()}
            for name, slots in self._services.items()
        }

    def _refuse(self, service: ServiceConfig, force: str, now: float) -> Iterator[tuple[str, str]]:
        guard = service.rotation.guard
        slots = self._services.get(service.service.name, {})
        for j, cid_slot in enumerate(service.service.cid_slots):
            config_id = cid_slot.config.config_id
            slot = slots.get(config_id)
            changed = _changed(slot.slot, cid_slot) if slot is not None and slot.slot is not None else []
            if slot is None or not changed:
                continue
            what = f"another {' and '.join(changed)}"
            if slot.phase in (Phase.ACTIVE, Phase.PREPARED):
                yield (
                    f"[{j}]",
                    f"config ID {config_id} is in use and has {what}: "
                    "expected a free config ID for the new configuration",
                )
            elif not self._is_quiet(slot, guard):
                state = "was freed while it was in use" if slot.phase is None else "is retiring"
                yield (
                    f"[{j}]",
                    f"config ID {config_id} {state} and has {what}: it is free {self._when(slot, guard)}",
                )
        kept = {slot.config.config_id for slot in service.service.cid_slots}
        for config_id, slot in slots.items():
            if slot.phase is None or config_id in kept or self._is_quiet(slot, guard):
                continue
            came = (
                f"the latest packet came {now - slot.seen_at:.0f}s ago"
                if slot.seen_at is not None
                else "clients may hold connection IDs of it"
            )
            free = f"it is free {self._when(slot, guard)} if no more come" if slot.phase is not Phase.ACTIVE else ""
            yield (
                "",
                f"nothing for config ID {config_id}, which is {slot.phase} and in use ({came}): "
                f"{free or 'expected it to stay until another one is active and it is quiet'}; "
                f"with {force} 0s it goes all the same, and so do its connections",
            )

    def _free(self, slots: Mapping[ConfigId, _Slot], guard: float, now: float) -> None:
        for slot in slots.values():
            if self._is_quiet(slot, guard):
                slot.slot, slot.busy_at = None, None
            elif slot.phase is not None:
                slot.busy_at = now  # its packets are not counted any more: as if they came until this moment
            slot.phase = slot.key_file = None

    def _is_quiet(self, slot: _Slot, guard: float) -> bool:
        # What came since the counters were last looked at is not known.
        return slot.busy_at is None or self._observed_at - slot.busy_at >= guard

    def _free_in(self, slot: _Slot, guard: float) -> float:
        return 0.0 if slot.busy_at is None else max(guard - (self._observed_at - slot.busy_at), 0.0)

    def _when(self, slot: _Slot, guard: float) -> str:
        return f"in {math.ceil(self._free_in(slot, guard))}s"

    def _view(self, slot: _Slot, guard: float, now: float) -> SlotView:
        is_free = slot.phase is None
        return SlotView(
            phase=FREE if slot.phase is None else str(slot.phase),
            packets=slot.count,
            last_packet=None if slot.seen_at is None else now - slot.seen_at,
            guard=guard,
            free_in=None if slot.phase is Phase.ACTIVE else self._free_in(slot, guard),
            may_be_freed=slot.phase is not Phase.ACTIVE and self._is_quiet(slot, guard),
            algorithm=None if is_free or slot.slot is None else slot.slot.config.algorithm,
            key_age=None if slot.key_file is None else self._key_age(slot.key_file),
        )


def _changed(live: CidSlot, slot: CidSlot) -> list[str]:
    """What CIDs that clients hold depend on and is not as it was, in the words of the file."""
    changed = [
        f.name.replace("_", "-")
        for f in fields(CidConfig)
        # Decoding never looks at the encoded length.
        if f.name != "encodes_length" and getattr(live.config, f.name) != getattr(slot.config, f.name)
    ]
    # Resets may be switched on and off, but tokens that clients hold are made with this key.
    if live.reset_key and slot.reset_key and live.reset_key != slot.reset_key:
        changed.append("reset key")
    return changed
