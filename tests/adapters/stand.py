"""Where an adapter is tried: four of its servers and a balancer, as processes, with their files in one directory.

Servers `a` and `b` are one service. `c` and `d` are another, where clients have to prove their address by a Retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from backend.adapters.registry import Adapter, Feature
from backend.certificate import self_signed
from backend.demo.place import free_ports, has_ipv6
from backend.demo.stage import START_TIMEOUT, Child, Metrics
from lb.address import Address
from lb.cid import Codec, ServerId, config_id_of
from lb.config import load_config
from lb.keys import LbConfig
from lb.server_half import SERVER_FILE, ServerHalf, server_half

PATIENCE = 10.0  # seconds until something is true, on a machine that is busy
POLL = 0.01  # seconds
CIDS: tuple[dict[str, Any], ...] = (
    # One AES block, and four passes over eleven octets with five of the server's own behind them: 17 octets both.
    {"config-id": 0, "server-id-length": 4, "nonce-length": 12, "encodes-length": True},
    {"config-id": 1, "server-id-length": 3, "nonce-length": 8, "appended-length": 5, "phase": "prepared"},
)
MADE = "2026-11-21T00:00:00Z"  # when the servers' files were made
SERVICES = {"web": ("a", "b"), "retry": ("c", "d")}
CALLED = {"d": "delta"}  # by --name; the others go by the name in their file


@dataclass(slots=True)
class Server:
    """One server's process, its files, and what it may call itself under each config ID."""

    name: str
    directory: Path
    halves: tuple[ServerHalf, ...]
    child: Child
    listens: tuple[Address, ...]

    @property
    def address(self) -> Address:
        return self.listens[0]

    @property
    def file(self) -> Path:
        return self.directory / SERVER_FILE

    def half(self, cid: bytes) -> ServerHalf:
        """What it was told of the configuration that a connection ID was made under."""
        return next(half for half in self.halves if half.config.config_id == config_id_of(cid))

    def decoded(self, cid: bytes) -> tuple[ServerId, bytes]:
        """Server ID and nonce of a connection ID."""
        half = self.half(cid)
        assert len(cid) == half.config.cid_length
        decoded = Codec(half.config).decode(cid)
        assert decoded is not None
        return decoded


