"""What the maps should hold: routing tables as octets. An image is whole and never changes.

Nothing here does input or output. What did not change since the last image is taken from there, and is the same
object, so that nobody needs to compare it.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, repeat
from typing import NamedTuple

from lb.address import Address, packed
from lb.cid import CidConfig
from lb.forward import Forward
from lb.reset_scheme import TokenKey
from lb.routing import RING_SLOTS, Action, BackendState, RoutingTable, UnknownServer
from lb.upstream import ServicePolicy
from lb.xdp import aes128, layout
from lb.xdp.layout import (
    BACKEND,
    CID_CONFIG,
    CONFIG_SLOTS,
    DNAT_RETURN,
    ENDPOINT,
    MAX_SERVICES,
    NO_BACKEND_SLOT,
    NO_MAC,
    RESET_KEY,
    SERVER,
    SERVER_KEY,
    SERVICE,
    SLOT_NAMES,
    U32_KEY,
    Algorithm,
)
from lb.xdp.slots import Allocation, Occupant, Slot

# Names of maps, as in maps.h.
LISTENERS = "listeners"
CID_CONFIGS = "cid_configs"
SERVERS = "servers"
RESET_KEYS = "reset_keys"
BACKENDS = "backends"
RINGS = "rings"
DNAT_RETURNS = "dnat_returns"
BACKEND_NAMES = "backend_names"
SERVICE_NAMES = "service_names"

# Ours.
NO_RING = NO_BACKEND_SLOT.to_bytes(2, "little") * RING_SLOTS
KEY_SCHEDULES = 2048  # CID keys whose schedules are kept
BACKEND_ZERO = bytes(24)

Entries = Mapping[bytes, bytes]


class NextHop(NamedTuple):
    """How packets get to a backend: the MAC address that they go to, and how long they may be."""

    mac: bytes
    mtu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What an image depends on besides routing tables. `hops` are next hops by backends' hosts, where they are known;
    `addresses` are what a wildcard listens on."""

    forward: Forward
    policies: Mapping[str, ServicePolicy]
    addresses: tuple[str, ...]
    hops: Mapping[str, NextHop]
    cpus: int


@dataclass(frozen=True, slots=True)
class ServicePart:
    """What one service contributes to an image, and what it was made of."""

    table: RoutingTable
    index: int
    occupants: Sequence[Occupant]  # in the order of the table's backends
    slots: tuple[Slot, ...]  # the same
    ways: tuple[tuple[Action, NextHop | None], ...]  # the same
    ring: bytes
    backends: Entries
    servers: Entries
    cid_configs: Entries
    reset_keys: Entries
    names: Entries


@dataclass(frozen=True, slots=True)
class Image:
    """What all maps hold: for each map several mappings, which have no key in common.

    `rings` has, by service index, in which of its two rings a service is, and its octets. `generation` is another one
    whenever anything is that the program caches: listeners, servers, CID configurations.
    """

    allocation: Allocation
    maps: Mapping[str, tuple[Entries, ...]] = field(default_factory=dict)
    rings: Mapping[int, tuple[int, bytes]] = field(default_factory=dict)
    parts: Mapping[str, ServicePart] = field(default_factory=dict)
    generation: int = 1

    def entries(self, name: str) -> dict[bytes, bytes]:
        """Everything in one map."""
        return {key: value for part in self.maps.get(name, ()) for key, value in part.items()}

    def count(self, name: str) -> int:
        return sum(map(len, self.maps.get(name, ())))


