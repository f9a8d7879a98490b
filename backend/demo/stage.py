"""The stage: keys and files in one directory, and the balancers and backends that are started from them.

Every process is a real one, in a process group of its own, and dies with us whatever becomes of us.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from backend.clients.process import DIES_WITH_US
from lb.address import Address
from lb.cid import KEY_LENGTH, CidConfig, ConfigId, ServerId
from lb.reset import RESET_KEY_LENGTH, server_reset_key

# Ours.
ROOT = Path(__file__).parents[2]
SERVICE = "web"
CONFIG_ID = ConfigId(0)
SERVER_ID_LENGTH, NONCE_LENGTH = 4, 12  # 16 in all: one AES block
START_TIMEOUT = 15.0  # seconds, on a machine that is busy
STOP_TIMEOUT = 5.0  # seconds
EVENT_TIMEOUT = 10.0  # seconds
GROUP_POLL = 0.005  # seconds from one look at a process group to the next
TAIL = 12  # lines of a dead process's log that are worth showing
LOWEST_PORT = 10_000


class StageError(Exception):
    """A process of the stage did not do what it is there for; says which, and its last words."""


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One line of a balancer's log. `time` is the wall clock's, in seconds."""

    time: float
    name: str
    fields: Mapping[str, Any]


class Child:
    """One process in a group of its own. What it says on standard error is kept, and appended to `log_path`."""

    def __init__(self, name: str, command: Sequence[str], log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._changed = asyncio.Event()
        self.ready: Address | None = None  # from `ready ADDRESS:PORT` on standard output
        self.events: list[LogEvent] = []

    async def start(self, *options: str) -> None:
        """Start it, with more options than it always has."""
        self.ready = None
        self._process = process = await asyncio.create_subprocess_exec(
            *DIES_WITH_US,
            *self._command,
            *options,
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._readers = [
            asyncio.create_task(self._read_output(process)),
            asyncio.create_task(self._read_log(process)),
        ]

    async def is_ready(self) -> Address:
        """Wait for its `ready` line. Raises StageError if it ends before."""
        await self._until(lambda: self.ready is not None, START_TIMEOUT, "to be ready")
        if self.ready is None:
            raise StageError(f"{self.name}: not ready")
        return self.ready

    async def logged(self, name: str, since: float = 0.0, *, within: float = EVENT_TIMEOUT, **fields: str) -> LogEvent:
        """Wait for an event that has these fields, logged at `since` or later. Raises StageError if none comes."""
        found: list[LogEvent] = []

        def is_logged() -> bool:
            found[:] = self.find(name, since, **fields)
            return bool(found)

        await self._until(is_logged, within, f"to log {name}")
        return found[0]

    def find(self, name: str, since: float = 0.0, **fields: str) -> list[LogEvent]:
        """The events of one name that were logged at `since` or later and have these fields."""
        return [
            event
            for event in self.events
            if event.name == name and event.time >= since and fields.items() <= event.fields.items()
        ]

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def signal(self, number: int) -> None:
        """Send a signal to the process itself."""
        if self._process is None or not self.is_running:
            raise StageError(f"{self.name} is not running")
        # Not Process.send_signal(): that may reap it behind asyncio's back.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    async def kill(self) -> float:
        """End it by SIGKILL, its group too. Returns when that was, by the wall clock."""
        at = time.time()
        if self._process is not None and self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._reap()
        return at

    async def stop(self) -> int:
        """End it by SIGTERM, or if that takes too long by SIGKILL. Returns its exit status."""
        if self._process is None:
            return 0
        if self.is_running:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)
            try:
                async with asyncio.timeout(STOP_TIMEOUT):
                    await self._process.wait()
            except TimeoutError:
                await self.kill()
        await self._reap()
        return self._process.returncode or 0

    async def _reap(self) -> None:
        if self._process is None:
            return
        await self._process.wait()
        await _end_group(self._process.pid)
        await asyncio.gather(*self._readers)

    async def _read_output(self, process: asyncio.subprocess.Process) -> None:
        async for line in _lines(process.stdout):
            word, _, rest = line.partition(" ")
            if word == "ready":
                self.ready = Address.parse(rest.split()[0])
            self._changed.set()
        self._changed.set()

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        with self.log_path.open("a") as log:
            async for line in _lines(process.stderr):
                print(line, file=log, flush=True)
                self._tail.append(line)
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self.events.append(LogEvent(entry.pop("time"), entry.pop("event"), entry))
                self._changed.set()

    async def _until(self, is_so: Callable[[], bool], seconds: float, what: str) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not is_so():
                    if not self.is_running:
                        raise StageError(f"{self.name} has ended while it was expected {what}:\n{self.last_words()}")
                    self._changed.clear()
                    waiting = asyncio.create_task(self._changed.wait())
                    ended = asyncio.create_task(self._process.wait())  # type: ignore[union-attr]
                    try:
                        await asyncio.wait((waiting, ended), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        waiting.cancel()
                        ended.cancel()
        except TimeoutError:
            raise StageError(
                f"{self.name} was expected {what} within {seconds:g} seconds:\n{self.last_words()}"
            ) from None

    def last_words(self) -> str:
        return "\n".join(f"    {line}" for line in self._tail) or "    (it said nothing)"


@dataclass(slots=True)
class Server:
    """A backend and what it may call itself."""

    name: str
    server_id: ServerId
    child: Child
    address: Address  # with port 0, any, until it has one


@dataclass(slots=True)
class Balancer:
    """A balancer: where clients send to, by IPv4 and by IPv6, and where its metrics are."""

    name: str
    address: Address
    address_v6: Address | None
    admin: Address
    child: Child

    async def metrics(self) -> Metrics:
        """Raises OSError if it does not answer."""
        return Metrics(await asyncio.to_thread(_fetch, f"http://{self.admin}/metrics"))


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of all time series of that name that have these labels."""
        return sum(s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """What is put on the stage. Times in seconds."""

    backends: tuple[str, ...] = ("a", "b", "c")
    hold_off: float = 1.5
    push: bool = True
    workers: int = 1
    retry: bool = False
    host: str = "127.0.0.1"  # the address that clients send to, besides ::1
    health: Mapping[str, Any] = field(
        default_factory=lambda: {"interval": "250ms", "timeout": "200ms", "fall": 2, "rise": 2, "silence": "300ms"}
    )


class Stage:
    """Everything that runs, in one directory."""

    def __init__(self, directory: Path, play: Play) -> None:
        self.directory = directory
        self.play = play
        self.servers: dict[str, Server] = {}
        self.balancers: dict[str, Balancer] = {}
        cid_key = secrets.token_bytes(KEY_LENGTH)
        self.cid_config = CidConfig(CONFIG_ID, SERVER_ID_LENGTH, NONCE_LENGTH, cid_key)
        self._reset_key = secrets.token_bytes(RESET_KEY_LENGTH)
        self._write_secret("cid.key", cid_key)
        self._write_secret("reset.key", self._reset_key)

    async def start_backends(self) -> None:
        """Start all backends at once and wait until they listen."""
        for i, name in enumerate(self.play.backends):
            server_id = ServerId((i + 1).to_bytes(2) + secrets.token_bytes(SERVER_ID_LENGTH - 2))
            self._write_secret(f"{name}-reset.key", server_reset_key(self._reset_key, CONFIG_ID, server_id))
            config = {
                "name": name,
                "cid-config": _CID_CONFIG,
                "server-id": server_id.hex(),
                "reset-key-file": f"{name}-reset.key",
                "nonce-file": f"{name}.nonces",
            }
            path = self._write_config(f"{name}.yaml", config)
            # The last one has an IPv6 address: what family a client has is not its backend's concern.
            host = "::1" if has_ipv6() and i == len(self.play.backends) - 1 else "127.0.0.1"
            command = [*_PYTHON, "backend", "--server-config", str(path)]
            command += ["--retry"] if self.play.retry else []
            child = Child(f"backend {name}", command, self.directory / f"{name}.log")
            self.servers[name] = Server(name, server_id, child, Address(host, 0))
        await asyncio.gather(*(self.restart(server) for server in self.servers.values()))

    async def restart(self, server: Server) -> None:
        """Start a backend, the first time or again: then where it was before."""
        await server.child.start("--listen", str(server.address))
        server.address = await server.child.is_ready()

    async def start_balancer(self, name: str = "one") -> Balancer:
        """Start a balancer with the configuration that all of them share, on ports of its own."""
        port, admin_port = free_ports(2)
        listen = [Address(self.play.host, port)] + ([Address("::1", port)] if has_ipv6() else [])
        admin = Address("127.0.0.1", admin_port)
        service = {
            "name": SERVICE,
            "listen": [str(address) for address in listen],
            "cid-configs": [{**_CID_CONFIG, "reset-key-file": "reset.key"}],
            "backends": [
                {
                    "name": server.name,
                    "address": str(server.address),
                    "server-ids": {str(CONFIG_ID): [server.server_id.hex()]},
                }
                for server in self.servers.values()
            ],
            "seed": "the same everywhere",
            "health": self.play.health,
            "resets": {"hold-off": f"{round(self.play.hold_off * 1000)}ms", "push": self.play.push},
        }
        config = {
            "engine": "udp",
            "workers": self.play.workers,
            "runtime-directory": f"run-{name}",
            "admin": str(admin),
            "log": {"format": "json"},
            "services": [service],
        }
        (self.directory / f"run-{name}").mkdir(mode=0o700)
        path = self._write_config(f"balancer-{name}.yaml", config)
        log_path = self.directory / f"balancer-{name}.log"
        child = Child(f"balancer {name}", [*_PYTHON, "lb", "run", "-c", str(path)], log_path)
        balancer = Balancer(name, listen[0], listen[1] if len(listen) > 1 else None, admin, child)
        self.balancers[name] = balancer
        await self.run(balancer)
        return balancer

    async def run(self, balancer: Balancer) -> LogEvent:
        """Start a balancer, the first time or again, and wait until it balances."""
        since = time.time()
        await balancer.child.start()
        return await balancer.child.logged("started", since, within=START_TIMEOUT)

    async def stop(self) -> None:
        """End every process."""
        children = [balancer.child for balancer in self.balancers.values()]
        children += [server.child for server in self.servers.values()]
        await asyncio.gather(*(child.stop() for child in children))

    def _write_secret(self, name: str, octets: bytes) -> None:
        with open(os.open(self.directory / name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
            file.write(octets.hex() + "\n")

    def _write_config(self, name: str, config: Mapping[str, Any]) -> Path:
        path = self.directory / name
        path.write_text(json.dumps(config, indent=2) + "\n")  # JSON is YAML
        return path


@contextlib.asynccontextmanager
async def stage(play: Play, balancers: Sequence[str] = ("one",)) -> AsyncIterator[Stage]:
    """A stage with its backends and balancers running, which leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="quiclb-") as directory:
        made = Stage(Path(directory), play)
        try:
            await made.start_backends()
            for name in balancers:
                await made.start_balancer(name)
            yield made
        finally:
            await made.stop()


def has_ipv6() -> bool:
    """Whether ::1 is there."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses on loopback, by UDP or TCP, and that the kernel gives to nobody who does not ask.

    Outside its range of ephemeral ports no client can take one away while a balancer is being restarted.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(LOWEST_PORT, max(low, LOWEST_PORT + 1000)))
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise StageError(f"fewer than {count} ports free on loopback")


def _is_free(port: int) -> bool:
    families = [(socket.AF_INET, "127.0.0.1")] + ([(socket.AF_INET6, "::1")] if has_ipv6() else [])
    try:
        for family, host in families:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                with socket.socket(family, kind) as sock:
                    sock.bind((host, port))
    except OSError:
        return False
    return True


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5.0) as response:  # noqa: S310 - our own http: URL
        text: str = response.read().decode()
    return text


async def _end_group(number: int) -> None:
    """End what is left of a process group, such as the workers of a balancer that was killed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        async with asyncio.timeout(STOP_TIMEOUT):
            while True:
                os.killpg(number, signal.SIGKILL)
                await asyncio.sleep(GROUP_POLL)


async def _lines(stream: asyncio.StreamReader | None) -> AsyncIterator[str]:
    if stream is None:
        raise RuntimeError("started without a pipe")
    async for line in stream:
        yield line.decode("utf-8", "replace").rstrip("\n")


_CID_CONFIG = {
    "config-id": CONFIG_ID,
    "server-id-length": SERVER_ID_LENGTH,
    "nonce-length": NONCE_LENGTH,
    "key-file": "cid.key",
}
_PYTHON = (sys.executable, "-u", "-m")
