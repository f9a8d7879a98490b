"""What becomes of packets: tables of cases, and a slow, plain model of forwarding that says what leaves.

A `Decision` and a `Story` are about UDP payloads and 4-tuples alone, and hold for every engine. All else is frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lb.address import Address, packed
from lb.cid import CidConfig, Codec, ConfigId
from lb.forward import Forward
from lb.router import Route, Verdict
from lb.routing import Backend, BackendState, CidSlot, FourTuple, RoutingTable, Service, UnknownServer, Unroutable
from tests.builders import KEY, RESET_KEY, long, server_id, short
from tests.xdp.frames import mac

INTERFACE = "02:00:00:00:00:01"
ROUTER = "02:00:00:00:00:fe"  # clients are behind it
VIPS = {4: "192.0.2.1", 6: "2001:db8::1"}
SOURCES = {4: "10.0.0.1", 6: "2001:db8:f::1"}  # ours, towards backends
CLIENTS = {4: "198.51.100.7", 6: "2001:db8:c::7"}
CLIENT_PORT = 50000
MOVED_PORT = 40000
BACKEND_PORT = 4433
MTU = 1500

ACTIVE, DRAINING, DOWN = BackendState


class Way(NamedTuple):
    """The families of clients and of the backends of their service."""

    client: int
    backend: int

    @property
    def service(self) -> str:
        return f"web-{self.client}-{self.backend}"

    @property
    def vip(self) -> Address:
        return Address(VIPS[self.client], 443 if self.client == self.backend else 444)

    def flow(self, port: int = CLIENT_PORT) -> FourTuple:
        return FourTuple(CLIENTS[self.client], port, *self.vip)


WAYS = (Way(4, 4), Way(6, 6), Way(4, 6), Way(6, 4))


def ways(forward: Forward) -> tuple[Way, ...]:
    """dnat leaves the client's address as it is: a backend of another family could not be told it."""
    return WAYS[:2] if forward is Forward.DNAT else WAYS


# The backends of each service, in this order, and their states.
A, B, DRAINS, FROZEN, DEAD = range(5)
NAMES = ("a", "b", "drains", "frozen", "dead")
STATES = {"drains": DRAINING, "frozen": DOWN, "dead": DOWN}
THE_DEAD = frozenset({"dead"})

# Instead of a backend's number.
RING = -1  # whichever the ring says
HOME = -2  # whichever it says while everybody is ACTIVE
NEXT = -3  # whichever it says while HOME is not

# One CID configuration of each kind. Config ID 5 names none.
SINGLE_PASS = CidConfig(ConfigId(0), 4, 12, KEY)
FOUR_PASS = CidConfig(ConfigId(1), 5, 6, KEY, encodes_length=False)
PLAINTEXT = CidConfig(ConfigId(2), 1, 4)
LAST_PASS = CidConfig(ConfigId(3), 10, 9, KEY)
APPENDED = CidConfig(ConfigId(4), 4, 12, KEY, encodes_length=False, appended_length=3)
LONGEST_ID = CidConfig(ConfigId(6), 15, 4)
CONFIGS = (SINGLE_PASS, FOUR_PASS, PLAINTEXT, LAST_PASS, APPENDED, LONGEST_ID)
WITHOUT_RESETS = LAST_PASS
SLOTS = tuple(CidSlot(c, None if c is WITHOUT_RESETS else RESET_KEY) for c in CONFIGS)
CONFIG_5 = bytes([5 << 5 | 15, *range(15)])
CODEPOINT_7 = bytes([7 << 5 | 15, *range(15)])
NOBODYS = 0x999  # number of a server that is nobody's


def cid(number: int, config: CidConfig = SINGLE_PASS, nonce: int = 7) -> bytes:
    """A CID of backend `number`."""
    return Codec(config).encode(
        server_id(number, config.server_id_length),
        nonce.to_bytes(config.nonce_length),
        low_bits=0b10110,
        appended=b"\xa9" * config.appended_length,
    )