def render(tables: Sequence[RoutingTable], around: Surroundings, before: Image) -> Image:
    """The image of these tables. `before` says who has which slot, and is reused where it fits.

    Raises NoRoomError if the maps were made for fewer services or backends.
    """
    named = {table.service.name: table for table in tables}
    known = {
        name: part for name, part in before.parts.items() if name in named and named[name].service is part.table.service
    }
    whose = {name: known[name].occupants if name in known else occupants(table) for name, table in named.items()}
    allocation = before.allocation
    if not before.parts or not len(named) == len(known) == len(before.parts):
        allocation = allocation.with_only(whose, list(chain.from_iterable(whose.values())))
    parts = {name: _part(table, allocation, whose[name], around.hops, known.get(name)) for name, table in named.items()}
    rings = {}
    for part in parts.values():
        half, octets = before.rings.get(part.index, (1, b""))
        rings[part.index] = (half, part.ring) if part.ring == octets else (1 - half, part.ring)

    maps: dict[str, tuple[Entries, ...]] = {
        BACKENDS: (*(part.backends for part in parts.values()), _freed(allocation, before)),
        SERVERS: tuple(part.servers for part in parts.values()),
        CID_CONFIGS: tuple(part.cid_configs for part in parts.values()),
        RESET_KEYS: tuple(part.reset_keys for part in parts.values()),
        BACKEND_NAMES: tuple(part.names for part in parts.values()),
        SERVICE_NAMES: ({U32_KEY.pack(part.index): _name(name) for name, part in parts.items()},),
        RINGS: ({ring_index(index, half): octets for index, (half, octets) in rings.items()},),
        LISTENERS: (_listeners(parts, rings, around),),
        DNAT_RETURNS: (_dnat_returns(parts, around),),
    }
    stays = maps[LISTENERS] == before.maps.get(LISTENERS) and all(
        _same(maps[name], before.maps.get(name, ())) for name in (SERVERS, CID_CONFIGS)
    )
    generation = before.generation if stays else next_generation(next_generation(before.generation))
    return Image(allocation, maps, rings, parts, generation)


def next_generation(generation: int) -> int:
    """Another one, and never 0."""
    return generation % 0xFFFFFFFF + 1


def ring_index(service: int, half: int) -> bytes:
    """The key of one of a service's two rings."""
    return U32_KEY.pack(service + half * MAX_SERVICES)


def occupants(table: RoutingTable) -> list[Occupant]:
    """Who of a service needs a slot, in the order of its backends."""
    return [Occupant(table.service.name, backend.name, backend.address) for backend in table.backends]


def endpoint(address: Address) -> bytes:
    return ENDPOINT.pack(layout.Endpoint(packed(address.host), address.port.to_bytes(2)))


def cid_config(config: CidConfig) -> bytes:
    """How the program is told to take CIDs apart. The halves of a block with an odd length share its middle octet."""
    length = config.routing_block_length
    algorithm = Algorithm.FOUR_PASS
    if config.key is None:
        algorithm = Algorithm.PLAINTEXT
    elif length == layout.AES_BLOCK:
        algorithm = Algorithm.SINGLE_PASS
    half = (1 << 4 * length) - 1  # as many bits as there are in half a block
    octets = (length + 1) // 2  # that a half has bits in
    shared = 4 * (length % 2)  # bits of them that are the other half's
    return CID_CONFIG.pack(
        layout.CidConfig(
            algorithm=algorithm,
            block_length=length,
            block_end=1 + length,
            cid_length=config.cid_length,
            encodes_length=config.encodes_length,
            right_at=length // 2,
            needs_last_pass=2 * config.server_id_length > length,
            server_id_length=config.server_id_length,
            left_mask=(half << shared).to_bytes(octets).ljust(16, b"\0"),
            right_mask=half.to_bytes(octets).ljust(16, b"\0"),
            server_id_mask=(b"\xff" * config.server_id_length).ljust(16, b"\0"),
            cid_mask=_cid_mask(config).ljust(24, b"\0"),
            **_schedules(config.key),
        )
    )


def token_key(key: TokenKey) -> bytes:
    """How the program is told to make tokens."""
    lengths = (len(key.key), len(key.suffix))
    return RESET_KEY.pack(layout.ResetKey(key.key, key.suffix, bytes(32), bytes(32), 0, key.arithmetic, *lengths))


def _cid_mask(config: CidConfig) -> bytes:
    """The bits of a CID that its server depends on. A nonce that is not encrypted would only fill the cache."""
    decides = config.routing_block_length if config.key is not None else config.server_id_length
    return bytes((0b1110_0000,)) + b"\xff" * decides


