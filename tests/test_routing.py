"""lb/routing.py: the ring, and every answer that a connection ID can get."""

from __future__ import annotations

import ipaddress
import pickle
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId, ServerId
from lb.reset import server_reset_key
from lb.reset_scheme import hmac_sha256
from lb.routing import (
    RING_SLOTS,
    Action,
    Backend,
    BackendState,
    CidSlot,
    FourTuple,
    RoutingTable,
    Server,
    Service,
    Unroutable,
    maglev_ring,
    ring_slot,
)

ACTIVE, DRAINING, DOWN = BackendState
KEY = bytes.fromhex("00112233445566778899aabbccddeeff")
MASTER = bytes(range(32))
WITH_RESETS = CidConfig(ConfigId(0), 4, 12, KEY)
WITHOUT_RESETS = CidConfig(ConfigId(1), 3, 6, KEY)
OF_NOBODY = CidConfig(ConfigId(2), 4, 4)
FREE_LENGTH = CidConfig(ConfigId(3), 4, 4, encodes_length=False, appended_length=2)
NAMES = ("a", "b", "c")
FLOWS = [FourTuple(f"192.0.2.{i % 250}", 1024 + i, "198.51.100.1", 443) for i in range(500)]


def server_id(config: CidConfig, name: str) -> ServerId:
    return ServerId(name.encode().ljust(config.server_id_length, b"-"))


def make_service(names: Iterable[str] = NAMES, *, seed: str = "", weights: Mapping[str, int] | None = None) -> Service:
    slots = (
        CidSlot(WITH_RESETS, MASTER),
        CidSlot(WITHOUT_RESETS),
        CidSlot(OF_NOBODY, MASTER),
        CidSlot(FREE_LENGTH),
    )
    backends = tuple(
        Backend(
            name,
            Address("192.0.2.1", 4430 + i),
            {c.config_id: frozenset({server_id(c, name)}) for c in (WITH_RESETS, WITHOUT_RESETS, FREE_LENGTH)},
            (weights or {}).get(name, 1),
        )
        for i, name in enumerate(names)
    )
    return Service("web", (Address("198.51.100.1", 443),), slots, backends, seed)


def make_cid(config: CidConfig, name: str) -> bytes:
    return Codec(config).encode(
        server_id(config, name), bytes(config.nonce_length), appended=bytes(config.appended_length)
    )


def owners(ring: Iterable[int], names: Mapping[int, str]) -> list[str]:
    return [names[number] for number in ring]


def members(names: Iterable[str], weight: int = 1) -> tuple[tuple[int, str, int], ...]:
    return tuple((number, name, weight) for number, name in enumerate(names))


# What a CID says.


@pytest.mark.parametrize(
    ("states", "dead", "with_resets", "without_resets"),
    [
        ({}, (), Action.FORWARD, Action.FORWARD),
        ({"a": ACTIVE}, (), Action.FORWARD, Action.FORWARD),
        ({"a": DRAINING}, (), Action.FORWARD, Action.FORWARD),
        ({"a": DOWN}, (), Action.FORWARD_DOWN, Action.FORWARD_DOWN),
        ({"a": DOWN}, ("b",), Action.FORWARD_DOWN, Action.FORWARD_DOWN),
        ({"a": DOWN}, ("a",), Action.RESET, Unroutable.DEAD_SERVER),
        ({"a": ACTIVE}, ("a",), Action.FORWARD, Action.FORWARD),  # only who is DOWN can be dead
        ({"a": DRAINING}, ("a",), Action.FORWARD, Action.FORWARD),
        ({"a": DOWN, "b": DOWN, "c": DRAINING}, ("a",), Action.RESET, Unroutable.DEAD_SERVER),
        ({"a": DOWN, "b": DOWN, "c": DOWN}, ("a", "b"), Action.FORWARD, Action.FORWARD),  # fails open
        ({"nobody": DOWN}, ("nobody",), Action.FORWARD, Action.FORWARD),
    ],
)
def test_what_becomes_of_a_servers_cids(
    states: dict[str, BackendState],
    dead: tuple[str, ...],
    with_resets: Action,
    without_resets: Action | Unroutable,
) -> None:
    table = RoutingTable.build(make_service(), states, dead)
    reset_key = hmac_sha256(server_reset_key(MASTER, ConfigId(0), server_id(WITH_RESETS, "a")))
    assert table.by_cid(make_cid(WITH_RESETS, "a")) == Server(0, with_resets, ConfigId(0), reset_key)
    expected = (
        without_resets if isinstance(without_resets, Unroutable) else Server(0, without_resets, ConfigId(1), None)
    )
    assert table.by_cid(make_cid(WITHOUT_RESETS, "a")) == expected


