"""A place for the xdp engine: clients, balancers and backends on one switch, each in a network namespace of its own.

Clients send to an address that no machine on the switch answers for. A route takes it to a balancer; backends that
answer directly have it on their loopback interface.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.demo import namespaces
from backend.demo.place import Front, StageError
from lb.address import Address
from lb.forward import Forward
from lb.xdp.abi import check, libbpf

# Ours.
VIP, VIP_V6 = "10.99.0.1", "fd99::1"
PORT, ADMIN_PORT = 443, 9100
INTERFACE, MTU = "e0", 1500  # of every machine
CLIENT, BALANCERS, BACKENDS = 2, 11, 21  # host numbers: of the client, of the first balancer and the first backend
CLIENTS, SERVERS = "10.78.0", "10.77.0"  # networks: a backend that would have to answer by the balancer must not see
CLIENTS_V6, SERVERS_V6 = "fd78:", "fd77:"  # the client on its own

# Whatever comes by any interface is taken; addresses are there at once, and said to be there when they move; a backend
# that has the clients' address too does not say so.
_SYSCTLS = {
    "ipv4.conf.all.rp_filter": 0,
    "ipv4.conf.default.rp_filter": 0,
    "ipv4.conf.all.send_redirects": 0,
    "ipv4.conf.default.send_redirects": 0,
    "ipv4.conf.all.arp_ignore": 1,
    "ipv4.conf.all.arp_announce": 2,
    "ipv4.conf.default.arp_notify": 1,
    "ipv6.conf.default.accept_dad": 0,
    "ipv6.conf.default.accept_ra": 0,
    "ipv6.conf.default.ndisc_notify": 1,
}
_FORWARDING = {"ipv4.ip_forward": 1, "ipv6.conf.all.forwarding": 1}

# linux/bpf.h, linux/if_link.h
_BPF_PROG_TYPE_XDP = 6
_XDP_FLAGS_DRV_MODE = 1 << 2
_RETURN_XDP_PASS = bytes.fromhex("b7000000020000009500000000000000")  # r0 = XDP_PASS; exit

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Xdp:
    """How a stage uses the xdp engine: the keys `forward` and `xdp.attach`."""

    forward: Forward = Forward.NAT
    attach: str = "auto"


def missing() -> str | None:
    """Why there can be no such place here; None if there can."""
    for program, package in (("ethtool", "ethtool"), ("nsenter", "util-linux"), ("mount", "mount")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt-get install {package})"
    return namespaces.missing()


@contextlib.contextmanager
def lan(xdp: Xdp, directory: Path, balancers: Sequence[str], backends: Sequence[str]) -> Iterator[Lan]:
    """The place, and this thread is where the clients are. Raises StageError."""
    if reason := missing():
        raise StageError(f"the xdp engine's stage cannot be set: {reason}")
    with contextlib.ExitStack() as built:
        made = Lan(xdp, directory, balancers, backends)
        built.enter_context(namespaces.namespaces(*made.names))
        made.wire()
        built.enter_context(_bpf_file_system(made.pins))
        built.enter_context(made.inside("client"))
        yield made


class Lan:
    """The switch and who is on it; `clients` are two IPv4 addresses of the client, which has two IPv6 ones as well."""

    clients = (f"{CLIENTS}.{CLIENT}", f"{CLIENTS}.{CLIENT + 1}")

    def __init__(self, xdp: Xdp, directory: Path, balancers: Sequence[str], backends: Sequence[str]) -> None:
        self.xdp = xdp
        self.pins = directory / "bpf"
        self.splits_families = xdp.forward is Forward.DNAT
        self._balancers = {name: number for number, name in enumerate(balancers, BALANCERS)}
        self._backends = {name: number for number, name in enumerate(backends, BACKENDS)}
        self._numbers = {"client": CLIENT, **self._balancers, **self._backends}
        self._prefix = f"quiclb-demo-{os.getpid()}-{next(_numbers)}"

    @property
    def names(self) -> list[str]:
        """Of all namespaces."""
        return [self.namespace(machine) for machine in ("switch", *self._numbers)]

    def namespace(self, machine: str) -> str:
        return f"{self._prefix}-{machine}"

    def wire(self) -> None:
        """Plug everybody in, and give them addresses and routes."""
        ports = [
            (
                f"link add p-{machine} type veth peer name {INTERFACE} netns {self.namespace(machine)} "
                f"address {self.mac(machine)} mtu {MTU}",
                f"link set p-{machine} master bridge up",
            )
            for machine in self._numbers
        ]
        for machine in self._numbers:
            namespaces.sysctl(self.namespace(machine), _SYSCTLS)
        namespaces.ip(
            self.namespace("switch"),
            "link add bridge type bridge mcast_snooping 0",
            "link set bridge up",
            *itertools.chain.from_iterable(ports),
        )
        for machine, number in self._numbers.items():
            namespaces.ip(
                self.namespace(machine),
                f"link set {INTERFACE} up",
                *self._addresses(machine, number),
                *self._routes(machine),
            )
            with self.inside(machine):
                # A checksum that is left to a driver that does not compute it would be wrong where XDP sees it.
                subprocess.run(["ethtool", "-K", INTERFACE, "tx", "off"], stdout=subprocess.DEVNULL, check=True)
        for balancer in self._balancers:
            if self.splits_families:
                namespaces.sysctl(self.namespace(balancer), _FORWARDING)
            with self.inside("switch"):
                _let_pass(f"p-{balancer}")
        self._route_to(next(iter(self._balancers)))

    def address(self, machine: str) -> str:
        """Its IPv4 address among the servers."""
        return f"{SERVERS}.{self._numbers[machine]}"

    def address_v6(self, machine: str) -> str:
        return f"{SERVERS_V6}:{self._numbers[machine]}"

    def mac(self, machine: str) -> str:
        return f"02:00:00:00:00:{self._numbers[machine]:02x}"

    def entering(self, machine: str) -> tuple[str, ...]:
        return namespaces.entering(self.namespace(machine))

    def inside(self, machine: str) -> AbstractContextManager[None]:
        return namespaces.inside(self.namespace(machine))

    def listens(self, backend: str) -> tuple[Address, ...]:
        hosts = [self.address(backend), self.address_v6(backend)]
        # The last one has an IPv6 address: what family a client has is not its backend's concern.
        if backend == list(self._backends)[-1] and not self.splits_families:
            hosts.reverse()
        if self.xdp.forward is Forward.NAT:
            del hosts[1:]
        elif self.xdp.forward.returns_directly:
            hosts += [VIP, VIP_V6]
        return tuple(Address(host, PORT) for host in hosts)

    def front(self, balancer: str) -> Front:
        keys: Mapping[str, Any] = {
            "engine": "xdp",
            "interface": INTERFACE,
            "forward": self.xdp.forward.name.lower(),
            "xdp": {
                "attach": self.xdp.attach,
                "pin-directory": str(self.pins / balancer),
                "source": [self.address(balancer), self.address_v6(balancer)],
            },
        }
        return Front((Address(VIP, PORT), Address(VIP_V6, PORT)), Address("127.0.0.1", ADMIN_PORT), keys)

    def preparation(self, backend: str) -> tuple[str, ...]:
        if self.xdp.forward in (Forward.IPIP, Forward.GUE):
            return ("lb", "decap", "--interface", INTERFACE, "--pin-directory", str(self.pins / backend))
        return ()

    @contextlib.contextmanager
    def rerouted(self, balancer: str) -> Iterator[bool]:
        self._route_to(balancer)
        try:
            yield True
        finally:
            self._route_to(next(iter(self._balancers)))

    def _route_to(self, balancer: str) -> None:
        number = self._balancers[balancer]
        namespaces.ip(
            self.namespace("client"),
            f"route replace {VIP} via {CLIENTS}.{number} dev {INTERFACE} src {CLIENTS}.{CLIENT}",
            f"route replace {VIP_V6} via {CLIENTS_V6}:{number} dev {INTERFACE} src {CLIENTS_V6}:{CLIENT}",
        )

    def _addresses(self, machine: str, number: int) -> list[str]:
        hosts = [f"{SERVERS}.{number}/24", f"{SERVERS_V6}:{number}/64"]
        if machine == "client":
            hosts = [f"{CLIENTS}.{n}/24" for n in (number, number + 1)]
            hosts += [f"{CLIENTS_V6}:{n}/64" for n in (number, number + 1)]
        elif machine in self._balancers:
            hosts += [f"{CLIENTS}.{number}/24", f"{CLIENTS_V6}:{number}/64"]
        added = [f"address add {host} dev {INTERFACE}" for host in hosts]
        if machine in self._backends and self.xdp.forward.returns_directly:
            added += [f"address add {host} dev lo" for host in (VIP, VIP_V6)]
        return added

    def _routes(self, machine: str) -> list[str]:
        if machine == "client":
            return [f"route add {SERVERS}.0/24 dev {INTERFACE}", f"route add {SERVERS_V6}:/64 dev {INTERFACE}"]
        if machine in self._balancers:
            return []
        if not self.splits_families:
            return [f"route add {CLIENTS}.0/24 dev {INTERFACE}", f"route add {CLIENTS_V6}:/64 dev {INTERFACE}"]
        first = next(iter(self._balancers.values()))
        return [
            f"route add {CLIENTS}.0/24 via {SERVERS}.{first}",
            f"route add {CLIENTS_V6}:/64 via {SERVERS_V6}:{first}",
        ]


def _let_pass(interface: str) -> None:
    """Put a program there that lets everything pass: only then does veth take what its peer sends by XDP_TX."""
    library = libbpf()
    load, attach = library.bpf_prog_load, library.bpf_xdp_attach
    load.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p)
    attach.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
    instructions = len(_RETURN_XDP_PASS) // 8
    program = check(
        load(_BPF_PROG_TYPE_XDP, b"pass", b"GPL", _RETURN_XDP_PASS, instructions, None), "cannot load a program"
    )
    try:
        index = socket.if_nametoindex(interface)
        check(attach(index, program, _XDP_FLAGS_DRV_MODE, None), f"cannot attach to {interface}")
    finally:
        os.close(program)


@contextlib.contextmanager
def _bpf_file_system(at: Path) -> Iterator[None]:
    """One of our own: what is pinned there goes with it."""
    at.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)
