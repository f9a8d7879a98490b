"""Routing tables as octets: what they say, and that no packet ever sees half of a change."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.address import Address, packed
from lb.cid import MAX_ROUTING_BLOCK, CidConfig, Codec, ConfigId, ServerId
from lb.forward import Forward
from lb.reset_scheme import MAX_KEY, MAX_SUFFIX, Arithmetic, TokenKey
from lb.router import RouterLimits
from lb.routing import (
    RING_SLOTS,
    Action,
    Backend,
    BackendState,
    CidSlot,
    RoutingTable,
    Service,
    UnknownServer,
)
from lb.upstream import ServicePolicy
from lb.xdp import layout
from lb.xdp.difference import GENERATION, Step, difference, overfull
from lb.xdp.image import (
    BACKEND_NAMES,
    BACKENDS,
    CID_CONFIGS,
    DNAT_RETURNS,
    LISTENERS,
    RESET_KEYS,
    RINGS,
    SERVERS,
    SERVICE_NAMES,
    Image,
    NextHop,
    Surroundings,
    cid_config,
    endpoint,
    render,
    token_key,
)
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
from lb.xdp.slots import Allocation
from tests.builders import CONFIG, KEY, VIP, backends, server_id, service
from tests.builders import RESET_KEY as MASTER_KEY

MAC = bytes.fromhex("020000000001")
POLICY = ServicePolicy(router=RouterLimits(reset_rate=1001, reset_prefix_rate=0.5), push_rate=0, silence=0)
NOTHING = Image(Allocation(64))
ALL_SERVICES = ("web", "dns", "mail")
AROUND = Surroundings(
    forward=Forward.NAT,
    policies=dict.fromkeys(ALL_SERVICES, POLICY),
    addresses=("192.0.2.9", "192.0.2.10", "2001:db8::9"),
    hops={f"10.0.0.{i}": NextHop(MAC, 1500) for i in range(16)},
    cpus=4,
)
DOWN = BackendState.DOWN


def slots_of(ring: bytes) -> array[int]:
    return array("H", ring)


def backend_of(image: Image, service: str, position: int) -> layout.Backend:
    key = U32_KEY.pack(image.parts[service].slots[position].number)
    return BACKEND.unpack(image.entries(BACKENDS)[key])


def test_a_service_is_found_by_its_endpoint_and_its_address() -> None:
    table = RoutingTable.build(service(2, unknown_server=UnknownServer.DROP))
    image = render([table], AROUND, NOTHING)
    listeners = {ENDPOINT.unpack(k): SERVICE.unpack(v) for k, v in image.entries(LISTENERS).items()}
    expected = layout.Service(
        ring_seed=table.ring_seed,
        index=0,
        drops_unknown_servers=1,
        new_flows_rate=10_000,
        reset_rate=251,  # of 1001, by 4 CPUs
        reset_prefix_rate=1,
        ring=0,
    )
    address = packed(VIP.host)
    assert listeners == {
        layout.Endpoint(address, (443).to_bytes(2)): expected,
        layout.Endpoint(address, bytes(2)): expected,
    }


def test_a_wildcard_is_every_address_of_the_interface_but_those_that_are_taken() -> None:
    everywhere = replace(service(1), name="dns", listen=(Address("0.0.0.0", 443), Address("::", 444)))
    web = replace(service(1), listen=(Address("192.0.2.9", 443),))
    image = render([RoutingTable.build(everywhere), RoutingTable.build(web)], AROUND, NOTHING)
    found = {key: SERVICE.unpack(value).index for key, value in image.entries(LISTENERS).items()}
    assert found == {
        endpoint(Address("192.0.2.9", 443)): 1,
        endpoint(Address("192.0.2.9", 0)): 1,
        endpoint(Address("192.0.2.10", 443)): 0,
        endpoint(Address("192.0.2.10", 0)): 0,
        endpoint(Address("2001:db8::9", 444)): 0,
        endpoint(Address("2001:db8::9", 0)): 0,
    }


@pytest.mark.parametrize(
    ("states", "dead", "actions"),
    [
        ({}, [], [Action.FORWARD] * 3),
        ({"b1": BackendState.DRAINING}, [], [Action.FORWARD] * 3),
        ({"b1": DOWN}, [], [Action.FORWARD, Action.FORWARD_DOWN, Action.FORWARD]),
        ({"b1": DOWN, "b2": DOWN}, ["b2"], [Action.FORWARD, Action.FORWARD_DOWN, Action.RESET]),
        (dict.fromkeys(("b0", "b1", "b2"), DOWN), ["b0", "b1", "b2"], [Action.FORWARD] * 3),
    ],
)
def test_actions_are_those_of_the_routing_table(
    states: Mapping[str, BackendState], dead: Sequence[str], actions: Sequence[Action]
) -> None:
    table = RoutingTable.build(service(3), states, dead)
    image = render([table], AROUND, NOTHING)
    assert [backend_of(image, "web", i).action for i in range(3)] == actions
    assert [table.servers(ConfigId(0))[server_id(i)].action for i in range(3)] == actions


def test_a_backend_is_where_it_is_and_how_to_get_there() -> None:
    members = (
        Backend("near", Address("10.0.0.1", 443), {}),
        Backend("far", Address("2001:db8:f::1", 4433), {}),
    )
    image = render([RoutingTable.build(service(members=members))], AROUND, NOTHING)
    assert backend_of(image, "web", 0) == layout.Backend(
        address=packed("10.0.0.1"),
        port=(443).to_bytes(2),
        next_hop=MAC,
        incarnation=1,
        action=0,
        is_ipv6=0,
        mtu=1500,
        service=0,
        last_incarnation=1,
    )
    assert backend_of(image, "web", 1) == layout.Backend(
        address=packed("2001:db8:f::1"),
        port=(4433).to_bytes(2),
        next_hop=NO_MAC,
        incarnation=1,
        action=0,
        is_ipv6=1,
        mtu=0,
        service=0,
        last_incarnation=1,
    )
    names = {SLOT_NAMES.unpack(name).name.rstrip(b"\0") for name in image.entries(BACKEND_NAMES).values()}
    assert names == {b"web/near", b"web/far"}


def test_server_ids_lead_to_slots_and_only_the_dead_have_reset_keys() -> None:
    slots = (CidSlot(CONFIG, MASTER_KEY), CidSlot(replace(CONFIG, config_id=ConfigId(3)), None))
    table = RoutingTable.build(service(3, slots=slots), {"b1": DOWN, "b2": DOWN}, ["b2"])
    image = render([table], AROUND, NOTHING)
    servers = {SERVER_KEY.unpack(k): SERVER.unpack(v).backend for k, v in image.entries(SERVERS).items()}
    assert servers == {
        layout.ServerKey(config_id, server_id(i).ljust(16, b"\0")): i for config_id in (0, 3) for i in range(3)
    }
    own = table.servers(ConfigId(0))[server_id(2)].reset_key
    assert own is not None
    assert {SERVER_KEY.unpack(key): value for key, value in image.entries(RESET_KEYS).items()} == {
        layout.ServerKey(0, server_id(2).ljust(16, b"\0")): token_key(own)
    }


@given(st.sampled_from(Arithmetic), st.binary(max_size=MAX_KEY), st.binary(max_size=MAX_SUFFIX))
def test_a_token_key_is_all_there(arithmetic: Arithmetic, key: bytes, suffix: bytes) -> None:
    there = RESET_KEY.unpack(token_key(TokenKey(arithmetic, key, suffix)))
    assert (there.arithmetic, there.key[: there.key_length], there.suffix[: there.suffix_length]) == (
        arithmetic,
        key,
        suffix,
    )
    assert not any(there.key[there.key_length :] + there.suffix[there.suffix_length :] + there.inner + there.outer)
    assert not there.is_prepared


@pytest.mark.parametrize("leaves", [False, True], ids=["slots in order", "slots in disorder"])
def test_the_ring_names_slots_where_the_table_has_positions(leaves: bool) -> None:
    other = replace(service(3), name="dns", listen=(Address("192.0.2.2", 443),))
    before = render([RoutingTable.build(other), RoutingTable.build(service(2))], AROUND, NOTHING)
    table = RoutingTable.build(service(4) if leaves else service(2))
    image = render([RoutingTable.build(other), table], AROUND, before)
    part = image.parts["web"]
    assert [slot.number for slot in part.slots] == [3, 4, 5, 6][: len(part.slots)]
    assert slots_of(part.ring) == array("H", [part.slots[position].number for position in table.ring])


def test_backends_without_weight_make_a_ring_of_nobody() -> None:
    members = tuple(replace(backend, weight=0) for backend in backends(2))
    image = render([RoutingTable.build(service(members=members))], AROUND, NOTHING)
    assert set(slots_of(image.parts["web"].ring)) == {NO_BACKEND_SLOT}


def test_dnat_knows_what_clients_call_a_backend() -> None:
    listen = (Address("192.0.2.1", 443), Address("2001:db8::1", 8443), Address("192.0.2.2", 443))
    members = (Backend("four", Address("10.0.0.1", 1), {}), Backend("six", Address("2001:db8:f::1", 2), {}))
    table = RoutingTable.build(service(listen=listen, members=members))
    image = render([table], replace(AROUND, forward=Forward.DNAT), NOTHING)
    assert {k: DNAT_RETURN.unpack(v) for k, v in image.entries(DNAT_RETURNS).items()} == {
        endpoint(Address("10.0.0.1", 1)): layout.DnatReturn(packed("192.0.2.1"), (443).to_bytes(2), 0, 0),
        endpoint(Address("2001:db8:f::1", 2)): layout.DnatReturn(packed("2001:db8::1"), (8443).to_bytes(2), 0, 1),
    }
    assert render([table], AROUND, NOTHING).entries(DNAT_RETURNS) == {}


LENGTHS = [
    (server, nonce) for server in range(1, MAX_ROUTING_BLOCK - 3) for nonce in range(4, MAX_ROUTING_BLOCK - server + 1)
]


@pytest.mark.parametrize("key", [None, KEY], ids=["plaintext", "encrypted"])
@pytest.mark.parametrize(("server", "nonce"), LENGTHS)
def test_masks_take_every_cid_apart(server: int, nonce: int, key: bytes | None) -> None:
    """As cid.h does it, in integers: the server ID that went in comes out."""
    config = CidConfig(ConfigId(2), server, nonce, key)
    told = CID_CONFIG.unpack(cid_config(config))
    wanted = bytes(range(0xE1, 0xE1 + server))
    cid = Codec(config).encode(wanted, bytes(range(0x51, 0x51 + nonce)))
    assert told.block_end == len(cid) == told.cid_length
    decides = server + nonce if key else server  # a nonce in the clear says nothing about the server
    assert told.cid_mask == (b"\xe0" + b"\xff" * decides).ljust(24, b"\0")
    assert _server_id(told, cid[1:] + b"\xee" * 15) == wanted.ljust(16, b"\0")


def _server_id(told: layout.CidConfig, block: bytes) -> bytes:
    cipher = Cipher(algorithms.AES(told.encrypt_key[:16]), modes.ECB())  # noqa: S305 - a schedule begins with its key
    found = block[:16]
    if told.algorithm == Algorithm.SINGLE_PASS:
        found = cipher.decryptor().update(found)
    elif told.algorithm == Algorithm.FOUR_PASS:
        left = _and(block[:16], told.left_mask)
        right = _and(block[told.right_at :][:16], told.right_mask)
        for number in (4, 3, 2, 1):
            source, mask = (right, told.left_mask) if number % 2 == 0 else (left, told.right_mask)
            if number == 1 and not told.needs_last_pass:
                right = bytes(16)
                break
            change = cipher.encryptor().update(source[:14] + bytes((told.block_length, number)))
            change = _and(change, mask)
            if number % 2 == 0:
                left = bytes(a ^ b for a, b in zip(left, change, strict=True))
            else:
                right = bytes(a ^ b for a, b in zip(right, change, strict=True))
        shifted = (bytes(told.right_at) + right)[:16]
        found = bytes(a | b for a, b in zip(left, shifted, strict=True))
    return _and(found, told.server_id_mask)


def _and(octets: bytes, mask: bytes) -> bytes:
    return bytes(a & b for a, b in zip(octets, mask, strict=True))


def test_a_state_change_writes_the_backend_the_other_ring_and_the_listeners() -> None:
    members = service(4)
    before = render([RoutingTable.build(members)], AROUND, NOTHING)
    after = render([RoutingTable.build(members, {"b1": DOWN})], AROUND, before)
    steps = difference(before, after)
    assert [(step.map, len(step.updates), len(step.deletes)) for step in steps] == [
        (BACKENDS, 1, 0),
        (RINGS, 1, 0),
        (LISTENERS, 2, 0),
        (GENERATION, 1, 0),
        (GENERATION, 1, 0),
    ]
    assert list(steps[1].updates) == [U32_KEY.pack(MAX_SERVICES)]
    assert difference(after, render([RoutingTable.build(members, {"b1": DOWN})], AROUND, after)) == []
    back = render([RoutingTable.build(members)], AROUND, after)
    assert back.entries(LISTENERS) == before.entries(LISTENERS)


def test_a_new_mac_address_writes_one_backend() -> None:
    table = RoutingTable.build(service(4))
    before = render([table], AROUND, NOTHING)
    elsewhere = replace(AROUND, hops={**AROUND.hops, "10.0.0.2": NextHop(bytes.fromhex("0200000000ff"), 1400)})
    steps = difference(before, render([table], elsewhere, before))
    assert [(step.map, len(step.updates), len(step.deletes)) for step in steps] == [(BACKENDS, 1, 0)]


def test_a_changed_key_is_never_used_half() -> None:
    before = render([RoutingTable.build(service(2))], AROUND, NOTHING)
    slots = (CidSlot(replace(CONFIG, key=bytes(16)), MASTER_KEY),)
    after = render([RoutingTable.build(service(2, slots=slots))], AROUND, before)
    written = [step for step in difference(before, after) if step.map in (CID_CONFIGS, GENERATION)]
    disabled, whole, _, generation = written
    body = cid_config(slots[0].config)
    assert disabled == Step(CID_CONFIGS, {U32_KEY.pack(0): bytes((Algorithm.NONE,)) + body[1:]})
    assert whole == Step(CID_CONFIGS, {U32_KEY.pack(0): body})
    assert generation.updates == {U32_KEY.pack(0): U32_KEY.pack(after.generation)}
    assert after.generation != before.generation


def test_reset_keys_are_there_before_a_backend_is_dead_and_until_it_is_not() -> None:
    members = service(4)
    before = render([RoutingTable.build(members, {"b1": DOWN})], AROUND, NOTHING)
    dead = render([RoutingTable.build(members, {"b1": DOWN}, ["b1"])], AROUND, before)
    assert [step.map for step in difference(before, dead)] == [RESET_KEYS, BACKENDS]
    assert [step.map for step in difference(dead, before)] == [BACKENDS, RESET_KEYS]


def test_a_newcomer_counts_from_zero() -> None:
    first = render([RoutingTable.build(service(2))], AROUND, NOTHING)
    then = render([RoutingTable.build(service(3))], AROUND, first)
    cleared = [(step.map, list(step.deletes)) for step in difference(first, then) if step.map.endswith("_count")]
    assert cleared == [("backend_count", [U32_KEY.pack(2)])]


def test_a_map_that_would_be_too_full_is_named() -> None:
    image = render([RoutingTable.build(service(4))], AROUND, NOTHING)
    steps = difference(NOTHING, image)
    room = dict.fromkeys((step.map for step in steps), 100)
    assert overfull(NOTHING, steps, room) is None
    assert overfull(NOTHING, steps, room | {SERVERS: 3}) == "map servers has room for 3 entries, and 4 are needed"
    other = render([RoutingTable.build(service(members=backends(8)[4:]))], AROUND, image)
    steps = difference(image, other)
    assert overfull(image, steps, room | {SERVERS: 7}) == "map servers has room for 7 entries, and 8 are needed"
    assert overfull(image, steps, room | {SERVERS: 8}) is None


# What a packet sees.


class Kernel:
    """The maps as the program sees them, and everything that any packet could look up in them."""

    def __init__(self) -> None:
        self.maps: defaultdict[str, dict[bytes, bytes]] = defaultdict(dict)
        self.generation = 1
        self.listeners: dict[bytes, tuple[bytes, int]] = {}  # what a CPU has cached, and its generation
        self.servers: dict[bytes, tuple[bytes, int]] = {}

    def write(self, step: Step) -> Iterator[None]:
        """Yields whenever a packet could come."""
        into = self.maps[step.map]
        for key, value in step.updates.items():
            if step.map == GENERATION:
                self.generation = U32_KEY.unpack(value)[0]
            into[key] = value
            yield
        for key in step.deletes:
            into.pop(key, None)
            yield

    def look(self, after: Image) -> None:
        """Look up what packets could, from every endpoint on, and find no loose end on the way to `after`."""
        reset_keys = after.entries(RESET_KEYS)
        backends, rings = self.maps[BACKENDS], self.maps[RINGS]
        valid = {key: cached for key, cached in self.listeners.items() if cached[1] == self.generation}
        self.listeners = {key: (value, self.generation) for key, value in self.maps[LISTENERS].items()} | valid
        for value, _ in self.listeners.values():
            found = SERVICE.unpack(value)
            assert U32_KEY.pack(found.index) in self.maps[SERVICE_NAMES]
            ring = rings[U32_KEY.pack(found.ring)]
            for slot in distinct(ring) - {NO_BACKEND_SLOT}:
                self.look_at(U32_KEY.pack(slot), found.index, backends)
            for config_id in range(CONFIG_SLOTS):
                config = self.maps[CID_CONFIGS].get(U32_KEY.pack(found.index * CONFIG_SLOTS + config_id))
                if config is not None and config[0] != Algorithm.NONE:
                    self.look_at_servers(found.index, config_id, backends, reset_keys)

    def look_at_servers(
        self, index: int, config_id: int, backends: Mapping[bytes, bytes], reset_keys: Mapping[bytes, bytes]
    ) -> None:
        prefix = U32_KEY.pack(index << 8 | config_id)
        for key, slot in self.maps[SERVERS].items():
            if not key.startswith(prefix):
                continue
            backend = self.look_at(slot, index, backends)
            if backend.action == Action.RESET and key in reset_keys:
                assert key in self.maps[RESET_KEYS]
            known = self.servers.get(key)
            if known is None or known[1] != self.generation:
                self.servers[key] = slot, self.generation
            elif BACKEND.unpack(backends[known[0]]).incarnation:  # an empty slot is decoded anew
                self.look_at(known[0], index, backends)

    def look_at(self, slot: bytes, index: int, backends: Mapping[bytes, bytes]) -> layout.Backend:
        backend = BACKEND.unpack(backends[slot])
        assert backend.incarnation
        assert backend.incarnation == backend.last_incarnation
        assert backend.service == index
        assert slot in self.maps[BACKEND_NAMES]
        return backend


@cache
def distinct(ring: bytes) -> set[int]:
    return set(slots_of(ring))


@cache
def simple_ring(members: tuple[int, ...]) -> array[int]:
    """Not Maglev's, which takes its time."""
    return array("H", [members[i % len(members)] for i in range(RING_SLOTS)]) if members else array("H")


