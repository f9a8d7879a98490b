"""What it costs a server to be routable: connection IDs per second, and the reference backend beside stock aioquic.

Both servers have the same application, event loop and certificate, each is one process on a core of its own, and they
take turns in every round. Loopback only; no root needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from backend import certificate
from backend.clients.aioquic_client import AioquicClient
from bench.balancers import BenchError
from bench.load import pinned_to_load_core
from bench.machine import BALANCER_CORE, cpu_seconds, memory_of
from bench.report import Section, reached
from lb.address import Address
from lb.cid import CidConfig, ConfigId, ServerId
from lb.generator import CidGenerator
from lb.highwater import HighWaterFile

CONFIGS = (
    ("single-pass, 4 + 12", CidConfig(ConfigId(0), 4, 12, bytes(range(16)))),
    ("four-pass, 4 + 8", CidConfig(ConfigId(0), 4, 8, bytes(range(16)))),
    ("plaintext, 8 + 7", CidConfig(ConfigId(0), 8, 7)),
    ("single-pass, 4 + 12, 2 appended", CidConfig(ConfigId(0), 4, 12, bytes(range(16)), True, 2)),
)
TITLE = "The reference backend"
THREADS = 4
CONNECTIONS = 1000
TOGETHER = 4  # clients that shake hands at a time
IDLE_TIMEOUT = 600.0  # seconds: on a busy machine the first client waits for long until the last has come
ROTATION_PATIENCE = 60.0  # seconds

TARGET_CIDS = 1e5  # per second
TARGET_RATIO = 0.9
TARGET_ROTATION = 2.0  # seconds


class Plan(NamedTuple):
    """How much is done: `connections` are left idle, and rotated; the others are of one server in one round."""

    rounds: int
    connections: int = CONNECTIONS
    handshakes: int = 150
    octets: int = 20_000_000  # of a download
    cids: int = 50_000  # of a thread


class Generated(NamedTuple):
    """Connection IDs per second that so many threads got out of one generator, and how many came twice."""

    case: str
    rates: list[float]
    repeated: int


class Round(NamedTuple):
    """One server's turn: per second by the clock, and per second of the server's CPU time."""

    handshakes: float
    handshakes_cpu: float
    octets: float
    octets_cpu: float


@dataclass(frozen=True, slots=True)
class Found:
    """Everything measured. Memory is in octets, times in seconds."""

    generated: list[Generated]
    stock: list[Round]
    reference: list[Round]
    rotations: list[float]
    connections: int  # that were rotated, and that have nothing to do in the following
    grown: int
    stock_grown: int


def measure(plan: Plan, directory: Path, say: Callable[[str], None]) -> Found:
    """Raises BenchError if a server does not do what it should."""
    generated = generate(plan, directory)
    files = write_files(directory)
    turns: dict[str, list[Round]] = {"stock": [], "reference": []}
    with pinned_to_load_core():
        with started(stock_command(files), directory) as stock, started(reference_command(files), directory) as ours:
            for number in range(plan.rounds):
                for server in (stock, ours) if number % 2 else (ours, stock):
                    turns[server.name].append(asyncio.run(_round(server, plan)))
                say(f"backend: round {number + 1} of {plan.rounds}")
        with started(stock_command(files), directory) as stock:
            stock_grown, _ = asyncio.run(_idle(stock, plan.connections, 0))
        with started(reference_command(files), directory) as ours:
            grown, rotations = asyncio.run(_idle(ours, plan.connections, plan.rounds))
    return Found(generated, turns["stock"], turns["reference"], rotations, plan.connections, grown, stock_grown)


def section(found: Found) -> Section:
    """The table, and which targets were reached."""
    rows = [
        (
            f"{each.case}: connection IDs per second",
            "-",
            f"{statistics.median(each.rates):,.0f}",
            "-",
            f"{min(each.rates):,.0f} to {max(each.rates):,.0f}",
        )
        for each in found.generated
    ]
    ratios = {}
    for title, which, scale in (
        ("handshakes per second", "handshakes", 1.0),
        ("handshakes per CPU-second", "handshakes_cpu", 1.0),
        ("download, MB per second", "octets", 1e6),
        ("download, MB per CPU-second", "octets_cpu", 1e6),
    ):
        theirs, ours = ([getattr(turn, which) / scale for turn in turns] for turns in (found.stock, found.reference))
        paired = [our / their for our, their in zip(ours, theirs, strict=True)]
        ratios[which] = statistics.median(paired)
        rows.append(
            (
                title,
                f"{statistics.median(theirs):.1f}",
                f"{statistics.median(ours):.1f}",
                f"{ratios[which]:.2f}",
                f"{min(paired):.2f} to {max(paired):.2f}",
            )
        )
    rows += [
        (
            f"{found.connections} idle connections, MB",
            f"{found.stock_grown / 1e6:.1f}",
            f"{found.grown / 1e6:.1f}",
            f"{found.grown / found.stock_grown:.2f}",
            "-",
        ),
        (
            f"rotation of {found.connections} connections, seconds",
            "-",
            f"{statistics.median(found.rotations):.2f}",
            "-",
            f"{min(found.rotations):.2f} to {max(found.rotations):.2f}",
        ),
    ]
    slowest = min(statistics.median(each.rates) for each in found.generated)
    repeated = sum(each.repeated for each in found.generated)
    rotation = statistics.median(found.rotations)
    remarks = (
        f"Medians of {len(found.stock)} interleaved rounds, ratios paired within each: ours over stock aioquic's.",
        f"Connection IDs are drawn by {THREADS} threads from one generator with a nonce file; {repeated} came twice.",
        "Both servers have the same application, loop and certificate; only ours gives tickets and tokens. "
        "The clients, in one Python process on the other core, bound what comes per second by the clock.",
        "A rotation lasts from SIGHUP until the last client has retired its last connection ID of before.",
        f"target, {TARGET_CIDS:.0e} connection IDs per second in each case: {slowest:,.0f}, "
        f"{reached(slowest >= TARGET_CIDS)}",
        f"target, handshakes per CPU-second at least {TARGET_RATIO:g}: {ratios['handshakes_cpu']:.2f}, "
        f"{reached(ratios['handshakes_cpu'] >= TARGET_RATIO)}",
        f"target, download per CPU-second at least {TARGET_RATIO:g}: {ratios['octets_cpu']:.2f}, "
        f"{reached(ratios['octets_cpu'] >= TARGET_RATIO)}",
        f"target, rotation in less than {TARGET_ROTATION:g} s: {rotation:.2f} s, {reached(rotation < TARGET_ROTATION)}",
    )
    header = ("what", "stock aioquic", "reference backend", "ratio", "spread")
    return Section(TITLE, header, rows, remarks, repeated > 0)


def generate(plan: Plan, directory: Path) -> list[Generated]:
    """Have all threads draw connection IDs at the same time, in every case and round."""
    found = [Generated(case, [], 0) for case, _ in CONFIGS]
    for number in range(plan.rounds):
        for at, (case, config) in enumerate(CONFIGS):
            with HighWaterFile(directory / f"nonces-{at}-{number}") as marks:
                server_id = ServerId(b"serverid"[: config.server_id_length])
                generator = CidGenerator(config, server_id, random=os.urandom, marks=marks)
                drawn: list[list[bytes]] = [[] for _ in range(THREADS)]

                def draw(into: list[bytes], next_cid: Callable[[], bytes] = generator.next) -> None:
                    into.extend(next_cid() for _ in range(plan.cids))

                threads = [threading.Thread(target=draw, args=(into,)) for into in drawn]
                began = time.perf_counter()
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                took = time.perf_counter() - began
            count = THREADS * plan.cids
            repeated = count - len(set().union(*drawn))
            found[at].rates.append(count / took)
            found[at] = found[at]._replace(repeated=found[at].repeated + repeated)
            assert case == found[at].case
    return found


class Served(NamedTuple):
    """A server that runs."""

    name: str
    process: subprocess.Popen[str]
    address: Address
    directory: Path


class Command(NamedTuple):
    name: str
    arguments: list[str]
    address: Address


def write_files(directory: Path) -> Path:
    """A certificate and a server's file with two configurations, by turns; returns their directory."""
    files = directory / "files"
    files.mkdir(mode=0o700)
    tls = certificate.self_signed(datetime.now(UTC))
    key = tls.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(files / "cert.pem", tls.pem())
    _write(files / "key.pem", key)
    _write(files / "reset.key", f"{bytes(range(32)).hex()}\n".encode())
    write_configuration(files, 0)
    return files


