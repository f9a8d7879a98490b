"""`python -m bench.panels`: the dashboards' main panels, drawn from what a real Prometheus saw of a real balancer.

Real clients come, go and move for about two minutes; meanwhile a backend is killed and comes back, another is drained,
and the key is rotated. Then the panels' own expressions are asked, and the answers drawn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from backend.clients.fleet import LIBRARIES
from backend.demo.stage import SERVICE, Play, Stage, stage
from bench import charts
from bench.charts import Mark
from bench.prometheus import Prometheus, PrometheusError, prometheus
from lb.admin.client import Client, Where
from lb.cid import ConfigId
from lb.config import load_config
from lb.rotation import SlotView, views_of
from lb.server_half import SERVER_FILE, server_half

ROOT = Path(__file__).parents[1]
CLIENTS = 8
DOWNLOAD = 20_000  # octets
STAY = (3.0, 9.0)  # seconds that a connection lasts
GUARD = 3  # seconds
STEP = 1.0  # seconds between points
WINDOW = "4s"  # that rates are taken over
PATIENCE = 60.0  # seconds

PICTURES = {
    "fleet": (
        "Datagrams to each backend",
        "Datagrams from clients, by verdict",
        "States",
        "Share of the ring",
        "Flows of each backend",
        "Moves, and connections that a 4-tuple balancer would have broken",
        "Resets",
    ),
    "connection-ids": (
        "Phases",
        "Datagrams by config ID",
        "Since the last datagram",
        "Unroutable datagrams, by reason",
        "Who decided",
    ),
}


async def client(balancer: Any, library: str, seed: int) -> None:
    """Connections, one after the other: requests, and now and then another address. What ends one begins the next."""
    chance = random.Random(seed)
    while True:
        with contextlib.suppress(OSError, TimeoutError):
            async with await LIBRARIES[library].connect(balancer.address) as connection:
                end = time.monotonic() + chance.uniform(*STAY)
                while time.monotonic() < end:
                    async with asyncio.timeout(5):
                        await connection.get(f"/bytes/{DOWNLOAD}")
                    if chance.random() < 0.2:
                        await connection.rebind()
                    await asyncio.sleep(chance.uniform(0.1, 0.4))


class Director:
    """Does things to a fleet, and notes when."""

    def __init__(self, made: Stage) -> None:
        self.marks: list[tuple[float, str]] = []
        self._stage = made
        self._file = made.directory / "balancer-one.yaml"
        self._client = Client(Where(made.directory / "run-one" / "admin.sock"))

    async def direct(self) -> None:
        await asyncio.sleep(15)
        self._note("backend c is killed")
        await self._stage.servers["c"].child.kill()
        await asyncio.sleep(12)
        self._note("and started again")
        await self._stage.restart(self._stage.servers["c"])
        await asyncio.sleep(12)
        self._note("b is drained")
        await asyncio.to_thread(self._client.change, SERVICE, "b", {"drain": True})
        await asyncio.sleep(14)
        self._note("and taken back")
        await asyncio.to_thread(self._client.change, SERVICE, "b", {"drain": None})
        await asyncio.sleep(5)
        await self._rotate()
        await asyncio.sleep(5)

    async def set_guard(self) -> None:
        config = json.loads(self._file.read_text())
        config["services"] = config["services"][:1]
        config["services"][0]["rotation"] = {"guard": f"{GUARD}s"}
        self._file.write_text(json.dumps(config, indent=2))
        await asyncio.to_thread(self._client.reload)

    async def _rotate(self) -> None:
        (old,) = (number for number, view in (await self._views()).items() if view.phase == "active")
        self._note("a new key is prepared")
        await self._step("prepare", None)
        (new,) = (number for number, view in (await self._views()).items() if view.phase == "prepared")
        await asyncio.sleep(4)
        self._note("servers use it")
        await self._step("activate", new)
        config = await asyncio.to_thread(load_config, self._file)
        directory = self._stage.directory
        for name, server in self._stage.servers.items():
            half = server_half(config, name, config_id=new, nonce_file=str(directory / f"{name}.nonces"))
            half.write(directory)
            (directory / SERVER_FILE).rename(directory / f"{name}.yaml")
            server.child.signal(signal.SIGHUP)

        async def is_quiet() -> bool:
            return (await self._views())[old].may_be_freed

        await _until(is_quiet)
        self._note("the old one is quiet, and taken out")
        await self._step("retire", old)

    async def _step(self, do: str, config_id: ConfigId | None) -> None:
        step = {"do": do} if config_id is None else {"do": do, "config-id": config_id}
        await asyncio.to_thread(self._client.rotate, SERVICE, step)

    async def _views(self) -> dict[ConfigId, SlotView]:
        return views_of((await asyncio.to_thread(self._client.rotation))[SERVICE])

    def _note(self, text: str) -> None:
        print(f"panels: {text}", file=sys.stderr, flush=True)
        self.marks.append((time.time(), text))


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await is_so():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.2)


async def perform(directory: Path, output: Path) -> None:
    """Play it, and write the pictures to `output`."""
    async with stage(Play()) as made:
        balancer = made.balancers["one"]
        director = Director(made)
        await director.set_guard()
        with prometheus(directory, balancer.front.admin) as scraping:
            libraries = itertools.cycle(LIBRARIES)
            clients = [
                asyncio.create_task(client(balancer, library, seed))
                for seed, library in zip(range(CLIENTS), libraries, strict=False)
            ]
            try:
                await asyncio.sleep(10)  # until there is something to take a rate of
                began = time.time()
                await director.direct()
            finally:
                for task in clients:
                    task.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
            marks = [Mark(at - began, text) for at, text in director.marks]
            for name in PICTURES:
                text = await asyncio.to_thread(drawn, scraping, name, marks, began, time.time())
                (output / f"grafana-{name}.svg").write_text(text)


def drawn(scraping: Prometheus, name: str, marks: Sequence[Mark], began: float, ended: float) -> str:
    """The picture of one dashboard."""
    board = json.loads((ROOT / "deploy" / "grafana" / f"{name}.json").read_text())
    found = {panel["title"]: panel for panel in board["panels"]}
    panels = [_panel(scraping, found[title], began, ended) for title in PICTURES[name]]
    return charts.picture(board["title"], panels, marks, ended - began)


def _panel(scraping: Prometheus, panel: dict[str, Any], began: float, ended: float) -> charts.Panel:
    series = [
        charts.Series(
            _named(target["legendFormat"], result["metric"]),
            [(at - began, float(value)) for at, value in result["values"]],
        )
        for target in panel["targets"]
        for result in scraping.query_range(_expression(target["expr"]), began, ended, STEP)
    ]
    defaults = panel["fieldConfig"]["defaults"]
    words = None
    if panel["type"] == "state-timeline":
        (mapping,) = defaults["mappings"]
        words = {int(number): (found["text"], found["color"]) for number, found in mapping["options"].items()}
    stacking = defaults.get("custom", {}).get("stacking", {}).get("mode")
    return charts.Panel(panel["title"], defaults.get("unit", ""), sorted(series), STEP, stacking == "normal", words)


def _expression(expression: str) -> str:
    given = {"__rate_interval": WINDOW, "__range": "5m", "instance": ".*", "service": ".*"}
    return re.sub(r"\$(\w+)", lambda found: given[found[1]], expression)


def _named(legend: str, labels: dict[str, str]) -> str:
    """The legend of a series; there is one balancer, whose address says nothing."""
    words = re.sub(r"\{\{(\w+)\}\}", lambda found: "" if found[1] == "instance" else labels.get(found[1], ""), legend)
    return " ".join(words.split())


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns an exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.panels", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures", metavar="DIRECTORY")
    options = parser.parse_args(arguments)
    options.output.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quiclb-panels-") as directory:
        try:
            asyncio.run(perform(Path(directory), options.output))
        except PrometheusError as error:
            print(f"panels: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