@pytest.mark.parametrize(
    ("dcid", "reason"),
    [
        (b"", Unroutable.NO_CID),
        (b"\x80" + bytes(19), Unroutable.NO_CONFIG),
        (b"\xdf" + bytes(254), Unroutable.NO_CONFIG),
        (b"\xe0" + bytes(19), Unroutable.CODEPOINT_7),
        (b"\xff", Unroutable.CODEPOINT_7),
        (b"\x00", Unroutable.TOO_SHORT),
        (make_cid(WITH_RESETS, "a")[:-1], Unroutable.TOO_SHORT),
        (make_cid(WITHOUT_RESETS, "a")[:-1], Unroutable.TOO_SHORT),
        (make_cid(OF_NOBODY, "a")[:8], Unroutable.TOO_SHORT),  # the server ID is there, the nonce is not
        (make_cid(WITH_RESETS, "d"), Unroutable.UNKNOWN_SERVER),
        (make_cid(OF_NOBODY, "a"), Unroutable.UNKNOWN_SERVER),  # a's, but not under this configuration
    ],
    ids=lambda value: value.name if isinstance(value, Unroutable) else None,
)
def test_why_a_cid_is_unroutable(dcid: bytes, reason: Unroutable) -> None:
    assert RoutingTable.build(make_service()).by_cid(dcid) is reason


def test_octets_after_a_cid_and_the_five_low_bits_do_not_matter() -> None:
    table = RoutingTable.build(make_service())
    for name, position in (("a", 0), ("b", 1), ("c", 2)):
        cid = make_cid(WITH_RESETS, name)
        for low_bits in range(32):
            found = table.by_cid(bytes([low_bits]) + cid[1:] + b"payload")
            assert isinstance(found, Server)
            assert found.backend == position


@settings(deadline=None)
@given(dcid=st.binary(max_size=300))
def test_every_dcid_gets_an_answer(dcid: bytes) -> None:
    assert isinstance(TABLE.by_cid(dcid), Server | Unroutable)


def test_a_backend_answers_to_all_its_server_ids() -> None:
    ids = frozenset(ServerId(bytes([i]) * 4) for i in range(10))
    backends = (
        Backend("a", Address("192.0.2.1", 443), {ConfigId(2): ids}),
        Backend("b", Address("192.0.2.2", 443), {ConfigId(2): frozenset({ServerId(b"bbbb")})}),
    )
    table = RoutingTable.build(Service("web", (), (CidSlot(OF_NOBODY),), backends))
    found = {sid: table.by_cid(Codec(OF_NOBODY).encode(sid, bytes(4))) for sid in (*ids, b"bbbb")}
    assert found == {sid: Server(1 if sid == b"bbbb" else 0, Action.FORWARD, ConfigId(2), None) for sid in found}


@pytest.mark.parametrize(
    ("dcid", "length"),
    [
        (b"", None),
        (b"\xe7" + bytes(30), None),  # 0b111: nobody's configuration
        (b"\x90" + bytes(30), None),
        (b"\x10" + bytes(30), 17),
        (b"\x13" + bytes(30), 20),  # three appended octets, counted
        (b"\x10" + bytes(16), 17),
        (b"\x10" + bytes(15), None),
        (b"\x13" + bytes(18), None),
        (b"\x00" + bytes(30), 17),  # appended octets left out of the count, or low bits that are no length
        (b"\x1f" + bytes(31), None),  # 32 octets are more than a CID has
        (b"\x60" + bytes(30), 11),  # does not encode its length: as configured, two appended octets
        (b"\x7f" + bytes(30), 11),
        (b"\x7f" + bytes(9), None),
    ],
)
def test_where_a_cid_ends(dcid: bytes, length: int | None) -> None:
    assert TABLE.whole_cid(dcid) == (None if length is None else dcid[:length])