SELDOM = st.sampled_from((0, 0, 0, 0, 1))


@st.composite
def tables(draw: st.DrawFn) -> list[RoutingTable]:
    """Some services, each with some backends in some states: a step in an operator's life."""
    found = []
    for number, name in enumerate(ALL_SERVICES):
        if not draw(st.booleans()):
            continue
        config_ids = draw(st.sets(st.integers(0, 2), max_size=2))
        configs = [CidConfig(ConfigId(c), 4, 12, draw(st.sampled_from((KEY, None)))) for c in sorted(config_ids)]
        members = []
        for i in draw(st.lists(st.integers(0, 3), unique=True, max_size=4)):
            moved, renamed = draw(SELDOM) * 8 + i, draw(SELDOM) * 8 + i
            host = f"10.0.{number}.{moved}"
            ids = {c.config_id: frozenset([ServerId(server_id(renamed))]) for c in configs}
            members.append(Backend(f"b{i}", Address(host, 443), ids))
        listen = tuple(Address(f"192.0.2.{n}", 443) for n in draw(st.sets(st.integers(0, 3), max_size=2)))
        states = {b.name: draw(st.sampled_from(BackendState)) for b in members}
        dead = [b.name for b in members if draw(st.booleans())]
        active = tuple(i for i, b in enumerate(members) if states[b.name] is BackendState.ACTIVE)
        slots = tuple(CidSlot(c, MASTER_KEY) for c in configs)
        changed = Service(name, listen, slots, tuple(members), "a seed")
        found.append(RoutingTable(changed, states, frozenset(dead), simple_ring(active)))
    return found


