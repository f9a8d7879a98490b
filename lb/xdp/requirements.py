"""What a machine must have before the engine can start on it; each thing that it lacks is said at once."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from lb.forward import Forward
from lb.xdp.attachment import BPF_FILE_SYSTEM, in_bpf_file_system
from lb.xdp.interface import Interface, read_interface
from lb.xdp.libbpf import LIBRARY, ProgramInfo, has_library, supports_program
from lb.xdp.netlink import Netlink
from lb.xdp.plane import XdpSettings
from lb.xdp.program import OBJECT, load_program

KERNEL = (5, 18)  # the first with fragmented frames in XDP

# linux/capability.h
_CAPABILITIES = {12: "CAP_NET_ADMIN", 39: "CAP_BPF", 21: "CAP_SYS_ADMIN"}


def missing(settings: XdpSettings, hosts: Iterable[str]) -> list[str]:
    """What this machine lacks; empty if the engine can be started. In the calling thread's network namespace.

    `hosts` are the addresses of all backends.
    """
    return list(_missing(settings, {":" in host for host in hosts}))


def load(settings: XdpSettings) -> ProgramInfo:
    """Have the kernel's verifier look at the program as it would be loaded, and let go of it. Raises OSError."""
    with Netlink() as netlink:
        interface = read_interface(settings.interface, netlink)
    with contextlib.closing(load_program(settings.of_program(interface, os.urandom))) as loaded:
        return loaded.program.info


def _missing(settings: XdpSettings, families: Collection[bool]) -> Iterator[str]:
    release = os.uname().release
    if _version(release) < KERNEL:
        yield f"Linux {release}: expected {KERNEL[0]}.{KERNEL[1]} or newer"
    lacking = [name for number, name in _CAPABILITIES.items() if not _effective() >> number & 1]
    if lacking:
        yield f"no {', '.join(lacking)}: run as root, or give the process these capabilities"
    if not has_library():
        yield f"{LIBRARY} is not installed (Debian: apt-get install libbpf1)"
    elif not lacking and not supports_program():
        yield "the kernel takes no XDP programs from this process"
    if not OBJECT.exists():
        yield f"{OBJECT} is not there: make build compiles it, and wheels carry it"
    if not lacking and not _has_bpf_file_system(settings.pin_directory):
        yield f"{settings.pin_directory} is not in a BPF file system: mount -t bpf bpf {BPF_FILE_SYSTEM}"
    try:
        with Netlink() as netlink:
            interface = read_interface(settings.interface, netlink)
    except OSError as error:
        yield str(error.strerror)
        return
    yield from _missing_of(interface, settings, families)


def _missing_of(interface: Interface, settings: XdpSettings, families: Collection[bool]) -> Iterator[str]:
    """`families` are those of backends, by whether they are IPv6."""
    name = interface.name
    if not interface.is_ethernet:
        yield f"{name} has no MAC address: expected an Ethernet interface"
    if not interface.is_up:
        yield f"{name} is down: ip link set {name} up"
    for host in settings.source if settings.forward is Forward.NAT else ():
        if host not in interface.addresses:
            yield f"{host} is not an address of {name}, and answers of backends would not come back to it"
    for is_ipv6 in sorted(families):
        family = "IPv6" if is_ipv6 else "IPv4"
        if settings.forward in (Forward.NAT, Forward.IPIP, Forward.GUE) and is_ipv6 not in settings.sources(interface):
            yield f"{name} has no {family} address to send to backends from: expected one, or one in xdp.source"
        if settings.forward is Forward.DNAT:
            forwarding = Path(f"/proc/sys/net/{family.lower()}/conf/{name}/forwarding")
            if forwarding.exists() and forwarding.read_text().strip() == "0":
                yield (
                    f"net.{family.lower()}.conf.{name}.forwarding is 0: expected 1, with dnat the balancer is its "
                    "backends' router"
                )


def _has_bpf_file_system(directory: Path) -> bool:
    """Whether there is one, or one can be made where the system expects it."""
    if in_bpf_file_system(directory):
        return True
    return directory.is_relative_to(BPF_FILE_SYSTEM) and BPF_FILE_SYSTEM.is_dir()


def _effective() -> int:
    """The capabilities of this process, a bit each."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 16) if found else 0


def _version(release: str) -> tuple[int, ...]:
    """`6.1.0-12-amd64` to (6, 1)."""
    return tuple(map(int, re.findall(r"\d+", release)[:2]))