@lru_cache(maxsize=KEY_SCHEDULES)
def _schedules(key: bytes | None) -> dict[str, bytes]:
    if key is None:
        return dict.fromkeys(("encrypt_key", "decrypt_key", "sliced_key"), bytes(176))
    return {
        "encrypt_key": aes128.encrypt_schedule(key),
        "decrypt_key": aes128.decrypt_schedule(key),
        "sliced_key": aes128.sliced_schedule(key),
    }


def _same(some: tuple[Entries, ...], others: tuple[Entries, ...]) -> bool:
    """Whether they are the same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _part(
    table: RoutingTable,
    allocation: Allocation,
    whose: Sequence[Occupant],
    hops: Mapping[str, NextHop],
    before: ServicePart | None,
) -> ServicePart:
    """One service's contribution. `before` is what it was, if the very same service was there."""
    service = table.service
    index = allocation.services[service.name]
    slots = before.slots if before is not None else tuple(map(allocation.backends.__getitem__, whose))
    ways = tuple(zip(_actions(table), [hops.get(b.address.host) for b in service.backends], strict=True))

    if before is None:
        backends: Entries = {
            U32_KEY.pack(slot.number): _backend(backend.address, slot, way, index)
            for backend, slot, way in zip(service.backends, slots, ways, strict=True)
        }
        names: Entries = {
            U32_KEY.pack(slot.number): _name(f"{service.name}/{backend.name}")
            for backend, slot in zip(service.backends, slots, strict=True)
        }
        servers = _servers(table, index, slots)
        cid_configs: Entries = {
            U32_KEY.pack(index * CONFIG_SLOTS + slot.config.config_id): cid_config(slot.config)
            for slot in service.cid_slots
        }
    else:
        backends, names, servers, cid_configs = before.backends, before.names, before.servers, before.cid_configs
        changed = [at for at, (way, was) in enumerate(zip(ways, before.ways, strict=True)) if way != was]
        if changed:
            backends = dict(backends)
            for at in changed:
                backends[U32_KEY.pack(slots[at].number)] = _backend(
                    service.backends[at].address, slots[at], ways[at], index
                )

    is_same_ring = before is not None and before.table.ring is table.ring
    ring = before.ring if before is not None and is_same_ring else _ring(table.ring, slots)
    reset_keys = _reset_keys(table, index, ways)
    if before is not None and before.reset_keys == reset_keys:
        reset_keys = before.reset_keys
    return ServicePart(table, index, whose, slots, ways, ring, backends, servers, cid_configs, reset_keys, names)


def _actions(table: RoutingTable) -> list[Action]:
    """What becomes of CIDs of each backend. Whether a dead one's are answered is up to its reset keys."""
    return [
        Action.FORWARD
        if state is not BackendState.DOWN or (table.fail_open and backend.name not in table.fenced)
        else Action.RESET
        if backend.name in table.dead
        else Action.FORWARD_DOWN
        for backend, state in zip(table.backends, table.states, strict=True)
    ]


def _backend(address: Address, slot: Slot, way: tuple[Action, NextHop | None], service: int) -> bytes:
    action, hop = way
    incarnation = slot.incarnation
    mac, mtu = hop or (NO_MAC, 0)
    host, port = packed(address.host), address.port.to_bytes(2)
    # Fields by position, and no Backend in between: there are many.
    return BACKEND.struct.pack(
        host, port, mac, incarnation, action, address.is_ipv6, mtu, service, incarnation, BACKEND_ZERO
    )


def _freed(allocation: Allocation, before: Image) -> Entries:
    """Slots that somebody was in: nobody is there, and what the next one's incarnation must not be."""
    if allocation is before.allocation:
        return before.maps[BACKENDS][-1]
    taken = {slot.number for slot in allocation.backends.values()}
    nobody = layout.Backend(bytes(16), bytes(2), NO_MAC, 0, 0, 0, 0, 0, 0)
    return {
        U32_KEY.pack(number): BACKEND.pack(nobody._replace(last_incarnation=incarnation))
        for number, incarnation in allocation.incarnations.items()
        if number not in taken
    }


def _servers(table: RoutingTable, index: int, slots: Sequence[Slot]) -> Entries:
    found: dict[bytes, bytes] = {}
    for backend, slot in zip(table.backends, slots, strict=True):
        value = SERVER.pack(layout.Server(slot.number))
        for config_id, server_ids in backend.server_ids.items():
            found.update(zip(_server_keys(index, config_id, server_ids), repeat(value)))
    return found


