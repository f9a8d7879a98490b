"""A run: the cells that are wanted, each place a process, some of them at a time, and what comes out as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.adapters.registry import ADAPTERS, Feature
from backend.clients.process import DIES_WITH_US
from backend.clients.visitors import CLIENTS
from backend.demo import lan
from backend.demo.place import has_ipv6
from bench.balancers import NginxError, find_nginx
from tests.interop.cells import Cell, Engine, Result, Verdict

# Ours.
ROOT = Path(__file__).parents[2]
CONTROL_SERVER = "aioquic"  # the control need not fail at every server


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be played, each by name."""

    engines: Sequence[Engine] = tuple(Engine)
    servers: Sequence[str] = tuple(ADAPTERS)
    clients: Sequence[str] = tuple(CLIENTS)
    features: Sequence[Feature] = tuple(Feature)

    @property
    def is_everything(self) -> bool:
        return self == Wanted()

    def places(self) -> list[tuple[Engine, str]]:
        """One for each server before each engine, and one for the control: first, for it takes longest."""
        control = CONTROL_SERVER if CONTROL_SERVER in self.servers else self.servers[0]
        found = [(engine, control) for engine in self.engines if engine is Engine.CONTROL]
        engines = [engine for engine in self.engines if engine is not Engine.CONTROL]
        return [*found, *itertools.product(engines, self.servers)]

    def cells(self, engine: Engine, server: str) -> list[Cell]:
        pairs = itertools.product(self.clients, self.features)
        return [Cell(engine, server, client, feature) for client, feature in pairs]


class Nginx:
    """Debian's, or why there is none."""

    def __init__(self) -> None:
        self.arguments: list[str] = []
        self.missing: str | None = None
        try:
            self.arguments = [str(path) for path in find_nginx()]
        except NginxError as error:
            self.missing = f"no nginx: {error}"


def play(
    wanted: Wanted, jobs: int, seconds: float, tell: Callable[[Result], None], own_cells: Sequence[Cell] | None = None
) -> list[Result]:
    """Play what is wanted, or of that `own_cells` alone, `jobs` places at a time. Results are told as they come.

    Whatever is not over within `seconds` has failed.
    """
    results: list[Result] = []

    def keep(result: Result) -> None:
        results.append(result)
        tell(result)

    asyncio.run(_play(wanted, jobs, seconds, keep, own_cells))
    return results


async def _play(
    wanted: Wanted, jobs: int, seconds: float, tell: Callable[[Result], None], own_cells: Sequence[Cell] | None
) -> None:
    nginx = await asyncio.to_thread(Nginx) if Engine.CONTROL in wanted.engines else None
    gate = asyncio.Semaphore(jobs)
    ends_at = asyncio.get_running_loop().time() + seconds

    async def one(engine: Engine, server: str) -> None:
        cells = [c for c in wanted.cells(engine, server) if own_cells is None or c in own_cells]
        if not cells:
            return
        if reason := _missing(engine, nginx):
            for cell in cells:
                tell(Result(cell, Verdict.NOT_RUN, cell.why_not() or reason))
            return
        async with gate:
            await _place(engine, server, cells, nginx.arguments if nginx else [], ends_at, tell)

    await asyncio.gather(*(one(engine, server) for engine, server in wanted.places()))


def _missing(engine: Engine, nginx: Nginx | None) -> str | None:
    """Why an engine cannot be played here; None if it can."""
    if not has_ipv6():
        return "there is no ::1 here"
    if engine is Engine.XDP:
        return lan.missing()
    if engine is Engine.CONTROL and nginx is not None:
        return nginx.missing
    return None


async def _place(
    engine: Engine,
    server: str,
    cells: Sequence[Cell],
    nginx: Sequence[str],
    ends_at: float,
    tell: Callable[[Result], None],
) -> None:
    rest = set(cells)
    why = "it was not told of"
    async with _worker(engine, server, cells, nginx if engine is Engine.CONTROL else ()) as process:
        try:
            async with asyncio.timeout_at(ends_at):
                async for line in _lines(process):
                    result = Result.from_json(json.loads(line))
                    rest.discard(result.cell)
                    tell(result)
                code = await process.wait()
                if code:
                    why = f"its place ended with status {code}"
        except TimeoutError:
            why = "the time for the whole run was over"
    for cell in cells:
        if cell in rest:
            tell(Result(cell, Verdict.FAIL, why))


async def _lines(process: asyncio.subprocess.Process) -> AsyncIterator[bytes]:
    if process.stdout is None:
        raise RuntimeError("started without a pipe")
    async for line in process.stdout:
        yield line


@contextlib.asynccontextmanager
async def _worker(
    engine: Engine, server: str, cells: Iterable[Cell], nginx: Sequence[str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    wanted = json.dumps([[cell.client, cell.feature] for cell in cells])
    process = await asyncio.create_subprocess_exec(
        *DIES_WITH_US,
        *(sys.executable, "-W", "ignore", "-m", "tests.interop.worker", engine, server, wanted, *nginx),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            await process.wait()