# Who is new.


def test_draining_and_down_backends_get_nothing_new() -> None:
    table = RoutingTable.build(make_service(), {"a": DRAINING, "b": DOWN})
    assert set(table.ring) == {2}
    assert {table.fallback(flow) for flow in FLOWS} == {2}
    assert not table.fail_open


@pytest.mark.parametrize(
    ("states", "fail_open", "takes_new"),
    [
        ({}, False, {0, 1, 2}),
        ({"a": DOWN, "b": DOWN, "c": DOWN}, True, {0, 1, 2}),
        ({"a": DOWN, "b": DOWN, "c": DRAINING}, False, {2}),
        ({"a": DRAINING, "b": DRAINING, "c": DRAINING}, False, {0, 1, 2}),
    ],
)
def test_whoever_comes_goes_somewhere(states: dict[str, BackendState], fail_open: bool, takes_new: set[int]) -> None:
    table = RoutingTable.build(make_service(), states, ("a",))
    assert table.fail_open is fail_open
    assert table.dead == (frozenset() if fail_open else {"a"})
    assert set(table.ring) == takes_new


def test_without_backends_or_weights_there_is_no_fallback() -> None:
    for service in (make_service(()), make_service(weights={"a": 0, "b": 0, "c": 0})):
        table = RoutingTable.build(service)
        assert table.fallback(FLOWS[0]) is None
        assert not table.fail_open


def test_two_tables_of_one_configuration_agree() -> None:
    one, two = (RoutingTable.build(make_service(seed="fleet")) for _ in range(2))
    maglev_ring.cache_clear()
    three = RoutingTable.build(make_service(seed="fleet"))
    assert one.ring == two.ring == three.ring
    assert [one.fallback(f) for f in FLOWS] == [three.fallback(f) for f in FLOWS]


def test_index_is_the_place_in_backends() -> None:
    table = RoutingTable.build(make_service())
    assert table.index == {b.name: i for i, b in enumerate(table.backends)} == {"a": 0, "b": 1, "c": 2}


# The ring.


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100, 655])
def test_equal_backends_get_equal_shares(count: int) -> None:
    shares = Counter(maglev_ring(members(f"server-{i}" for i in range(count)), ""))
    assert sum(shares.values()) == RING_SLOTS
    assert set(shares) == set(range(count))
    assert max(shares.values()) - min(shares.values()) <= 1


@pytest.mark.parametrize(
    "weights", [(1, 2, 3, 4), (1, 1, 100), (5, 7), (3, 0, 1), (1000, 999, 1), (0, 0, 1), (10, 10, 10)]
)
def test_shares_are_in_proportion_to_weights(weights: tuple[int, ...]) -> None:
    shares = Counter(maglev_ring(tuple((i, f"server-{i}", w) for i, w in enumerate(weights)), ""))
    expected = [RING_SLOTS * weight / sum(weights) for weight in weights]
    assert [shares[i] for i in range(len(weights))] == pytest.approx(expected, rel=0.01, abs=1)
    assert all(shares[i] == 0 for i, weight in enumerate(weights) if not weight)


def test_neither_order_nor_numbers_change_who_gets_a_slot() -> None:
    names = [f"server-{i}" for i in range(20)]
    expected = owners(maglev_ring(members(names), "s"), dict(enumerate(names)))
    source = random.Random(5)
    for _ in range(3):
        shuffled = source.sample(names, len(names))
        assert owners(maglev_ring(members(shuffled), "s"), dict(enumerate(shuffled))) == expected
        numbered = tuple((n, name, 1) for n, name in zip(source.sample(range(1000), 20), names, strict=True))
        assert owners(maglev_ring(numbered, "s"), {n: name for n, name, _ in numbered}) == expected


