"""The file that keeps the operator's changes for the next process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

from lb.files import write_file
from lb.log import event
from lb.overrides import Overrides

MAX_FILE = 4 << 20  # octets

logger = logging.getLogger(__name__)


def read_overrides(path: Path) -> Overrides:
    """What was kept; nothing, and a word in the log, if it cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            octets = file.read(MAX_FILE + 1)
        return Overrides.from_json(json.loads(octets))
    except FileNotFoundError:
        return Overrides()
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        event(logger, logging.WARNING, "overrides-ignored", file=path, reason=reason)
        return Overrides()


def write_overrides(path: Path, overrides: Overrides) -> None:
    """Replace the file whole. Raises OSError, and then the old one is still there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    try:
        write_file(new, json.dumps(overrides.to_json(), indent=1).encode(), mode=0o600)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