def write_configuration(files: Path, number: int) -> None:
    """Another configuration for each number, with a key of its own. It takes the other one's place as a whole."""
    _write(files / f"cid-{number}.key", f"{number:032x}\n".encode())
    text = (
        f"name: bench\ncid-config: {{config-id: {number % 7}, server-id-length: 4, nonce-length: 12, "
        f'key-file: cid-{number}.key}}\nserver-id: "0badcafe"\nreset-key-file: reset.key\n'
    )
    new = files / "server.yaml.new"
    _write(new, text.encode())
    new.rename(files / "server.yaml")


def stock_command(files: Path) -> Command:
    address = _free()
    options = ["--port", str(address.port), "--cert", str(files / "cert.pem"), "--key", str(files / "key.pem")]
    options += ["--idle-timeout", str(IDLE_TIMEOUT)]
    return Command("stock", [sys.executable, "-m", "bench.stock", *options], address)


def reference_command(files: Path) -> Command:
    address = _free()
    arguments = [
        sys.executable,
        "-m",
        "backend",
        "--listen",
        str(address),
        "--grace",
        "0",
        "--idle-timeout",
        str(IDLE_TIMEOUT),
    ]
    for option, name in (("--server-config", "server.yaml"), ("--cert", "cert.pem"), ("--key", "key.pem")):
        arguments += [option, str(files / name)]
    return Command("reference", arguments, address)


