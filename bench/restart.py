"""What a restart costs: datagrams lost, and the longest silence, while numbered datagrams go through and come back.

The load is a process of its own, `python -m bench.restart`: clients that send at a fixed rate, backends that send
back what they get. Half of all datagrams are the clients', half the backends'. What is counted as lost are datagrams
that the other end never saw, whoever lost them; whoever starts this sees to it that nobody but the balancer does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, NamedTuple

from bench import report
from bench.balancers import BenchError
from bench.machine import LOAD_CORE
from bench.network import BACKENDS, BALANCER, FIRST_BACKEND, FIRST_CLIENT, PORT, Network
from bench.report import Section
from lb.cid import CidConfig, Codec, ConfigId, ServerId
from lb.mmsg import Batch

TITLE = "Datagrams lost at a restart"
ENGINES = ("udp", "xdp")
RATE = 50_000  # datagrams per second, of both directions together
FLOWS = 256
CONFIG = CidConfig(ConfigId(0), 4, 12, bytes(16))

_SIZE = 300  # octets of each datagram
_WARM_UP = 1.0  # seconds before something happens
_RATE_OF_BEATS = 1000  # bursts per second
_LINGER = 1.0  # seconds that the last datagrams may take
_PATIENCE = 60.0  # seconds for anything
_HEADER = 1 + CONFIG.cid_length


class Event(NamedTuple):
    """Something that happens to a balancer, and what should be lost by it; None: whatever it is."""

    name: str
    title: str
    goal: int | None


EVENTS = (
    Event("nothing", "nothing (the load by itself)", 0),
    Event("reload", "reload, 5 times", 0),
    Event("upgrade", "upgrade (take-over)", 0),
    Event("kill", "kill -9, and start", None),
)


class Run(NamedTuple):
    """One run's counts. `gap` is the longest time, in ms, in which nothing arrived at any end."""

    sent: int
    lost_up: int  # from clients
    lost_down: int  # from backends
    twice: int
    gap: float
    pause: float | None = None  # ms in which nobody read, while an engine was taken over

    @property
    def lost(self) -> int:
        return self.lost_up + self.lost_down


@dataclass(frozen=True, slots=True)
class Restart:
    """All runs of one event with one engine."""

    engine: str
    event: Event
    runs: list[Run]

    @property
    def lost(self) -> int:
        return sum(run.lost for run in self.runs)

    @property
    def sent(self) -> int:
        return sum(run.sent for run in self.runs)

    @property
    def gap(self) -> float:
        return max(run.gap for run in self.runs)

    @property
    def median_gap(self) -> float:
        return statistics.median(run.gap for run in self.runs)


def measure(
    engines: Sequence[str],
    rate: int,
    rounds: int,
    program: Sequence[str] | None,
    place: Path,
    say: Callable[[str], None],
    events: Sequence[Event] = EVENTS,
) -> list[Restart]:
    """Every event with every engine. `place` is an empty folder; `program` starts quiclb, up to `run -c`.

    Raises BenchError if something does not work.
    """
    program = program or [str(Path(sys.executable).with_name("quiclb"))]
    found = []
    for engine in engines:
        for event in events:
            runs = []
            for number in range(rounds):
                directory = place / f"{engine}-{event.name}-{number}"
                directory.mkdir()
                with Network() as network:
                    runs.append(_run(engine, event, rate, program, directory, network))
                say(f"{engine}, {event.title}: lost {runs[-1].lost} of {runs[-1].sent}, {runs[-1].gap:.1f} ms")
            found.append(Restart(engine, event, runs))
    return found


def section(restarts: Sequence[Restart], rate: int) -> Section:
    rows = [
        (
            restart.engine,
            restart.event.title,
            str(restart.sent),
            str(restart.lost),
            str(sum(run.twice for run in restart.runs)),
            f"{restart.median_gap:.1f}",
            f"{restart.gap:.1f}",
        )
        for restart in restarts
    ]
    remarks = [
        f"{rate} datagrams of {_SIZE} octets per second are offered, half of them by clients, the others are the "
        f"backends' answers; {FLOWS} flows, {BACKENDS} backends; {len(restarts[0].runs)} rounds.",
        "A gap is the longest time in which nothing arrived anywhere: its median and its maximum over the rounds.",
    ]
    pauses = [run.pause for restart in restarts for run in restart.runs if run.pause is not None]
    if pauses:
        remarks.append(f"Nobody reads while udp is taken over: for {max(pauses):.1f} ms at most, by its own clock.")
    noisy = {restart.engine for restart in restarts if restart.event.name == "nothing" and restart.lost}
    if noisy:
        remarks.append(
            f"NOISE: {', '.join(sorted(noisy))} lost datagrams with nothing happening: this machine does not give the "
            "rate. Repeat with a lower --restart-rate, or on a quiet machine, before believing any figure above."
        )
    for restart in restarts:
        if restart.event.goal is not None and restart.event.name != "nothing":
            said = report.reached(restart.lost <= restart.event.goal)
            remarks.append(f"target, {restart.engine}, {restart.event.title}: lost {restart.lost}, {said}")
    return Section(
        TITLE,
        ("engine", "event", "sent", "lost", "twice", "median gap, ms", "longest gap, ms"),
        rows,
        remarks,
        any(run.twice for restart in restarts for run in restart.runs),
    )


