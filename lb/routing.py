"""Which backend a connection ID, or failing that a 4-tuple, belongs to.

Everything here is immutable and computed from configuration and backend states alone: two balancers with the
same configuration hold equal tables, without talking to each other. Policy is decided when the table is built;
looking something up decides nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import NamedTuple

from lb.address import Address, packed
from lb.cid import LENGTH_BITS, MAX_CID_LENGTH_V1, UNROUTABLE, CidConfig, Codec, ConfigId, ServerId
from lb.reset_scheme import USUAL_RULE, ResetRule, TokenKey, server_token_key

RING_SLOTS = 65537  # prime; imbalance stays under 1 % up to 655 backends (Maglev, NSDI 2016, section 5.3)
_MASK64 = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


class BackendState(IntEnum):
    """ACTIVE takes connections; DRAINING keeps those it has; DOWN has failed its health checks."""

    ACTIVE = 0
    DRAINING = 1
    DOWN = 2


class Action(IntEnum):
    """What becomes of packets whose CID carries a known server ID. The same list as `enum action` in shared.h."""

    FORWARD = 0
    FORWARD_DOWN = 1  # DOWN, but within the hold-off: it may yet come back with its connections
    RESET = 2  # declared dead, and its reset key is known
    FALL_THROUGH = 3  # declared dead: not active in the draft's sense, so the CID is unroutable


class Unroutable(IntEnum):
    """Why a DCID was unroutable (section 4.1 of the draft). The same list as `enum unroutable` in shared.h."""

    NO_CID = 0  # a long header with a zero-length DCID, or nothing after the first octet
    NO_CONFIG = 1  # its config ID names no configuration
    CODEPOINT_7 = 2  # 0b111: from a server without a configuration, or one in eight client-chosen DCIDs
    TOO_SHORT = 3  # ends before the routing block does
    UNKNOWN_SERVER = 4  # decodes to a server ID that is nobody's
    DEAD_SERVER = 5  # decodes to a server that is declared dead, and resets are off


@dataclass(frozen=True, slots=True)
class Backend:
    """One server of the fleet. `server_ids` are those it may encode, by config ID; `weight` is its share of new
    connections relative to the others, 0 for none. `workers` has them in the order of its workers, where reset tokens
    depend on that."""

    name: str
    address: Address
    server_ids: Mapping[ConfigId, frozenset[ServerId]]
    weight: int = 1
    workers: Mapping[ConfigId, tuple[ServerId, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CidSlot:
    """What a balancer knows about one config ID. `reset_key` is what the service's reset rule needs, mostly a master
    key of 32 octets, or None: no resets."""

    config: CidConfig
    reset_key: bytes | None = field(default=None, repr=False)


class UnknownServer(IntEnum):
    """What becomes of a CID whose server ID is nobody's: what the draft says, or what cloud balancers do."""

    FALLBACK = 0
    DROP = 1


@dataclass(frozen=True, slots=True)
class Service:
    """One or more listening addresses and the backends behind them. `seed` (any text) shuffles the ring.

    With a smaller share of its backends ACTIVE than `panic_threshold`, their states are not believed.
    """

    name: str
    listen: tuple[Address, ...]
    cid_slots: tuple[CidSlot, ...]
    backends: tuple[Backend, ...]
    seed: str = ""
    unknown_server: UnknownServer = UnknownServer.FALLBACK
    panic_threshold: float = 0.0
    reset_rule: ResetRule = USUAL_RULE


class FourTuple(NamedTuple):
    """Source and destination of a datagram, hosts in the kernel's spelling."""

    client: str
    client_port: int
    local: str
    local_port: int


class Server(NamedTuple):
    """What a server ID maps to. `backend` indexes `RoutingTable.backends`; `reset_key` makes its reset tokens."""

    backend: int
    action: Action
    config_id: ConfigId
    reset_key: TokenKey | None


class _Decoder:
    """One config ID's half of a lookup: CID to server."""

    __slots__ = ("block_end", "cid_length", "encodes_length", "server_id", "servers")

    def __init__(self, config: CidConfig, servers: dict[bytes, Server]) -> None:
        self.block_end = 1 + config.routing_block_length
        self.cid_length = config.cid_length
        self.encodes_length = config.encodes_length
        self.server_id = Codec(config).server_id
        self.servers = servers