class Stand:
    """The files, and what is started from them."""

    def __init__(self, adapter: Adapter, directory: Path) -> None:
        self.adapter = adapter
        self.directory = directory
        self._ports = free_ports(1 + len(SERVICES) + sum(map(len, SERVICES.values())))
        self.admin = Address("127.0.0.1", self._ports.pop())
        self.fronts = {name: Address("127.0.0.1", self._ports.pop()) for name in SERVICES}
        self.servers: dict[str, Server] = {}
        self._ids = {name: tuple(secrets.token_bytes(each["server-id-length"]) for each in CIDS) for name in "abcd"}
        for name, octets in {"cid-0.key": 16, "cid-1.key": 16, "reset.key": 32}.items():
            secret(directory / name, secrets.token_hex(octets))
        secret(directory / "token.keys", "\n".join(secrets.token_hex(32) for _ in range(2)))
        certificate = self_signed(datetime.now(UTC))
        (directory / "cert.pem").write_bytes(certificate.pem())
        key = certificate.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        secret(directory / "key.pem", key.decode())
        config = self._configure()
        for name in self._ids:
            self.servers[name] = self._server(name, config)
        command = [sys.executable, "-u", "-m", "lb", "run", "-c", str(directory / "quiclb.yaml")]
        self.balancer = Child("balancer", command, directory / "balancer.log")

    async def start(self) -> None:
        """Start the servers, all at once, and then a balancer that knows where they are."""
        await asyncio.gather(*(self.restart(server) for server in self.servers.values()))
        self._configure()
        (self.directory / "run").mkdir(mode=0o700)
        since = time.time()
        await self.balancer.start()
        await self.balancer.logged("started", since, within=START_TIMEOUT)

    async def restart(self, server: Server) -> None:
        """Start a server, the first time or again: then where it was before."""
        await server.child.start(*(word for each in server.listens for word in ("--listen", str(each))))
        server.listens = await server.child.is_ready()

    async def stop(self) -> None:
        """End every process."""
        await asyncio.gather(self.balancer.stop(), *(server.child.stop() for server in self.servers.values()))

    async def resets(self) -> float:
        """Stateless Resets that the balancer has sent: none, if what a server does is to be seen."""
        return await self._metric("quiclb_resets_total")

    async def moves(self) -> float:
        """Changes of address that the balancer has seen."""
        return await self._metric("quiclb_moves_total")

    async def _metric(self, name: str) -> float:
        def scrape() -> Metrics:
            from urllib.request import urlopen

            with urlopen(f"http://{self.admin}/metrics", timeout=PATIENCE) as response:
                return Metrics(response.read().decode())

        return (await asyncio.to_thread(scrape)).value(name)

    def command(self, file: Path, *options: str) -> list[str]:
        """How the adapter's server is started with a file."""
        files = ["--cert", str(self.directory / "cert.pem"), "--key", str(self.directory / "key.pem")]
        if Feature.RETRY not in self.adapter.cannot:
            files += ["--token-key-file", str(self.directory / "token.keys")]
        return [*self.adapter.command, "--server-config", str(file), *files, *options]

    def _server(self, name: str, config: LbConfig) -> Server:
        directory = self.directory / name
        halves = tuple(
            server_half(config, name, config_id=each, nonce_file="nonces", made=MADE) for each in range(len(CIDS))
        )
        for half in reversed(halves):
            half.write(directory)
        options = ["--retry"] if name in SERVICES["retry"] and Feature.RETRY not in self.adapter.cannot else []
        options += ["--name", CALLED[name]] if name in CALLED else []
        child = Child(f"server {name}", self.command(directory / SERVER_FILE, *options), directory / "log")
        port = self._ports.pop()
        listens = [Address("127.0.0.1", port), *([Address("::1", port)] if has_ipv6() else [])]
        return Server(name, directory, halves, child, tuple(listens))

    def _configure(self) -> LbConfig:
        """Write the balancer's file. Servers that do not listen yet have addresses that will do for now."""
        path = self.directory / "quiclb.yaml"
        config = {
            "runtime-directory": "run",
            "metrics": str(self.admin),
            "log": {"format": "json"},
            "engine": "udp",
            "services": [self._service(name, members) for name, members in SERVICES.items()],
        }
        path.write_text(json.dumps(config))  # JSON is YAML
        return load_config(path)

    def _service(self, service: str, members: tuple[str, ...]) -> dict[str, Any]:
        backends = [
            {
                "name": name,
                "address": str(self.servers[name].address if name in self.servers else Address("127.0.0.1", 1000 + i)),
                "server-ids": {str(i): [octets.hex()] for i, octets in enumerate(self._ids[name])},
            }
            for i, name in enumerate(members)
        ]
        keys = {"reset-key-file": "reset.key"}
        return {
            "name": service,
            "listen": [str(self.fronts[service])],
            "cid-configs": [{**each, **keys, "key-file": f"cid-{each['config-id']}.key"} for each in CIDS],
            "backends": backends,
            "health": {"interval": "500ms"},
            "resets": {"hold-off": "300s"},  # so that all resets are the servers'
        }


@contextlib.asynccontextmanager
async def stand(adapter: Adapter) -> AsyncIterator[Stand]:
    """Four servers and a balancer, running, of which nothing stays behind."""
    with tempfile.TemporaryDirectory(prefix="quiclb-") as directory:
        made = Stand(adapter, Path(directory))
        try:
            await made.start()
            yield made
        finally:
            await made.stop()


async def until(condition: Callable[[], object]) -> None:
    """Wait until it is true. AssertionError if it never is."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():  # noqa: ASYNC110 - of a process, which sets no event
                await asyncio.sleep(POLL)
    except TimeoutError:
        raise AssertionError("it never came true") from None


def secret(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file that nobody else may read, unless `mode` says so."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
    path.chmod(mode)
