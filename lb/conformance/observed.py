"""What was seen of a server. Nothing here judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Origin(StrEnum):
    """Where a server says a CID."""

    HANDSHAKE = "Initial"
    NEW_CONNECTION_ID = "NEW_CONNECTION_ID"
    PREFERRED_ADDRESS = "preferred_address"
    RETRY = "Retry"


@dataclass(frozen=True, slots=True)
class SeenCid:
    """A CID that a server issued, in the order in which it came.

    `connection` counts the connections. `token` is its stateless reset token, None where the server gave none: it
    can end the connection of a real client, so it does not print. `after_restart`: by a restarted server.
    """

    cid: bytes
    origin: Origin
    connection: int
    token: bytes | None = field(default=None, repr=False)
    after_restart: bool = False


@dataclass(frozen=True, slots=True)
class SeenRetry:
    """A Retry packet's SCID, and the DCID of the Initial that it answers."""

    scid: bytes
    answered_dcid: bytes


@dataclass(slots=True)
class PoolRecord:
    """How many CIDs a client was given that takes `limit` at a time. `error` is how its connection came to an end."""

    limit: int
    most_active: int = 0
    is_exceeded: bool = False
    issued: int = 0  # after the one of the handshake
    retired: int = 0  # by us, one after the other
    ran_out: bool = False  # there was no other one in time
    error: str | None = None


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """A client that goes on from another port. `error` is why that could not even be tried."""

    is_answered: bool = False
    challenges: int = 0  # PATH_CHALLENGE frames of the server, which validates the new path
    is_challenge_answered: bool = False  # ours, from the new port
    took_new_cid: bool = False
    error: str | None = None


class Kind(StrEnum):
    """Whose CID a packet carries that no connection can be for."""

    OWN = "of this server, never issued"
    OLD = "of a connection before the restart"
    FOREIGN = "of another server"
    UNROUTABLE = "0b111"


@dataclass(frozen=True, slots=True)
class Trigger:
    """A datagram with a short header that no key fits, and what came back to the port that it left from."""

    kind: Kind
    cid: bytes
    size: int
    answers: tuple[bytes, ...] = field(default=(), repr=False)  # datagrams: they end in tokens


@dataclass(frozen=True, slots=True)
class RestartRecord:
    """The operator's command, and the CIDs of before it. `error` is why nothing was learnt."""

    triggers: tuple[Trigger, ...] = ()
    seconds: float = 0.0  # until a connection could be made again
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LiveConnection:
    """A connection that lived while the server's configuration was changed.

    `active` are the CIDs that it had in the end, `moved_after` the seconds until all of them were new ones, None if
    some never were; `retire_prior_to` is the highest that was said, `old` how many CIDs there were before.
    """

    limit: int
    old: int
    active: tuple[bytes, ...]
    moved_after: float | None
    retire_prior_to: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RotationRecord:
    """The operator's command, and what became of live connections and new ones within so many seconds."""

    within: float
    live: tuple[LiveConnection, ...] = ()
    later: tuple[SeenCid, ...] = ()  # CIDs issued when the bound was over
    is_old_accepted: bool | None = None  # a CID that was to be retired and was not yet; None: there was none
    error: str | None = None


@dataclass(slots=True)
class Observations:
    """All that was seen. None where it was not looked for."""

    cids: list[SeenCid] = field(default_factory=list)
    retries: list[SeenRetry] = field(default_factory=list)
    handshakes: int = 0
    unanswered: int = 0
    without_token: int = 0  # handshakes to the end whose transport parameters had no stateless_reset_token
    connect_seconds: float | None = None
    alpn: str | None = None
    disables_migration: bool | None = None
    pools: list[PoolRecord] = field(default_factory=list)
    rebinding: MoveRecord | None = None
    migration: MoveRecord | None = None
    triggers: list[Trigger] = field(default_factory=list)
    restart: RestartRecord | None = None
    rotation: RotationRecord | None = None
    is_complete: bool = False  # all that was to be looked at was, within the deadline
