"""`python -m tests.deploy.confined UNIT… -- COMMAND…`: run a command with the powers that unit files leave to it.

Capabilities, system calls, address families, memory protection, umask and descriptors; by setpriv and libseccomp.
Not the view of the file system. The user stays, who is root without its capabilities.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import sys
from pathlib import Path

from tests.deploy import units

# <seccomp.h>
ALLOW = 0x7FFF0000
REFUSE = 0x00050000  # | errno
MASKED_EQUAL, EQUAL = 7, 4
NO_SUCH_CALL = -1

# <sys/mman.h>, <sys/socket.h>
PROT_WRITE, PROT_EXEC = 2, 4
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
MAX_FAMILY = 64

LIBRARY = "libseccomp.so.2"


class Comparison(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    ]


class Filter:
    """A seccomp filter. What no rule is about meets `default`."""

    def __init__(self, default: int) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._library.seccomp_rule_add_array.argtypes = (
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.POINTER(Comparison),
        )
        self._library.seccomp_load.argtypes = (ctypes.c_void_p,)
        self._context = self._library.seccomp_init(ctypes.c_uint32(default))

    def add(self, action: int, name: str, *comparisons: Comparison) -> None:
        """Nothing happens for a call that this architecture does not have."""
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number <= NO_SUCH_CALL:
            return
        array = (Comparison * max(1, len(comparisons)))(*comparisons)
        status = self._library.seccomp_rule_add_array(self._context, action, number, len(comparisons), array)
        if status:
            raise OSError(-status, f"{name}: {os.strerror(-status)}")

    def load(self) -> None:
        status = self._library.seccomp_load(self._context)
        if status:
            raise OSError(-status, os.strerror(-status))


def missing() -> str | None:
    """Why commands cannot be confined here; None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("setpriv") is None:
        return "no setpriv: install util-linux"
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return "no libseccomp.so.2: install libseccomp2"
    return units.missing()


def command(*paths: Path) -> list[str]:
    """What to put before a command."""
    bounding = [f"+{name.lower().removeprefix('cap_')}" for name in units.words(*paths, of="CapabilityBoundingSet")]
    kept = ",".join(["-all", *bounding])
    powers = ["setpriv", "--no-new-privs", "--inh-caps", "-all", "--bounding-set", kept]
    return [*powers, sys.executable, "-m", "tests.deploy.confined", *map(str, paths), "--"]


def main(arguments: list[str]) -> None:
    split = arguments.index("--")
    paths, program = [Path(path) for path in arguments[:split]], arguments[split + 1 :]
    found = units.settings(*paths)
    os.umask(int(found["UMask"][-1], 8))
    descriptors = min(int(found["LimitNOFILE"][-1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    calls = Filter(REFUSE | errno.EPERM)
    for name in sorted(units.system_calls(*paths)):
        calls.add(ALLOW, name)
    rest = Filter(ALLOW)
    allowed = {FAMILIES[name] for name in units.words(*paths, of="RestrictAddressFamilies")}
    for family in set(range(MAX_FAMILY)) - allowed:
        rest.add(REFUSE | errno.EAFNOSUPPORT, "socket", Comparison(0, EQUAL, family, 0))
    if found["MemoryDenyWriteExecute"] == ["yes"]:
        both = PROT_WRITE | PROT_EXEC
        rest.add(REFUSE | errno.EPERM, "mmap", Comparison(2, MASKED_EQUAL, both, both))
        rest.add(REFUSE | errno.EPERM, "mprotect", Comparison(2, MASKED_EQUAL, PROT_EXEC, PROT_EXEC))
        rest.add(REFUSE | errno.EPERM, "pkey_mprotect", Comparison(2, MASKED_EQUAL, PROT_EXEC, PROT_EXEC))
    if found["RestrictNamespaces"] == ["yes"]:
        rest.add(REFUSE | errno.ENOSYS, "clone3")
        for name in ("unshare", "setns"):
            rest.add(REFUSE | errno.EPERM, name)
    rest.load()
    calls.load()
    os.execvp(program[0], program)  # noqa: S606 - that is what it is for


if __name__ == "__main__":
    main(sys.argv[1:])
