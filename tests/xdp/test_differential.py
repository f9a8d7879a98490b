"""A million random packets over random tables: lb.router.Router and the program decide alike, about every one of them.

The router has its 4-tuple table only and no limits, as docs/xdp.md says of the program. A round is a seed, which its
name tells. QUICLB_DIFFERENTIAL_PACKETS and QUICLB_DIFFERENTIAL_SEED ask for more packets, or for others.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from itertools import count
from random import Random

import pytest

from lb.address import Address
from lb.cid import CONFIG_IDS, CidConfig, Codec, ConfigId, ServerId
from lb.flows import FlowTable
from lb.forward import Forward
from lb.router import Route, Router, RouterLimits, Verdict
from lb.routing import Backend, BackendState, CidSlot, FourTuple, RoutingTable, Service, UnknownServer, Unroutable
from lb.xdp.layout import SERVICE_COUNTERS, U32_KEY
from tests.xdp.bpf import Action, Balancer
from tests.xdp.cases import INTERFACE, ROUTER, next_hop
from tests.xdp.conftest import Summary
from tests.xdp.expectations import Loaded
from tests.xdp.frames import Ethernet, IPv4, IPv6, Udp, octets_of_mac

PACKETS = int(os.environ.get("QUICLB_DIFFERENTIAL_PACKETS", "1000000"))
SEED = int(os.environ.get("QUICLB_DIFFERENTIAL_SEED", "1"))
EPOCHS = 4  # of one round: its tables change in between
PACKETS_OF_AN_EPOCH = 10_000
ROUNDS = -(-PACKETS // (EPOCHS * PACKETS_OF_AN_EPOCH))
FLOWS = 1500
SIZES = {"flows": 65536, "nat_out": 131072, "nat_in": 131072}

REMEMBERS = RouterLimits(table_entries=1 << 20, new_flows_rate=0, reset_rate=0, reset_prefix_rate=0)
DECIDED = SERVICE_COUNTERS.offsets["moves"]  # octets of counters that a Route says all of
CONFIG_COUNTERS = len(Verdict) + len(Unroutable)


class World:
    """Random services, and how they change. No name and no address is ever given to two backends."""

    def __init__(self, random: Random, forward: Forward) -> None:
        self._random = random
        self._same_family = forward is Forward.DNAT
        self._numbers = count(1)
        self.states: dict[str, BackendState] = {}
        self.dead: set[str] = set()
        self.fenced: set[str] = set()
        self.weights: dict[str, int] = {}  # the operator's
        self.services = [self._service() for _ in range(random.randint(1, 5))]

    def tables(self) -> list[RoutingTable]:
        return [
            RoutingTable.build(
                service,
                self.states,
                self.dead,
                fenced=self.fenced & {backend.name for backend in service.backends},
                weights=self.weights,
            )
            for service in self.services
        ]

    def change(self) -> None:
        """Something that an operator or a health check may do, to about half of what there is."""
        random = self._random
        if len(self.services) > 1 and random.random() < 0.2:
            del self.services[random.randrange(len(self.services))]
        if random.random() < 0.2:
            self.services.append(self._service())
        for i, service in enumerate(self.services):
            backends, slots = list(service.backends), list(service.cid_slots)
            if random.random() < 0.3 and len(backends) > 1:
                del backends[random.randrange(len(backends))]
            if random.random() < 0.3:
                backends.append(self._backend(service.listen[0].is_ipv6, slots, backends))
            if random.random() < 0.2 and slots:
                gone = slots.pop(random.randrange(len(slots))).config.config_id
                backends = [
                    replace(b, server_ids={c: b.server_ids[c] for c in b.server_ids if c != gone}) for b in backends
                ]
            if random.random() < 0.2:
                free = set(CONFIG_IDS) - {slot.config.config_id for slot in slots}
                slots += [self._slot(config_id) for config_id in sorted(free)[:1]]
            if random.random() < 0.3:
                at = random.randrange(len(backends))
                backends[at] = replace(backends[at], server_ids=self._server_ids(slots, backends))
            if random.random() < 0.2:
                at = random.randrange(len(backends))
                backends[at] = replace(backends[at], weight=random.randrange(4))
            if (tuple(backends), tuple(slots)) != (service.backends, service.cid_slots):
                self.services[i] = replace(service, backends=tuple(backends), cid_slots=tuple(slots))
            if random.random() < 0.5:
                self._set_states(self.services[i])

    def _service(self) -> Service:
        random, number = self._random, next(self._numbers)
        listen = [self._vip(random.choice((4, 6)), number)]
        while not self._same_family and len(listen) < 3 and random.random() < 0.4:
            listen.append(self._vip(random.choice((4, 6)), next(self._numbers)))
        slots = [self._slot(config_id) for config_id in CONFIG_IDS if random.random() < 0.6]
        backends: list[Backend] = []
        for _ in range(random.randint(1, 9)):
            backends.append(self._backend(listen[0].is_ipv6, slots, backends))
        service = Service(
            f"service {number}",
            tuple(listen),
            tuple(slots),
            tuple(backends),
            random.randbytes(4).hex(),
            random.choice(list(UnknownServer)),
            random.choice((0.0, 0.0, 0.5, 1.0)),
        )
        self._set_states(service)
        return service

    def _set_states(self, service: Service) -> None:
        weights = self._random.choice(((9, 1, 1), (1, 1, 3), (0, 0, 1)))
        for backend in service.backends:
            self.states[backend.name] = self._random.choices(list(BackendState), weights)[0]
            self.dead.discard(backend.name)
            if self.states[backend.name] is BackendState.DOWN and self._random.random() < 0.5:
                self.dead.add(backend.name)
            self.fenced.discard(backend.name)
            if self._random.random() < 0.1:
                self.fenced.add(backend.name)
            self.weights.pop(backend.name, None)
            if self._random.random() < 0.2:
                self.weights[backend.name] = self._random.randrange(4)

    def _vip(self, family: int, number: int) -> Address:
        # Several services share an address, and several addresses a port.
        host = f"192.0.2.{number % 3}" if family == 4 else f"2001:db8::{number % 3 + 1:x}"
        return Address(host, 400 + number)

    def _slot(self, config_id: ConfigId) -> CidSlot:
        random = self._random
        server_id_length = random.randint(1, 15)
        nonce_length = random.choice((16 - server_id_length, random.randint(4, 19 - server_id_length)))
        if not 4 <= nonce_length <= 19 - server_id_length:
            nonce_length = 4
        config = CidConfig(
            config_id,
            server_id_length,
            nonce_length,
            random.choice((None, random.randbytes(16), random.randbytes(16))),
            random.random() < 0.5,
            random.randint(0, 19 - server_id_length - nonce_length),
        )
        return CidSlot(config, random.choice((None, random.randbytes(32))))

    def _backend(self, is_ipv6: bool, slots: list[CidSlot], others: list[Backend]) -> Backend:
        number = next(self._numbers)
        if not self._same_family:
            is_ipv6 = self._random.random() < 0.5
        host = str(IPv6Address(0x20010DB8_000B << 80 | number)) if is_ipv6 else f"10.{number >> 8}.{number & 255}.6"
        return Backend(
            f"backend {number}",
            Address(host, 4433),
            self._server_ids(slots, others),
            self._random.choice((0, 1, 1, 1, 3)),
        )

    def _server_ids(self, slots: list[CidSlot], others: list[Backend]) -> dict[ConfigId, frozenset[ServerId]]:
        """Up to three of each configuration, and none that is somebody's."""
        found = {}
        for slot in slots:
            config_id, length = slot.config.config_id, slot.config.server_id_length
            taken = {server_id for backend in others for server_id in backend.server_ids.get(config_id, ())}
            wanted = {ServerId(self._random.randbytes(length)) for _ in range(self._random.randrange(4))}
            found[config_id] = frozenset(wanted - taken)
        return found


