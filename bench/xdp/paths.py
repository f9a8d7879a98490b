"""The ways that a packet can take through the program, each with the frames that take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from bench.xdp import frames
from bench.xdp.harness import XDP_PASS, XDP_TX
from lb.cid import CidConfig
from lb.forward import Forward
from lb.router import Verdict

MAX_FLOWS = 16384  # harness.bpf.c has as many heads
PAYLOAD = 200  # octets of a datagram; nothing looks behind its first 26
# A reset is shorter than its trigger, and the prototype's are 43 octets long.
TRIGGER = 44

# Our targets.
RATIO = 1.15  # of the prototype's nanoseconds on the same path, at most
RESETS = 1_000_000  # per second and core, at least

BY_CID = "the CID decides"
BY_ADDRESS = "the 4-tuple decides"
BY_MODE = "forward modes"
OTHERWISE = "other packets"
RESET = "stateless reset"


@dataclass(frozen=True, slots=True)
class Path:
    """One path. `prototype` is what to compile the prototype with for the same; None: it has no such path.

    The verdict is None if the packet is not ours to decide about.
    """

    group: str
    name: str
    payload: Callable[[int], bytes]  # of a flow
    verdict: Verdict | None
    prototype: str | None = None
    is_promised: bool = True  # the ratio to the prototype is among our targets
    mode: Forward = Forward.IPIP
    flows: int = MAX_FLOWS
    decodes: bool = False  # nothing is found in the cache
    fresh_clients: bool = False
    constant_time: bool = False
    is_ipv6: bool = False
    vlan: bool = False
    limits: bool = False  # new flows per source prefix are limited
    is_reset: bool = False
    port: int = frames.PORT

    def frames(self) -> Sequence[bytes]:
        return _frames(self.payload, self.is_ipv6, self.vlan, self.port)[: self.flows]

    @property
    def returns(self) -> int:
        """An XDP action."""
        return XDP_PASS if self.verdict is None else XDP_TX

    @property
    def long_heads(self) -> bool:
        return self.is_ipv6 or self.vlan


def _short(config: CidConfig, length: int = PAYLOAD) -> Callable[[int], bytes]:
    return lambda flow: frames.short(config, flow, length)


def _initial(flow: int) -> bytes:
    return frames.initial(flow, PAYLOAD)


@cache
def _frames(payload: Callable[[int], bytes], is_ipv6: bool, vlan: bool, port: int) -> Sequence[bytes]:
    return [frames.frame(flow, payload(flow), is_ipv6=is_ipv6, vlan=vlan, port=port) for flow in range(MAX_FLOWS)]


_PLAINTEXT, _SINGLE = _short(frames.PLAINTEXT), _short(frames.SINGLE_PASS)
_FOUR, _FOUR_LAST = _short(frames.FOUR_PASS), _short(frames.FOUR_PASS_LAST)

_MODES = ((Forward.L2, "-DL2"), (Forward.DNAT, "-DDNAT"), (Forward.GUE, "-DGUE"), (Forward.NAT, "-DSNAT"))

PATHS = (
    Path(BY_CID, "plaintext", _PLAINTEXT, Verdict.CID, ""),
    Path(BY_CID, "single-pass", _SINGLE, Verdict.CID, ""),
    Path(BY_CID, "four-pass, decrypted", _FOUR, Verdict.CID, "-DDMC", decodes=True),
    Path(BY_CID, "the same, to a prototype without cache", _FOUR, Verdict.CID, "", is_promised=False, decodes=True),
    Path(BY_CID, "four-pass, all four passes", _FOUR_LAST, Verdict.CID, "-DDMC", decodes=True),
    Path(BY_CID, "four-pass, constant time", _FOUR, Verdict.CID, "-DDMC -DCT", decodes=True, constant_time=True),
    Path(BY_CID, "four-pass, cached, 1 flow", _FOUR, Verdict.CID, "-DDMC", flows=1),
    Path(BY_CID, "four-pass, cached, 1024 flows", _FOUR, Verdict.CID, "-DDMC", flows=1024),
    Path(BY_CID, "four-pass, cached, 16384 flows", _FOUR, Verdict.CID, "-DDMC"),
    Path(BY_ADDRESS, "in the table", _initial, Verdict.TABLE_FLOW, "-DLRU"),
    Path(BY_ADDRESS, "first packet", _initial, Verdict.FALLBACK, "-DLRU", fresh_clients=True),
    Path(BY_ADDRESS, "first packet, limited by prefix", _initial, Verdict.FALLBACK, fresh_clients=True, limits=True),
    *(
        Path(BY_MODE, f"{mode.name.lower()}, plaintext", _PLAINTEXT, Verdict.CID, flag, mode=mode)
        for mode, flag in _MODES
    ),
    *(
        Path(BY_MODE, f"{mode.name.lower()}, four-pass", _FOUR, Verdict.CID, f"{flag} -DDMC", mode=mode, decodes=True)
        for mode, flag in _MODES
    ),
    Path(OTHERWISE, "not ours", _PLAINTEXT, None, "", is_promised=False, port=53),
    Path(OTHERWISE, "IPv6 in IPv6, plaintext", _PLAINTEXT, Verdict.CID, is_ipv6=True),
    Path(OTHERWISE, "IPv6 in IPv6, four-pass, cached", _FOUR, Verdict.CID, is_ipv6=True),
    Path(OTHERWISE, "VLAN, plaintext", _PLAINTEXT, Verdict.CID, vlan=True),
    Path(OTHERWISE, RESET, _short(frames.SINGLE_PASS, TRIGGER), Verdict.RESET, "reset", is_reset=True),
)