def test_names_and_seed_change_who_gets_a_slot() -> None:
    ring = maglev_ring(members(("a", "b", "c")), "s")
    for other in (maglev_ring(members(("a", "b", "d")), "s"), maglev_ring(members(("a", "b", "c")), "t")):
        same = sum(x == y for x, y in zip(ring, other, strict=True))
        assert same < 0.9 * RING_SLOTS
        assert set(other) == {0, 1, 2}


@pytest.mark.parametrize("count", [2, 10, 50])
def test_a_backend_that_leaves_moves_few_slots_of_others(count: int) -> None:
    names = [f"server-{i}" for i in range(count)]
    before = owners(maglev_ring(members(names), ""), dict(enumerate(names)))
    after = owners(maglev_ring(members(names[:-1]), ""), dict(enumerate(names)))
    assert names[-1] not in after
    moved = sum(b not in (a, names[-1]) for a, b in zip(after, before, strict=True))
    assert moved < 0.05 * RING_SLOTS


@pytest.mark.parametrize("state", [DRAINING, DOWN])
def test_a_backend_that_comes_back_gets_its_slots_again(state: BackendState) -> None:
    before = RoutingTable.build(make_service())
    RoutingTable.build(make_service(), {"b": state})
    assert RoutingTable.build(make_service()).ring == before.ring


