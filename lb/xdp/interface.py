"""A network interface: what it is called, where it is, how long its packets may be, what its driver can do."""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import struct
from typing import NamedTuple

from lb.xdp.netlink import NETLINK_GENERIC, RT_SCOPE_UNIVERSE, Netlink, attribute, attributes

# linux/sockios.h, linux/ethtool.h
SIOCETHTOOL = 0x8946
ETHTOOL_GDRVINFO = 3
_DRIVER_INFO = struct.Struct("=I32s160x")  # command, driver
_REQUEST = struct.Struct("@16sP16x")  # struct ifreq: name, pointer

# linux/genetlink.h, linux/netdev.h
GENL_ID_CTRL = 16
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 1, 2
NETDEV_CMD_DEV_GET = 1
NETDEV_A_DEV_IFINDEX, NETDEV_A_DEV_XDP_FEATURES = 1, 3
NETDEV_XDP_ACT_BASIC = 1
_GENERIC = struct.Struct("=BBxx")  # command, version

ETHERNET_ADDRESS = 6  # octets


class Interface(NamedTuple):
    """What the engine must know of its interface. `addresses` are hosts; `global_addresses` those of them that mean
    the same elsewhere."""

    name: str
    index: int  # type: ignore[assignment]  # over tuple's method
    mac: bytes
    mtu: int
    is_up: bool
    addresses: tuple[str, ...]
    global_addresses: tuple[str, ...]

    @property
    def is_ethernet(self) -> bool:
        return len(self.mac) == ETHERNET_ADDRESS and any(self.mac)


def read_interface(name: str, netlink: Netlink) -> Interface:
    """Raises OSError, naming the interface, if there is none of this name."""
    link = next((link for link in netlink.links() if link.name == name), None)
    if link is None:
        raise OSError(errno.ENODEV, f"no such network interface: {name}")
    found = [address for address in netlink.addresses() if address.index == link.index and address.is_usable]
    return Interface(
        name=name,
        index=link.index,
        mac=link.mac,
        mtu=link.mtu,
        is_up=link.is_up,
        addresses=tuple(address.host for address in found),
        global_addresses=tuple(address.host for address in found if address.scope == RT_SCOPE_UNIVERSE),
    )


def driver(name: str) -> str | None:
    """The name of an interface's driver; None if it has none that says so."""
    info = array.array("B", _DRIVER_INFO.pack(ETHTOOL_GDRVINFO, b""))
    where, _ = info.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, SIOCETHTOOL, _REQUEST.pack(name.encode(), where))
        except OSError:
            return None
    return str(_DRIVER_INFO.unpack(info.tobytes())[1].rstrip(b"\0").decode(errors="replace"))


def is_native_capable(index: int) -> bool | None:
    """Whether an interface's driver can run XDP programs itself; None if this kernel does not tell (before 6.3)."""
    try:
        with Netlink(NETLINK_GENERIC) as netlink:
            question = _GENERIC.pack(CTRL_CMD_GETFAMILY, 1) + attribute(CTRL_ATTR_FAMILY_NAME, b"netdev\0")
            family = _read_generic(netlink.request(GENL_ID_CTRL, question).body)
            number = int.from_bytes(family[CTRL_ATTR_FAMILY_ID], "little")
            question = _GENERIC.pack(NETDEV_CMD_DEV_GET, 1) + attribute(NETDEV_A_DEV_IFINDEX, struct.pack("=I", index))
            found = _read_generic(netlink.request(number, question).body)
    except OSError:
        return None
    features = int.from_bytes(found.get(NETDEV_A_DEV_XDP_FEATURES, b""), "little")
    return bool(features & NETDEV_XDP_ACT_BASIC)


def _read_generic(body: bytes) -> dict[int, bytes]:
    return attributes(body[_GENERIC.size :])