UNROUTABLE = short(cid(NOBODYS))


def service(number: int, name: str, listen: Address, family: int, **changes: Any) -> Service:
    """A service whose backends are on a network of their own."""
    hosts = [f"10.{number}.0.{10 + i}" if family == 4 else f"2001:db8:b::{number:x}:{16 + i:x}" for i in range(5)]
    members = tuple(
        Backend(
            backend,
            Address(host, BACKEND_PORT),
            {c.config_id: frozenset([server_id(i, c.server_id_length)]) for c in CONFIGS},
        )
        for i, (backend, host) in enumerate(zip(NAMES, hosts, strict=True))
    )
    return replace(Service(name, (listen,), SLOTS, members, "a seed"), **changes)


WEB = {way: service(i + 1, way.service, way.vip, way.backend) for i, way in enumerate(WAYS)}
STRICT = service(5, "strict", Address(VIPS[4], 450), 4, unknown_server=UnknownServer.DROP)
DOUBTED = service(6, "doubted", Address(VIPS[4], 451), 4)
_WEIGHTLESS = service(7, "nobody", Address(VIPS[4], 452), 4)
NOBODY = replace(_WEIGHTLESS, backends=tuple(replace(b, weight=0) for b in _WEIGHTLESS.backends))
# As a cloud's network load balancer has it: config/nlb.yaml.
CLOUDS = CidConfig(ConfigId(0), 8, 7, encodes_length=False)
_LIKE_A_CLOUDS = service(
    8, "clouds", Address(VIPS[4], 453), 4, unknown_server=UnknownServer.DROP, cid_slots=(CidSlot(CLOUDS, RESET_KEY),)
)
CLOUD = replace(
    _LIKE_A_CLOUDS,
    backends=tuple(
        replace(backend, server_ids={CLOUDS.config_id: frozenset([server_id(i, CLOUDS.server_id_length)])})
        for i, backend in enumerate(_LIKE_A_CLOUDS.backends)
    ),
)


def tables(forward: Forward) -> tuple[RoutingTable, ...]:
    """What all cases are decided by."""
    return (
        *(RoutingTable.build(WEB[way], STATES, THE_DEAD) for way in ways(forward)),
        RoutingTable.build(STRICT, STATES, THE_DEAD),
        RoutingTable.build(DOUBTED, dict.fromkeys(NAMES, DOWN), NAMES),
        RoutingTable.build(NOBODY, STATES, THE_DEAD),
        RoutingTable.build(CLOUD, STATES, THE_DEAD),
    )


def next_hop(host: str) -> str:
    """The MAC address that packets to a backend are sent to."""
    return mac(b"\x02\x01" + packed(host)[-4:])


class Decision(NamedTuple):
    """A UDP payload of a new flow, and what becomes of it. `reply` of a Route is left out: it has random bits."""

    name: str
    payload: bytes
    route: Route
    service: Service | None = None  # None: any of WEB


def _by_cid(number: int, config: CidConfig = SINGLE_PASS) -> Route:
    return Route(Verdict.CID_DOWN if number == FROZEN else Verdict.CID, number, config.config_id)


def _by_ring(reason: Unroutable) -> Route:
    return Route(Verdict.FALLBACK, RING, unroutable=reason)


NO_CID, NO_CONFIG, IS_CODEPOINT_7, TOO_SHORT, UNKNOWN_SERVER, DEAD_SERVER = map(_by_ring, Unroutable)
MALFORMED = Route(Verdict.MALFORMED)


