"""A balancer's configuration: what `load_config` makes of its file, and which changes a running process can take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lb.checks import Section, check_engine, check_fleet, check_limits, valid
from lb.cid import CidConfig
from lb.document import Document
from lb.errors import ConfigError
from lb.forward import Attach, Forward
from lb.keys import (
    HealthConfig,
    LbConfig,
    Limits,
    LogConfig,
    Probe,
    ResetConfig,
    ServiceConfig,
    ServiceKeys,
    XdpConfig,
)
from lb.routing import CidSlot
from lb.schema import INVALID, Reading, Record, json_schema, keys_of

__all__ = [
    "Attach",
    "Forward",
    "HealthConfig",
    "LbConfig",
    "Limits",
    "LogConfig",
    "Probe",
    "ResetConfig",
    "ServiceConfig",
    "XdpConfig",
    "load_config",
    "refuse_reload",
    "schema",
]


def load_config(path: Path) -> LbConfig:
    """Read a configuration and the key files it names. Raises ConfigErrors with every mistake in them."""
    document = Document.of_keys(path)
    reading = Reading(document)
    config: LbConfig = Record(LbConfig).read(document.root, "", reading)
    if config is INVALID:
        document.raise_mistakes()
    # As read, `services` are still the keys of the file.
    services: Iterable[ServiceKeys] = config.services  # type: ignore[assignment]
    sections = [Section(keys, f"services[{i}]", reading) for i, keys in valid(services)]
    check_engine(config, document.root if isinstance(document.root, dict) else {}, sections, reading)
    check_limits(config.limits, reading)
    check_fleet(sections, reading)
    document.raise_mistakes()
    return replace(config, services=tuple(section.build() for section in sections))


def refuse_reload(old: LbConfig, new: LbConfig) -> list[ConfigError]:
    """Why a process that runs with `old` cannot go on with `new`; empty if it can.

    Live CIDs must keep their meaning: a config ID that carries other keys or lengths takes a rotation
    (section 3.1 of the draft), which needs a config ID that is free.
    """
    refused: list[ConfigError] = []
    _refuse_restart(old, new, "", refused)
    for i, service in enumerate(new.services):
        before = next((s.service for s in old.services if s.service.name == service.service.name), None)
        slots = {slot.config.config_id: slot for slot in before.cid_slots} if before else {}
        for j, slot in enumerate(service.service.cid_slots):
            live = slots.get(slot.config.config_id)
            changed = _changed_in_slot(live, slot) if live else []
            if changed:
                path = f"services[{i}].cid-configs[{j}]"
                message = (
                    f"config ID {slot.config.config_id} is in use and has another {' and '.join(changed)}: "
                    "expected a free config ID for the new configuration"
                )
                refused.append(ConfigError(path, message))
    return refused


def schema() -> str:
    """The JSON Schema of the file that `load_config` reads."""
    return json_schema(LbConfig, "The configuration of a quiclb balancer")


def _changed_in_slot(live: CidSlot, slot: CidSlot) -> list[str]:
    changed = [
        f.name.replace("_", "-")
        for f in fields(CidConfig)
        if f.name != "encodes_length" and getattr(live.config, f.name) != getattr(slot.config, f.name)
    ]
    # Resets may be switched on and off, but tokens that clients hold are made with this key.
    if live.reset_key and slot.reset_key and live.reset_key != slot.reset_key:
        changed.append("reset key")
    return changed


def _refuse_restart(old: Any, new: Any, path: str, refused: list[ConfigError]) -> None:
    for name, (field_name, entry) in keys_of(type(new)).items():
        before, after = getattr(old, field_name), getattr(new, field_name)
        where = f"{path}.{name}" if path else name
        if isinstance(entry.kind, Record):
            _refuse_restart(before, after, where, refused)
        elif entry.restart and before != after:
            was, wants = ("nothing" if v is None else entry.kind.to_json(v) for v in (before, after))
            refused.append(ConfigError(where, f"{wants}: this process runs with {was}; a restart changes it"))
