"""The examination: connections, packets and commands, in an order that disturbs a server as little as can be.

What is seen goes into `Observations`; nothing here judges. Everything has an end: each wait its timeout, all of them
together the deadline.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from lb.address import Address
from lb.conformance.client import MOST_CIDS, Connection, ExaminationError, Glimpse, Offer, glimpse
from lb.conformance.datagrams import Asker
from lb.conformance.observed import (
    Kind,
    LiveConnection,
    MoveRecord,
    Observations,
    Origin,
    PoolRecord,
    RestartRecord,
    RotationRecord,
    SeenCid,
    SeenRetry,
    Trigger,
)
from lb.conformance.subject import Subject
from lb.reset import SHORT_HEADER_FORM

Command = Callable[[], Awaitable[None]]

# Ours.
CONNECTIONS = 2000
CONCURRENCY = 16
TIMEOUT = 5.0  # seconds
SETTLE = 0.3  # seconds for CIDs that come unasked
LIMITS = (2, 5, MOST_CIDS)  # of CIDs at a time, that clients out there take
SAMPLED = 50  # one connection of so many is made to its end
FEWEST_SAMPLES = 4
AFTER_RESTART = 200  # connections, to see whether nonces come again
AFTER_ROTATION = 50
OWN_SIZES = (1200, 300, 100, 60, 43, 30, 24, 21, 12)  # octets of packets to CIDs that were never issued
OLD_SIZES = (1200, 100, 60)
FOREIGN = 8  # packets to other servers' CIDs
UNROUTABLE = 2  # and to 0b111 ones
RESTARTED = 2  # connections that a restart breaks
CIDS_OF_EACH = 2
FOREIGN_SIZE = 200
QUIET = 1.0  # seconds
SPACING = 0.05  # seconds; quinn sends a reset every 20 ms at most
TRIES = 3  # packets get lost, and resets are limited
POLL = 0.25  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be looked at. `restart` and `rotate` raise ExaminationError if they do not do it."""

    alpn: tuple[str, ...] = ("h3",)
    server_name: str = "localhost"
    connections: int = CONNECTIONS
    concurrency: int = CONCURRENCY
    restart: Command | None = None
    restart_within: float = 30.0  # seconds
    rotate: Command | None = None
    within: float = 5.0  # seconds for a new configuration to be obeyed
    timeout: float = TIMEOUT  # seconds that anything may take to be answered
    quiet: float = QUIET  # seconds without an answer mean that there is none
    spacing: float = SPACING  # seconds between packets that want to be answered with resets
    deadline: float = 300.0  # seconds for all