@settings(max_examples=150)
@given(st.lists(tables(), min_size=2, max_size=5))
def test_no_packet_ever_finds_a_loose_end(life: list[list[RoutingTable]]) -> None:
    kernel = Kernel()
    image = NOTHING
    for now in life:
        after = render(now, AROUND, image)
        for step in difference(image, after):
            for _ in kernel.write(step):
                kernel.look(after)
        for name in (LISTENERS, SERVERS, RESET_KEYS, CID_CONFIGS, BACKENDS, BACKEND_NAMES, SERVICE_NAMES):
            assert kernel.maps[name] == after.entries(name), name
        for key, ring in after.entries(RINGS).items():
            assert kernel.maps[RINGS][key] == ring
        assert kernel.generation == after.generation
        image = after


@settings(max_examples=50)
@given(tables(), tables())
def test_the_difference_the_other_way_undoes_a_change(one: list[RoutingTable], other: list[RoutingTable]) -> None:
    """Even one that was broken off half-way."""
    before = render(one, AROUND, NOTHING)
    after = render(other, AROUND, before)
    forth, back = difference(before, after), difference(after, before)
    for broken_off in range(len(forth) + 1):
        kernel = Kernel()
        for step in [*difference(NOTHING, before), *forth[:broken_off], *back]:
            list(kernel.write(step))
        for name in (LISTENERS, SERVERS, RESET_KEYS, CID_CONFIGS, BACKEND_NAMES, SERVICE_NAMES):
            assert kernel.maps[name] == before.entries(name), name
        for key, value in before.entries(BACKENDS).items():
            assert kernel.maps[BACKENDS][key] == value