def _of_a_configuration(config: CidConfig) -> Iterator[Decision]:
    name = f"{config.algorithm} {config.server_id_length}+{config.nonce_length}"
    block_end = 1 + config.routing_block_length
    for number in (A, B, DRAINS, FROZEN):
        for form in (short, long):
            what = f"{name}, {NAMES[number]}, {form.__name__} header"
            yield Decision(what, form(cid(number, config)), _by_cid(number, config))
    reset = DEAD_SERVER if config is WITHOUT_RESETS else Route(Verdict.RESET, config_id=config.config_id)
    yield Decision(f"{name}, dead, short header", short(cid(DEAD, config)), reset)
    yield Decision(f"{name}, dead, long header", long(cid(DEAD, config)), DEAD_SERVER)
    for form in (short, long):
        what = f"{form.__name__} header"
        whole, block = cid(A, config), cid(A, config)[:block_end]
        yield Decision(f"{name}, nobody's, {what}", form(cid(NOBODYS, config)), UNKNOWN_SERVER)
        yield Decision(f"{name}, cut, {what}", form(block[:-1], size=0), TOO_SHORT)
        yield Decision(f"{name}, routing block alone, {what}", form(block, size=0), _by_cid(A, config))
        yield Decision(f"{name}, whole CID alone, {what}", form(whole, size=0), _by_cid(A, config))


def _of_the_header() -> Iterator[Decision]:
    routed = _by_cid(A)
    header = long(cid(A), b"a client's SCID")
    longest = cid(A).ljust(255, b"\xa5")
    yield Decision("nothing", b"", Route(Verdict.EMPTY))
    yield Decision("one octet, short header", b"\x41", NO_CID)
    yield Decision("one octet, long header", b"\xc1", MALFORMED)
    yield Decision("Initial", header, routed)
    yield Decision("QUIC v2", long(cid(A), version=0x6B3343CF), routed)
    yield Decision("version negotiation", long(cid(A), version=0), routed)
    yield Decision("long header without the fixed bit", b"\x80" + header[1:], routed)
    yield Decision("short header without the fixed bit", b"\x00" + short(cid(A))[1:], routed)
    yield Decision("every other bit of a short header", b"\x7f" + short(cid(A))[1:], routed)
    yield Decision("other low bits of the CID", short(bytes([cid(A)[0] ^ 0x1F]) + cid(A)[1:]), routed)
    yield Decision("two packets in one datagram", header[:300] + short(cid(B)), routed)
    yield Decision("octets behind a long header's CID", long(cid(A) + b"and"), routed)
    yield Decision("no DCID", long(b"", b"scid"), NO_CID)
    yield Decision("no CIDs", long(b""), NO_CID)
    yield Decision("no CIDs and nothing else", long(b"", size=0), NO_CID)
    yield Decision("a DCID of 255 octets", long(longest, b"scid"), routed)
    yield Decision("a DCID of 255 octets, unroutable", long(CODEPOINT_7.ljust(255, b"\xa5")), IS_CODEPOINT_7)
    yield Decision("an SCID of 255 octets", long(cid(A), bytes(255)), routed)
    yield Decision("both of 255 octets", long(longest, bytes(255), size=0), routed)
    yield Decision("both of 255 octets, one missing", long(longest, bytes(255), size=0)[:-1], MALFORMED)
    yield Decision("a DCID longer than the packet", long(bytes(30), size=0)[:20], MALFORMED)
    for form in (short, long):
        yield Decision(f"{form.__name__} header, config ID 5", form(CONFIG_5), NO_CONFIG)
        yield Decision(f"{form.__name__} header, codepoint 7", form(CODEPOINT_7), IS_CODEPOINT_7)
    for length in range(1, 21):
        yield Decision(f"a DCID of {length} octets, unroutable", long(CODEPOINT_7[:1] * length), IS_CODEPOINT_7)
    for length in range(7, len(long(cid(A), b"scid", size=0))):
        yield Decision(f"long header cut at {length}", long(cid(A), b"scid", size=0)[:length], MALFORMED)


