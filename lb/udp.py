"""UdpEngine: sockets around a Router, and nothing that decides.

Clients' datagrams are drained from the listening sockets, trains of them at once (GRO). Each one's CID is looked
at: if it is the one that its flow carried last, the answer is known; if not, the Router says. Datagrams of one
flow that follow each other leave together (GSO), from a port that backends answer to.

All sockets sit in an epoll set of our own inside the event loop's: an event loop's handle per socket costs more
memory than a flow, and not every loop passes on EPOLLERR, which is how ICMP errors announce themselves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import select
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import repeat
from pathlib import Path

from lb.address import Address
from lb.engine import Counters, Drop, Suspect, add_counters
from lb.handover import Handover, Sockets
from lb.log import event
from lb.mmsg import Batch, socket_address
from lb.nat import Nat, UdpLimits, bring_forward, host_of
from lb.packet import LONG_HEADER, parse_header
from lb.returnpath import ReturnPath, ReturnPaths
from lb.router import Verdict
from lb.routing import FourTuple, RoutingTable
from lb.sockets import (
    MAX_DATAGRAM,
    MAX_TRAIN_OCTETS,
    MAX_TRAIN_SEGMENTS,
    NO_CONTROL,
    BoundSockets,
    Port,
    listening_port,
    read_control,
    read_errors,
    source_control,
)
from lb.takeover import Takeover
from lb.upstream import ENDED, NO_SHORTCUT, OTHER, Flow, Key, Listener, Member, RunningService, ServicePolicy, Upstream

# Ours.
BATCH = 64  # receives per socket and turn of the loop
EVENTS = 256  # sockets per turn
TICK = 0.1  # seconds between looks at idle flows and silent backends
SWEEP = 4096  # flows looked at per tick
PUSH_INTERVAL = 0.01  # seconds between bursts of pushed resets, or more if there are fewer to push
STOPPED = 1.0  # seconds without a look at the clock, after which this process must have been stopped
RESTORE_PATIENCE = 1.0  # seconds that a port of a killed predecessor may take to become free
SHARE_PATIENCE = 10.0  # seconds that another worker may take to share an address that it takes over

logger = logging.getLogger(__name__)


class UdpEngine:
    """The socket data plane of one process.

    `suspect(service, backend)` is called at signs of trouble. `return_paths(lock)` opens what survives this process;
    `lock` is that of a predecessor which still writes its own, None without one.
    `shared` lets several engines listen on the same addresses. `inherited` are bound sockets that somebody opened for
    us; `keep(address, descriptor)` is told of each listening socket, and of None when it goes.

    A successor is served at the socket `handover`; `on_handed_over` is called when it has everything, and this engine
    is to be stopped: if the successor ends before, this engine goes on.
    With `take_over`, everything that the engines at the sockets `predecessors` have is taken over.
    `log_flows` is the share of new flows that are logged, chosen by `chance`, a number from 0 to 1.
    """

    def __init__(
        self,
        limits: UdpLimits,
        policies: Mapping[str, ServicePolicy],
        *,
        suspect: Suspect,
        random: Callable[[int], bytes] = os.urandom,
        return_paths: Callable[[int | None], ReturnPaths | None] = lambda _: None,
        shared: bool = False,
        inherited: Sequence[socket.socket] = (),
        keep: Callable[[Address, int | None], None] = lambda *_: None,
        handover: Path | None = None,
        take_over: bool = False,
        predecessors: Sequence[Path] = (),
        on_handed_over: Callable[[], None] = lambda: None,
        log_flows: float = 0.0,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._limits = limits
        self._policies = policies
        self._suspect = suspect
        self._random = random
        self._open_return_paths = return_paths
        self._shared = shared
        self._bound = BoundSockets(inherited)
        self._keep = keep
        self._handover = Handover(handover, self) if handover is not None else None
        self._take_over = take_over
        self._predecessors = predecessors
        self._takeover: Takeover | None = None
        self._on_handed_over = on_handed_over
        self._log_flows = log_flows
        self._chance = chance
        self._changing = asyncio.Lock()  # held by who changes tables, and while a successor has everything
        self._services: dict[str, RunningService] = {}
        self._listeners: dict[Address, Listener] = {}
        self._counters = Counters(flow_limit=limits.flows, socket_limit=limits.sockets)
        self._nat = Nat(limits, self._counters, self._on_new_upstream)
        self._timers: set[asyncio.TimerHandle] = set()
        self._batch = Batch(BATCH, MAX_DATAGRAM)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._epoll: select.epoll | None = None
        self._readable: dict[int, Callable[[int], None]] = {}  # by descriptor; called with epoll's events
        self._looked_at = self._stopped_for = 0.0  # the clock; seconds

    # Engine.

    async def start(self, tables: Sequence[RoutingTable]) -> None:
        """Listen, take over what a predecessor has or a killed one left behind, forward.

        Raises OSError, and has closed everything, if it cannot listen, or cannot take over what it is to take over.
        """
        self._loop = asyncio.get_running_loop()
        self._looked_at = self._loop.time()
        self._epoll = select.epoll()
        try:
            if self._take_over:
                await self._start_after_predecessors(tables)
            else:
                await self._start_alone(tables)
        except BaseException:
            await self.stop()
            raise
        for service in self._services.values():
            self._bid_farewell(service, service.router.table.dead)  # to those that a predecessor had not told yet
        self._bound.close()
        self._serve_handover()

    async def _start_alone(self, tables: Sequence[RoutingTable]) -> None:
        self._nat.return_paths = paths = self._open_return_paths(None)
        await self._apply(tables)
        if paths is not None:
            await self._restore(list(paths.remembered()))
            paths.commit()
        self._read()

    async def _start_after_predecessors(self, tables: Sequence[RoutingTable]) -> None:
        """Take everything that they have, while they forward; then have them stop, catch up, and read."""
        self._takeover = takeover = Takeover(self._nat, self._bound, self._now)
        try:
            await takeover.begin(self._predecessors)
            await self._apply(tables)
            self._nat.return_paths = paths = self._open_return_paths(takeover.lock)
            await takeover.follow(self._listeners, paths)
            stopped = self._now()
            await takeover.finish(self._listeners)
            self._read()
            paused = self._now() - stopped
        finally:
            takeover.close_files()
        if paths is not None:
            paths.commit()
        self._counters.flows_restored += takeover.finished(paused * 1000)

    def _serve_handover(self) -> None:
        if self._handover is None or self._nat.return_paths is None:
            return  # without the file there is nothing to follow
        try:
            self._handover.serve()
        except OSError as error:
            meaning = "an upgrade of this process loses its flows"
            event(logger, logging.WARNING, "no-handover", reason=error.strerror, meaning=meaning)

    async def apply(self, tables: Sequence[RoutingTable]) -> None:
        """Obey these tables from now on, and no others. Raises OSError, with nothing changed, if it cannot listen."""
        async with self._changing:
            await self._apply(tables)

    async def _apply(self, tables: Sequence[RoutingTable]) -> None:
        wanted = {address: table for table in tables for address in table.service.listen}
        opened: dict[Address, list[Port]] = {}
        try:
            for address in wanted:
                if address not in self._listeners:
                    opened[address] = await self._listening_ports(address)
        except OSError as error:
            for port in (port for ports in opened.values() for port in ports):
                port.close()
            raise OSError(error.errno, f"cannot listen on {address}: {os.strerror(error.errno or 0)}") from error

        # From here on nothing can fail.
        for flow in self._nat.flows:
            flow.shortcut = NO_SHORTCUT
        gone: list[Member] = []
        for table in tables:
            gone += self._apply_to_service(table)
        for name in self._services.keys() - {table.service.name for table in tables}:
            gone += self._services.pop(name).members
        for address, listener in list(self._listeners.items()):
            if address not in wanted:
                self._close_listener(listener)
            else:
                listener.service = self._services[wanted[address].service.name]
        for address, ports in opened.items():
            self._open_listener(Listener(address, ports, self._services[wanted[address].service.name]))
        if gone:
            left = set(gone)
            for flow in [flow for flow in self._nat.flows if flow.member in left]:
                self._nat.end(flow, self._now())
        self._nat.set_backends([member for service in self._services.values() for member in service.members])

    def set_policies(self, policies: Mapping[str, ServicePolicy]) -> None:
        """Replace policies; they take effect with the next `apply`."""
        self._policies = policies

    async def counters(self) -> Counters:
        counters = self._counters
        counters.flows = self._nat.flows.count
        counters.sockets = self._nat.sockets
        counters.services = {name: service.counted() for name, service in self._services.items()}
        moment = Counters()  # which others may look at for as long as they like
        add_counters(moment, counters)
        return moment

    async def stop(self) -> None:
        """Close everything. Return paths stay in their file, for a successor."""
        if self._handover is not None:
            await self._handover.stop()
        for timer in self._timers:
            timer.cancel()
        if self._loop is not None and self._epoll is not None and not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
        for listener in self._listeners.values():
            for port in listener.ports:
                port.close()
        self._listeners = {}
        self._bound.close()
        self._nat.close()
        if self._takeover is not None:
            self._takeover.close()

    # Giver: what a successor gets.

    def files(self) -> tuple[str, int, int] | None:
        paths = self._nat.return_paths
        return (paths.path.name, paths.descriptor, paths.lock) if paths is not None else None

    def sockets(self) -> Sockets:
        listening = [port.sock for listener in self._listeners.values() for port in listener.ports]
        return Sockets(listening, [upstream.sock for upstream in self._nat.upstreams])

    def records(self) -> int:
        return self._nat.flows.numbers

    async def pause(self) -> None:
        await self._changing.acquire()
        assert self._loop is not None  # noqa: S101
        assert self._epoll is not None  # noqa: S101
        self._loop.remove_reader(self._epoll.fileno())
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def resume(self) -> None:
        paths = self._nat.return_paths
        if paths is not None and not paths.is_in_place():
            try:
                paths.reclaim()
            except OSError as error:
                event(logger, logging.WARNING, "return-paths-lost", file=paths.path, reason=error.strerror)
        self._changing.release()
        self._read()
        for service in self._services.values():
            if service.pushing:
                self._push(service)

    def handed_over(self) -> None:
        self._on_handed_over()

    # From clients.

    def _on_events(self) -> None:
        assert self._epoll is not None  # noqa: S101 - we are its reader
        for descriptor, events in self._epoll.poll(0, EVENTS):
            readable = self._readable.get(descriptor)
            if readable is not None:
                readable(events)

    def _on_clients(self, listener: Listener, port: Port) -> None:
        """Drain a listening socket.

        Datagrams that take the shortcut are gathered into a run while they are of one flow, size and traffic class,
        and sent when the next one is not. Every receive of a batch has a buffer of its own, so that a run is views
        into them. Written out flat: at this rate a call costs as much as a look at a CID.
        """
        now = self._now()
        flows = listener.flows
        said = b""  # the control messages that were read last: mostly they are the same again
        said_length = segment = tos = 0
        local: bytes | None = None
        run: list[memoryview] = []
        run_flow: Flow | None = None
        run_segment = run_tos = run_octets = run_count = 0
        run_open = False

        try:
            batch = self._batch.receive(port.descriptor, port.is_ipv6)
        except OSError:
            return  # an ICMP error from a client; it is the client's to repair
        for (length, size), (client,), (control,), buffer, view in batch:
            if control != said or length != said_length:
                segment, tos, local = read_control(control[:length])
                said, said_length = control, length
            flow = flows.get(client if local is None else (client, local))

            # The shortcut: short headers with the very CID that the flow carried last.
            if flow is None:
                hit = False
            elif segment:
                hit = all_of(flow.shortcut, buffer, size, segment)
                count, step = -(-size // segment), segment
            else:
                cid = flow.shortcut
                hit = size > len(cid) and buffer[0] < LONG_HEADER and buffer.startswith(cid, 1)
                count, step = 1, size
            if not hit or flow is None:
                if run_flow is not None:
                    self._send_up(run_flow, run, run_count, run_segment, run_tos)
                    run_flow = None
                self._ask(listener, client, local, view[:size], segment, tos, now)
                continue

            member = flow.member
            member.by_config[flow.config_id] += count
            member.octets_to += size
            if (
                flow is run_flow
                and run_open
                and tos == run_tos
                and (step == run_segment or (count == 1 and size <= run_segment))
                and run_octets + size <= MAX_TRAIN_OCTETS
                and run_count + count <= MAX_TRAIN_SEGMENTS
            ):
                run.append(view[:size])
                run_octets += size
                run_count += count
            else:
                if run_flow is not None:
                    self._send_up(run_flow, run, run_count, run_segment, run_tos)
                run = [view[:size]]
                run_flow, run_segment, run_tos, run_octets, run_count = flow, step, tos, size, count
                flow.seen = now
            # Only the last datagram of a train may be shorter than the others.
            run_open = size == count * run_segment

        if run_flow is not None:
            self._send_up(run_flow, run, run_count, run_segment, run_tos)

    def _send_up(self, flow: Flow, run: list[memoryview], count: int, segment: int, tos: int) -> None:
        drop = flow.upstream.send(run, segment, count, tos, flow.member.sockaddr, NO_CONTROL)
        if drop is not None:
            self._counters.failures[drop] += count

    def _ask(
        self,
        listener: Listener,
        client: bytes,
        local: bytes | None,
        received: memoryview,
        segment: int,
        tos: int,
        now: float,
    ) -> None:
        """Ask the router about every datagram of what was received; cut a train where its flow changes, and send."""
        key = client if local is None else (client, local)
        octets, size = bytes(received), len(received)
        segment = segment or size or 1
        start = 0
        while True:
            stop = min(start + segment, size)
            flow, config = self._admit(listener, key, client, local, octets[start:stop], now)
            count = 1
            if flow is not None:
                # The datagram may have made the shortcut that the next ones of its train take.
                while (more := octets[stop : stop + segment]) and all_of(flow.shortcut, more, len(more), segment):
                    stop += len(more)
                    count += 1
                flow.seen = now
                flow.member.by_config[config] += 1
                flow.member.by_config[flow.config_id] += count - 1
                flow.member.octets_to += stop - start
                self._send_up(flow, [received[start:stop]], count, segment if count > 1 else stop - start, tos)
            start = stop
            if start >= size:
                return

    def _admit(
        self,
        listener: Listener,
        key: Key,
        client: bytes,
        local: bytes | None,
        datagram: bytes,
        now: float,
    ) -> tuple[Flow | None, int]:
        """Ask the router about a datagram. Returns its flow, None if it goes nowhere, and what to count it under."""
        service = listener.service
        router, counters = service.router, service.counters
        host = listener.address.host if local is None else host_of(local)
        where = socket_address(client)
        four_tuple = FourTuple(where[0], where[1], host, listener.address.port)
        verdict, backend, config_id, unroutable, reply = router.route(datagram, four_tuple, now)
        if unroutable is not None:
            counters.unroutable[unroutable] += 1
        if verdict is not Verdict.CID:  # that one is counted by config ID
            counters.verdicts[verdict] += 1
            if verdict is Verdict.CID_DOWN and config_id is not None:
                service.by_config_down[config_id] += 1
        if backend is None:
            if reply is not None:
                drop = listener.port.send([reply], len(reply), 1, 0, where, source_control(local))
                if drop is not None:
                    self._counters.failures[drop] += 1
            return None, OTHER

        member = service.members[backend]
        head = flow = listener.flows.get(key)
        while flow is not None and flow.member is not member:
            flow = flow.sibling
        is_short = datagram[0] < LONG_HEADER
        by_cid = verdict is Verdict.CID or verdict is Verdict.CID_DOWN
        if flow is None:
            flow = self._nat.begin(listener, key, where, local, member, now)
            if flow is None:
                self._counters.failures[Drop.NO_SOCKET] += 1
                if verdict is Verdict.CID and config_id is not None:
                    service.past[config_id] += 1
                return None, OTHER
            is_move = by_cid and is_short
            if is_move:
                counters.moves += 1
                if router.table.fallback(four_tuple) != backend:
                    counters.rescued += 1
            if self._log_flows and self._chance() < self._log_flows:
                self._log_flow(four_tuple, member, verdict, is_move)
        elif flow is not head:
            bring_forward(flow)
        if is_short:
            flow.short_header_seen = True
        if not by_cid or config_id is None:
            return flow, OTHER
        if is_short or flow.cid is None:
            # A long header's CID will do until a short one comes: its client may have got no further.
            cid = router.table.whole_cid(datagram[1:] if is_short else _dcid(datagram))
            if cid is not None and cid != flow.cid:
                flow.cid = cid
                self._nat.remember(flow)
            if is_short and flow.cid is not None and cid is not None and verdict is Verdict.CID:
                flow.shortcut = flow.cid  # the same object, not an equal one: flows are many
                flow.config_id = config_id
        return flow, config_id if verdict is Verdict.CID else OTHER

    def _log_flow(self, flow: FourTuple, member: Member, verdict: Verdict, is_move: bool) -> None:
        """A new flow: whose, and where it went. Its CID and server ID say nothing to who reads this, and stay out."""
        event(
            logger,
            logging.INFO,
            "flow",
            client=Address(flow.client, flow.client_port),
            service=member.service,
            backend=member.name,
            verdict=verdict.name.lower(),
            is_move=is_move,
        )

    # From backends.

    def _on_backends(self, upstream: Upstream, events: int = 0) -> None:
        """Drain a port towards backends; runs as in `_on_clients`."""
        if events & select.EPOLLERR:
            # Receiving does not always say so: a send may have been told first, and to be too long is told to it alone.
            self._on_errors(upstream)
        now = self._now()
        flows = upstream.flows
        said = b""
        said_length = segment = tos = 0
        run: list[memoryview] = []
        run_flow: Flow | None = None
        run_segment = run_tos = run_octets = run_count = 0
        run_open = False

        try:
            batch = self._batch.receive(upstream.descriptor, upstream.is_ipv6)
        except OSError:
            self._on_errors(upstream)
            return
        for (length, size), (peer,), (control,), _, view in batch:
            if control != said or length != said_length:
                segment, tos, _local = read_control(control[:length])
                said, said_length = control, length
            step, count = (segment, -(-size // segment)) if segment else (size, 1)
            flow = flows.get(peer)
            if flow is None:
                self._counters.failures[Drop.NO_FLOW] += count
                continue
            member = flow.member
            member.datagrams_from += count
            member.octets_from += size
            if (
                flow is run_flow
                and run_open
                and tos == run_tos
                and (step == run_segment or (count == 1 and 0 < size <= run_segment))
                and run_octets + size <= MAX_TRAIN_OCTETS
                and run_count + count <= MAX_TRAIN_SEGMENTS
            ):
                run.append(view[:size])
                run_octets += size
                run_count += count
            else:
                if run_flow is not None:
                    self._send_down(run_flow, run, run_count, run_segment, run_tos)
                run = [view[:size]]
                run_flow, run_segment, run_tos, run_octets, run_count = flow, step, tos, size, count
                flow.seen = now
                if not flow.established and flow.short_header_seen:
                    self._nat.flows.establish(flow)
                    self._nat.remember(flow)
            run_open = 0 < size == count * run_segment

        if run_flow is not None:
            self._send_down(run_flow, run, run_count, run_segment, run_tos)

    def _send_down(self, flow: Flow, run: list[memoryview], count: int, segment: int, tos: int) -> None:
        drop = flow.listener.port.send(run, segment, count, tos, flow.client, flow.control)
        if drop is not None:
            self._counters.failures[drop] += count

    def _on_errors(self, upstream: Upstream) -> None:
        """ICMP has come back for something that was sent. It decides nothing, but it is worth a look."""
        suspects = set()
        for raw in read_errors(upstream):
            flow = upstream.flows.get(raw)
            if flow is not None:
                flow.member.unreachable += 1
                suspects.add(flow.member)
        for member in suspects:
            self._suspect(member.service, member.name)

    # Services and sockets.

    async def _restore(self, paths: list[ReturnPath]) -> None:
        """Carry on the flows of a process that died. Its last worker may take a moment to let go of a port."""
        give_up = self._now() + RESTORE_PATIENCE
        while not self._nat.reopen_ports(paths, self._now(), final=self._now() >= give_up):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._nat.restore(paths, self._listeners, self._now())

    async def _listening_ports(self, address: Address) -> list[Port]:
        """Ports at an address: those that another process has bound, or a new one. Raises OSError."""
        bound = self._bound.take(address)
        buffer, shared = self._limits.socket_buffer, self._shared
        if bound:
            return [listening_port(address, buffer=buffer, shared=shared, bound=sock) for sock in bound]
        # One more worker than before: another one is about to make an address one that can be shared.
        give_up = self._now() + (SHARE_PATIENCE if self._take_over and shared else 0)
        while True:
            try:
                return [listening_port(address, buffer=buffer, shared=shared)]
            except OSError:
                if self._now() >= give_up:
                    raise
            await asyncio.sleep(0.02)

    def _apply_to_service(self, table: RoutingTable) -> list[Member]:
        """Swap one service's table. Returns the members that are no more."""
        name = table.service.name
        policy = self._policies[name]
        service = self._services.get(name)
        if service is None:
            service = self._services[name] = RunningService(table, policy, self._random)
        before = service.router.table
        service.router.table = table
        if policy != service.policy:
            service.policy = policy
            service.router.set_limits(policy.router)
        known = {(member.name, member.address): member for member in service.members}
        service.members = [
            known.pop(who) if (who := (b.name, b.address)) in known else Member(name, *who) for b in table.backends
        ]
        self._bid_farewell(service, table.dead - before.dead)
        for member in known.values():
            service.past = [a + b for a, b in zip(service.past, member.by_config, strict=True)]
        return list(known.values())

    def _open_listener(self, listener: Listener) -> None:
        self._listeners[listener.address] = listener
        for port in listener.ports:
            self._watch_clients(listener, port)
        self._keep(listener.address, listener.port.descriptor)

    def _watch_clients(self, listener: Listener, port: Port) -> None:
        self._watch(port, lambda _: self._on_clients(listener, port))

    def _close_listener(self, listener: Listener) -> None:
        for flow in [flow for flow in self._nat.flows if flow.listener is listener]:
            self._nat.end(flow, self._now())
        self._keep(listener.address, None)
        for port in listener.ports:
            self._unwatch(port)
            port.close()
        del self._listeners[listener.address]

    def _read(self) -> None:
        assert self._loop is not None  # noqa: S101
        assert self._epoll is not None  # noqa: S101
        self._loop.add_reader(self._epoll.fileno(), self._on_events)
        self._later(TICK, self._tick)

    def _on_new_upstream(self, upstream: Upstream) -> None:
        self._watch(upstream, lambda events: self._on_backends(upstream, events))

    def _watch(self, port: Port, readable: Callable[[int], None]) -> None:
        assert self._epoll is not None  # noqa: S101 - made in start(), before anything is opened
        self._epoll.register(port.sock.fileno(), select.EPOLLIN)
        self._readable[port.sock.fileno()] = readable

    def _unwatch(self, port: Port) -> None:
        assert self._epoll is not None  # noqa: S101
        self._epoll.unregister(port.sock.fileno())
        del self._readable[port.sock.fileno()]

    # Time.

    def _now(self) -> float:
        """Seconds, but for those in which this process was stopped: nobody was idle because we did not listen."""
        assert self._loop is not None  # noqa: S101 - set in start()
        now = self._loop.time()
        if now - self._looked_at > STOPPED:
            self._stopped_for += now - self._looked_at
        self._looked_at = now
        return now - self._stopped_for

    def _later(self, delay: float, call: Callable[[], None]) -> None:
        assert self._loop is not None  # noqa: S101

        def run() -> None:
            self._timers.discard(timer)
            call()

        timer = self._loop.call_later(delay, run)
        self._timers.add(timer)

    def _tick(self) -> None:
        self._later(TICK, self._tick)  # first, lest whatever goes wrong below be the last thing that happens here
        now = self._now()
        for flow in self._nat.flows.expired(now, SWEEP, self._limits.idle_timeout, self._limits.new_flow_timeout):
            self._counters.flows_expired += 1
            self._nat.end(flow, now)
        for service in self._services.values():
            service.router.sweep(now, SWEEP // 16)
            if not service.policy.silence:
                continue
            for member in service.members:
                sent, heard = sum(member.by_config), member.datagrams_from
                if member.silent.suspicious(sent, heard, now, service.policy.silence):
                    self._suspect(member.service, member.name)

    # Pushed resets.

    def _bid_farewell(self, service: RunningService, dead: Collection[str]) -> None:
        """Queue a reset for every client of servers that are dead.

        A client that only receives sends nothing once its server is silent: nobody but us can tell it.
        """
        if not dead or not service.policy.push_rate:
            return
        members = {member for member in service.members if member.name in dead}
        service.farewells.extend(flow for flow in self._nat.flows if flow.cid is not None and flow.member in members)
        if service.farewells and not service.pushing:
            self._push(service)

    def _push(self, service: RunningService) -> None:
        """Send a burst of resets, and the next one a little later: `push_rate` a second."""
        rate = service.policy.push_rate
        if not rate:
            service.farewells.clear()
        burst = max(1, int(rate * PUSH_INTERVAL))
        service.pushing = bool(service.farewells)
        if service.pushing:
            self._later(burst / rate, lambda: self._push(service))
        for _ in range(min(burst, len(service.farewells))):
            flow = service.farewells.popleft()
            # It may have ended meanwhile, or its server risen.
            reset = service.router.farewell(flow.cid) if flow.number != ENDED and flow.cid is not None else None
            if reset is None:
                continue
            drop = flow.listener.port.send([reset], len(reset), 1, 0, flow.client, flow.control)
            if drop is None:
                service.counters.resets_pushed += 1
            else:
                self._counters.failures[drop] += 1
                if drop == Drop.BUFFER_FULL:  # it will be told, if later
                    service.farewells.append(flow)
                    continue
            self._nat.end(flow, self._now())


def all_of(cid: bytes, buffer: bytes | bytearray, size: int, segment: int) -> bool:
    """Whether every datagram of a train is a short header packet with this CID.

    The train is the first `size` octets of `buffer`, cut every `segment` octets; what is behind them is stale.
    """
    if (size - 1) % segment < len(cid) or not buffer[:size:segment].isascii():  # no first octet has its high bit set
        return False
    return all(map(buffer.startswith, repeat(cid), range(1, size, segment)))


def _dcid(datagram: bytes) -> bytes:
    header = parse_header(datagram)
    return header.dcid if header is not None else b""
