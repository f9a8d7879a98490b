"""Router: the draft's forwarding steps in its order, one verdict for every datagram."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.cid import CidConfig, ConfigId
from lb.reset import reset_token, server_reset_key
from lb.router import Route, Router, RouterLimits, Verdict
from lb.routing import BackendState, CidSlot, FourTuple, RoutingTable, UnknownServer, Unroutable, maglev_ring
from tests.builders import (
    CONFIG,
    KEY,
    RESET_KEY,
    cid_of,
    deterministic_random,
    flow,
    long,
    server_id,
    service,
    short,
)

DOWN, DRAINING = BackendState.DOWN, BackendState.DRAINING
NOBODY = cid_of(0x999)  # decodes, to a server ID that is nobody's
CHOSEN = b"chosen by client"
CODEPOINT_7 = bytes([0b111_00000 | 15]) + bytes(range(15))


def router_for(table: RoutingTable | None = None, limits: RouterLimits | None = None) -> Router:
    return Router(table or RoutingTable.build(service()), random=deterministic_random(), limits=limits)


@pytest.mark.parametrize(
    ("datagram", "expected"),
    [
        pytest.param(short(cid_of(2)), Route(Verdict.CID, 2, ConfigId(0)), id="short header, routable"),
        pytest.param(long(cid_of(3)), Route(Verdict.CID, 3, ConfigId(0)), id="long header, routable"),
        pytest.param(
            b"\x80" + long(cid_of(3), version=0x6B3343CF)[1:],
            Route(Verdict.CID, 3, ConfigId(0)),
            id="QUIC v2 without the fixed bit",
        ),
        pytest.param(short(cid_of(1) + b"more"), Route(Verdict.CID, 1, ConfigId(0)), id="octets after the CID"),
        pytest.param(b"", Route(Verdict.EMPTY), id="empty"),
        pytest.param(b"\xc0", Route(Verdict.MALFORMED), id="long header of one octet"),
        pytest.param(long(cid_of(1), size=0)[:-1], Route(Verdict.MALFORMED), id="long header cut in its SCID length"),
    ],
)
def test_what_needs_no_table(datagram: bytes, expected: Route) -> None:
    assert router_for().route(datagram, flow(), 0.0) == expected


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (long(b""), Unroutable.NO_CID),
        (b"\x41", Unroutable.NO_CID),
        (short(cid_of(0, config=CidConfig(ConfigId(5), 4, 12, KEY))), Unroutable.NO_CONFIG),
        (short(CODEPOINT_7), Unroutable.CODEPOINT_7),
        (short(cid_of(0)[:-1], size=0), Unroutable.TOO_SHORT),
        (long(cid_of(0)[:8]), Unroutable.TOO_SHORT),
        (short(NOBODY), Unroutable.UNKNOWN_SERVER),
    ],
)
def test_the_unroutable_goes_where_the_ring_says_and_why_is_told(datagram: bytes, reason: Unroutable) -> None:
    router = router_for()

    assert router.route(datagram, flow(), 0.0) == Route(
        Verdict.FALLBACK, router.table.fallback(flow()), unroutable=reason
    )


def other_than(table: RoutingTable, flow: FourTuple) -> RoutingTable:
    """The same service, with the backend that the ring gives `flow` in DRAINING: the ring says another one now."""
    chosen = table.fallback(flow)
    assert chosen is not None
    return RoutingTable.build(table.service, {table.backends[chosen].name: DRAINING})


@pytest.mark.parametrize(
    ("first", "second", "moved", "verdict"),
    [
        pytest.param(long(CHOSEN, b"scid"), long(b"another", b"scid"), False, Verdict.TABLE_SCID, id="scid"),
        pytest.param(long(CHOSEN, b"scid"), long(CHOSEN, b"new"), True, Verdict.TABLE_DCID, id="dcid"),
        pytest.param(short(CODEPOINT_7 + b"x"), short(CODEPOINT_7 + b"yz"), True, Verdict.TABLE_DCID, id="codepoint 7"),
        pytest.param(long(CHOSEN, b"scid"), short(NOBODY), False, Verdict.TABLE_FLOW, id="4-tuple"),
        pytest.param(short(NOBODY), short(NOBODY), True, Verdict.FALLBACK, id="nothing in common"),
    ],
)  # fmt: skip
def test_a_fallback_decision_outlives_a_change_of_the_ring(
    first: bytes, second: bytes, moved: bool, verdict: Verdict
) -> None:
    """Steps 2 to 4, each with the key that only it has; `moved` is to another client address."""
    router = router_for()
    decided = router.route(first, flow(1), 0.0).backend
    router.table = other_than(router.table, flow(1))
    where = flow(2) if moved else flow(1)
    found = router.route(second, where, 1.0)

    assert found.verdict is verdict
    assert found.backend == (router.table.fallback(where) if verdict is Verdict.FALLBACK else decided)


def test_two_handshakes_on_one_4_tuple_stay_apart() -> None:
    """The ring changes between them, so that they have different backends; their SCIDs tell them apart."""
    router = router_for()
    one = router.route(long(b"first dcid", b"one"), flow(), 0.0).backend
    router.table = other_than(router.table, flow())
    router._by_flow = type(router._by_flow)(0)
    two = router.route(long(b"second dcid", b"two"), flow(), 0.0).backend
    assert one != two

    assert [router.route(long(b"later", scid), flow(), 0.0).backend for scid in (b"one", b"two")] == [one, two]


def test_a_routable_cid_outranks_every_table() -> None:
    router = router_for()
    elsewhere = (router.route(long(b"initial", b"scid"), flow(), 0.0).backend or 0) + 1
    number = elsewhere % 4

    assert router.route(long(cid_of(number), b"scid"), flow(), 0.0).backend == number
    assert router.route(long(b"initial", b"scid"), flow(), 0.0).verdict is Verdict.TABLE_SCID


def test_seeing_a_routable_cid_takes_nobodys_table_entry_away() -> None:
    """Or an attacker who replays a CID from a victim's address could cut it off (draft, section 6)."""
    router = router_for()
    decided = router.route(short(NOBODY), flow(), 0.0).backend
    router.table = other_than(router.table, flow())
    router.route(short(cid_of(1)), flow(), 0.0)

    assert router.route(short(NOBODY), flow(), 0.0) == Route(
        Verdict.TABLE_FLOW, decided, unroutable=Unroutable.UNKNOWN_SERVER
    )


