"""Network namespaces: addresses, routes and interfaces that can be changed, and nothing of the machine's own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h
HOME = Path("/run/netns")  # where ip-netns(8) keeps them
IP = shutil.which("ip") or "/usr/sbin/ip"

_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
def missing() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path(IP).exists():
        return "ip is not installed (Debian: apt-get install iproute2)"
    name = f"quiclb-test-{os.getpid()}"
    if subprocess.run([IP, "netns", "add", name], capture_output=True, check=False).returncode:
        return "may not create a network namespace"
    subprocess.run([IP, "netns", "delete", name], check=True)
    return None


@contextlib.contextmanager
def namespaces(*names: str) -> Iterator[None]:
    """Namespaces of these names, each with a loopback interface; gone after the block."""
    try:
        for name in names:
            subprocess.run([IP, "netns", "add", name], check=True)
            ip(name, "link set lo up")
        yield
    finally:
        for name in names:
            subprocess.run([IP, "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def ip(namespace: str, *commands: str) -> None:
    """Run ip(8) commands in a namespace, all of them in one batch."""
    subprocess.run([IP, "-n", namespace, "-batch", "-"], input="\n".join(commands) + "\n", text=True, check=True)


def sysctl(namespace: str, values: Mapping[str, int]) -> None:
    """Set parameters of a namespace's network stack; `ipv4.ip_forward` is net.ipv4.ip_forward."""
    with inside(namespace):
        for name, value in values.items():
            Path("/proc/sys/net", *name.split(".")).write_text(str(value))


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Sockets that this thread opens in the block, and processes and threads that it starts, are in a namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        with open(HOME / namespace) as entered:
            _enter(entered.fileno())
        try:
            yield
        finally:
            _enter(before)
    finally:
        os.close(before)


def entering(namespace: str) -> tuple[str, ...]:
    """What to put before a command so that it runs in a namespace: with the mounts that we have, unlike ip-netns(8)."""
    return ("nsenter", f"--net={HOME / namespace}", "--")


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
