"""Where cells are played: servers of one make, and two balancers before them.

Balancers are quiclb's, with either engine, or two of nginx, which know nothing of each other nor of connection IDs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from backend.adapters.registry import Adapter, Feature
from backend.certificate import self_signed
from backend.clients.relay import NatRelay
from backend.demo.lan import Xdp, lan
from backend.demo.place import Front, Loopback, Place, StageError
from backend.demo.stage import EVENT_TIMEOUT, SERVICE, Child, Play, Server, Stage
from lb.address import Address
from lb.admin.client import Client, Where
from lb.cid import Codec, ConfigId, ServerId, config_id_of
from lb.config import load_config
from lb.places import ADMIN_SOCKET
from lb.reset import reset_token, server_reset_key
from lb.server_half import SERVER_FILE, server_half
from tests.interop.cells import Engine

# Ours.
SERVERS = ("a", "b", "c")  # three: a 4-tuple balancer that moves twice is not back where it was
BALANCERS = ("one", "two")
CIDS: tuple[Mapping[str, Any], ...] = (
    # One AES block, and four passes over eleven octets with five more behind them: 17 octets both.
    {"config-id": 0, "server-id-length": 4, "nonce-length": 12, "encodes-length": True, "phase": "active"},
    {"config-id": 1, "server-id-length": 3, "nonce-length": 8, "appended-length": 5, "phase": "prepared"},
)
CID_LENGTH = 17
KEYS = tuple(f"cid-{each['config-id']}.key" for each in CIDS)
# Whoever is only slow, on a busy machine, must not be taken for dead; who is dead is noticed by ICMP.
HEALTH = {"interval": "500ms", "timeout": "500ms", "fall": 4, "rise": 1, "silence": "500ms"}
HOLD_OFF = 1.5  # seconds
LISTENING_TIMEOUT = 10.0  # seconds, for nginx
POLL = 0.01  # seconds
UDP_STATE = Path("net/udp")
SILENT = 6  # servers more for the control that answer nothing: who is sent elsewhere again and again is not back soon


class Balancing(Protocol):
    """Two balancers as a scenario sees them."""

    address: Address
    address_v6: Address

    async def begin(self) -> None:
        """Make ready for one cell."""

    async def restart(self) -> None:
        """End the first one by SIGKILL, and start it again."""

    def swapped(self, relay: NatRelay) -> contextlib.AbstractContextManager[None]:
        """Have the network send what a relay's client says to the second one, as long as the block lasts."""

    async def avoid(self, server: str) -> None:
        """Give one server no new connections."""

    async def avoid_nobody(self) -> None: ...

    async def is_back(self, server: str) -> None:
        """Wait until a server that was started again gets new connections."""


