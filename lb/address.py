"""An IP address and a UDP port, of either family, written in one canonical way."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import NamedTuple

MAX_PORT = 65535


class Address(NamedTuple):
    """`host` is an IPv4 or IPv6 address in the form that the kernel prints, so that equal means same."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `192.0.2.1:443` or `[2001:db8::1]:443`. Raises ValueError: names are not looked up here."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) <= MAX_PORT:
            raise ValueError(f"{text!r}: expected ADDRESS:PORT, as in 192.0.2.1:443 or [2001:db8::1]:443")
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            ip = ipaddress.ip_address(host[1:-1] if bracketed else host)
        except ValueError:
            raise ValueError(f"{text!r}: expected an IP address before the port, not {host!r}") from None
        if bracketed != (ip.version == 6):
            raise ValueError(f"{text!r}: IPv6 addresses, and only those, go in brackets")
        if ip.version == 6 and ip.scope_id is not None:
            raise ValueError(f"{text!r}: an address with a zone; expected one that means the same on every link")
        if ip.version == 6 and ip.ipv4_mapped is not None:
            raise ValueError(f"{text!r}: an IPv4-mapped address; write it as IPv4")
        return cls(str(ip), int(port))

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    @property
    def is_wildcard(self) -> bool:
        """Whether a socket bound to it receives for every address of the machine."""
        return self.host in ("0.0.0.0", "::")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.is_ipv6 else f"{self.host}:{self.port}"


@lru_cache(maxsize=256)
def packed(host: str) -> bytes:
    """The 16 octets of an address; IPv4 as an IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2)."""
    if ":" not in host:
        return _IPV4_MAPPED + bytes(map(int, host.split(".")))  # ten times faster than ipaddress
    return ipaddress.IPv6Address(host.partition("%")[0]).packed


def unpacked(octets: bytes) -> str:
    """The host whose 16 octets these are."""
    ip = ipaddress.IPv6Address(octets)
    return str(ip.ipv4_mapped or ip)


_IPV4_MAPPED = bytes(10) + b"\xff\xff"
