"""Two network namespaces with a cable between them: clients and backends on one side, the balancer on the other.

Nothing in it reaches the machine's own network, and nothing of it stays.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType

BALANCER = "10.77.0.2"
PORT = 4433
FIRST_CLIENT = IPv4Address("10.78.0.1")
FIRST_BACKEND = IPv4Address("10.79.0.1")
BACKENDS = 16

_LOAD = "10.77.0.1"

_NAMESPACES = Path("/run/netns")  # where ip-netns(8) keeps them
_CLONE_NEWNET = 0x40000000  # linux/sched.h

_LOAD_SIDE = "02:00:00:00:77:01"
_BALANCER_SIDE = "02:00:00:00:77:02"


class Network:
    """A context manager. `load` and `balancer` are the namespaces' names; the numbers in them are this process's."""

    def __init__(self) -> None:
        self.load = f"quiclb-bench-{os.getpid()}-load"
        self.balancer = f"quiclb-bench-{os.getpid()}-balancer"

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def command(self, namespace: str, core: int, command: Sequence[str]) -> list[str]:
        """The command that runs `command` in a namespace on a core. All of it is one process: each part execs."""
        return ["ip", "netns", "exec", namespace, "taskset", "-c", str(core), *command]

    def _build(self) -> None:
        for namespace in (self.load, self.balancer):
            _ip("netns", "add", namespace)
        _ip(
            *("link", "add", "eth0", "netns", self.load, "address", _LOAD_SIDE, "type", "veth"),
            *("peer", "name", "eth0", "netns", self.balancer, "address", _BALANCER_SIDE),
        )
        # Clients and backends are two prefixes as a whole: an address of its own for every flow, if need be.
        # Neighbours are known beforehand: a packet lost to address resolution is not the balancer's loss.
        self._batch(
            self.load,
            "link set lo up",
            "link set eth0 up",
            f"address add {_LOAD}/24 dev eth0",
            "route add local 10.78.0.0/16 dev lo",
            "route add local 10.79.0.0/16 dev lo",
            f"neighbour add {BALANCER} lladdr {_BALANCER_SIDE} dev eth0 nud permanent",
        )
        self._batch(
            self.balancer,
            "link set lo up",
            "link set eth0 up",
            f"address add {BALANCER}/24 dev eth0",
            f"route add 10.78.0.0/15 via {_LOAD}",
            f"neighbour add {_LOAD} lladdr {_LOAD_SIDE} dev eth0 nud permanent",
        )

    def _batch(self, namespace: str, *lines: str) -> None:
        _ip("-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")

    def _remove(self) -> None:
        for namespace in (self.load, self.balancer):
            subprocess.run(["ip", "netns", "delete", namespace], stderr=subprocess.DEVNULL, check=False)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a namespace: the interfaces that it names are those there."""
    with open("/proc/thread-self/ns/net") as before, open(_NAMESPACES / namespace) as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ip(*arguments: str, stdin: str = "") -> None:
    subprocess.run(["ip", *arguments], input=stdin, text=True, check=True)
