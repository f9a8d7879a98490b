"""Where scenes are played: a stage and the event loop that it runs on, and what scenes have in common."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from backend.clients.fleet import Session, open_session
from backend.clients.relay import NatRelay
from backend.clients.transfer import Move
from backend.demo.stage import Balancer, Play, Stage, stage
from lb.address import Address

TEST_TIMEOUT = 20.0  # seconds; far above what any of them takes
TRIES = 60  # connections, to find one on a given backend

Scene = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Theatre:
    """A stage, and the event loop that it runs on."""

    stage: Stage
    runner: asyncio.Runner

    def play(self, scene: Scene) -> None:
        """Run one scene to its end."""
        self.runner.run(self._bounded(scene))

    async def _bounded(self, scene: Scene) -> None:
        async with asyncio.timeout(TEST_TIMEOUT):
            await scene(self.stage)


@contextlib.contextmanager
def theatre(play: Play, *balancers: str) -> Iterator[Theatre]:
    """Balancers and backends, as long as the block lasts."""
    with asyncio.Runner() as runner:
        context = stage(play, balancers or ("one",))
        made = runner.run(context.__aenter__())
        try:
            yield Theatre(made, runner)
        finally:
            runner.run(context.__aexit__(None, None, None))


def perform(scene: Scene, play: Play, *balancers: str) -> None:
    """Play one scene on a stage of its own."""
    with theatre(play, *balancers) as made:
        made.play(scene)


@contextlib.asynccontextmanager
async def session(
    stack: str,
    server: Address,
    *paths: str,
    move: Move | None = None,
    move_after: float = 0.3,
    is_talkative: bool = False,
) -> AsyncIterator[Session]:
    """A client, as long as the block lasts."""
    opened = await open_session(stack, server, *paths, move=move, move_after=move_after, is_talkative=is_talkative)
    try:
        yield opened
    finally:
        await opened.close()


async def whoami(client: Session) -> dict[str, Any]:
    """The answer to a session's first request, which was that."""
    answer: dict[str, Any] = json.loads(await client.transfers[0].complete())
    return answer


@contextlib.asynccontextmanager
async def placed(stack: str, server: Address, backend: str, *paths: str) -> AsyncIterator[Session]:
    """A client on one backend that asks `/whoami` and `paths`."""
    for _ in range(TRIES):
        async with session(stack, server, "/whoami", *paths) as client:
            if (await whoami(client))["name"] == backend:
                yield client
                return
    raise AssertionError(f"{TRIES} connections, and none on backend {backend}")


async def divert(relay: NatRelay, client: Session, target: Address) -> None:
    """Have a client's packets take another way.

    What is sent to the old one is lost, unless the client has nothing to say for itself: then it has to be heard by
    its acknowledgements.
    """
    await relay.retarget(target, keep_old=not client.can_speak)
    client.speak()


async def moves(balancer: Balancer) -> float:
    """How many moves a balancer has counted."""
    return (await balancer.metrics()).value("quiclb_moves_total")