@dataclass(frozen=True, slots=True)
class Sender:
    """A client's 4-tuple, and its frames but for what depends on the payload."""

    service: str
    flow: FourTuple
    before_length: bytes
    between: bytes
    overhead: int  # octets that the length of the IP packet counts besides the payload

    @classmethod
    def of(cls, service: str, flow: FourTuple) -> Sender:
        # No switch looks at checksums: one that is not zero will do for UDP.
        content = Udp(flow.client_port, flow.local_port, checksum=0xBEEF)
        packet = (IPv6 if ":" in flow.client else IPv4)(flow.client, flow.local, content)
        frame = bytes(Ethernet(INTERFACE, ROUTER, packet))
        at, overhead = (18, 8) if isinstance(packet, IPv6) else (16, 28)
        return cls(service, flow, frame[:at], frame[at + 2 : -4], overhead)

    def frame(self, payload: bytes) -> bytes:
        length = len(payload)
        return b"".join(
            (
                self.before_length,
                (length + self.overhead).to_bytes(2),
                self.between,
                (length + 8).to_bytes(2),
                b"\xbe\xef",
                payload,
            )
        )


def senders(random: Random, service: Service) -> list[Sender]:
    found = []
    for _ in range(FLOWS // 5):
        vip = random.choice(service.listen)
        client = str(IPv6Address(0x20010DB8_000C << 80 | random.randrange(1 << 64)))
        if not vip.is_ipv6:
            client = f"198.51.{random.randrange(100, 102)}.{random.randrange(256)}"
        found.append(Sender.of(service.name, FourTuple(client, random.randint(1, 65535), *vip)))
    return found


def payloads(random: Random, service: Service) -> Callable[[], bytes]:
    """Whatever clients of a service, and others, may send."""
    cids: list[bytes] = [
        Codec(slot.config).encode(
            server_id,
            random.randbytes(slot.config.nonce_length),
            low_bits=random.randrange(32),
            appended=random.randbytes(slot.config.appended_length),
        )
        for backend in service.backends
        for slot in service.cid_slots
        for server_id in backend.server_ids.get(slot.config.config_id, ())
        for _ in range(5)
    ] or [b"\xff"]
    kinds = ("routable", "changed", "random", "codepoint 7", "noise", "nothing")
    weights = (60, 15, 10, 5, 9, 1)

    def one() -> bytes:
        kind = random.choices(kinds, weights)[0]
        if kind == "noise":
            return random.randbytes(random.randrange(64))
        if kind == "nothing":
            return b""
        cid = random.choice(cids)
        if kind == "changed":
            at = random.randrange(len(cid)) if random.random() < 0.5 else 0
            cid = cid[:at] + bytes((cid[at] ^ 1 << random.randrange(8),)) + cid[at + 1 :]
        elif kind == "random":
            cid = random.randbytes(random.randrange(24))
        elif kind == "codepoint 7":
            cid = b"\xe7" + random.randbytes(7)
        first = random.randrange(256)
        size = random.choice((0, 0, 22, 40, 60, 120, 1250))
        if first & 0x80:
            scid = random.randbytes(random.choice((0, 0, 8, 20, 255)))
            if random.random() < 0.1:
                cid = cid.ljust(random.randrange(256), b"\x5a")
            packet = b"".join((b"%c" % first, b"\0\0\0\1%c" % len(cid), cid, b"%c" % len(scid), scid))
        else:
            packet = b"%c" % first + cid
        packet = packet.ljust(size, b"\x5a")
        return packet if random.random() < 0.9 else packet[: random.randrange(len(packet) + 1)]

    return one


class Expected:
    """What the program should have counted for a service, as it lies in the map: exactly what a Route says."""

    def __init__(self, balancer: Balancer, service: str) -> None:
        self._map = balancer.maps["service_count"]
        self._key = U32_KEY.pack(balancer.index(service))
        self._expected = array("Q", self._now())

    def add(self, route: Route) -> None:
        self._expected[route.verdict] += 1
        if route.unroutable is not None:
            self._expected[len(Verdict) + route.unroutable] += 1
        if route.verdict in (Verdict.CID, Verdict.CID_DOWN):
            assert route.config_id is not None
            self._expected[CONFIG_COUNTERS + route.config_id] += 1

    def is_so(self) -> bool:
        return self._now() == self._expected.tobytes()

    def _now(self) -> bytes:
        """The counters of the first CPU, on which all of this happens."""
        octets = self._map.lookup(self._key)
        assert octets is not None
        return octets[:DECIDED]


def epochs(random: Random, forward: Forward) -> Iterator[tuple[list[RoutingTable], list[Sender]]]:
    world = World(random, forward)
    known: dict[str, list[Sender]] = {}
    for _ in range(EPOCHS):
        for service in world.services:
            known.setdefault(service.name, senders(random, service))
        yield world.tables(), [sender for service in world.services for sender in known[service.name]]
        world.change()


def router_for(table: RoutingTable) -> Router:
    """A router with the memory that the program has."""
    router = Router(table, random=bytes, limits=REMEMBERS)
    router._by_scid, router._by_dcid = FlowTable(0), FlowTable(0)
    return router


def test_the_packets_are_of_every_kind() -> None:
    """Or a million of them would say little."""
    random = Random(SEED)
    verdicts: Counter[Verdict] = Counter()
    unroutable: Counter[Unroutable | None] = Counter()
    for _ in range(8):
        routers: dict[str, Router] = {}
        for tables, all_senders in epochs(random, Forward.L2):
            routers |= {t.service.name: router_for(t) for t in tables if t.service.name not in routers}
            payload_of = {table.service.name: payloads(random, table.service) for table in tables}
            for table in tables:
                routers[table.service.name].table = table
            for sender in random.choices(all_senders, k=800):
                route = routers[sender.service].route(payload_of[sender.service](), sender.flow, 0.0)
                verdicts[route.verdict] += 1
                unroutable[route.unroutable] += 1

    never = {Verdict.TABLE_SCID, Verdict.TABLE_DCID, Verdict.NEW_FLOW_LIMIT, Verdict.RESET_LIMITED, Verdict.FRAGMENT}
    assert set(verdicts) == set(Verdict) - never
    assert set(unroutable) == {None, *Unroutable}
    assert min(verdicts.values()) > 50
    assert min(unroutable.values()) > 50


@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS))
@pytest.mark.usefixtures("one_cpu")
def test_the_router_and_the_program_decide_alike(seed: int, loaded: Loaded, summary: Summary) -> None:
    random = Random(seed)
    forward = random.choice((Forward.L2, Forward.L2, *Forward))
    balancer = loaded(forward, sizes=SIZES, constant_time=random.random() < 0.2, nat_ports=range(1024, 65536))
    balancer.forget()
    run = balancer.loaded.program.test_run
    routers: dict[str, Router] = {}
    for epoch, (tables, all_senders) in enumerate(epochs(random, forward)):
        balancer.apply(tables)
        for table in tables:
            name = table.service.name
            if name not in routers:
                routers[name] = router_for(table)
            routers[name].table = table
        counted = {table.service.name: Expected(balancer, table.service.name) for table in tables}
        macs = {
            table.service.name: [octets_of_mac(next_hop(b.address.host)) for b in table.backends] for table in tables
        }
        payload_of = {table.service.name: payloads(random, table.service) for table in tables}
        for number in range(PACKETS_OF_AN_EPOCH):
            sender = random.choice(all_senders)
            payload = payload_of[sender.service]()
            route = routers[sender.service].route(payload, sender.flow, 0.0)
            result = run(sender.frame(payload))

            counted[sender.service].add(route)
            if route.backend is not None:
                expected = Action.TX, macs[sender.service][route.backend]
            elif route.reply is not None:
                expected = Action.TX, octets_of_mac(ROUTER)
            else:
                expected = Action.DROP, octets_of_mac(INTERFACE)
            if (result.retval, result.data[:6]) != expected or not counted[sender.service].is_so():
                pytest.fail(
                    f"seed {seed}, {forward.name}, epoch {epoch}, packet {number} of {sender.flow}: {payload.hex()}\n"
                    f"router {route}\nprogram {Action(result.retval).name}, to {result.data[:6].hex(':')}"
                )
    if seed == SEED + ROUNDS - 1:
        packets = ROUNDS * EPOCHS * PACKETS_OF_AN_EPOCH
        summary.append(f"differential: {packets} packets, seeds {SEED} to {seed}")
