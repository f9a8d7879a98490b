"""A balancer's configuration: what `load_config` makes of its file, and which changes a running process can take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lb.checks import Section, check_admin, check_engine, check_fleet, check_limits, valid
from lb.document import Document
from lb.errors import ConfigError
from lb.forward import Attach, Forward
from lb.keys import (
    AdminConfig,
    HealthConfig,
    Http3Config,
    LbConfig,
    Limits,
    LogConfig,
    Phase,
    Probe,
    ResetConfig,
    RotationConfig,
    ServiceConfig,
    ServiceKeys,
    XdpConfig,
)
from lb.schema import INVALID, Reading, Record, json_schema, keys_of

__all__ = [
    "AdminConfig",
    "Attach",
    "Forward",
    "HealthConfig",
    "Http3Config",
    "LbConfig",
    "Limits",
    "LogConfig",
    "Phase",
    "Probe",
    "ResetConfig",
    "RotationConfig",
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
    check_admin(config.admin, config.metrics, reading)
    check_limits(config.limits, reading)
    check_fleet(sections, reading)
    document.raise_mistakes()
    return replace(config, services=tuple(section.build() for section in sections))


def refuse_reload(old: LbConfig, new: LbConfig) -> list[ConfigError]:
    """Why a process that runs with `old` cannot go on with `new`, whatever it has seen; empty if it can.

    What packets have to say about it is for `rotation.py`.
    """
    refused: list[ConfigError] = []
    _refuse_restart(old, new, "", refused)
    return refused


def schema() -> str:
    """The JSON Schema of the file that `load_config` reads."""
    return json_schema(LbConfig, "The configuration of a quiclb balancer")


def _refuse_restart(old: Any, new: Any, path: str, refused: list[ConfigError]) -> None:
    for name, (field_name, entry) in keys_of(type(new)).items():
        before, after = getattr(old, field_name), getattr(new, field_name)
        where = f"{path}.{name}" if path else name
        if isinstance(entry.kind, Record):
            _refuse_restart(before, after, where, refused)
        elif entry.restart and before != after:
            was, wants = ("nothing" if v is None else entry.kind.to_json(v) for v in (before, after))
            refused.append(ConfigError(where, f"{wants}: this process runs with {was}; a restart changes it"))