def _of_a_policy() -> Iterator[Decision]:
    dropped = Route(Verdict.UNKNOWN_SERVER, unroutable=Unroutable.UNKNOWN_SERVER)
    no_backend = Route(Verdict.NO_BACKEND, unroutable=Unroutable.UNKNOWN_SERVER)
    yield Decision("unknown-server: drop", UNROUTABLE, dropped, STRICT)
    yield Decision("unknown-server: drop, long header", long(cid(NOBODYS)), UNKNOWN_SERVER, STRICT)
    yield Decision("unknown-server: drop, codepoint 7", short(CODEPOINT_7), IS_CODEPOINT_7, STRICT)
    yield Decision("unknown-server: drop, dead", short(cid(DEAD, WITHOUT_RESETS)), DEAD_SERVER, STRICT)
    yield Decision("nobody in the ring", UNROUTABLE, no_backend, NOBODY)
    yield Decision("nobody in the ring, routable", short(cid(A)), _by_cid(A), NOBODY)
    yield Decision("all DOWN: the checks are in doubt", short(cid(DEAD)), _by_cid(DEAD), DOUBTED)
    yield Decision("all DOWN, unroutable", UNROUTABLE, UNKNOWN_SERVER, DOUBTED)


def _of_a_cloud() -> Iterator[Decision]:
    dropped = Route(Verdict.UNKNOWN_SERVER, unroutable=Unroutable.UNKNOWN_SERVER)
    for number in (A, B, DRAINS, FROZEN):
        for form in (short, long):
            what = f"like a cloud's, {NAMES[number]}, {form.__name__} header"
            yield Decision(what, form(cid(number, CLOUDS)), _by_cid(number, CLOUDS), CLOUD)
    yield Decision("like a cloud's, nobody's, short header", short(cid(NOBODYS, CLOUDS)), dropped, CLOUD)
    yield Decision("like a cloud's, nobody's, long header", long(cid(NOBODYS, CLOUDS)), UNKNOWN_SERVER, CLOUD)
    yield Decision("like a cloud's, no server ID", short(cid(A, CLOUDS)[:15], size=0), TOO_SHORT, CLOUD)


DECISIONS = (
    *(decision for config in CONFIGS for decision in _of_a_configuration(config)),
    *_of_the_header(),
    *_of_a_policy(),
    *_of_a_cloud(),
)


class Step(NamedTuple):
    """One packet of a story. `states` are those of HOME and NEXT, everybody else is ACTIVE; so are they by default."""

    payload: bytes
    verdict: Verdict
    backend: int | None = HOME
    states: Mapping[int, BackendState] = {}
    dead: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()  # not in the configuration at all
    moved: bool = False  # from another port
    # The udp engine has tables by SCID and by DCID too (docs/xdp.md). None: its verdict, and backend, are the same.
    udp: tuple[Verdict, int | None] | None = None


class Story(NamedTuple):
    name: str
    steps: tuple[Step, ...]


_LONG = long(CODEPOINT_7, b"scid")
_FALLBACK, _TABLE = Verdict.FALLBACK, Verdict.TABLE_FLOW
_ALL_DOWN = dict.fromkeys(range(5), DOWN)

