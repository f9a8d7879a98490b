"""Every server that can stand behind the balancer here: how it is started, and what its stack cannot do.

They all take the same options and serve the same resources, see docs/servers/README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "adapters"


class Feature(StrEnum):
    """What a client does, or what happens to it, that a server has to go along with."""

    REQUEST = "request"
    DOWNLOAD = "download"
    NAT_REBINDING = "nat-rebinding"
    ADDRESS_MOVE = "address-move"
    IPV6_TO_IPV4 = "ipv6-to-ipv4"
    ACTIVE_MIGRATION = "active-migration"
    RETRY = "retry"
    EARLY_DATA_ELSEWHERE = "0rtt-elsewhere"
    QUIC_V2 = "quic-v2"
    ROTATION = "rotation"
    BACKEND_KILLED = "backend-killed"
    BALANCER_RESTARTED = "balancer-restarted"
    BALANCERS_SWAP = "balancers-swap"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A server: the command before its options, what there is to build, and what its stack cannot do, and why."""

    name: str
    stack: str
    command: tuple[str, ...]
    cannot: Mapping[Feature, str] = field(default_factory=dict)

    @property
    def build(self) -> Path | None:
        """The script that builds it; None if there is nothing to build."""
        script = Path(__file__).parent / self.name / "build.sh"
        return script if script.exists() else None

    @property
    def missing(self) -> str | None:
        """Why it cannot be started here; None if it can."""
        program = Path(self.command[0])
        return None if program.exists() else f"{program.relative_to(ROOT)} is not built: `make adapters`"


def _built(name: str, stack: str, cannot: Mapping[Feature, str] | None = None) -> Adapter:
    return Adapter(name, stack, (str(BUILT / name / "server"),), cannot or {})


ADAPTERS: Mapping[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter("aioquic", "aioquic 1.7.2, the reference backend", (sys.executable, "-m", "backend")),
        Adapter(
            "hypercorn",
            "hypercorn 0.18.0 on aioquic 1.7.2",
            (sys.executable, "-m", "backend.adapters.hypercorn"),
            {
                Feature.RETRY: "hypercorn sends none",
                Feature.EARLY_DATA_ELSEWHERE: "hypercorn gives out no session tickets",
            },
        ),
        _built(
            "quic-go",
            "quic-go 0.65.0",
            {Feature.ROTATION: "quic-go cannot ask clients to retire connection IDs: live connections keep theirs"},
        ),
        Adapter(
            "quinn",
            "quinn 0.11.12",
            # Rotation comes with the end of a connection ID's life: here soon enough for somebody to wait for it.
            (str(BUILT / "quinn" / "server"), "--cid-lifetime", "2"),
            {
                Feature.QUIC_V2: "quinn speaks version 1 alone",
                Feature.EARLY_DATA_ELSEWHERE: "rustls takes early data only on sessions in its own memory",
            },
        ),
        _built(
            "ngtcp2",
            "ngtcp2 0.12 with GnuTLS",
            {
                Feature.QUIC_V2: "ngtcp2 0.12 knows version 2 by the number of a draft, 0x709a50c4",
                Feature.ROTATION: "ngtcp2 never says Retire Prior To: live connections keep the CIDs they have",
            },
        ),
        _built(
            "quiche",
            "quiche, through @matrixai/quic 2.0.9",
            {
                Feature.QUIC_V2: "quiche speaks version 1 alone",
                **dict.fromkeys(
                    (Feature.NAT_REBINDING, Feature.ADDRESS_MOVE, Feature.IPV6_TO_IPV4, Feature.ACTIVE_MIGRATION),
                    "quiche does not send again what was lost when the client's address changed (its issue 2452)",
                ),
            },
        ),
    )
}