class _Quiclb:
    """`quiclb run` in the balancer's namespace, its successors included."""

    def __init__(self, engine: str, program: Sequence[str], directory: Path, network: Network) -> None:
        self._config = directory / "quiclb.yaml"
        self._log = directory / "log"
        self._program = program
        # Not ip-netns(8): it would have a /sys of its own, and pins in it would end with the process.
        self._inside = ("nsenter", f"--net=/run/netns/{network.balancer}")
        self._engine = engine
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self.pid = 0
        key = directory / "cid.key"
        key.touch(mode=0o600)
        assert CONFIG.key is not None
        key.write_text(CONFIG.key.hex() + "\n")
        self.write()

    def write(self, weight: int = 1) -> None:
        document: dict[str, object] = {
            "engine": self._engine,
            "log": {"format": "json"},
            "limits": {"new-flows-rate": 0},
            "runtime-directory": str(self._directory / "run"),
            "services": [
                {
                    "name": "bench",
                    "listen": [f"{BALANCER}:{PORT}"],
                    "cid-configs": [{"config-id": 0, "server-id-length": 4, "nonce-length": 12, "key-file": "cid.key"}],
                    "backends": [
                        {
                            "name": f"b{i}",
                            "address": f"{FIRST_BACKEND + i}:{PORT}",
                            "server-ids": {0: [_server_id(i).hex()]},
                            "weight": weight if i == 0 else 1,
                        }
                        for i in range(BACKENDS)
                    ],
                    "health": {"probe": "none"},
                }
            ],
        }
        if self._engine == "xdp":
            pins = f"/sys/fs/bpf/quiclb-bench-{os.getpid()}"
            document |= {"interface": "eth0", "xdp": {"attach": "generic", "pin-directory": pins}}
        self._config.write_text(json.dumps(document))

    def start(self) -> None:
        # On no particular core: a successor has one of its own for as long as there is one.
        command = [*self._inside, *self._program, "run", "-c", str(self._config)]
        with self._log.open("ab") as log:
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory)
            )
        self.pid = self._processes[-1].pid

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines()
        return [said for said in map(json.loads, filter(_is_whole, lines)) if said.get("event") == name]

    def wait_for(self, name: str, count: int) -> dict[str, Any]:
        """The `count`th event of that name."""
        give_up = time.monotonic() + _PATIENCE
        while len(found := self.events(name)) < count:
            if time.monotonic() > give_up or self._failed():
                raise BenchError(f"no event {name!r}. It printed:\n{self._log.read_text()[-1500:].strip()}")
            time.sleep(0.02)
        return found[count - 1]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        give_up = time.monotonic() + _PATIENCE
        while Path(f"/proc/{self.pid}").exists() and time.monotonic() < give_up:
            for process in self._processes:
                process.poll()
            if _is_zombie(self.pid):  # a successor, whose parent has ended, is for somebody else to wait for
                break
            time.sleep(0.02)
        for process in self._processes:
            process.kill()
            process.wait()
        if self._engine == "xdp":
            pins = f"/sys/fs/bpf/quiclb-bench-{os.getpid()}"
            command = [*self._program, "xdp", "detach", "--interface", "eth0", "--pin-directory", pins]
            subprocess.run([*self._inside, *command], capture_output=True, check=False)
            with contextlib.suppress(OSError):
                Path(pins).rmdir()

    def _failed(self) -> bool:
        ended = self.pid == self._processes[-1].pid and self._processes[-1].poll()  # with a status other than 0
        return bool(ended or self.events("failed") or self.events("upgrade-failed"))


