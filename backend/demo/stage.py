"""The stage: keys and files in one directory, and the balancers and backends that are started from them.

Every process is a real one, in a process group of its own, and dies with us whatever becomes of us.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import secrets
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from backend.clients.process import DIES_WITH_US
from backend.demo.lan import Xdp, lan
from backend.demo.place import Front, Loopback, Place, StageError
from lb.address import Address
from lb.cid import KEY_LENGTH, CidConfig, ConfigId, ServerId
from lb.keyfile import TOKEN_KEY_LENGTH
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
        self.ready: tuple[Address, ...] = ()  # from `ready ADDRESS:PORT ...` on standard output
        self.events: list[LogEvent] = []

    async def start(self, *options: str) -> None:
        """Start it, with more options than it always has."""
        self.ready = ()
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

    async def is_ready(self) -> tuple[Address, ...]:
        """Wait for its `ready` line, and say what it says. Raises StageError if it ends before."""
        await self._until(lambda: bool(self.ready), START_TIMEOUT, "to be ready")
        return self.ready

    async def succeeds(self) -> None:
        """Wait for its end. Raises StageError if that is a failure."""
        await self._reap()
        if self._process is not None and self._process.returncode:
            raise StageError(f"{self.name} failed:\n{self.last_words()}")

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
                self.ready = tuple(map(Address.parse, rest.split()))
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
    listens: tuple[Address, ...]  # with port 0, any, until it has one

    @property
    def address(self) -> Address:
        return self.listens[0]

    def address_for(self, client_side: Sequence[Address], *, same_family: bool) -> Address:
        """What a balancer that listens on `client_side` is to know it by."""
        families = {address.is_ipv6 for address in client_side}
        return next(each for each in self.listens if not same_family or each.is_ipv6 in families)


@dataclass(slots=True)
class Balancer:
    """A balancer, at its place."""

    name: str
    front: Front
    child: Child
    place: Place

    @property
    def address(self) -> Address:
        """Where clients send to."""
        return self.front.listen[0]

    @property
    def address_v6(self) -> Address | None:
        return next((address for address in self.front.listen if address.is_ipv6), None)

    async def metrics(self) -> Metrics:
        """Raises OSError if it does not answer."""
        return Metrics(await asyncio.to_thread(self._fetch))

    def _fetch(self) -> str:
        url = f"http://{self.front.admin}/metrics"
        with self.place.inside(self.name), urllib.request.urlopen(url, timeout=5.0) as response:
            text: str = response.read().decode()
        return text


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
    grace: float = 0.0  # that backends have for requests when they are told to end
    push: bool = True
    workers: int = 1
    retry: bool = False
    early_data: bool = False
    preferred: tuple[str, ...] = ()  # hosts at which each backend has an address of its own where clients are to go on
    host: str = "127.0.0.1"  # the address that clients send to, besides ::1; not with `xdp`
    xdp: Xdp | None = None
    health: Mapping[str, Any] = field(
        default_factory=lambda: {"interval": "250ms", "timeout": "200ms", "fall": 2, "rise": 2, "silence": "300ms"}
    )


class Stage:
    """Everything that runs, with its files in one directory."""

    def __init__(self, directory: Path, play: Play, place: Place) -> None:
        self.directory = directory
        self.play = play
        self.place = place
        self.servers: dict[str, Server] = {}
        self.balancers: dict[str, Balancer] = {}
        cid_key = secrets.token_bytes(KEY_LENGTH)
        self.cid_config = CidConfig(CONFIG_ID, SERVER_ID_LENGTH, NONCE_LENGTH, cid_key)
        self._reset_key = secrets.token_bytes(RESET_KEY_LENGTH)
        self._write_secret("cid.key", cid_key)
        self._write_secret("reset.key", self._reset_key)
        self._write_secret("token.keys", secrets.token_bytes(TOKEN_KEY_LENGTH))

    @property
    def services(self) -> tuple[str, ...]:
        """Their names."""
        return (SERVICE, f"{SERVICE}-v6") if self.place.splits_families else (SERVICE,)

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
            command = ["backend", "--server-config", str(path), "--grace", f"{self.play.grace:g}"]
            command += ["--token-key-file", str(self.directory / "token.keys")]
            command += ["--retry"] if self.play.retry else []
            command += ["--early-data"] if self.play.early_data else []
            command += [f"--preferred-address={Address(host, 0)}" for host in self.play.preferred]
            child = self._child(f"backend {name}", name, command)
            self.servers[name] = Server(name, server_id, child, self.place.listens(name))
        starting = [self._start_backend(server) for server in self.servers.values()]
        for outcome in await asyncio.gather(*starting, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def restart(self, server: Server) -> None:
        """Start a backend, the first time or again: then where it was before."""
        await server.child.start(*(word for each in server.listens for word in ("--listen", str(each))))
        server.listens = await server.child.is_ready()

    async def start_balancer(self, name: str = "one") -> Balancer:
        """Start a balancer with the configuration that all of them share, at a place of its own."""
        front = self.place.front(name)
        (self.directory / f"run-{name}").mkdir(mode=0o700)
        path = self._configure(name, front)
        child = self._child(f"balancer {name}", name, ["lb", "run", "-c", str(path)])
        balancer = self.balancers[name] = Balancer(name, front, child, self.place)
        await self.run(balancer)
        return balancer

    async def reload(self, balancer: Balancer, *more: Mapping[str, Any]) -> None:
        """Have a balancer read its file again, with `more` services than this stage has by itself."""
        since = time.time()
        self._configure(balancer.name, balancer.front, *more)
        balancer.child.signal(signal.SIGHUP)
        await balancer.child.logged("reloaded", since)

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

    async def _start_backend(self, server: Server) -> None:
        if preparation := self.place.preparation(server.name):
            preparing = self._child(f"preparation of {server.name}", server.name, preparation)
            await preparing.start()
            await preparing.succeeds()
        await self.restart(server)

    def _configure(self, name: str, front: Front, *more: Mapping[str, Any]) -> Path:
        config = {
            **front.keys,
            "runtime-directory": f"run-{name}",
            "metrics": str(front.admin),
            "log": {"format": "json"},
            "services": [*self._services(front.listen), *more],
        }
        return self._write_config(f"balancer-{name}.yaml", config)

    def _services(self, listen: Sequence[Address]) -> list[dict[str, Any]]:
        split = self.place.splits_families
        groups = [[a for a in listen if not a.is_ipv6], [a for a in listen if a.is_ipv6]] if split else [listen]
        return [
            {
                "name": name,
                "listen": [str(address) for address in group],
                "cid-configs": [{**_CID_CONFIG, "reset-key-file": "reset.key"}],
                "backends": [
                    {
                        "name": server.name,
                        "address": str(server.address_for(group, same_family=split)),
                        "server-ids": {str(CONFIG_ID): [server.server_id.hex()]},
                    }
                    for server in self.servers.values()
                ],
                "seed": "the same everywhere",
                "health": self.play.health,
                "resets": {"hold-off": f"{round(self.play.hold_off * 1000)}ms", "push": self.play.push},
            }
            for name, group in zip(self.services, groups, strict=True)
        ]

    def _child(self, name: str, machine: str, module: Sequence[str]) -> Child:
        """A process to be, of one of our modules, on a machine."""
        command = [*self.place.entering(machine), sys.executable, "-u", "-m", *module]
        return Child(name, command, self.directory / f"{name.replace(' ', '-')}.log")

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
    with tempfile.TemporaryDirectory(prefix="quiclb-") as directory, _place(play, Path(directory), balancers) as place:
        made = Stage(Path(directory), play, place)
        try:
            await made.start_backends()
            for name in balancers:
                await made.start_balancer(name)
            yield made
        finally:
            await made.stop()


def _place(play: Play, directory: Path, balancers: Sequence[str]) -> AbstractContextManager[Place]:
    if play.xdp is not None:
        return lan(play.xdp, directory, balancers, play.backends)
    return contextlib.nullcontext(Loopback(play.host, play.backends, {"engine": "udp", "workers": play.workers}))


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
