"""Where the processes of a stage run, and by which addresses they find each other: here on loopback."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lb.address import Address

# Ours.
LOWEST_PORT = 10_000


class StageError(Exception):
    """Something of the stage cannot be, or did not do what it is there for; says what, and its last words."""


@dataclass(frozen=True, slots=True)
class Front:
    """Where a balancer is. `keys` are those of its file that depend on the place."""

    listen: tuple[Address, ...]
    admin: Address
    keys: Mapping[str, Any] = field(default_factory=dict)


class Place(Protocol):
    """Clients are processes and sockets of whoever set the stage; `clients` are two addresses that they may have.

    With `splits_families`, IPv4 and IPv6 have to be services of their own.
    """

    clients: tuple[str, str]
    splits_families: bool

    def entering(self, machine: str) -> tuple[str, ...]:
        """What to put before a command that is to run where a balancer or a backend is, or `client`."""

    def inside(self, machine: str) -> AbstractContextManager[None]:
        """Have this thread's sockets there, for as long as the block takes."""

    def listens(self, backend: str) -> tuple[Address, ...]:
        """Where a backend listens, with port 0 for any; balancers know it by the first of a family, or of all."""

    def front(self, balancer: str) -> Front: ...

    def preparation(self, backend: str) -> tuple[str, ...]:
        """The module and arguments of what has to be done where a backend is before it starts; empty if nothing."""

    def rerouted(self, balancer: str) -> AbstractContextManager[bool]:
        """Have the network send all clients' packets to another balancer. False if this network cannot."""


class Loopback:
    """One machine, and every process has its own port."""

    clients = ("127.0.0.1", "127.0.0.2")
    splits_families = False

    def __init__(self, host: str, backends: Sequence[str], keys: Mapping[str, Any]) -> None:
        self._host = host
        self._backends = backends
        self._keys = keys

    def entering(self, machine: str) -> tuple[str, ...]:
        return ()

    def inside(self, machine: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def listens(self, backend: str) -> tuple[Address, ...]:
        # The last one has an IPv6 address: what family a client has is not its backend's concern.
        return (Address("::1" if has_ipv6() and backend == self._backends[-1] else "127.0.0.1", 0),)

    def front(self, balancer: str) -> Front:
        port, admin_port = free_ports(2)
        listen = [Address(self._host, port)] + ([Address("::1", port)] if has_ipv6() else [])
        return Front(tuple(listen), Address("127.0.0.1", admin_port), self._keys)

    def preparation(self, backend: str) -> tuple[str, ...]:
        return ()

    @contextlib.contextmanager
    def rerouted(self, balancer: str) -> Iterator[bool]:
        yield False


def has_ipv6() -> bool:
    """Whether ::1 is there."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses on loopback, by UDP or TCP, and that the kernel gives to nobody who does not ask.

    Outside its range of ephemeral ports no client can take one away while a balancer is being restarted.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(LOWEST_PORT, max(low, LOWEST_PORT + 1000)))
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise StageError(f"fewer than {count} ports free on loopback")


def _is_free(port: int) -> bool:
    families = [(socket.AF_INET, "127.0.0.1")] + ([(socket.AF_INET6, "::1")] if has_ipv6() else [])
    try:
        for family, host in families:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                with socket.socket(family, kind) as sock:
                    sock.bind((host, port))
    except OSError:
        return False
    return True