def _run(engine: str, event: Event, rate: int, program: Sequence[str], directory: Path, network: Network) -> Run:
    quiclb = _Quiclb(engine, program, directory, network)
    try:
        quiclb.start()
        quiclb.wait_for("started", 1)
        with _load(rate, network) as load:
            time.sleep(_WARM_UP)
            _happen(event.name, quiclb)
            time.sleep(_WARM_UP)
            try:
                out, _ = load.communicate("\n", timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                raise BenchError("the load does not end") from None
        taken = quiclb.events("taken-over")
        return Run(**json.loads(out), pause=taken[-1]["milliseconds"] if taken else None)
    finally:
        quiclb.stop()


def _happen(what: str, quiclb: _Quiclb) -> None:
    if what == "reload":
        for number in range(1, 6):
            quiclb.write(weight=1 + number)
            quiclb.signal(signal.SIGHUP)
            quiclb.wait_for("reloaded", number)
            time.sleep(0.2)
    elif what == "upgrade":
        before = quiclb.pid
        quiclb.signal(signal.SIGUSR2)
        quiclb.pid = int(quiclb.wait_for("handed-over", 1)["successor"])
        _until_gone(before)
    elif what == "kill":
        before = quiclb.pid
        quiclb.signal(signal.SIGKILL)
        _until_gone(before)
        quiclb.start()
        quiclb.wait_for("started", 2)


def _is_whole(line: str) -> bool:
    """Whether a line of the log is an event, and not part of a traceback, or still being written."""
    return line.startswith("{") and line.endswith("}")


def _until_gone(pid: int) -> None:
    give_up = time.monotonic() + _PATIENCE
    while not _is_zombie(pid):
        if time.monotonic() > give_up:
            raise BenchError("the predecessor does not end")
        time.sleep(0.005)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@contextmanager
def _load(rate: int, network: Network) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "bench.restart", str(rate)]
    process = subprocess.Popen(
        network.command(network.load, LOAD_CORE, command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    with process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "running\n":
                raise BenchError("the load lets nothing through")
            yield process
        finally:
            process.kill()


def _server_id(backend: int) -> ServerId:
    return ServerId((backend + 1).to_bytes(CONFIG.server_id_length))


# The load.


class _Ends:
    """Clients' and backends' sockets, what they sent and what arrived."""

    def __init__(self, flows: int) -> None:
        codec = Codec(CONFIG)
        self._clients = [_bound(FIRST_CLIENT + i, 0) for i in range(flows)]
        self._backends = [_bound(FIRST_BACKEND + i, PORT) for i in range(BACKENDS)]
        self._headers = [
            b"\x41" + codec.encode(_server_id(i % BACKENDS), i.to_bytes(CONFIG.nonce_length)) for i in range(flows)
        ]
        self._rest = bytes(_SIZE - _HEADER - 8)
        self._poll = select.epoll()
        self._by_descriptor = {sock.fileno(): (sock, sock in self._backends) for sock in self._all()}
        for sock in self._all():
            self._poll.register(sock.fileno(), select.EPOLLIN)
        self._batch = Batch(64, 2048)
        self.sent = 0
        self.at_backends = bytearray()
        self.at_clients = bytearray()
        self.twice = 0
        self.gap = 0.0
        self._last = time.monotonic()

    def send(self, count: int) -> None:
        self.at_backends += bytes(count)
        self.at_clients += bytes(count)
        for number in range(self.sent, self.sent + count):
            flow = number % len(self._clients)
            datagram = self._headers[flow] + number.to_bytes(8) + self._rest
            self._clients[flow].sendto(datagram, (BALANCER, PORT))
        self.sent += count

    def receive(self, timeout: float) -> None:
        """Take what is there, and have backends answer."""
        ready = self._poll.poll(timeout)
        if ready:
            now = time.monotonic()
            self.gap = max(self.gap, now - self._last)
            self._last = now
        for descriptor, _ in ready:
            sock, is_backend = self._by_descriptor[descriptor]
            arrived = self.at_backends if is_backend else self.at_clients
            for (_, size), (peer,), _, _, view in self._batch.receive(descriptor, False):
                number = int.from_bytes(view[_HEADER : _HEADER + 8])
                self.twice += arrived[number]
                arrived[number] = 1
                if is_backend:
                    port, host = int.from_bytes(peer[2:4]), socket.inet_ntoa(peer[4:8])
                    sock.sendto(view[:size], (host, port))

    def forget(self) -> None:
        """Begin to count."""
        self.gap, self._last = 0.0, time.monotonic()

    def _all(self) -> list[socket.socket]:
        return [*self._clients, *self._backends]


def _bound(host: IPv4Address, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE: whatever is lost is to be lost by the balancer
        sock.setsockopt(socket.SOL_SOCKET, option, 32 << 20)
    sock.bind((str(host), port))
    return sock


def _play(rate: int) -> Mapping[str, object]:
    """Send until a line comes in. Returns what `Run` has."""
    ends = _Ends(FLOWS)
    ends.send(FLOWS)  # every flow begins
    give_up = time.monotonic() + _PATIENCE
    while not all(ends.at_clients) and time.monotonic() < give_up:
        ends.receive(0.05)
    if not all(ends.at_clients):
        raise SystemExit(1)
    print("running", flush=True)
    ends.forget()
    begun = time.monotonic()
    beat = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        beat += 1
        due = FLOWS + int((time.monotonic() - begun) * rate / 2)
        # What could not be sent in time is made up for little by little: a burst is nobody's fault but ours.
        ends.send(min(due - ends.sent, 2 * rate // _RATE_OF_BEATS) if due > ends.sent else 0)
        ends.receive(0)
        wait = (ends.sent + 1 - FLOWS) * 2 / rate + begun - time.monotonic()
        if wait > 0:
            ends.receive(min(wait, 1 / _RATE_OF_BEATS))
    end = time.monotonic() + _LINGER
    gap = ends.gap
    while time.monotonic() < end:
        ends.receive(0.01)
    up, down = ends.at_backends.count(0), ends.at_clients.count(0)
    arrived = ends.sent - up
    return {
        "sent": ends.sent + arrived,
        "lost_up": up,
        "lost_down": down - up,
        "twice": ends.twice,
        "gap": gap * 1000,
    }


if __name__ == "__main__":
    print(json.dumps(_play(int(sys.argv[1]))), flush=True)
