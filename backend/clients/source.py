"""Which of this machine's addresses a server would see."""

from __future__ import annotations

import socket

from lb.address import Address


def source_towards(server: Address) -> str:
    """The address that the kernel sends to `server` from. Raises OSError if it knows no way there."""
    with socket.socket(socket.AF_INET6 if server.is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(server)  # nothing is sent
        host: str = sock.getsockname()[0]
    return host
