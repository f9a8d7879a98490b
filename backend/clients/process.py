"""Processes that die with us, whatever becomes of us."""

from __future__ import annotations

import shutil

# Put before a command. Even SIGKILL leaves nothing behind then; util-linux has it, and where it is missing the
# ordinary cleaning up must do.
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