def test_what_only_a_long_header_made_is_forgotten_soon_what_carried_a_short_one_is_kept() -> None:
    limits = RouterLimits(new_flow_timeout=10, idle_timeout=100)
    for second, at, verdict in (
        (long(b"d", b"s"), 9.0, Verdict.TABLE_SCID),
        (long(b"d", b"s"), 11.0, Verdict.FALLBACK),
    ):
        router = router_for(limits=limits)
        router.route(long(b"d", b"s"), flow(), 0.0)
        assert router.route(second, flow(), at).verdict is verdict

    router = router_for(limits=limits)
    router.route(long(b"d", b"s"), flow(), 0.0)
    router.route(short(NOBODY), flow(), 1.0)
    assert router.route(short(NOBODY), flow(), 99.0).verdict is Verdict.TABLE_FLOW


def test_a_draining_backend_keeps_its_connections_but_gets_no_new_ones() -> None:
    router = router_for()
    kept = router.route(long(b"early", b"s"), flow(1), 0.0).backend
    assert kept is not None
    router.table = RoutingTable.build(router.table.service, {f"b{kept}": DRAINING})

    assert router.route(short(cid_of(kept)), flow(9), 0.0) == Route(Verdict.CID, kept, ConfigId(0))
    assert router.route(long(b"early", b"s"), flow(1), 0.0).backend == kept
    assert {0, 1, 2, 3} - {kept} == {router.route(long(b"%d" % i, b"s"), flow(i), 0.0).backend for i in range(2, 200)}