class RoutingTable:
    """A service's whole routing, built by `build` and never changed."""

    __slots__ = (
        "__dict__",
        "_decoders",
        "_ring_seed",
        "dead",
        "fail_open",
        "fenced",
        "ring",
        "service",
        "states",
        "weights",
    )

    def __init__(
        self,
        service: Service,
        states: Mapping[str, BackendState],
        dead: frozenset[str],
        ring: array[int],
        fenced: frozenset[str] = frozenset(),
        weights: Mapping[str, int] | None = None,
    ) -> None:
        self.service = service
        self.states = tuple(_state(b.name, states, fenced) for b in service.backends)
        self.fail_open = _fails_open(service, states, fenced)
        # An operator's word is believed in any case.
        self.dead = fenced if self.fail_open else dead | fenced
        self.fenced = fenced
        self.weights = weights or {}
        self.ring = ring
        self._ring_seed = _seed_word(service.seed)
        self._decoders: list[_Decoder | None] = [None] * 8
        for slot in service.cid_slots:
            self._decoders[slot.config.config_id] = _Decoder(slot.config, self._servers(slot))

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process gets the ring as it is, not the work of computing it.
        states = dict(zip(self.index, self.states, strict=True))
        return RoutingTable, (self.service, states, self.dead, self.ring, self.fenced, self.weights)

    @classmethod
    def build(
        cls,
        service: Service,
        states: Mapping[str, BackendState] | None = None,
        dead: Iterable[str] = (),
        *,
        fenced: Iterable[str] = (),
        weights: Mapping[str, int] | None = None,
    ) -> RoutingTable:
        """The table for a service whose backends are in the given states (ACTIVE where nothing is said).

        `dead` names backends that are DOWN for longer than the hold-off: those whose connections are certainly gone,
        so that their clients may be told. `fenced` names those that are DOWN and dead because the operator says so,
        whatever their states are. `weights` stand in for the service's own. It takes some tens of milliseconds if
        the set of ACTIVE backends is a new one.
        """
        states, weights, fenced = states or {}, weights or {}, frozenset(fenced)
        there = [b for b in service.backends if b.name not in fenced]
        wanted = {BackendState.ACTIVE}
        if _fails_open(service, states, fenced):
            wanted = {BackendState.ACTIVE, BackendState.DOWN}
        eligible = [b for b in there if states.get(b.name, BackendState.ACTIVE) in wanted]
        if not eligible:  # nobody new should come, but whoever comes must go somewhere
            eligible = [b for b in there if states.get(b.name) is BackendState.DRAINING]
        positions = {b.name: i for i, b in enumerate(service.backends)}
        members = tuple((positions[b.name], b.name, weights.get(b.name, b.weight)) for b in eligible)
        return cls(service, states, frozenset(dead), maglev_ring(members, service.seed), fenced, weights)

    def by_cid(self, dcid: bytes) -> Server | Unroutable:
        """The server that a DCID was made for, or why there is none (section 4.1 of the draft).

        `dcid` may have any number of octets after the CID, as a short header's has.
        """
        if not dcid:
            return Unroutable.NO_CID
        config_id = dcid[0] >> 5
        decoder = self._decoders[config_id]
        if decoder is None:
            return Unroutable.CODEPOINT_7 if config_id == UNROUTABLE else Unroutable.NO_CONFIG
        block = dcid[1 : decoder.block_end]
        if len(block) + 1 != decoder.block_end:
            return Unroutable.TOO_SHORT
        server = decoder.servers.get(decoder.server_id(block))
        if server is None:
            return Unroutable.UNKNOWN_SERVER
        if server.action is Action.FALL_THROUGH:
            return Unroutable.DEAD_SERVER
        return server

    def whole_cid(self, dcid: bytes) -> bytes | None:
        """The CID that starts a short header's `dcid`, cut where its configuration says; None if not all there.

        Octets appended after the routing block count: tokens are made from the whole CID. A first octet that says
        that there are more than QUIC v1 allows is not one that a server made.
        """
        decoder = self._decoders[dcid[0] >> 5] if dcid else None
        if decoder is None:
            return None
        length = max(decoder.block_end, 1 + (dcid[0] & LENGTH_BITS)) if decoder.encodes_length else decoder.cid_length
        return dcid[:length] if length <= min(len(dcid), MAX_CID_LENGTH_V1) else None

    def fallback(self, flow: FourTuple) -> int | None:
        """The backend that the ring gives a 4-tuple (section 4.3.1: its only input); None without backends."""
        return self.ring[ring_slot(flow, self._ring_seed)] if self.ring else None

    def servers(self, config_id: ConfigId) -> Mapping[bytes, Server]:
        """All server IDs of one config ID, and what they map to."""
        decoder = self._decoders[config_id]
        return decoder.servers if decoder is not None else {}

    @property
    def ring_seed(self) -> int:
        """What `ring_slot` begins with: 64 bits."""
        return self._ring_seed

    @property
    def backends(self) -> tuple[Backend, ...]:
        return self.service.backends

    @cached_property
    def index(self) -> dict[str, int]:
        """Backend name to its place in `backends`."""
        return {b.name: i for i, b in enumerate(self.service.backends)}

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The share of the ring that each backend has, 0 to 1, by its place in `backends`."""
        counts = Counter(self.ring)
        return tuple(counts[i] / (len(self.ring) or 1) for i in range(len(self.backends)))

    def _servers(self, slot: CidSlot) -> dict[bytes, Server]:
        servers: dict[bytes, Server] = {}
        config_id = slot.config.config_id
        for position, backend in enumerate(self.service.backends):
            action = Action.FORWARD
            if self.states[position] is BackendState.DOWN and not (self.fail_open and backend.name not in self.fenced):
                action = Action.FORWARD_DOWN
                if backend.name in self.dead:
                    action = Action.RESET if slot.reset_key else Action.FALL_THROUGH
            keys = self._token_keys(slot, backend) if slot.reset_key else {}
            for server_id in backend.server_ids.get(config_id, ()):
                servers[server_id] = Server(position, action, config_id, keys.get(server_id))
        return servers

    def _token_keys(self, slot: CidSlot, backend: Backend) -> dict[ServerId, TokenKey]:
        """What makes the reset tokens of each server ID of a backend."""
        rule, key, config_id, host = (
            self.service.reset_rule,
            slot.reset_key or b"",
            slot.config.config_id,
            backend.address.host,
        )
        workers = backend.workers.get(config_id, ())
        if workers:
            return {
                server_id: server_token_key(rule, key, config_id, workers[0], host, number)
                for number, server_id in enumerate(workers)
            }
        return {
            server_id: server_token_key(rule, key, config_id, server_id, host)
            for server_id in backend.server_ids.get(config_id, ())
        }


def _state(name: str, states: Mapping[str, BackendState], fenced: frozenset[str]) -> BackendState:
    return BackendState.DOWN if name in fenced else states.get(name, BackendState.ACTIVE)


def _fails_open(service: Service, states: Mapping[str, BackendState], fenced: frozenset[str]) -> bool:
    """Whether the health checks are not believed: with (almost) nobody left, they would turn every client away.

    Whoever drains and is not DOWN is proof that they can be believed, and whoever is fenced is not asked.
    """
    known = [states.get(b.name, BackendState.ACTIVE) for b in service.backends if b.name not in fenced]
    down, active = known.count(BackendState.DOWN), known.count(BackendState.ACTIVE)
    return down > 0 and (down == len(known) or 0 < active < service.panic_threshold * (active + down))


def ring_slot(flow: FourTuple, seed: int) -> int:
    """The ring slot of a 4-tuple: five 64-bit words, mixed by multiplication, the same arithmetic as in forward.h.

    `seed` is a 64-bit number that outsiders do not know.
    """
    client, local = packed(flow.client), packed(flow.local)
    h = seed
    for word in (
        int.from_bytes(client[:8]),
        int.from_bytes(client[8:]),
        int.from_bytes(local[:8]),
        int.from_bytes(local[8:]),
        flow.client_port << 16 | flow.local_port,
    ):
        h = (h ^ word) * _MULTIPLIER & _MASK64
        h ^= h >> 32
    return h % RING_SLOTS


@lru_cache(maxsize=64)
def maglev_ring(members: Sequence[tuple[int, str, int]], seed: str) -> array[int]:
    """Maglev's lookup table: `RING_SLOTS` entries, each the number of a member (number, name, weight).

    Members take turns, each as often as its weight says, and each takes the next free slot in an order of its own.
    So a member that leaves gives its slots to the others and few others move (NSDI 2016, section 3.4). The
    order depends on names and seed only, never on the numbers. Empty if every weight is 0.
    """
    members = sorted((m for m in members if m[2] > 0), key=lambda m: m[1])
    if not members:
        return array("H")
    free = -1
    ring = [free] * RING_SLOTS
    heaviest = max(weight for _, _, weight in members)
    # position, skip, number, weight, credit
    turns = []
    for number, name, weight in members:
        digest = hashlib.blake2b(name.encode(), key=_ring_key(seed), digest_size=16).digest()
        offset = int.from_bytes(digest[:8]) % RING_SLOTS
        skip = int.from_bytes(digest[8:]) % (RING_SLOTS - 1) + 1
        turns.append([offset, skip, number, weight, 0])
    left = RING_SLOTS
    while True:
        for turn in turns:
            turn[4] += turn[3]
            if turn[4] < heaviest:
                continue
            turn[4] -= heaviest
            position, skip, number, _, _ = turn
            while ring[position] != free:
                position += skip
                if position >= RING_SLOTS:
                    position -= RING_SLOTS
            ring[position] = number
            turn[0] = position
            left -= 1
            if not left:
                return array("H", ring)


def _ring_key(seed: str) -> bytes:
    return hashlib.blake2b(seed.encode(), digest_size=32, person=b"quiclb ring").digest()


def _seed_word(seed: str) -> int:
    return int.from_bytes(_ring_key(seed)[:8])
