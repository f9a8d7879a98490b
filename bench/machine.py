"""The machine that the figures are of, and the clocks that they are read from."""

from __future__ import annotations

import gzip
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BUILD = Path(__file__).parent / "build"
RESULTS = Path(__file__).parent / "results"

TOOLS = ("gcc", "ip", "prlimit", "taskset", "unshare")

BALANCER_CORE = 1
LOAD_CORE = 0

_TICKS = os.sysconf("SC_CLK_TCK")
_KIB = 1024


class Clocks(NamedTuple):
    """Seconds of CPU time that one core and one balancer have used so far."""

    core: float  # everything that ran on the balancer's core, interrupts included, from an arbitrary start
    balancer: float  # its processes, and ksoftirqd of that core

    @classmethod
    def read(cls, pids: list[int]) -> Clocks:
        return cls(_core_seconds(BALANCER_CORE), sum(map(cpu_seconds, [*pids, *_ksoftirqd(BALANCER_CORE)])))

    def __sub__(self, earlier: object) -> Clocks:
        if not isinstance(earlier, Clocks):
            return NotImplemented
        return Clocks(self.core - earlier.core, self.balancer - earlier.balancer)

    def figure(self) -> float:
        """The one to divide by packets.

        A process's own time is exact and blind to the neighbours. It holds the softirqs that ran inside it, unless
        the kernel keeps a separate account of them; then only the whole core's time has everything.
        """
        return self.core if softirqs_are_apart() else self.balancer


def describe() -> dict[str, str]:
    """What a reader needs to compare another machine with."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory} GiB",
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "softirqs": "accounted apart" if softirqs_are_apart() else "accounted to the process they interrupt",
    }


def obstacle() -> str | None:
    """Why network namespaces and pinned cores cannot be had here; None if they can."""
    if os.geteuid() != 0:
        return "it needs root, for network namespaces"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"it needs {', '.join(missing)}"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "this machine, or container, does not let root make network namespaces"
    if not {LOAD_CORE, BALANCER_CORE} <= os.sched_getaffinity(0):
        return f"it needs cores {LOAD_CORE} and {BALANCER_CORE}: one for the balancer, one for the load"
    return None


def descendants(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    parents = {int(p.name): _parent(p) for p in _processes()}
    family = [pid]
    for member in family:  # grows while it runs
        family += [child for child, parent in parents.items() if parent == member]
    return family


def memory_of(pids: list[int]) -> dict[str, int]:
    """Octets of memory in use: `anonymous` and `file` sum to `total`; pages shared among them count once.

    Raises ProcessLookupError or FileNotFoundError if one of them has ended.
    """
    sums = {"Pss": 0, "Pss_Anon": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in sums:
                sums[name] += int(value.split()[0]) * _KIB
    return {"total": sums["Pss"], "anonymous": sums["Pss_Anon"], "file": sums["Pss"] - sums["Pss_Anon"]}


def kernel_slab() -> int:
    """Octets that the kernel holds in its own structures, sockets among them; of the whole machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return int(line.split()[1]) * _KIB
    raise LookupError("/proc/meminfo has no Slab line")


def softirqs_are_apart() -> bool:
    """Whether the kernel leaves softirqs out of the time of the process that they interrupt.

    A kernel that does not tell its configuration is taken to: then the whole core is measured.
    """
    try:
        text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except OSError:
        try:
            text = Path(f"/boot/config-{platform.release()}").read_text()
        except OSError:
            return True
    return "CONFIG_IRQ_TIME_ACCOUNTING=y" in text


def _core_seconds(core: int) -> float:
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            _user, _nice, _system, idle, iowait, _irq, _softirq, steal = map(int, ticks[:8])
            # Idle time is measured where busy time is sampled 250 times a second: what is not idle is busy.
            return time.monotonic() - (idle + iowait + steal) / _TICKS
    raise LookupError(f"/proc/stat has no core {core}")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far."""
    # schedstat is in nanoseconds; stat's own times are whole ticks.
    return sum(int(p.read_text().split()[0]) for p in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _ksoftirqd(core: int) -> list[int]:
    return [int(p.name) for p in _processes() if _read(p / "comm").strip() == f"ksoftirqd/{core}"]


def _processes() -> Iterator[Path]:
    return (p for p in Path("/proc").iterdir() if p.name.isdigit())


def _parent(process: Path) -> int:
    # The name, in parentheses, may hold anything; the parent is the second field after it.
    fields = _read(process / "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""


def _processor() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
