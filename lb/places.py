"""Where a balancer keeps what should survive its process but not the machine, and where it is found."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lb.address import Address
from lb.config import LbConfig

ADMIN_SOCKET = "admin.sock"
OVERRIDES = "overrides.json"
DOWN = "down.json"


def default_runtime_directory() -> Path:
    """The directory that systemd gave us, root's, or the user's own."""
    given = os.environ.get("RUNTIME_DIRECTORY")  # systemd's
    if given:
        return Path(given.partition(":")[0])
    if os.geteuid() == 0:
        return Path("/run/quiclb")
    user = os.environ.get("XDG_RUNTIME_DIR")
    return Path(user) / "quiclb" if user else Path(tempfile.gettempdir()) / f"quiclb-{os.geteuid()}"


def runtime_directory(config: LbConfig) -> Path:
    """The directory that a configuration names, or the default one."""
    return config.runtime_directory or default_runtime_directory()


def admin_addresses(config: LbConfig) -> tuple[Path | Address, ...]:
    """Where the API is served: paths are those of unix sockets. Empty: nowhere."""
    if config.admin.listen is None:
        return (runtime_directory(config) / ADMIN_SOCKET,)
    return config.admin.listen