def _server_keys(index: int, config_id: int, server_ids: Iterable[bytes]) -> Iterator[bytes]:
    """Keys of `servers`. There are many: no function of ours is called for each."""
    return map(SERVER_KEY.struct.pack, repeat(index << 8 | config_id), server_ids)


def _reset_keys(table: RoutingTable, index: int, ways: Sequence[tuple[Action, NextHop | None]]) -> Entries:
    found = {}
    for backend, (action, _) in zip(table.backends, ways, strict=True):
        if action is not Action.RESET:
            continue
        for config_id, server_ids in backend.server_ids.items():
            servers = table.servers(config_id)
            for server_id, key in zip(server_ids, _server_keys(index, config_id, server_ids), strict=False):
                reset_key = servers[server_id].reset_key if server_id in servers else None
                if reset_key is not None:
                    found[key] = token_key(reset_key)
    return found


def _ring(ring: array[int], slots: Sequence[Slot]) -> bytes:
    """The table's ring, with slots in place of positions."""
    if not ring:
        return NO_RING
    numbers = [slot.number for slot in slots]
    first = numbers[0]
    if numbers == list(range(first, first + len(numbers))):
        # Mostly they are, and then one addition of large integers does it, ten times faster: no sum needs a 17th bit.
        every = int.from_bytes(first.to_bytes(2, "little") * RING_SLOTS, "little")
        return (int.from_bytes(ring.tobytes(), "little") + every).to_bytes(2 * RING_SLOTS, "little")
    return array("H", [numbers[position] for position in ring]).tobytes()


def _listeners(
    parts: Mapping[str, ServicePart], rings: Mapping[int, tuple[int, bytes]], around: Surroundings
) -> Entries:
    """Endpoints and their services. An address of its own goes before a wildcard."""
    found: dict[bytes, bytes] = {}
    for is_wildcard in (False, True):
        for name, part in parts.items():
            value = _service(part, around.policies[name], rings[part.index][0], around.cpus)
            for listen in part.table.service.listen:
                if listen.is_wildcard is is_wildcard:
                    for address in _local(listen, around.addresses):
                        found.setdefault(endpoint(address), value)
                        found.setdefault(endpoint(address._replace(port=0)), value)  # fragments have no port
    return found


def _local(listen: Address, addresses: Sequence[str]) -> list[Address]:
    """What a listening address means on our interface."""
    if not listen.is_wildcard:
        return [listen]
    all_of_them = [Address(host, listen.port) for host in addresses]
    return [address for address in all_of_them if address.is_ipv6 == listen.is_ipv6]


def _service(part: ServicePart, policy: ServicePolicy, half: int, cpus: int) -> bytes:
    limits = policy.router
    return SERVICE.pack(
        layout.Service(
            ring_seed=part.table.ring_seed,
            index=part.index,
            drops_unknown_servers=part.table.service.unknown_server is UnknownServer.DROP,
            new_flows_rate=math.ceil(limits.new_flows_rate),
            reset_rate=math.ceil(limits.reset_rate / cpus),
            reset_prefix_rate=math.ceil(limits.reset_prefix_rate),
            ring=part.index + half * MAX_SERVICES,
        )
    )


def _dnat_returns(parts: Mapping[str, ServicePart], around: Surroundings) -> Entries:
    """Backends' endpoints, and the first address of their family that their service listens on."""
    if around.forward is not Forward.DNAT:
        return {}
    found = {}
    for part in parts.values():
        listens = [a for listen in part.table.service.listen for a in _local(listen, around.addresses)]
        for backend, slot in zip(part.table.backends, part.slots, strict=True):
            vip = next((listen for listen in listens if listen.is_ipv6 == backend.address.is_ipv6), None)
            if vip is not None:
                found[endpoint(backend.address)] = DNAT_RETURN.pack(
                    layout.DnatReturn(packed(vip.host), vip.port.to_bytes(2), 0, slot.number)
                )
    return found


def _name(name: str) -> bytes:
    return SLOT_NAMES.struct.pack(name.encode())