def naive_ring_slot(flow: FourTuple, seed: int) -> int:
    """The same five words in textbook arithmetic: no masks, no shifts, addresses by the standard library."""
    words = []
    for host in (flow.client, flow.local):
        ip = ipaddress.ip_address(host)
        number = int(ip) if ip.version == 6 else 0xFFFF * 2**32 + int(ip)
        words += [number // 2**64, number % 2**64]
    words.append(flow.client_port * 65536 + flow.local_port)
    state = seed
    for word in words:
        state = ((state ^ word) * 11400714819323198485) % 2**64
        state ^= state // 2**32
    return state % 65537


@pytest.mark.parametrize(
    ("flow", "seed", "slot"),
    [
        (FourTuple("192.0.2.1", 50000, "198.51.100.1", 443), 0, 60744),
        (FourTuple("192.0.2.1", 50001, "198.51.100.1", 443), 0, 30693),
        (FourTuple("192.0.2.1", 50000, "198.51.100.1", 443), 2**64 - 1, 42984),
        (FourTuple("2001:db8::1", 50000, "2001:db8::2", 443), 0x0123456789ABCDEF, 11046),
        (FourTuple("2001:db8::2", 443, "2001:db8::1", 50000), 0x0123456789ABCDEF, 50191),
        (FourTuple("0.0.0.0", 0, "0.0.0.0", 0), 0, 43186),
        (FourTuple("ffff::ffff", 65535, "ffff::ffff", 65535), 1, 59096),
        (FourTuple("fe80::1", 5353, "::1", 1), 1, 12190),
    ],
)
def test_the_slot_of_a_flow_is_fixed_for_good(flow: FourTuple, seed: int, slot: int) -> None:
    """Balancers of different releases, and the C program, must give the same."""
    assert ring_slot(flow, seed) == naive_ring_slot(flow, seed) == slot


@settings(deadline=None)
@given(
    addresses=st.tuples(st.ip_addresses(), st.ip_addresses()),
    ports=st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_slot_of_any_flow_is_what_the_naive_arithmetic_says(
    addresses: tuple[object, object], ports: tuple[int, int], seed: int
) -> None:
    flow = FourTuple(str(addresses[0]), ports[0], str(addresses[1]), ports[1])
    assert ring_slot(flow, seed) == naive_ring_slot(flow, seed)


@pytest.mark.parametrize("varies", ["client_port", "client", "local_port"])
def test_flows_that_differ_in_one_field_spread_evenly(varies: str) -> None:
    """65536 neighbours fill as many slots as random ones do: 1 - 1/e of all, and the halves of the ring equally."""
    base = FourTuple("10.0.0.0", 50000, "198.51.100.1", 443)
    flows = {
        "client": [base._replace(client=f"10.0.{i >> 8}.{i & 255}") for i in range(65536)],
        "client_port": [base._replace(client_port=i) for i in range(65536)],
        "local_port": [base._replace(local_port=i) for i in range(65536)],
    }
    slots = [ring_slot(flow, 0x5EED) for flow in flows[varies]]
    assert len(set(slots)) / RING_SLOTS == pytest.approx(0.632, abs=0.02)
    shares = Counter(slot * 16 // RING_SLOTS for slot in slots)
    assert max(shares.values()) / min(shares.values()) < 1.15


TABLE = RoutingTable.build(make_service())


# The operator's word, and when health checks are not believed.


def eligible(table: RoutingTable) -> set[str]:
    return {table.backends[number].name for number in set(table.ring)}


def action(table: RoutingTable, name: str) -> Action:
    found = table.by_cid(Codec(WITH_RESETS).encode(server_id(WITH_RESETS, name), bytes(12)))
    assert isinstance(found, Server)
    return found.action


@pytest.mark.parametrize("state", BackendState)
def test_whoever_is_fenced_is_dead_whatever_its_state(state: BackendState) -> None:
    table = RoutingTable.build(make_service(), {"a": state}, fenced=["a"])
    assert table.states == (DOWN, ACTIVE, ACTIVE)
    assert table.dead == table.fenced == {"a"}
    assert action(table, "a") is Action.RESET
    assert eligible(table) == {"b", "c"}


def test_the_only_backend_can_be_fenced() -> None:
    """Fail-open doubts health checks, not the operator: this is how a service with one backend ends connections."""
    table = RoutingTable.build(make_service(["a"]), {}, fenced=["a"])
    assert not table.fail_open
    assert action(table, "a") is Action.RESET
    assert table.fallback(FLOWS[0]) is None


def test_with_everybody_else_down_a_fence_holds() -> None:
    table = RoutingTable.build(make_service(), {"b": DOWN, "c": DOWN}, dead=["b"], fenced=["a"])
    assert table.fail_open
    assert table.dead == {"a"}
    assert [action(table, name) for name in NAMES] == [Action.RESET, Action.FORWARD, Action.FORWARD]
    assert eligible(table) == {"b", "c"}


@pytest.mark.parametrize(
    ("threshold", "states", "panics"),
    [
        (0.0, {"a": DOWN, "b": DOWN}, False),
        (0.5, {"a": DOWN, "b": DOWN}, True),  # a third is left
        (0.5, {"a": DOWN}, False),  # two thirds
        (0.67, {"a": DOWN}, True),
        (1.0, {}, False),  # all of them: nothing to doubt
        (0.5, {"a": DOWN, "b": DRAINING}, False),  # half of those that do not drain
        (0.6, {"a": DOWN, "b": DRAINING}, True),
        (0.0, {"a": DOWN, "b": DOWN, "c": DOWN}, True),
        (0.0, {"a": DOWN, "b": DOWN, "c": DRAINING}, False),  # there is somebody to go to
    ],
)
def test_below_the_panic_threshold_states_are_not_believed(
    threshold: float, states: dict[str, BackendState], panics: bool
) -> None:
    service = replace(make_service(), panic_threshold=threshold)
    table = RoutingTable.build(service, states, dead=["a"])
    assert table.fail_open is panics
    assert table.dead == (set() if panics else {"a"})
    takes_new = {ACTIVE, DOWN} if panics else {ACTIVE}
    expected = {name for name in NAMES if states.get(name, ACTIVE) in takes_new}
    assert eligible(table) == (expected or {"c"})


def test_weights_stand_in_for_the_services_own() -> None:
    table = RoutingTable.build(make_service(weights={"a": 1, "b": 1, "c": 2}), weights={"a": 2, "c": 0})
    assert eligible(table) == {"a", "b"}
    assert table.shares == pytest.approx((2 / 3, 1 / 3, 0), abs=0.01)
    same = RoutingTable.build(make_service(weights={"a": 2, "b": 1, "c": 0}))
    assert table.ring == same.ring


def test_a_worker_gets_the_table_whole() -> None:
    table = RoutingTable.build(make_service(), {"b": DOWN}, dead=["b"], fenced=["a"], weights={"c": 5})
    copy = pickle.loads(pickle.dumps(table))  # noqa: S301 - our own
    for name in ("states", "dead", "fenced", "fail_open", "weights", "ring", "shares"):
        assert getattr(copy, name) == getattr(table, name)