class Examination:
    """One examination of one server."""

    def __init__(self, server: Address, subject: Subject, plan: Plan) -> None:
        self.seen = Observations()
        self._server = server
        self._subject = subject
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._numbered = 0  # connections so far
        self._open_connections: set[Connection] = set()
        self._askers: list[Asker] = []

    async def run(self) -> Observations:
        """Look at everything. Raises ExaminationError or OSError if there is no server at all."""
        try:
            for _ in range(len(OWN_SIZES) + FOREIGN + UNROUTABLE + RESTARTED * CIDS_OF_EACH * len(OLD_SIZES)):
                self._askers.append(await Asker.open(self._server))
            async with asyncio.timeout(self._plan.deadline):
                await self._first()
                async with asyncio.TaskGroup() as group:
                    rebinding = group.create_task(self._move(self._rebound))
                    migration = group.create_task(self._move(self._migrated))
                    pools = [group.create_task(self._pool(limit)) for limit in LIMITS]
                self.seen.rebinding, self.seen.migration = rebinding.result(), migration.result()
                self.seen.pools += [pool for task in pools if (pool := task.result()) is not None]
                await self._sweep(self._plan.connections)
                await self._triggers()
                if self._plan.restart is not None:
                    self.seen.restart = await self._restart(self._plan.restart)
                if self._plan.rotate is not None and self._subject.rotated is not None:
                    self.seen.rotation = await self._rotation(self._plan.rotate, self._subject.rotated)
                self.seen.is_complete = True
        except TimeoutError:
            if not self.seen.handshakes:
                raise ExaminationError(f"no handshake within {self._plan.deadline:g} s") from None
        finally:
            for connection in self._open_connections:
                connection.close()
            for asker in self._askers:
                asker.close()
        return self.seen

    def _offer(self, limit: int = MOST_CIDS) -> Offer:
        return Offer(self._plan.alpn, self._plan.server_name, limit)

    async def _open(self, limit: int = MOST_CIDS) -> Connection:
        connection = await Connection.open(self._server, self._offer(limit), self._plan.timeout)
        self._open_connections.add(connection)
        return connection

    async def _first(self) -> None:
        began = self._loop.time()
        connection = await self._open()
        self.seen.connect_seconds = self._loop.time() - began
        self.seen.alpn = connection.alpn
        self.seen.disables_migration = connection.quic.disables_migration
        await self._settle(connection)
        self._note(connection)
        self._close(connection)

    async def _settle(self, connection: Connection) -> None:
        """Wait for the CIDs that a server issues unasked."""
        limit = connection.quic.limit
        await connection.ping(self._plan.timeout)
        await connection.until(lambda: len(connection.quic.active_cids) >= limit, SETTLE)

    def _note(self, connection: Connection, after_restart: bool = False) -> None:
        """Write down what a connection has shown."""
        number = self._numbered
        quic = connection.quic
        if quic.token is None:
            self.seen.without_token += 1
        self._note_retries(connection.retries, connection.handshake_cid, after_restart)
        cids = [SeenCid(connection.handshake_cid, Origin.HANDSHAKE, number, quic.token, after_restart)]
        for each in quic.issued:
            origin = Origin.PREFERRED_ADDRESS if each.in_preferred_address else Origin.NEW_CONNECTION_ID
            cids.append(SeenCid(each.cid, origin, number, each.token, after_restart))
        self.seen.cids += cids
        self._numbered += 1
        self.seen.handshakes += 1

    def _close(self, connection: Connection) -> None:
        connection.close()
        self._open_connections.discard(connection)

    def _note_glimpse(self, seen: Glimpse, after_restart: bool) -> None:
        self._note_retries(seen.retries, seen.cid, after_restart)
        self.seen.cids.append(SeenCid(seen.cid, Origin.HANDSHAKE, self._numbered, None, after_restart))
        self._numbered += 1
        self.seen.handshakes += 1

    def _note_retries(self, retries: Iterable[tuple[bytes, bytes]], then: bytes, after_restart: bool) -> None:
        """A server may go on with the SCID of its Retry: `then` is the one that it goes on with."""
        for scid, dcid in retries:
            self.seen.retries.append(SeenRetry(scid, dcid))
            if scid != then:
                self.seen.cids.append(SeenCid(scid, Origin.RETRY, self._numbered, None, after_restart))

    async def _pool(self, limit: int) -> PoolRecord | None:
        """What a client gets that takes so many CIDs at a time, and retires one after the other."""
        try:
            connection = await self._open(limit)
        except (ExaminationError, OSError):
            self.seen.unanswered += 1
            return None
        await self._settle(connection)
        quic = connection.quic
        pool = PoolRecord(limit, most_active=len(quic.active_cids), issued=len(quic.issued))
        for _ in range(pool.issued + 2 if pool.issued else 0):
            if not connection.change_cid():
                break
            pool.retired += 1
            if not await connection.until(lambda: len(quic.active_cids) > 1, self._plan.timeout):
                pool.ran_out = True
                break
            pool.most_active = max(pool.most_active, len(quic.active_cids))
        pool.error = connection.ended
        pool.is_exceeded = quic.exceeded_limit
        self._note(connection)
        self._close(connection)
        return pool

    async def _move(self, how: Callable[[Connection], Awaitable[tuple[bool, bool]]]) -> MoveRecord:
        try:
            connection = await self._open()
            await self._settle(connection)
            challenges = connection.quic.challenges
            took_new_cid, is_probed = await how(connection)
            # Whoever migrates looks first whether there is a way; whom a NAT moves does not know.
            is_challenge_answered = is_probed and await connection.challenge(self._plan.timeout)
            is_answered = await connection.ping(self._plan.timeout)
            await connection.until(lambda: connection.quic.challenges > challenges, SETTLE)
        except (ExaminationError, OSError) as error:
            self.seen.unanswered += 1
            return MoveRecord(error=str(error))
        challenges = connection.quic.challenges - challenges
        self._note(connection)
        self._close(connection)
        return MoveRecord(is_answered, challenges, is_challenge_answered, took_new_cid)

    async def _rebound(self, connection: Connection) -> tuple[bool, bool]:
        """Whether it took another CID, and whether it is to validate the new path itself."""
        await connection.rebind()
        return False, False

    async def _migrated(self, connection: Connection) -> tuple[bool, bool]:
        await connection.rebind()
        return connection.change_cid(), True

    async def _sweep(self, connections: int, after_restart: bool = False) -> None:
        """So many handshakes; all but some are broken off when the server's CID is known."""
        every = max(1, min(SAMPLED, connections // FEWEST_SAMPLES))
        numbers = iter(range(connections))

        async def work() -> None:
            for number in numbers:
                if number % every == 0:
                    try:
                        connection = await self._open()
                    except (ExaminationError, OSError):
                        self.seen.unanswered += 1
                        continue
                    await self._settle(connection)
                    self._note(connection, after_restart)
                    self._close(connection)
                    continue
                try:
                    seen = await glimpse(self._server, self._offer(), self._plan.timeout)
                except OSError:
                    seen = None
                if seen is None:
                    self.seen.unanswered += 1
                else:
                    self._note_glimpse(seen, after_restart)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._plan.concurrency, connections)):
                group.create_task(work())

    async def _triggers(self) -> None:
        subject = self._subject
        wanted = [Trigger(Kind.OWN, subject.craft(os.urandom), size) for size in OWN_SIZES]
        wanted += [Trigger(Kind.FOREIGN, subject.craft_foreign(os.urandom), FOREIGN_SIZE) for _ in range(FOREIGN)]
        wanted += [
            Trigger(Kind.UNROUTABLE, subject.craft_unroutable(os.urandom), FOREIGN_SIZE) for _ in range(UNROUTABLE)
        ]
        self.seen.triggers = list(await self._ask_all(wanted))

    async def _ask_all(self, triggers: Iterable[Trigger]) -> Iterable[Trigger]:
        return await asyncio.gather(*(self._ask(each, i * self._plan.spacing) for i, each in enumerate(triggers)))

    async def _ask(self, trigger: Trigger, after: float) -> Trigger:
        """Send it after so many seconds, and again and again if it should be answered and is not."""
        await asyncio.sleep(after)
        tries = TRIES if trigger.kind in (Kind.OWN, Kind.OLD) and trigger.size >= min(OLD_SIZES) else 1
        asker = self._askers.pop()
        for _ in range(tries):
            answers = await asker.ask(_short_header(trigger.cid, trigger.size), self._plan.quiet, self._plan.quiet / 2)
            if answers:
                break
        asker.close()
        return Trigger(trigger.kind, trigger.cid, trigger.size, answers)

    async def _restart(self, command: Command) -> RestartRecord:
        old: list[bytes] = []
        connections = []
        for _ in range(RESTARTED):
            try:
                connection = await self._open()
            except (ExaminationError, OSError) as error:
                return RestartRecord(error=f"before the restart: {error}")
            await self._settle(connection)
            connections.append(connection)
            old += [cid for cid in connection.quic.active_cids[:CIDS_OF_EACH] if self._subject.misrouted(cid) is None]
        try:
            await command()
        except ExaminationError as error:
            return RestartRecord(error=str(error))
        for connection in connections:
            self._note(connection)
            # Without a farewell: a server that has not ended still has the connection, and nothing to reset.
            connection.abandon()
        began = self._loop.time()
        try:
            async with asyncio.timeout(self._plan.restart_within):
                while not await self._is_up():  # noqa: ASYNC110 - another process
                    await asyncio.sleep(POLL)
                seconds = self._loop.time() - began
        except TimeoutError:
            return RestartRecord(error=f"not up again {self._plan.restart_within:g} s after the restart")
        wanted = [Trigger(Kind.OLD, cid, size) for cid in old for size in OLD_SIZES]
        triggers = await self._ask_all(wanted)
        await self._sweep(min(AFTER_RESTART, self._plan.connections), after_restart=True)
        return RestartRecord(tuple(triggers), seconds)

    async def _is_up(self) -> bool:
        try:
            return await glimpse(self._server, self._offer(), QUIET) is not None
        except OSError:
            return False

    async def _rotation(self, command: Command, rotated: Subject) -> RotationRecord:
        within = self._plan.within
        try:
            live = [await self._open(limit) for limit in (MOST_CIDS, 2, MOST_CIDS)]
            for connection in live:
                await self._settle(connection)
            *moving, slow = live
            slow.quic.expect_no_limit()
            slow.quic.keeps_old = True
            before = [1 + max(connection.quic.active_sequences) for connection in moving]
            await command()
        except (ExaminationError, OSError) as error:
            return RotationRecord(within, error=str(error))
        began = self._loop.time()
        moved = [self._moved(each, old, rotated, began) for each, old in zip(moving, before, strict=True)]
        records, is_old_accepted = await asyncio.gather(
            asyncio.gather(*moved), self._is_old_accepted(slow, rotated, began)
        )
        later = await self._later(moving, rotated)
        for connection in live:
            self._close(connection)
        return RotationRecord(within, tuple(records), later, is_old_accepted)

    async def _moved(self, connection: Connection, old: int, rotated: Subject, began: float) -> LiveConnection:
        quic = connection.quic
        has_moved = await self._poll(
            connection, began, lambda: not any(rotated.misrouted(cid) for cid in quic.active_cids)
        )
        seconds = self._loop.time() - began
        return LiveConnection(
            limit=quic.limit,
            old=old,
            active=tuple(quic.active_cids),
            moved_after=seconds if has_moved else None,
            retire_prior_to=max((each.retire_prior_to for each in quic.issued), default=0),
            error=connection.ended,
        )

    async def _is_old_accepted(self, slow: Connection, rotated: Subject, began: float) -> bool | None:
        """Whether a client that does not retire a CID at once is still heard."""
        is_asked = await self._poll(slow, began, lambda: any(each.retire_prior_to for each in slow.quic.issued))
        if not is_asked or rotated.misrouted(slow.quic.peer_cid) is None:
            return None
        return await slow.ping(self._plan.timeout)

    async def _poll(self, connection: Connection, began: float, condition: Callable[[], bool]) -> bool:
        """Whether it becomes true within the bound, for a client that has something to say now and then."""
        end = began + self._plan.within
        while (left := end - self._loop.time()) > 0 and connection.ended is None:
            if await connection.until(condition, min(POLL, left)):
                return True
            await connection.ping(min(POLL, left))
        return condition()

    async def _later(self, moving: Iterable[Connection], rotated: Subject) -> tuple[SeenCid, ...]:
        """CIDs that are issued when the configuration is in force: to new connections, and for retired ones."""
        cids, retries = len(self.seen.cids), len(self.seen.retries)
        await self._sweep(min(AFTER_ROTATION, self._plan.connections))
        later = self.seen.cids[cids:]
        # They are not what the checks of the first configuration are about.
        del self.seen.cids[cids:]
        del self.seen.retries[retries:]
        for connection in moving:
            count = len(connection.quic.issued)
            if connection.ended is None and connection.change_cid():
                await connection.until(lambda c=connection, n=count: len(c.quic.issued) > n, self._plan.timeout)  # type: ignore[misc]
                later += [SeenCid(i.cid, Origin.NEW_CONNECTION_ID, -1, i.token) for i in connection.quic.issued[count:]]
        return tuple(later)


def _short_header(cid: bytes, size: int) -> bytes:
    """A datagram of `size` octets that looks like a 1-RTT packet to `cid`, or to the beginning of it."""
    first = bytes((SHORT_HEADER_FORM | os.urandom(1)[0] & 0b0011_1111,))
    return (first + cid + os.urandom(size))[:size]
