"""What all clients have in common, whatever they are made of: a visitor connects, and comes back if asked to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from backend.clients.fleet import Session
from lb.address import Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a visitor is to do besides asking. `spki` is the certificate's SHA-256 pin, which Chromium wants to know."""

    quic_v2: bool = False
    migrates_after: float | None = None  # seconds from its handshake to its active migration
    spki: str = ""


class Visitor(Protocol):
    """One client with its memory: what a server gave it for the next time, it has the next time."""

    async def open(self, server: Address, *paths: str) -> Session:
        """Connect, and GET all of `paths`, in this order or at once.

        All sessions of one visitor go to the same address. Raises ConnectionEndedError or TimeoutError.
        """

    async def close(self) -> None:
        """Forget everything. Its sessions are closed before."""