def test_a_down_backend_keeps_its_cids_and_short_header_flows_until_the_hold_off_ends() -> None:
    router = router_for()
    victim = router.route(short(NOBODY), flow(), 0.0).backend
    handshake = router.route(long(b"d", b"s"), flow(2), 0.0).backend
    assert victim is not None
    assert handshake is not None
    router.table = RoutingTable.build(router.table.service, {f"b{victim}": DOWN, f"b{handshake}": DOWN})

    assert router.route(short(cid_of(victim)), flow(5), 0.0) == Route(Verdict.CID_DOWN, victim, ConfigId(0))
    assert router.route(short(NOBODY), flow(), 0.0).backend == victim
    assert router.route(long(b"d", b"s"), flow(2), 0.0).verdict is Verdict.FALLBACK
    router.table = RoutingTable.build(router.table.service, {f"b{victim}": DOWN}, [f"b{victim}"])
    assert router.route(short(NOBODY), flow(), 0.0).verdict is Verdict.FALLBACK


def dead_table(*names: str, slots: tuple[CidSlot, ...] = (CidSlot(CONFIG, RESET_KEY),)) -> RoutingTable:
    return RoutingTable.build(service(slots=slots), dict.fromkeys(names, DOWN), names)


@pytest.mark.parametrize("size", range(201))
def test_a_short_header_for_a_dead_server_is_answered_by_the_rules_of_rfc_9000(size: int) -> None:
    """Section 10.3: never as long as its trigger, at least 21 octets, ending in the token of the CID in it."""
    cid = cid_of(1)
    trigger = short(cid)[:size] if size < 60 else short(cid, size)
    route = router_for(dead_table("b1")).route(trigger, flow(), 0.0)

    if size < 2:
        assert route.verdict in (Verdict.EMPTY, Verdict.FALLBACK)
    elif size < 1 + len(cid):
        assert route == Route(Verdict.FALLBACK, route.backend, unroutable=Unroutable.TOO_SHORT)
    elif size < 22:
        assert route == Route(Verdict.RESET_TOO_SMALL, config_id=ConfigId(0))
    else:
        reply = route.reply
        assert reply is not None
        assert route == Route(Verdict.RESET, config_id=ConfigId(0), reply=reply)
        assert reply.endswith(reset_token(server_reset_key(RESET_KEY, ConfigId(0), server_id(1)), cid))
        assert 21 <= len(reply) < size
        assert len(reply) == size - 1 or size > 43
        assert reply[0] & 0xC0 == 0x40


def test_the_token_covers_the_octets_that_the_server_appended() -> None:
    for config in (replace(CONFIG, appended_length=3, encodes_length=False), replace(CONFIG, appended_length=3)):
        cid = cid_of(1, config=config)
        assert len(cid) == 20
        route = router_for(dead_table("b1", slots=(CidSlot(config, RESET_KEY),))).route(short(cid), flow(), 0.0)

        assert route.reply is not None
        assert route.reply[-16:] == reset_token(server_reset_key(RESET_KEY, ConfigId(0), server_id(1)), cid)


@pytest.mark.parametrize(
    ("table", "datagram"),
    [
        pytest.param(RoutingTable.build(service()), short(cid_of(1)), id="active"),
        pytest.param(RoutingTable.build(service(), {"b1": DRAINING}), short(cid_of(1)), id="draining"),
        pytest.param(RoutingTable.build(service(), {"b1": DOWN}), short(cid_of(1)), id="down within the hold-off"),
        pytest.param(dead_table("b1"), long(cid_of(1)), id="long header"),
        pytest.param(dead_table("b1"), short(NOBODY), id="unknown server ID"),
        pytest.param(dead_table("b1"), short(CODEPOINT_7), id="codepoint 7"),
        pytest.param(dead_table("b1"), short(cid_of(2)), id="somebody else is dead"),
        pytest.param(dead_table("b1", slots=(CidSlot(CONFIG),)), short(cid_of(1)), id="no reset key"),
        pytest.param(dead_table("b0", "b1", "b2", "b3"), short(cid_of(1)), id="fail open: the checks are in doubt"),
    ],
)
def test_nobody_is_reset_who_may_be_alive(table: RoutingTable, datagram: bytes) -> None:
    router = router_for(table)
    route = router.route(datagram, flow(), 0.0)

    assert route.reply is None
    assert route.backend is not None
    assert datagram[0] & 0x80 or router.farewell(datagram[1:18]) is None or table.dead == {"b1"}


