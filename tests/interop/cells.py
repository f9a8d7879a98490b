"""What a matrix is made of: cells, and what came out of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from backend.adapters.registry import ADAPTERS, Feature
from backend.clients.visitors import CLIENTS


class Engine(StrEnum):
    """Who balances: one of quiclb's two engines, or nginx, which goes by 4-tuples alone."""

    UDP = "udp"
    XDP = "xdp"
    CONTROL = "nginx"


# What needs connection IDs to be looked at. A 4-tuple balancer that gets through one of these shows that the scenario
# does not test what it is for.
NEEDS_CIDS = frozenset(
    {
        Feature.NAT_REBINDING,
        Feature.ADDRESS_MOVE,
        Feature.IPV6_TO_IPV4,
        Feature.ACTIVE_MIGRATION,
        Feature.BACKEND_KILLED,
        Feature.BALANCER_RESTARTED,
        Feature.BALANCERS_SWAP,
    }
)


# What a client and a server that can do it each cannot do with each other. Found by trying; a run does not try again.
TOGETHER: Mapping[tuple[str, str, Feature], str] = {
    ("qh3", "ngtcp2", Feature.EARLY_DATA_ELSEWHERE): (
        "qh3 2.1 has 2048 octets for a ClientHello, and one of GnuTLS's tickets beside a post-quantum key share is more"
    ),
}


class Verdict(StrEnum):
    """What a cell says."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Cell:
    """One client at one server behind one balancer in one scenario."""

    engine: Engine
    server: str
    client: str
    feature: Feature

    @property
    def must_fail(self) -> bool:
        return self.engine is Engine.CONTROL and self.feature in NEEDS_CIDS

    def why_not(self) -> str | None:
        """Why it cannot be played, whatever machine this is; None if it can."""
        client, server = CLIENTS[self.client], ADAPTERS[self.server]
        together = TOGETHER.get((self.client, self.server, self.feature))
        return client.cannot.get(self.feature) or server.cannot.get(self.feature) or together

    def __str__(self) -> str:
        return f"{self.engine} {self.server} {self.client} {self.feature}"


@dataclass(frozen=True, slots=True)
class Result:
    """A cell's verdict and what was seen, or why it was not played. `seconds`: how long it took.

    `was_disturbed`: it came to the point where connection IDs matter. A control that fails before shows nothing.
    """

    cell: Cell
    verdict: Verdict
    saw: str
    seconds: float = 0.0
    attempts: int = 1
    was_disturbed: bool = True

    @property
    def is_as_expected(self) -> bool:
        """A control that gets through what only a connection ID can save is not."""
        if self.verdict is Verdict.NOT_RUN:
            return True
        if self.cell.must_fail:
            return self.verdict is Verdict.FAIL and self.was_disturbed
        return self.verdict is Verdict.PASS

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Result:
        cell = found["cell"]
        return cls(
            Cell(Engine(cell["engine"]), cell["server"], cell["client"], Feature(cell["feature"])),
            Verdict(found["verdict"]),
            found["saw"],
            found["seconds"],
            found["attempts"],
            found["was_disturbed"],
        )