class Site(Stage):
    """The stage with servers of another make, their certificate, and two CID configurations to rotate between."""

    def __init__(self, adapter: Adapter, directory: Path, play: Play, place: Place) -> None:
        super().__init__(directory, play, place)
        self.adapter = adapter
        self.config_id = 0
        self._codecs: dict[int, Codec] = {}
        for name in KEYS:
            self._write_secret(name, os.urandom(16))
        certificate = self_signed(datetime.now(UTC))
        (directory / "cert.pem").write_bytes(certificate.pem())
        key = certificate.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with open(os.open(directory / "key.pem", os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
            file.write(key)
        public = certificate.chain[0].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.spki = base64.b64encode(hashlib.sha256(public).digest()).decode()
        self._ids = {
            name: tuple(bytes([i + 1]) + os.urandom(each["server-id-length"] - 1) for each in CIDS)
            for i, name in enumerate(play.backends)
        }

    async def start_backends(self) -> None:
        for name in self.play.backends:
            child = Child(f"server {name}", self._command(name), self.directory / f"server-{name}.log")
            server_id = ServerId(self._ids[name][0])
            self.servers[name] = Server(name, server_id, child, self.place.listens(name))
        self._write_halves(0)
        starting = [self._start_backend(server) for server in self.servers.values()]
        for outcome in await asyncio.gather(*starting, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def with_retry(self) -> None:
        """Start all servers again: from now on clients have to prove their address."""
        await asyncio.gather(*(server.child.kill() for server in self.servers.values()))
        for server in self.servers.values():
            command = [*self._command(server.name), "--retry"]
            server.child = Child(server.child.name, command, server.child.log_path)
        await asyncio.gather(*(self.restart(server) for server in self.servers.values()))

    def rotate(self) -> None:
        """Have all servers go on with the other configuration."""
        self._write_halves(1 - self.config_id)
        for server in self.servers.values():
            server.child.signal(signal.SIGHUP)

    def server_of(self, cid: bytes) -> str | None:
        """Whose a connection ID is; None if it is nobody's."""
        codec = self._codecs.get(config_id_of(cid) or 0)
        decoded = codec.decode(cid) if codec and len(cid) == CID_LENGTH else None
        if codec is None or decoded is None:
            return None
        config_id = codec.config.config_id
        return next((name for name, ids in self._ids.items() if ids[config_id] == decoded.server_id), None)

    def reset_tokens(self, server: str, cids: Sequence[bytes]) -> set[bytes]:
        """That a server's resets for these connection IDs end in."""
        tokens = set()
        for cid in cids:
            config_id = config_id_of(cid) or 0
            if config_id < len(CIDS):
                server_id = ServerId(self._ids[server][config_id])
                tokens.add(reset_token(server_reset_key(self._reset_key, ConfigId(config_id), server_id), cid))
        return tokens

    def _command(self, name: str) -> list[str]:
        options = {
            "--server-config": self.directory / name / SERVER_FILE,
            "--cert": self.directory / "cert.pem",
            "--key": self.directory / "key.pem",
        }
        if not {Feature.RETRY, Feature.EARLY_DATA_ELSEWHERE} <= set(self.adapter.cannot):
            options["--token-key-file"] = self.directory / "token.keys"
        given = [str(word) for option in options.items() for word in option]
        if self.adapter.name == "aioquic":
            given += ["--early-data", "--grace", "0"]
        return [*self.place.entering(name), *self.adapter.command, *given]

    def _write_halves(self, config_id: int) -> None:
        path = self._write_config("halves.yaml", {"services": self._services([Address("127.0.0.1", 1)])})
        config = load_config(path)
        self.config_id = config_id
        slots = config.services[0].service.cid_slots
        self._codecs = {int(slot.config.config_id): Codec(slot.config) for slot in slots}
        made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for name in self.servers:
            half = server_half(config, name, config_id=config_id, nonce_file="nonces", made=made)
            half.write(self.directory / name)

    def _services(self, listen: Sequence[Address]) -> list[dict[str, Any]]:
        return [
            {
                "name": SERVICE,
                "listen": [str(address) for address in listen],
                "cid-configs": [
                    {**each, "key-file": key, "reset-key-file": "reset.key"}
                    for each, key in zip(CIDS, KEYS, strict=True)
                ],
                "backends": [
                    {
                        "name": server.name,
                        "address": str(
                            server.address if server.address.port else Address(server.address.host, 1000 + i)
                        ),
                        "server-ids": {str(c): [octets.hex()] for c, octets in enumerate(self._ids[server.name])},
                    }
                    for i, server in enumerate(self.servers.values())
                ],
                "seed": "the same everywhere",
                "health": self.play.health,
                "resets": {"hold-off": f"{round(self.play.hold_off * 1000)}ms"},
            }
        ]


class Quiclb:
    """Two of ours, with the same configuration."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._avoided: set[str] = set()
        one = site.balancers["one"]
        if one.address_v6 is None:
            raise StageError("there is no IPv6 here")
        self.address, self.address_v6 = one.address, one.address_v6

    async def begin(self) -> None:
        """It is ready."""

    async def restart(self) -> None:
        one = self._site.balancers["one"]
        await one.child.kill()
        await self._site.run(one)

    @contextlib.contextmanager
    def swapped(self, relay: NatRelay) -> Iterator[None]:
        with self._site.place.rerouted("two") as by_route:
            before = relay.target
            if not by_route:
                relay.target = self._site.balancers["two"].address
            try:
                yield
            finally:
                relay.target = before

    async def avoid(self, server: str) -> None:
        await self._change(server, {"drain": True})
        self._avoided.add(server)

    async def avoid_nobody(self) -> None:
        for server in list(self._avoided):
            await self._change(server, {"drain": None})
            self._avoided.discard(server)

    async def is_back(self, server: str) -> None:
        async with asyncio.timeout(EVENT_TIMEOUT):
            for client in self._clients():
                # It need not have noticed that it was gone, and nothing is logged then.
                while (await asyncio.to_thread(client.backend, SERVICE, server))["state"] != "active":  # noqa: ASYNC110
                    await asyncio.sleep(POLL)

    async def _change(self, server: str, change: Mapping[str, Any]) -> None:
        for client in self._clients():
            await asyncio.to_thread(client.change, SERVICE, server, change)

    def _clients(self) -> list[Client]:
        return [Client(Where(self._site.directory / f"run-{name}" / ADMIN_SOCKET)) for name in BALANCERS]


class Nginx:
    """Two of nginx's stream proxies, round robin, started anew for each cell.

    Their fleet is larger than ours: some clients move by themselves until somebody answers, and would come round.
    """

    def __init__(self, site: Site, program: Path, modules: Path) -> None:
        self._site = site
        self._program = program
        self._modules = modules
        self._fronts = [site.place.front(name) for name in BALANCERS]
        self._children: list[Child] = []
        self.address, self.address_v6 = self._fronts[0].listen
        self._silent = [_silent_server() for _ in range(SILENT)]

    async def begin(self) -> None:
        """The next client of the first one gets the second server, and the next of the other one the third."""
        await asyncio.gather(*(child.kill() for child in self._children))
        self._children = [self._child(name, front) for name, front in zip(BALANCERS, self._fronts, strict=True)]
        await asyncio.gather(*map(self._start, self._children, self._fronts))
        _clients_before(self._fronts[0], 1)
        _clients_before(self._fronts[1], 2)

    async def restart(self) -> None:
        """Others are quicker: the next client gets the third server."""
        await self._children[0].kill()
        await self._start(self._children[0], self._fronts[0])
        _clients_before(self._fronts[0], 2)

    @contextlib.contextmanager
    def swapped(self, relay: NatRelay) -> Iterator[None]:
        relay.target = self._fronts[1].listen[0]
        try:
            yield
        finally:
            relay.target = self.address

    async def avoid(self, server: str) -> None:
        """Start anew: then it is the third server's turn."""
        await self.restart()

    async def avoid_nobody(self) -> None:
        """It does not."""

    async def is_back(self, server: str) -> None:
        """It never knew that it was gone."""

    async def stop(self) -> None:
        await asyncio.gather(*(child.kill() for child in self._children))
        for sock in self._silent:
            sock.close()

    async def _start(self, child: Child, front: Front) -> None:
        await child.start()
        wanted = f":{front.listen[0].port:04X} "
        try:
            async with asyncio.timeout(LISTENING_TIMEOUT):
                while wanted not in await asyncio.to_thread((Path(f"/proc/{child.pid}") / UDP_STATE).read_text):
                    if not child.is_running:
                        raise StageError(f"{child.name} has ended:\n{child.last_words()}")
                    await asyncio.sleep(POLL)
        except TimeoutError:
            raise StageError(f"{child.name} does not listen:\n{child.last_words()}") from None

    def _child(self, name: str, front: Front) -> Child:
        directory = self._site.directory / f"nginx-{name}"
        directory.mkdir(exist_ok=True)
        addresses = [server.address for server in self._site.servers.values()]
        addresses += [Address(*sock.getsockname()) for sock in self._silent]
        servers = "\n".join(f"        server {address} max_fails=0;" for address in addresses)
        listens = "\n".join(f"        listen {address} udp;" for address in front.listen)
        user = "user root;" if os.geteuid() == 0 else ""
        path = directory / "nginx.conf"
        path.write_text(f"""
load_module {self._modules}/ngx_stream_module.so;
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
stream {{
    upstream servers {{
{servers}
    }}
    server {{
{listens}
        proxy_pass servers;
    }}
}}
""")
        command = [str(self._program), "-p", str(directory), "-e", "stderr", "-c", str(path)]
        return Child(f"nginx {name}", command, directory / "log")


def _silent_server() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def _clients_before(front: Front, count: int) -> None:
    for _ in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as somebody:
            somebody.sendto(b"\0", front.listen[0])


@dataclass(frozen=True, slots=True)
class Scenery:
    """A site and the balancers before it."""

    site: Site
    balancing: Balancing


@contextlib.asynccontextmanager
async def scenery(engine: Engine, adapter: Adapter, nginx: tuple[Path, Path] | None = None) -> AsyncIterator[Scenery]:
    """Servers and balancers, running, of which nothing stays behind. `nginx`: its program and modules, for the control.

    Raises StageError.
    """
    xdp = Xdp() if engine is Engine.XDP else None
    play = Play(backends=SERVERS, hold_off=HOLD_OFF, xdp=xdp, health=HEALTH)
    async with contextlib.AsyncExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="quiclb-")))
        place: Place
        if xdp is not None:
            place = opened.enter_context(lan(xdp, directory, BALANCERS, SERVERS))
        else:
            place = Loopback(play.host, SERVERS, {"engine": "udp", "workers": 1})
        site = Site(adapter, directory, play, place)
        opened.push_async_callback(site.stop)
        await site.start_backends()
        if engine is Engine.CONTROL:
            if nginx is None:
                raise StageError("there is no nginx")
            control = Nginx(site, *nginx)
            opened.push_async_callback(control.stop)
            yield Scenery(site, control)
        else:
            for name in BALANCERS:
                await site.start_balancer(name)
            yield Scenery(site, Quiclb(site))
