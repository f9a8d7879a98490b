"""`python -m tests.interop.worker ENGINE SERVER CELLS [NGINX MODULES]`: plays the cells of one place.

CELLS is a list in JSON of a client's and a scenario's name each.

It writes each result as a line of JSON when it is there. It is a process of its own because a network namespace is a
thread's, and so that nothing of one place holds up another.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from backend.adapters.registry import ADAPTERS, Feature
from backend.clients.transfer import ConnectionEndedError
from backend.clients.visitors import CLIENTS
from backend.demo import namespaces
from backend.demo.place import StageError
from lb.errors import QuicLbError
from tests.interop.cells import Cell, Engine, Result, Verdict
from tests.interop.places import Scenery, scenery
from tests.interop.scenarios import SCENARIOS, FailedError, Scene

# Ours.
CELL_TIMEOUT = 30.0  # seconds; far more than any cell takes that passes
STALL = 8.0  # seconds without one octet: a balancer that is started again takes some of them on a busy machine
STALL_CONTROL = 2.5  # seconds, where it is expected
ATTEMPTS = 2  # of a cell: the machine may be busy. How many it took is told.


def main() -> int:
    name, server, wanted, *nginx = sys.argv[1:]
    engine = Engine(name)
    pairs = [(client, Feature(feature)) for client, feature in json.loads(wanted)]
    order = list(SCENARIOS)
    pairs.sort(key=lambda pair: order.index(pair[1]))
    cells = [Cell(engine, server, client, feature) for client, feature in pairs]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    _go_apart(engine)
    asyncio.run(_play(engine, server, cells, (Path(nginx[0]), Path(nginx[1])) if nginx else None))
    return 0


def _end(number: int, _: object) -> None:
    """End in order: what was made is taken away."""
    raise SystemExit(128 + number)


def _go_apart(engine: Engine) -> None:
    """Into a network namespace that has nothing but loopback, and goes with us; xdp's places make their own."""
    if engine is Engine.XDP or namespaces.missing():
        return
    if ctypes.CDLL(None, use_errno=True).unshare(namespaces.CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    subprocess.run([namespaces.IP, "link", "set", "lo", "up"], check=True)


async def _play(engine: Engine, server: str, cells: Sequence[Cell], nginx: tuple[Path, Path] | None) -> None:
    rest = [cell for cell in cells if not _not_run(cell)]
    if not rest:
        return
    try:
        async with scenery(engine, ADAPTERS[server], nginx) as made:
            while rest:
                if rest[0].feature is Feature.RETRY:
                    await made.site.with_retry()
                    while rest:
                        _tell(await _cell(made, rest.pop(0)))
                else:
                    _tell(await _cell(made, rest.pop(0)))
    except (StageError, QuicLbError, OSError) as error:
        for cell in rest:
            _tell(Result(cell, Verdict.FAIL, f"the stage: {error}"))


def _not_run(cell: Cell) -> bool:
    why = cell.why_not() or CLIENTS[cell.client].missing() or ADAPTERS[cell.server].missing
    if why:
        _tell(Result(cell, Verdict.NOT_RUN, why))
    return why is not None


async def _cell(made: Scenery, cell: Cell) -> Result:
    began = time.monotonic()
    failures: list[str] = []
    while True:
        verdict, saw, disturbed = await _attempt(made, cell)
        is_final = disturbed if cell.must_fail else verdict is Verdict.PASS
        if is_final or len(failures) == ATTEMPTS - 1:
            break
        failures.append(saw)
    saw += "".join(f" (at first: {failure})" for failure in failures if failure != saw)
    return Result(cell, verdict, saw, round(time.monotonic() - began, 2), len(failures) + 1, disturbed)


async def _attempt(made: Scenery, cell: Cell) -> tuple[Verdict, str, bool]:
    """Its verdict, what was seen, and whether it came to what it is about."""
    stall = STALL_CONTROL if cell.must_fail else STALL
    scene = Scene(made.site, made.balancing, CLIENTS[cell.client], stall)
    try:
        async with asyncio.timeout(CELL_TIMEOUT):
            await made.balancing.begin()
            return Verdict.PASS, await SCENARIOS[cell.feature](scene), scene.disturbed
    except TimeoutError:
        return Verdict.FAIL, f"not over within {CELL_TIMEOUT:g} s, or no connection", scene.disturbed
    except (FailedError, ConnectionEndedError, StageError, OSError, ValueError, KeyError) as error:
        saw = str(error) if isinstance(error, FailedError) else f"{type(error).__name__}: {error}"
        return Verdict.FAIL, saw, scene.disturbed


def _tell(result: Result) -> None:
    print(json.dumps(result.as_json()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
