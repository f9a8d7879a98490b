"""How the xdp engine gets hold of packets, and how they reach a backend."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Forward(IntEnum):
    """The forward modes. The same list as `enum forward_mode` in xdp/bpf/shared.h."""

    NAT = 0  # both addresses rewritten, as the udp engine does
    DNAT = 1  # the destination rewritten; the way back is through the balancer
    L2 = 2  # the MAC address rewritten; the backend answers directly
    IPIP = 3  # IP in IP; the backend answers directly
    GUE = 4  # IP in UDP; the backend answers directly

    @property
    def returns_directly(self) -> bool:
        """Whether backends answer clients without the balancer, under the address that clients sent to."""
        return self in (Forward.L2, Forward.IPIP, Forward.GUE)


class Attach(StrEnum):
    """Where on an interface's way in the program runs."""

    AUTO = "auto"
    NATIVE = "native"
    GENERIC = "generic"
