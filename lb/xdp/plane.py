"""One interface's program and its maps, as a thread sees them: everything here blocks, and is for one thread at a time.

It renders routing tables and writes what changed, follows next hops, ends idle flows, tells the clients of dead
servers, and counts. When it is closed the program stays, and packets keep flowing.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lb.address import Address, packed, unpacked
from lb.engine import Counters
from lb.forward import Attach, Forward
from lb.log import event
from lb.router import Router
from lb.routing import BackendState, RoutingTable
from lb.upstream import ServicePolicy
from lb.xdp import aes128
from lb.xdp.attachment import Attachment
from lb.xdp.counting import read_backends, read_counters
from lb.xdp.difference import difference, overfull
from lb.xdp.farewell import Farewell, Farewells
from lb.xdp.image import Image, Surroundings, next_generation, render
from lb.xdp.interface import Interface
from lb.xdp.layout import Settings
from lb.xdp.libbpf import Map, possible_cpus
from lb.xdp.natflows import NatFlows
from lb.xdp.neighbours import Neighbours
from lb.xdp.program import LoadedProgram, load_program
from lb.xdp.tables import Tables
from lb.xdp.watch import Watch

# Ours.
START_PATIENCE = 2.0  # seconds that a start waits for next hops
APPLY_PATIENCE = 0.3  # and a change that brings new backends
REBUILD_INTERVAL = 1.0  # between attempts to load a program that fits a changed interface
BACKEND_SLOTS = 16384  # at least: a reload may bring more backends than there were
MAX_BACKENDS = 65535  # a ring's entries are 16 bits, and one of them means nobody
NO_ADDRESS = bytes(16)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class XdpSettings:
    """What the engine is told once. Times in seconds; `source` has at most one address per family."""

    interface: str
    forward: Forward
    attach: Attach = Attach.AUTO
    pin_directory: Path
    source: tuple[str, ...] = ()
    nat_ports: range = range(1024, 32768)
    constant_time: bool = False
    flows: int
    table_entries: int
    idle_timeout: float
    new_flow_timeout: float

    def sources(self, interface: Interface) -> dict[bool, str]:
        """The addresses that backends see, or that tunnels begin at, by whether they are IPv6."""
        found: dict[bool, str] = {}
        for host in (*self.source, *interface.global_addresses):
            found.setdefault(":" in host, host)
        return found

    def of_program(self, interface: Interface, random: Callable[[int], bytes]) -> Settings:
        """What the program is told, on this interface."""
        sources = self.sources(interface)
        return Settings(
            forward_mode=self.forward,
            constant_time=self.constant_time,
            interface_mac=interface.mac,
            zero=bytes(5),
            source_ipv4=packed(sources[False]) if False in sources else NO_ADDRESS,
            source_ipv6=packed(sources[True]) if True in sources else NO_ADDRESS,
            nat_port_first=self.nat_ports.start,
            nat_port_count=len(self.nat_ports),
            interface_mtu=interface.mtu,
            hash_seed=int.from_bytes(random(8)),
            random_key=aes128.encrypt_schedule(random(16)),
        )


class Look(NamedTuple):
    """What is new: backends that something seems wrong with, and those that have become (un)reachable."""

    suspects: list[tuple[str, str]]
    reachable: dict[tuple[str, str], bool]


class Plane:
    """The program on one interface. `random(n)` returns n random octets."""

    def __init__(self, settings: XdpSettings, random: Callable[[int], bytes]) -> None:
        self._settings = settings
        self._random = random
        self._tables: Sequence[RoutingTable] = ()
        self._policies: Mapping[str, ServicePolicy] = {}
        self._reachable: dict[tuple[str, str], bool] = {}
        self._watch = Watch()
        self._farewells: dict[str, Farewells] = {}
        self._pushed: dict[str, int] = {}
        self._flows = NatFlows(idle_timeout=settings.idle_timeout, new_flow_timeout=settings.new_flow_timeout)
        self._has_news = False  # of next hops, and the maps do not have them yet
        self._rebuilt_at = float("-inf")
        self._open: list[Callable[[], None]] = []  # what is to be closed, last first

    def start(self, tables: Sequence[RoutingTable], policies: Mapping[str, ServicePolicy], now: float) -> None:
        """Load the program, fill its maps, attach it; or take over from a predecessor.

        Raises OSError: then the machine is as it was.
        """
        try:
            self._start(tables, policies, now)
        except BaseException:
            self.close()
            raise

    def _start(self, tables: Sequence[RoutingTable], policies: Mapping[str, ServicePolicy], now: float) -> None:
        settings = self._settings
        self._neighbours = Neighbours(settings.interface)
        self._open.append(self._neighbours.close)
        self._attachment = Attachment(settings.interface, self._neighbours.interface.index, settings.pin_directory)
        self._open.append(self._attachment.close)
        self._load(sum(len(table.backends) for table in tables))
        self._neighbours.set_hosts(_hosts(tables), now)
        self._neighbours.wait(START_PATIENCE, now)
        found = self._image
        self.apply(tables, policies, now)
        try:
            self._attachment.attach(self._loaded.program, settings.attach)
        except OSError:
            self._undo(self._image, found)  # a predecessor's program goes on with these maps
            raise
        event(
            logger,
            logging.INFO,
            "attached",
            interface=settings.interface,
            mode=self.attach_mode,
            program=self._loaded.program.info.id,
            taken_over="yes" if self._loaded.reused else "no",
        )
        if self._attachment.refused is not None:
            event(
                logger,
                logging.WARNING,
                "not-native",
                interface=settings.interface,
                reason=self._attachment.refused,
                meaning="the kernel runs the program behind the driver, for every packet that it has already unpacked",
            )

    @property
    def attach_mode(self) -> str:
        """`native` or `generic`."""
        return str(self._attachment.mode)

    def close(self) -> None:
        """Let go. What is attached stays."""
        with contextlib.ExitStack() as closing:
            for close in self._open:
                closing.callback(close)
            self._open = []

    def apply(self, tables: Sequence[RoutingTable], policies: Mapping[str, ServicePolicy], now: float) -> None:
        """Write what changed. Raises OSError, and then what was there before is still obeyed."""
        before = self._tables
        has_other_services = [t.service for t in tables] != [t.service for t in before]
        if has_other_services:
            self._neighbours.set_hosts(_hosts(tables) | _hosts(before), now)
            self._neighbours.wait(APPLY_PATIENCE, now)
        self._write(tables, policies)
        if has_other_services:
            self._neighbours.set_hosts(_hosts(tables), now)
        self._tables, self._policies = tables, policies
        self._bid_farewell(before)
        self._push(now)

    def look(self, now: float) -> Look:
        """What is to be done every now and then."""
        if self._settings.forward is Forward.NAT:
            self._flows.step(now)
        self._push(now)
        self._has_news |= self._neighbours.follow(now)
        # What is new of the interface may have come while somebody waited for a next hop.
        self._has_news |= self._follow_interface(now)
        if self._has_news:
            self._write(self._tables, self._policies)
            self._has_news = False
        return Look(self._suspects(now), self._news_of_reachable())

    def unreachable(self, backends: Mapping[tuple[str, str], str], now: float) -> dict[tuple[str, str], str]:
        """Those of these backends that packets cannot be sent to, and why. Newcomers get a moment to be found.

        `backends` are hosts, by service and name.
        """
        hosts, known = set(backends.values()), _hosts(self._tables)
        if hosts - known:
            self._neighbours.set_hosts(hosts | known, now)
            self._neighbours.wait(APPLY_PATIENCE, now)
            self._write(self._tables, self._policies)  # what others' next hops have become meanwhile
        hops, reasons = self._neighbours.hops, self._neighbours.reasons
        return {
            who: reasons.get(host, "its next hop is not known") for who, host in backends.items() if host not in hops
        }

    def counters(self) -> Counters:
        counters = read_counters(self._loaded.maps, self._image.allocation)
        for name, service in counters.services.items():
            service.resets_pushed = self._pushed.get(name, 0)
        if self._settings.forward is Forward.NAT:
            counters.flows = self._flows.count
            counters.flow_limit = self._settings.flows
            counters.flows_expired = self._flows.expired
            counters.flows_evicted = self._flows.orphans
        return counters

    def _load(self, backends: int) -> None:
        """Load the program, with the maps of a predecessor if there is one that is like us."""
        settings, predecessor = self._settings, self._attachment.predecessor
        found = {} if predecessor is None else {m.name: m for m in map(Map.from_id, predecessor.info.map_ids)}
        slots = BACKEND_SLOTS
        while slots < min(2 * backends, MAX_BACKENDS):
            slots *= 2
        flows = settings.flows if settings.forward is Forward.NAT else 1
        self._sizes = dict.fromkeys(("backends", "backend_count", "backend_names"), slots)
        self._sizes |= dict.fromkeys(("nat_out", "nat_in"), flows) | {"flows": settings.table_entries}
        try:
            loaded = load_program(self._program_settings(), self._sizes, found)
        finally:
            for one in found.values():
                one.close()
        self._use(loaded, Tables(loaded.maps))
        self._image, self._built_for = self._maps.read(), self._facts()
        if predecessor and not self._loaded.reused:
            event(
                logger,
                logging.WARNING,
                "not-taken-over",
                interface=settings.interface,
                reason="its program keeps its maps in another way",
                meaning="flows and counters begin anew",
            )

    def _use(self, loaded: LoadedProgram, tables: Tables) -> None:
        self._loaded, self._maps = loaded, tables
        self._open += [loaded.close, tables.close]
        self._flows.move_to(loaded.maps["nat_out"], loaded.maps["nat_in"])

    def _facts(self) -> tuple[object, ...]:
        """What the program is built for, the interface's index first."""
        interface = self._neighbours.interface
        return interface.index, interface.mac, interface.mtu, self._settings.sources(interface)

    def _program_settings(self) -> Settings:
        return self._settings.of_program(self._neighbours.interface, self._random)

    def _follow_interface(self, now: float) -> bool:
        """The program knows its interface by heart. If that has changed, or is another one, a new program is needed.

        Returns whether there is one.
        """
        interface, facts = self._neighbours.interface, self._facts()
        if facts == self._built_for or not interface.is_up or now - self._rebuilt_at < REBUILD_INTERVAL:
            return False
        self._rebuilt_at = now
        settings, maps = self._settings, self._loaded.maps.values()
        loaded = load_program(self._program_settings(), self._sizes, {one.name: one for one in maps})
        tables = Tables(loaded.maps)
        attachment = self._attachment
        try:
            image = tables.read()
            if interface.index != self._built_for[0]:  # of the same name, but another one
                attachment = Attachment(settings.interface, interface.index, settings.pin_directory)
            attachment.attach(loaded.program, settings.attach)
        except OSError:
            if attachment is not self._attachment:
                attachment.close()
            tables.close()
            loaded.close()
            raise
        before: list[LoadedProgram | Tables | Attachment] = [self._loaded, self._maps]
        if attachment is not self._attachment:
            before.append(self._attachment)
            self._attachment = attachment
            self._open.append(attachment.close)
        self._use(loaded, tables)
        self._image, self._built_for = image, facts
        for one in before:
            self._open.remove(one.close)
            one.close()
        event(logger, logging.INFO, "interface-changed", interface=interface.name, mac=interface.mac.hex(":"))
        return True

    def _write(self, tables: Sequence[RoutingTable], policies: Mapping[str, ServicePolicy]) -> None:
        around = Surroundings(
            forward=self._settings.forward,
            policies=policies,
            addresses=self._neighbours.interface.addresses,
            hops=self._neighbours.hops,
            cpus=possible_cpus(),
        )
        before = self._image
        within_reach = [_within_reach(table, self._neighbours.reasons) for table in tables]
        with _no_collections():
            after = render(within_reach, around, before)
            steps = difference(before, after)
        full = overfull(before, steps, self._maps.capacities)
        if full is not None:
            raise OSError(errno.ENOSPC, full)
        try:
            self._maps.write(steps)
        except OSError:
            self._undo(after, before)
            raise
        self._image = after

    def _undo(self, after: Image, before: Image) -> None:
        """Put back what was there, however far the change has come."""
        undone = replace(before, generation=next_generation(after.generation))
        self._maps.write(difference(after, undone))
        self._image = undone

    def _suspects(self, now: float) -> list[tuple[str, str]]:
        """Backends that are silent under traffic, or said to be unreachable: known only of those that answer to us."""
        if self._settings.forward.returns_directly:
            return []
        occupants = {slot.number: occupant for occupant, slot in self._image.allocation.backends.items()}
        totals = read_backends(self._loaded.maps["backend_count"], max(occupants, default=-1) + 1)
        silences = {slot: self._policies[occupant.service].silence for slot, occupant in occupants.items()}
        suspects = self._watch.look(silences, totals.datagrams_to, totals.datagrams_from, totals.unreachable, now)
        return [(occupants[slot].service, occupants[slot].backend) for slot in suspects]

    def _news_of_reachable(self) -> dict[tuple[str, str], bool]:
        hops = self._neighbours.hops
        reachable = {
            (table.service.name, backend.name): backend.address.host in hops
            for table in self._tables
            for backend in table.backends
        }
        before, self._reachable = self._reachable, reachable
        return {who: there for who, there in reachable.items() if there != before.get(who, True)}

    def _bid_farewell(self, before: Sequence[RoutingTable]) -> None:
        """Queue a reset for every client of servers that have died, and for no longer of those that have risen.

        A client that only receives sends nothing once its server is silent: nobody but us can tell it.
        """
        if self._settings.forward is not Forward.NAT:
            return  # who talks to whom is not known
        dead_before = {table.service.name: table.dead for table in before}
        for table in self._tables:
            name = table.service.name
            farewells = self._farewells.setdefault(name, Farewells())
            farewells.forget(dead_before.get(name, frozenset()) - table.dead)
            died = table.dead - dead_before.get(name, frozenset())
            if died and self._policies[name].push_rate:
                farewells.add(self._farewells_of(table, died))
        for name in self._farewells.keys() - {table.service.name for table in self._tables}:
            del self._farewells[name]

    def _push(self, now: float) -> None:
        for name, farewells in self._farewells.items():
            if farewells:
                self._pushed[name] = self._pushed.get(name, 0) + farewells.send(self._policies[name].push_rate, now)

    def _farewells_of(self, table: RoutingTable, died: Collection[str]) -> Iterator[Farewell]:
        router = Router(table, random=self._random)
        slots = {
            slot.number: occupant.backend
            for occupant, slot in self._image.allocation.backends.items()
            if occupant.service == table.service.name and occupant.backend in died
        }
        for key, flow in self._flows.of_backends(slots):
            cid = table.whole_cid(flow.cid[: flow.cid_octets])
            datagram = router.farewell(cid) if cid is not None else None
            if datagram is not None:
                local = Address(unpacked(key.local), int.from_bytes(key.local_port))
                client = Address(unpacked(key.client), int.from_bytes(key.client_port))
                yield Farewell(slots[key.backend], local, client, datagram)


def _within_reach(table: RoutingTable, unreachable: Collection[str]) -> RoutingTable:
    """The table with everybody DOWN on hosts that no packet can be sent to, before anybody else has heard of it."""
    if not unreachable:
        return table
    lost = {
        backend.name: BackendState.DOWN
        for backend, state in zip(table.backends, table.states, strict=True)
        if state is not BackendState.DOWN and backend.address.host in unreachable
    }
    if not lost:
        return table
    states = dict(zip(table.index, table.states, strict=True))
    return RoutingTable.build(table.service, states | lost, table.dead, fenced=table.fenced, weights=table.weights)


def _hosts(tables: Sequence[RoutingTable]) -> set[str]:
    return {backend.address.host for table in tables for backend in table.backends}


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Rendering makes many objects and no cycles: looking for those would take more than half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
