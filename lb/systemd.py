"""What a service manager is told, and what it gives us: sd_notify(3), sd_listen_fds(3) and its store of descriptors.

Without such a manager all of this does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
MAX_DESCRIPTORS = 1 << 16


def notify(*assignments: str, descriptors: Sequence[int] = ()) -> None:
    """Tell the manager, in one message. Never raises: whoever does not listen misses it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # Linux: an abstract address
        address = "\0" + address[1:]
    message = "\n".join(assignments).encode()
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)  # a manager that does not read must not stop datagrams
        sock.connect(address)
        if descriptors:
            socket.send_fds(sock, [message], list(descriptors))
        else:
            sock.send(message)


async def keep_watchdog_fed() -> None:
    """Say that the event loop turns, twice as often as the manager wants to hear it. Returns if it does not want to."""
    interval = watchdog_interval()
    while interval is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval / 2)


def watchdog_interval() -> float | None:
    """Seconds within which the manager wants to hear from this process; None if it does not."""
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", ""))
        # A successor started by its predecessor is not who that variable was set for, but it is who is watched now.
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 else None


def inherited() -> list[socket.socket]:
    """The sockets that the manager opened for us, or kept for us over a restart. Each is given out once."""
    process, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or not count.isascii() or not count.isdigit():
        return []
    found = []
    for descriptor in range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + min(int(count), MAX_DESCRIPTORS)):
        with contextlib.suppress(OSError):  # not a socket, or not open at all
            sock = socket.socket(fileno=descriptor)
            sock.set_inheritable(False)
            found.append(sock)
    return found


def store(name: str, descriptor: int) -> None:
    """Have the manager keep a descriptor until the next start, whatever happens to this process or to the socket."""
    notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=[descriptor])


def unstore(name: str) -> None:
    """Have it close those of a name."""
    notify("FDSTOREREMOVE=1", f"FDNAME={name}")