@contextlib.contextmanager
def started(command: Command, directory: Path) -> Iterator[Served]:
    """The server, on the core that a balancer would have. Raises BenchError if it does not start."""
    log = directory / f"{command.name}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command.arguments, stdout=subprocess.PIPE, stderr=stderr, text=True)
    with process:
        try:
            with contextlib.suppress(OSError):  # there is one core only
                os.sched_setaffinity(process.pid, {BALANCER_CORE})
            assert process.stdout is not None
            if not process.stdout.readline().startswith("ready "):
                raise BenchError(f"{command.name} does not start: {log.read_text().strip()}")
            yield Served(command.name, process, command.address, directory)
        finally:
            process.terminate()


async def _round(server: Served, plan: Plan) -> Round:
    pid = server.process.pid
    began, cpu = time.perf_counter(), cpu_seconds(pid)
    await _shake_hands(server.address, plan.handshakes)
    hands, hands_cpu = time.perf_counter() - began, cpu_seconds(pid) - cpu
    async with await AioquicClient.connect(server.address) as client:
        began, cpu = time.perf_counter(), cpu_seconds(pid)
        body = await client.get(f"/bytes/{plan.octets}")
        took, took_cpu = time.perf_counter() - began, cpu_seconds(pid) - cpu
    if len(body) != plan.octets:
        raise BenchError(f"{server.name} sent {len(body)} octets of {plan.octets}")
    return Round(plan.handshakes / hands, plan.handshakes / hands_cpu, plan.octets / took, plan.octets / took_cpu)


async def _shake_hands(address: Address, count: int) -> None:
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            (await AioquicClient.connect(address)).close()

    await asyncio.gather(*(some() for _ in range(TOGETHER)))


async def _idle(server: Served, count: int, rotations: int) -> tuple[int, list[float]]:
    """Memory that so many connections take that have nothing to do; then how long each rotation of them takes."""
    pid = server.process.pid
    async with await AioquicClient.connect(server.address) as client:
        await client.get("/")  # what is set up once
    before = memory_of([pid])["total"]
    clients: list[AioquicClient] = []
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            client = await AioquicClient.connect(server.address, idle_timeout=IDLE_TIMEOUT)
            clients.append(client)
            await client.get("/")

    try:
        await asyncio.gather(*(some() for _ in range(TOGETHER)))
        await asyncio.sleep(1)  # acknowledgements that are delayed, and what is freed after them
        grown = memory_of([pid])["total"] - before
        took = [await _rotate(server, number) for number in range(1, rotations + 1)]
        if broken := sum(client.ended.done() for client in clients):
            raise BenchError(f"{broken} of {count} connections ended")
    finally:
        for client in clients:
            client.close()
    return grown, took


async def _rotate(server: Served, number: int) -> float:
    """Seconds until no client has a connection ID of before."""
    write_configuration(server.directory / "files", number)
    log = server.directory / f"{server.name}.log"
    loop = asyncio.get_running_loop()
    began = loop.time()
    server.process.send_signal(signal.SIGHUP)
    while log.read_text().count("event=rotated") < number:
        if loop.time() - began > ROTATION_PATIENCE:
            raise BenchError(f"rotation {number} did not end within {ROTATION_PATIENCE:g} s: {log.read_text()[-300:]}")
        await asyncio.sleep(0.01)
    return loop.time() - began


def _write(path: Path, octets: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(octets)


def _free() -> Address:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return Address(*sock.getsockname())
