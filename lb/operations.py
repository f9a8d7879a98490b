"""What may be asked of a running balancer and done to it: by the API, and so by the command and the status page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from lb.errors import QuicLbError
from lb.overrides import Change
from lb.snapshot import Snapshot

Refusal = Literal["unknown", "conflict", "stale", "invalid", "failed"]


class Refused(QuicLbError):  # noqa: N818 - as events and answers say it
    """A change that was not made, and all the reasons.

    `unknown`: there is no such service or backend. `conflict`: not in this state. `stale`: something else was changed
    meanwhile. `invalid`: it makes no sense. `failed`: it was tried.
    """

    def __init__(self, kind: Refusal, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.kind = kind
        self.reasons = reasons


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationStep:
    """One step of a rotation. `config_id` None lets `prepare` take a free one; the lengths are for `prepare` only."""

    do: Literal["prepare", "activate", "retire"]
    config_id: int | None = None
    server_id_length: int | None = None
    nonce_length: int | None = None
    plaintext: bool = False
    force: bool = False


class Operations(Protocol):
    """A running balancer. To be called from its event loop.

    Every change has an author, `who`, who is logged. With `generation` it is made only if nothing was changed since
    the snapshot that had that number. All raise Refused.
    """

    async def snapshot(self) -> Snapshot:
        """Raises TimeoutError if the engine does not answer in time."""
        ...

    async def change(
        self, service: str, backend: str, change: Change, *, who: str, generation: int | None = None
    ) -> int:
        """Change what is said about a backend. Returns the new generation."""
        ...

    async def reload(self, *, who: str, generation: int | None = None) -> tuple[str, ...]:
        """Read the file again. Returns what changed, a line each. Raises ConfigErrors, with nothing changed."""
        ...

    async def rotate(
        self, service: str, step: RotationStep, *, who: str, generation: int | None = None
    ) -> tuple[str, ...]:
        """Take a step of a rotation in the file, and reload it. Returns what changed, a line each."""
        ...

    async def upgrade(self, *, who: str) -> int:
        """Start what is installed now in the place of this process. Returns the successor's process ID."""
        ...