def test_resets_are_limited_per_prefix_and_in_all() -> None:
    router = router_for(dead_table("b1"), RouterLimits(reset_rate=6, reset_prefix_rate=4))
    verdicts = [router.route(short(cid_of(1)), FourTuple(host, 1, "192.0.2.1", 443), 0.0).verdict
                for host in ("10.0.0.1",) * 6 + ("10.0.1.1",) * 4]  # fmt: skip

    reset, limited = Verdict.RESET, Verdict.RESET_LIMITED
    assert verdicts == [reset] * 4 + [limited] * 2 + [reset] * 2 + [limited] * 2


def test_farewell_is_said_for_the_dead_only() -> None:
    router = router_for(dead_table("b1"))
    reset = router.farewell(cid_of(1))

    assert reset is not None
    assert reset.endswith(reset_token(server_reset_key(RESET_KEY, ConfigId(0), server_id(1)), cid_of(1)))
    assert 42 <= len(reset) <= 100
    assert [router.farewell(cid) for cid in (cid_of(2), NOBODY, CODEPOINT_7, b"")] == [None] * 4


def test_unknown_servers_are_dropped_where_the_service_says_so_but_not_what_a_client_chose() -> None:
    table = RoutingTable.build(service(unknown_server=UnknownServer.DROP))
    router = router_for(table)

    assert router.route(short(NOBODY), flow(), 0.0) == Route(
        Verdict.UNKNOWN_SERVER, unroutable=Unroutable.UNKNOWN_SERVER
    )
    assert router.route(long(NOBODY), flow(), 0.0).verdict is Verdict.FALLBACK


def test_without_backends_every_datagram_is_counted_as_such() -> None:
    table = RoutingTable.build(service(members=()))

    assert router_for(table).route(long(b"d"), flow(), 0.0) == Route(
        Verdict.NO_BACKEND, unroutable=Unroutable.NO_CONFIG
    )


def test_a_prefix_may_begin_so_many_flows_and_no_more_but_keeps_those_it_has() -> None:
    router = router_for(limits=RouterLimits(new_flows_rate=3))
    verdicts = [router.route(long(b"%d" % i, b"s"), flow(1, 1000 + i), 0.0).verdict for i in range(5)]

    assert verdicts == [Verdict.FALLBACK] * 3 + [Verdict.NEW_FLOW_LIMIT] * 2
    assert router.route(long(b"0", b"s"), flow(1, 1000), 0.0).verdict is Verdict.TABLE_SCID
    assert router.route(short(cid_of(1)), flow(1, 9), 0.0).verdict is Verdict.CID


def test_memory_is_bounded_under_a_flood_of_initials() -> None:
    router = router_for(limits=RouterLimits(table_entries=100, new_flows_rate=0))
    for i in range(2000):
        router.route(long(i.to_bytes(8), i.to_bytes(4)), flow(i & 0xFFFF, i % 60000 + 1), 0.0)

    assert [len(t) for t in (router._by_scid, router._by_dcid, router._by_flow)] == [100, 100, 100]
    router.sweep(1000.0, 1000)
    assert [len(t) for t in (router._by_scid, router._by_dcid, router._by_flow)] == [0, 0, 0]


