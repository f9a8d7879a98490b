"""What a process keeps for the next one in small files: the operator's changes, and who was DOWN."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from lb.files import write_file
from lb.log import event
from lb.overrides import Overrides

MAX_FILE = 4 << 20  # octets

T = TypeVar("T")

logger = logging.getLogger(__name__)

Place = tuple[str, str, str]  # a backend: service, name and address


def read_overrides(path: Path) -> Overrides:
    """The operator's changes; nothing, and a word in the log, if they cannot be read."""
    return _read(path, Overrides.from_json, Overrides())


def write_overrides(path: Path, overrides: Overrides) -> None:
    """Replace the file whole. Raises OSError, and then the old one is still there."""
    _write(path, overrides.to_json())


def read_down(path: Path) -> frozenset[Place]:
    """Who was DOWN when that was written last; nobody, and a word in the log, if it cannot be read."""
    return _read(path, _places, frozenset())


def write_down(path: Path, down: Iterable[Place]) -> None:
    """As `write_overrides`."""
    _write(path, sorted(down))


def _places(value: Any) -> frozenset[Place]:
    found = set()
    for place in value if isinstance(value, list) else [None]:
        match place:
            case [str(service), str(backend), str(address)]:
                found.add((service, backend, address))
            case _:
                raise ValueError("not a list of backends")
    return frozenset(found)


def _read(path: Path, parse: Callable[[Any], T], nothing: T) -> T:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return parse(json.loads(file.read(MAX_FILE + 1)))
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        event(logger, logging.WARNING, "runtime-file-ignored", file=path, reason=reason)
        return nothing


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    try:
        write_file(new, json.dumps(value, indent=1).encode(), mode=0o600)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