STORIES = (
    Story(
        "a choice outlives a change of the ring",
        (
            Step(UNROUTABLE, _FALLBACK),
            Step(UNROUTABLE, _TABLE, states={HOME: DRAINING}),
            Step(UNROUTABLE, _FALLBACK, RING, states={HOME: DRAINING}, moved=True),
        ),
    ),
    Story(
        "a choice of a long header holds for the short ones that follow",
        (Step(_LONG, _FALLBACK), Step(UNROUTABLE, _TABLE, states={HOME: DRAINING})),
    ),
    Story(
        "what a routable CID says changes no choice",
        (
            Step(UNROUTABLE, _FALLBACK),
            Step(short(cid(A)), Verdict.CID, A),
            Step(short(cid(B)), Verdict.CID, B, states={HOME: DRAINING}),
            Step(UNROUTABLE, _TABLE, states={HOME: DRAINING}),
        ),
    ),
    Story(
        "DOWN within the hold-off: connections wait, handshakes begin elsewhere, and then the choice is another one",
        (
            Step(UNROUTABLE, _FALLBACK),
            Step(UNROUTABLE, _TABLE, states={HOME: DOWN}),
            Step(_LONG, _FALLBACK, NEXT, states={HOME: DOWN}),
            Step(UNROUTABLE, _TABLE, NEXT, states={HOME: DOWN}),
            Step(UNROUTABLE, _TABLE, NEXT),
        ),
    ),
    Story(
        "nothing is sent to the dead",
        (
            Step(UNROUTABLE, _FALLBACK),
            Step(UNROUTABLE, _FALLBACK, NEXT, states={HOME: DOWN}, dead=(HOME,)),
            Step(UNROUTABLE, _TABLE, NEXT),
        ),
    ),
    Story(
        "with everybody DOWN the choice holds, for handshakes too",
        (
            Step(UNROUTABLE, _FALLBACK),
            Step(UNROUTABLE, _TABLE, states=_ALL_DOWN),
            Step(_LONG, _TABLE, states=_ALL_DOWN),
        ),
    ),
    Story(
        "a choice of a backend that is gone is made anew",
        (
            Step(UNROUTABLE, _FALLBACK),
            Step(UNROUTABLE, _FALLBACK, NEXT, gone=(HOME,)),
            Step(UNROUTABLE, _TABLE, NEXT),
        ),
    ),
    Story(
        "departure: the udp engine knows a backend that comes back by its name, to the xdp engine it is a new one",
        (
            Step(UNROUTABLE, _FALLBACK),
            Step(b"", Verdict.EMPTY, None, gone=(HOME,)),
            Step(UNROUTABLE, _FALLBACK, udp=(_TABLE, HOME)),
        ),
    ),
    Story(
        "departure: one 4-tuple is one choice, whatever its SCIDs are",
        (
            Step(_LONG, _FALLBACK),
            Step(_LONG, _TABLE, states={HOME: DRAINING}, udp=(Verdict.TABLE_SCID, HOME)),
        ),
    ),
    Story(
        "departure: a DCID that a client chose is not remembered when its address changes",
        (
            Step(_LONG, _FALLBACK),
            Step(_LONG, _FALLBACK, RING, states={HOME: DRAINING}, moved=True, udp=(Verdict.TABLE_DCID, HOME)),
        ),
    ),
)


class Moment(NamedTuple):
    """A step of a story in a service: the table, the packet's 4-tuple, and the name of the backend that gets it."""

    table: RoutingTable
    flow: FourTuple
    backend: str | None
    udp_backend: str | None


def moment(story_service: Service, step: Step, way: Way) -> Moment:
    """HOME and NEXT are whoever the ring says they are for the story's first 4-tuple."""
    ring = RoutingTable.build(story_service)
    home = ring.fallback(way.flow())
    assert home is not None
    following = RoutingTable.build(story_service, {NAMES[home]: DRAINING}).fallback(way.flow())
    assert following is not None
    numbers = {HOME: home, NEXT: following}

    def name(who: int) -> str:
        return NAMES[numbers.get(who, who)]

    gone = {name(who) for who in step.gone}
    left = tuple(b for b in story_service.backends if b.name not in gone)
    table = RoutingTable.build(
        replace(story_service, backends=left),
        {name(who): state for who, state in step.states.items()},
        map(name, step.dead),
    )
    flow = way.flow(MOVED_PORT if step.moved else CLIENT_PORT)
    chosen = table.fallback(flow)
    assert chosen is not None

    def expected(who: int | None) -> str | None:
        return left[chosen].name if who == RING else None if who is None else name(who)

    return Moment(table, flow, expected(step.backend), expected(step.udp[1] if step.udp else step.backend))