@given(datagram=st.binary(max_size=300), first=st.sampled_from([b"", b"\x41", b"\xc0", b"\xc3\0\0\0\1"]))
def test_no_datagram_raises_and_each_gets_one_verdict(datagram: bytes, first: bytes) -> None:
    router = router_for(dead_table("b1"))
    route = router.route(first + datagram, flow(), 0.0)
    forwards = route.verdict <= Verdict.FALLBACK

    assert (route.backend is not None, route.reply is not None) == (forwards, route.verdict is Verdict.RESET)


def test_two_balancers_with_one_configuration_agree_on_a_million_random_packets() -> None:
    """Built apart, with other histories of health, from equal configurations: not one different answer."""
    slots = (
        CidSlot(CONFIG, RESET_KEY),
        CidSlot(CidConfig(ConfigId(1), 3, 8, KEY[::-1]), RESET_KEY),
        CidSlot(CidConfig(ConfigId(4), 2, 6)),
    )
    states = {"b3": DRAINING, "b5": DOWN, "b6": DOWN}
    limits = RouterLimits(table_entries=1000, new_flows_rate=0, reset_rate=0, reset_prefix_rate=0)
    balancers = []
    for history in (["b1"], ["b7", "b2"]):
        maglev_ring.cache_clear()  # or they would share one ring
        router = router_for(RoutingTable.build(service(8, slots=slots), dict.fromkeys(history, DOWN)), limits)
        router.table = RoutingTable.build(service(8, slots=slots), dict(states), ["b6"])
        balancers.append(router)
    assert balancers[0].table.ring is not balancers[1].table.ring

    seed = 20261120
    print(f"seed {seed}")
    rng = random.Random(seed)
    cids = [cid_of(n, rng.getrandbits(40), s.config) for n in range(9) for s in slots for _ in range(4)]
    seen: set[Verdict] = set()
    for _ in range(1_000_000):
        dcid = rng.choice(cids) if rng.random() < 0.5 else rng.randbytes(rng.randrange(20))
        packet = short(dcid) if rng.random() < 0.5 else long(dcid, rng.randbytes(4), size=0)
        where = FourTuple(f"10.{rng.randrange(64)}.{rng.randrange(64)}.1", rng.randrange(1, 65536), "192.0.2.1", 443)
        one, other = (router.route(packet, where, 0.0) for router in balancers)
        assert one == other
        seen.add(one.verdict)

    assert seen >= {Verdict.CID, Verdict.CID_DOWN, Verdict.FALLBACK, Verdict.RESET, Verdict.TABLE_DCID}


def test_what_a_predecessor_decided_is_remembered() -> None:
    """A handshake that began with another process goes on where it was, wherever the ring points now."""
    router = Router(RoutingTable.build(service()), random=deterministic_random())
    begun = flow(7)
    home = router.table.fallback(begun)
    other = next(b.name for i, b in enumerate(router.table.backends) if i != home)
    router.adopt(begun, other, now=0.0)
    route = router.route(long(b"client's choice"), begun, 1.0)
    assert (route.verdict, router.table.backends[route.backend or 0].name) == (Verdict.TABLE_FLOW, other)
    late = router.route(long(b"another one"), flow(8), 1.0)
    assert late.verdict is Verdict.FALLBACK


def test_a_fenced_backend_keeps_no_flow_although_all_others_are_down() -> None:
    """Fail-open forwards to whoever the health checks call DOWN, and not to whom the operator has fenced."""
    begun = flow(7)
    router = Router(RoutingTable.build(service()), random=deterministic_random())
    first = router.route(long(b"client's choice"), begun, 0.0)
    assert first.backend is not None
    names = [backend.name for backend in router.table.backends]
    home = names[first.backend]
    router.table = RoutingTable.build(service(), dict.fromkeys(names, BackendState.DOWN), fenced=[home])
    assert router.table.fail_open
    again = router.route(long(b"client's choice"), begun, 1.0)
    assert again.verdict is Verdict.FALLBACK
    assert again.backend is not None
    assert names[again.backend] != home
