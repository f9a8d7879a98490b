"""The scenario: each step moves or breaks something, and says what the clients saw of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from backend.clients.fleet import LIBRARIES, Session, open_session
from backend.clients.relay import NatRelay
from backend.clients.transfer import ConnectionEndedError, Move, StatelessResetError, Transfer, slow_body
from backend.demo.place import StageError
from backend.demo.report import Report, Row
from backend.demo.stage import SERVICE, Balancer, Metrics, Server, Stage
from lb.address import Address

# Ours.
CONNECTIONS = 60  # of the first step
AT_ONCE = 6  # handshakes
DOWNLOAD = 6_000_000  # octets
ENOUGH = 20  # octets of a slow download, after about half a second: it is on its way
FREEZE = 1.0  # seconds; less than the hold-off
WHILE_DEAD = 20  # datagrams, about a second's
PROMPT = 0.25  # seconds for a round trip on loopback and the client's next PING, on a busy machine
NOTICEABLE = 1.0  # seconds; a line comes every 50 ms
STEP_TIMEOUT = 40.0  # seconds
HARD_TO_PLACE = 60  # connections that are tried to find one on a given backend


class StepFailedError(Exception):
    """What a client saw is not what it should have seen."""


class SkippedError(Exception):
    """A step cannot be played here; says why."""


@dataclass(slots=True)
class Scene:
    """What a step needs. `past` are the last metrics of balancers that were killed."""

    stage: Stage
    report: Report
    stacks: Sequence[str]
    past: list[Metrics] = field(default_factory=list)

    @property
    def one(self) -> Balancer:
        return self.stage.balancers["one"]

    @property
    def two(self) -> Balancer:
        return self.stage.balancers["two"]

    @property
    def libraries(self) -> list[str]:
        return [stack for stack in self.stacks if stack in LIBRARIES]

    def say(self, text: str) -> None:
        self.report.say(text)

    @contextlib.asynccontextmanager
    async def watching(self, downloads: Iterable[tuple[str, Transfer]]) -> AsyncIterator[None]:
        """Show how many octets each client has."""
        watched = list(downloads)
        async with self.report.watching(
            lambda: ", ".join(f"{stack} {len(transfer.body):,}" for stack, transfer in watched) + " octets"
        ):
            yield


class Step(NamedTuple):
    title: str
    play: Callable[[Scene], Awaitable[str]]


async def play(scene: Scene) -> None:
    """Play all steps, one after the other, whatever becomes of each. Their results are in the report."""
    for number, step in enumerate(STEPS, 1):
        scene.report.heading(f"{number}/{len(STEPS)}  {step.title}")
        began = time.monotonic()
        passed: bool | None
        try:
            async with asyncio.timeout(STEP_TIMEOUT):
                saw = await step.play(scene)
            passed = True
        except SkippedError as skipped:
            saw, passed = str(skipped), None
        except TimeoutError:
            saw, passed = f"nothing for {STEP_TIMEOUT:g} seconds", False
        except (StepFailedError, StageError, ConnectionEndedError, OSError, ValueError) as error:
            saw, passed = f"{type(error).__name__}: {error}", False
        scene.report.result(Row(step.title, saw, time.monotonic() - began, passed))


async def spread(scene: Scene) -> str:
    """Many connections, and who answers."""
    found: Counter[str] = Counter()
    gate = asyncio.Semaphore(AT_ONCE)
    # A few of the programs that take a process each; the rest divided among the libraries.
    shares = {stack: 4 for stack in scene.stacks if stack not in LIBRARIES}
    for i in range(CONNECTIONS - sum(shares.values())):
        stack = scene.libraries[i % len(scene.libraries)]
        shares[stack] = shares.get(stack, 0) + 1

    async def connect(stack: str) -> None:
        async with gate, _session(stack, scene.one.address, "/whoami") as session:
            answer = await _whoami(session)
            name = answer["name"]
            _expect(answer["server_id"], scene.stage.servers[name].server_id.hex(), f"server ID of {name}")
            found[name] += 1

    async with scene.report.watching(lambda: f"{found.total()} of {CONNECTIONS} connections"):
        await asyncio.gather(*(connect(stack) for stack, share in shares.items() for _ in range(share)))
    for name in scene.stage.servers:
        scene.say(f"backend {name}: {found[name]:2} {'#' * found[name]}")
    if len(found) < len(scene.stage.servers):
        raise StepFailedError(f"only {', '.join(sorted(found))} got connections")
    counts = ", ".join(f"{name} {found[name]}" for name in sorted(found))
    return f"{CONNECTIONS} connections: {counts}; each server ID is its backend's ({_listed(shares)})"


async def nat_rebinding(scene: Scene) -> str:
    """A NAT gives clients other ports while they download."""
    path = f"/bytes/{DOWNLOAD}"

    async def download(guest: Guest) -> None:
        for third in (1, 2):
            await guest.transfer.reached(third * DOWNLOAD // 3)
            old = guest.relay.outside
            await guest.move(guest.relay.target)
            octets = f"{len(guest.transfer.body):,} octets"
            scene.say(f"{guest.stack}: after {octets} the NAT changes {old} to {guest.relay.outside}")
        _expect(len(await guest.transfer.complete()), DOWNLOAD, f"octets of {guest.stack}")

    async with _through_relays(scene, scene.one.address, path) as guests:
        async with scene.watching((guest.stack, guest.transfer) for guest in guests):
            await asyncio.gather(*(download(guest) for guest in guests))
        pause = _longest_pause(guests)
        return f"{len(guests)} downloads of {DOWNLOAD:,} octets complete, longest pause {pause} ({_names(guests)})"


async def migration(scene: Scene) -> str:
    """A client goes on from another address, under another connection ID."""
    here, there = scene.stage.place.clients

    async def migrate(stack: str) -> str:
        if stack not in LIBRARIES:
            async with _session(stack, scene.one.address, "/slow/2", move=Move.MIGRATION, move_after=0.6) as session:
                scene.say(f"{stack}: migrates by itself, 0.6 s after its handshake")
                _expect(await session.transfers[0].complete(), slow_body(2), "body")
            return stack
        async with await LIBRARIES[stack].connect(scene.one.address, local=here) as client:
            before = await client.whoami()
            transfer = client.begin("/slow/2")
            await transfer.reached(ENOUGH)
            old = client.local
            await client.migrate(there)
            scene.say(f"{stack}: moves from {old} to {client.local}")
            _expect(await transfer.complete(), slow_body(2), "body")
            after = await client.whoami()
            _expect_same(before, after)
            if before["dcid"] == after["dcid"]:
                raise StepFailedError(f"{stack}: still uses connection ID {after['dcid']}")
            scene.say(f"{stack}: connection ID {before['dcid']} became {after['dcid']}, both are {after['name']}'s")
        return stack

    played = await asyncio.gather(*(migrate(stack) for stack in scene.stacks))
    return f"{here} to {there}, new connection ID, same backend, nothing lost ({', '.join(played)})"


async def family_change(scene: Scene) -> str:
    """What the balancer sees of a client moves from IPv6 to IPv4, as behind a NAT64."""
    if scene.one.address_v6 is None:
        raise SkippedError("there is no IPv6 here")

    async with _through_relays(scene, scene.one.address_v6, "/slow/2") as guests:
        await _on_their_way(guests)
        for guest in guests:
            old = guest.relay.outside
            await guest.move(scene.one.address)
            scene.say(f"{guest.stack}: the balancer sees it come from {guest.relay.outside}, no longer {old}")
        async with scene.watching((guest.stack, guest.transfer) for guest in guests):
            await _expect_bodies(guests, slow_body(2))
        return f"downloads complete, longest pause {_longest_pause(guests)} ({_names(guests)})"


async def balancer_killed(scene: Scene) -> str:
    """The balancer dies and comes back. What that does to clients depends on what moves packets."""
    return await (_only_the_process_killed if scene.stage.play.xdp else _the_data_path_killed)(scene)


async def _the_data_path_killed(scene: Scene) -> str:
    """No packet moves meanwhile, and afterwards the clients only listen: who they are is in a file."""
    async with _through_relays(scene, scene.one.address, "/slow/4") as guests:
        await _on_their_way(guests)
        for guest in guests:
            guest.relay.is_muted = True
        scene.say("from now on nothing that clients send gets through: only the flow file can know them")
        scene.past.append(await scene.one.metrics())
        killed = await scene.one.child.kill()
        scene.say("SIGKILL to the balancer")
        started = await scene.stage.run(scene.one)
        scene.say(f"started again, and balancing {_ms(started.time - killed)} after the kill")
        await asyncio.gather(*(guest.relay.relayed_down(1) for guest in guests))
        scene.say(f"the backends' datagrams reach the clients again {_ms(time.time() - killed)} after the kill")
        restored = scene.one.child.find("flows-restored", killed)
        flows = restored[0].fields.get("flows") if restored else None
        scene.say(f"flows restored: {flows}; now the clients may speak again")
        for guest in guests:
            guest.relay.is_muted = False
        async with scene.watching((guest.stack, guest.transfer) for guest in guests):
            await _expect_bodies(guests, slow_body(4))
        pause = _longest_pause(guests)
        return (
            f"back in {_ms(started.time - killed)}; silent downloads went on, longest pause {pause} ({_names(guests)})"
        )


async def _only_the_process_killed(scene: Scene) -> str:
    """The program in the kernel goes on: with the downloads, and with connections that nobody has told it of."""
    async with _through_relays(scene, scene.one.address, "/slow/4") as guests:
        await _on_their_way(guests)
        counted = (await scene.one.metrics()).value("quiclb_datagrams_total")
        killed = await scene.one.child.kill()
        scene.say("SIGKILL to the balancer, which is not started again for now")
        await asyncio.gather(*(guest.relay.relayed_down(WHILE_DEAD) for guest in guests))
        scene.say(f"each client has got {WHILE_DEAD} more datagrams {_ms(time.time() - killed)} after the kill")
        for stack in scene.stacks:
            async with _session(stack, scene.one.address, "/whoami") as session:
                scene.say(f"{stack}: a new connection, to backend {(await _whoami(session))['name']}")
        if scene.one.child.is_running:
            raise StepFailedError("the balancer is running, which nobody has started")
        dead_for = time.time() - killed
        await scene.stage.run(scene.one)
        again = (await scene.one.metrics()).value("quiclb_datagrams_total")
        scene.say(f"started again {_ms(dead_for)} after the kill: {counted:,.0f} datagrams counted before,")
        scene.say(f"and {again:,.0f} now, those among them that went by while there was no process to count them")
        if again <= counted:
            raise StepFailedError(f"it counts {again:.0f} datagrams: expected more than {counted:.0f}")
        async with scene.watching((guest.stack, guest.transfer) for guest in guests):
            await _expect_bodies(guests, slow_body(4))
        pause = _longest_pause(guests)
        return (
            f"dead for {_ms(dead_for)}, and nobody noticed: downloads went on, longest pause {pause}, and new "
            f"connections came about ({_names(guests)})"
        )


async def takeover(scene: Scene) -> str:
    """Another balancer, which has never heard of a connection, gets its packets."""
    before = (await scene.two.metrics()).value("quiclb_moves_total")
    async with _through_relays(scene, scene.one.address, "/slow/2") as guests:
        await _on_their_way(guests)
        with scene.stage.place.rerouted("two") as by_route:
            for guest in guests:
                if by_route:
                    guest.session.speak()
                else:
                    await guest.move(scene.two.address)
            how = "by another route" if by_route else f"at {scene.two.address}"
            scene.say(f"the network sends all clients to the second balancer, {how}")
            async with scene.watching((guest.stack, guest.transfer) for guest in guests):
                await _expect_bodies(guests, slow_body(2))
        moved = (await scene.two.metrics()).value("quiclb_moves_total") - before
        if moved < len(guests):
            raise StepFailedError(f"the second balancer counts {moved:.0f} moves: expected {len(guests)}")
        return f"downloads complete through the second balancer, which counts {moved:.0f} moves ({_names(guests)})"


async def frozen(scene: Scene) -> str:
    """A backend says nothing for less than the hold-off."""
    async with contextlib.AsyncExitStack() as opened:
        server, sessions = await _on_one_backend(scene, opened, "/slow/3")
        began = time.time()
        server.child.signal(signal.SIGSTOP)
        scene.say(f"SIGSTOP to backend {server.name}, with {len(sessions)} downloads on it")
        await asyncio.sleep(FREEZE)
        server.child.signal(signal.SIGCONT)
        scene.say(f"SIGCONT after {_ms(FREEZE)}")
        downloads = [session.transfers[-1] for session in sessions]
        async with scene.watching(zip(scene.stacks, downloads, strict=True)):
            for download in downloads:
                _expect(await download.complete(), slow_body(3), "body")
        verdicts = scene.one.child.find("backend-down", began, backend=server.name)
        if scene.one.child.find("backend-dead", began):
            raise StepFailedError("it was declared dead, before the hold-off was over")
        was_down = f"DOWN after {_ms(verdicts[0].time - began)}" if verdicts else "never DOWN"
        if verdicts:
            await scene.one.child.logged("backend-up", began, backend=server.name)
        scene.say(f"the balancer's verdict: {was_down}, not dead")
        return f"{len(sessions)} downloads complete, nobody was reset (the backend was {was_down})"


async def backend_killed(scene: Scene) -> str:
    """A backend dies. Its clients are told, and all others do not notice."""
    async with contextlib.AsyncExitStack() as opened:
        server, silent = await _on_one_backend(scene, opened, "/slow/20")
        deaf = []
        for stack in scene.libraries:
            relay = await opened.enter_async_context(await NatRelay.open(scene.one.address))
            session = await _place(scene, opened, stack, server.name, "/slow/20", relay=relay, is_talkative=True)
            deaf.append(Guest(stack, relay, session))
        others = [
            (stack, (await _place(scene, opened, stack, other.name, "/slow/6")).transfers[-1])
            for stack in scene.libraries
            for other in scene.stage.servers.values()
            if other is not server
        ]
        scene.say(f"on backend {server.name} {len(silent)} clients that only listen and {len(deaf)} that talk")
        scene.say(f"on the other backends {len(others)} clients")
        for guest in deaf:
            guest.relay.is_deaf = True
        killed = await server.child.kill()
        scene.say(f"SIGKILL to backend {server.name}; those that talk hear nothing for a while")

        down = await scene.one.child.logged("backend-down", killed, backend=server.name)
        scene.say(f"kill -> DOWN: {_ms(down.time - killed)}")
        dead = await scene.one.child.logged("backend-dead", killed, backend=server.name)
        scene.say(f"DOWN -> declared dead: {_ms(dead.time - down.time)} (hold-off {scene.stage.play.hold_off:g} s)")

        pushed = []
        for stack, session in zip(scene.stacks, silent, strict=True):
            pushed.append(await _reset_at(stack, session) - dead.time)
            scene.say(f"declared dead -> {stack} client, which only listens, is reset: {_ms(pushed[-1])}")
        answered = []
        for guest in deaf:
            hears = time.time()
            guest.relay.is_deaf = False
            answered.append(await _reset_at(guest.stack, guest.session) - hears)
            scene.say(f"hears again -> {guest.stack} client, which talks, is reset: {_ms(answered[-1])}")
        if min(pushed) < 0:
            raise StepFailedError("a client was reset before its server was declared dead")
        if max(*pushed, *answered) > PROMPT:
            raise StepFailedError(f"a client was reset only after {_ms(max(*pushed, *answered))}")

        again = await asyncio.gather(*(_reconnect(scene, stack, server.name) for stack in scene.stacks))
        scene.say(f"they connect again: {', '.join(again)}")
        async with scene.watching(others):
            for _, download in others:
                _expect(await download.complete(), slow_body(6), "body")
        pause = max(download.longest_pause for _, download in others)
        if pause > NOTICEABLE:
            raise StepFailedError(f"a client of another backend had to wait for {_ms(pause)}")
        scene.say(
            f"the {len(others)} clients of other backends have all of their downloads; longest pause {_ms(pause)}"
        )
        return (
            f"DOWN {_ms(down.time - killed)} after the kill, dead {_ms(dead.time - down.time)} later, "
            f"{len(silent)} silent clients reset {_ms(max(pushed))} after that at most, and all connected elsewhere; "
            f"{len(others)} others noticed nothing"
        )


async def backend_back(scene: Scene) -> str:
    """A backend that was declared dead comes back."""
    dead = [server for server in scene.stage.servers.values() if not server.child.is_running]
    if not dead:
        raise SkippedError("no backend is dead")
    began = time.time()
    for server in dead:
        await scene.stage.restart(server)
        up = await scene.one.child.logged("backend-up", began, backend=server.name)
        scene.say(f"backend {server.name} is up {_ms(up.time - began)} after it was started")
        async with contextlib.AsyncExitStack() as opened:
            await _place(scene, opened, scene.libraries[0], server.name)
        scene.say(f"backend {server.name} gets connections again")
    return f"it gets new connections {_ms(time.time() - began)} after it was started"


async def closing_figures(scene: Scene) -> list[str]:
    """What the balancers counted, those that were killed included."""
    scrapes = [*scene.past, await scene.one.metrics(), await scene.two.metrics()]

    def total(name: str, **labels: str) -> str:
        return f"{sum(scrape.value(name, service=SERVICE, **labels) for scrape in scrapes):,.0f}"

    return [
        f"{total('quiclb_moves_total')} moves",
        f"{total('quiclb_rescued_total')} connections that a 4-tuple balancer would have broken",
        f"{total('quiclb_resets_total', kind='pushed')} resets pushed, one for each flow of the dead backend; "
        f"{total('quiclb_resets_total', kind='answered')} answered",
        f"{total('quiclb_datagrams_total')} datagrams from clients",
    ]


STEPS = (
    Step("many connections spread over the backends", spread),
    Step("NAT rebinding in mid-download", nat_rebinding),
    Step("active migration to another address, with a new connection ID", migration),
    Step("a move from IPv6 to IPv4 in mid-download", family_change),
    Step("balancer killed (SIGKILL) and restarted in mid-download", balancer_killed),
    Step("a second balancer takes live connections over", takeover),
    Step(f"a backend frozen for {FREEZE:g} s, less than the hold-off", frozen),
    Step("a backend killed (SIGKILL) in mid-download", backend_killed),
    Step("that backend comes back", backend_back),
)


@dataclass(slots=True)
class Guest:
    """A client behind a relay of its own, with one download."""

    stack: str
    relay: NatRelay
    session: Session

    @property
    def transfer(self) -> Transfer:
        return self.session.transfers[0]

    async def move(self, target: Address) -> None:
        """Have its packets take another way. What is sent to the old one is lost, unless nothing else is left that
        the client could answer to, having no PING to send."""
        await self.relay.retarget(target, keep_old=not self.session.can_speak)
        self.session.speak()


@contextlib.asynccontextmanager
async def _session(stack: str, server: Address, *paths: str, **how: Any) -> AsyncIterator[Session]:
    session = await open_session(stack, server, *paths, **how)
    try:
        yield session
    finally:
        await session.close()


@contextlib.asynccontextmanager
async def _through_relays(scene: Scene, server: Address, path: str) -> AsyncIterator[list[Guest]]:
    """One client of each stack behind a relay, and all of them downloading `path`."""
    async with contextlib.AsyncExitStack() as opened:
        guests = []
        for stack in scene.stacks:
            relay = await opened.enter_async_context(await NatRelay.open(server))
            session = await opened.enter_async_context(_session(stack, relay.address, path))
            guests.append(Guest(stack, relay, session))
        yield guests


async def _on_one_backend(scene: Scene, opened: contextlib.AsyncExitStack, path: str) -> tuple[Server, list[Session]]:
    """One client of each stack, downloading `path` from the same backend, wherever the first one has come to."""
    sessions: dict[str, Session] = {}
    name = None
    # The others first: libraries can try again more cheaply.
    for stack in sorted(scene.stacks, key=lambda each: each in LIBRARIES):
        sessions[stack] = session = await _place(scene, opened, stack, name, path)
        name = name or (await _whoami(session))["name"]
    for session in sessions.values():
        await session.transfers[-1].reached(1)
    return scene.stage.servers[str(name)], [sessions[stack] for stack in scene.stacks]


async def _place(
    scene: Scene,
    opened: contextlib.AsyncExitStack,
    stack: str,
    name: str | None,
    *paths: str,
    relay: NatRelay | None = None,
    is_talkative: bool = False,
) -> Session:
    """A client on the backend `name`, or any, that has asked `/whoami` and `paths`. Others are sent away."""
    server = relay.address if relay else scene.one.address
    for _ in range(HARD_TO_PLACE):
        session = await open_session(stack, server, "/whoami", *paths, is_talkative=is_talkative)
        opened.push_async_callback(session.close)
        if name in (None, (await _whoami(session))["name"]):
            return session
        await session.close()
        if relay is not None:
            await relay.rebind()  # from the same port it would be the same backend again
    raise StepFailedError(f"{stack}: {HARD_TO_PLACE} connections, and none on backend {name}")


async def _reconnect(scene: Scene, stack: str, dead: str) -> str:
    async with _session(stack, scene.one.address, "/whoami") as session:
        name = (await _whoami(session))["name"]
    if name == dead:
        raise StepFailedError(f"{stack}: connected to the dead backend {dead}")
    return f"{stack} to {name}"


async def _reset_at(stack: str, session: Session) -> float:
    try:
        await session.transfers[-1].complete()
    except StatelessResetError as reset:
        return reset.at
    raise StepFailedError(f"the {stack} client was not reset")


async def _whoami(session: Session) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(await session.transfers[0].complete())
    return answer


async def _on_their_way(guests: Iterable[Guest]) -> None:
    for guest in guests:
        await guest.transfer.reached(ENOUGH)


async def _expect_bodies(guests: Iterable[Guest], body: bytes) -> None:
    for guest in guests:
        _expect(await guest.transfer.complete(), body, f"body of {guest.stack}")


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        if isinstance(found, bytes) and isinstance(expected, bytes):
            found, expected = f"{len(found)} octets", f"{len(expected)} others"
        raise StepFailedError(f"{what}: {found}, expected {expected}")


def _expect_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("name", "connection"):
        _expect(after[key], before[key], key)


def _longest_pause(guests: Iterable[Guest]) -> str:
    return _ms(max(guest.transfer.longest_pause for guest in guests))


def _names(guests: Iterable[Guest]) -> str:
    return ", ".join(guest.stack for guest in guests)


def _listed(shares: dict[str, int]) -> str:
    return ", ".join(f"{stack} {share}" for stack, share in shares.items())


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
