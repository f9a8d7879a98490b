"""The balancers that are compared: how each is configured, started and stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.machine import BALANCER_CORE, BUILD, descendants
from bench.network import BACKENDS, BALANCER, FIRST_BACKEND, PORT, Network
from lb.cid import CidConfig

START_TIMEOUT = 20.0  # seconds
STOP_TIMEOUT = 10.0
MAX_FLOWS = 200_000
# The program is in nginx-light or in the nginx that it depends on, by Debian's release.
NGINX_PACKAGES = ("nginx", "nginx-light", "libnginx-mod-stream")


class Balancer(Protocol):
    """`name` is the report's; `command` writes what it needs into an empty directory and returns how to start it."""

    name: str

    def command(self, directory: Path) -> list[str]: ...


@dataclass(slots=True)
class Running:
    """A balancer that listens."""

    process: subprocess.Popen[bytes]

    def pids(self) -> list[int]:
        return descendants(self.process.pid)


class BenchError(Exception):
    """A balancer did not start, did not let anything through, or ended by itself; with the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Quiclb:
    """quiclb with one service and sixteen backends that nobody probes. `program` starts it, up to `run -c`."""

    config: CidConfig
    server_ids: Sequence[str]  # hex, one per backend
    program: Sequence[str] = (str(Path(sys.executable).with_name("quiclb")),)
    name: str = "quiclb udp"

    def command(self, directory: Path) -> list[str]:
        slot: dict[str, object] = {
            "config-id": self.config.config_id,
            "server-id-length": self.config.server_id_length,
            "nonce-length": self.config.nonce_length,
        }
        if self.config.key is not None:
            key_file = directory / "cid.key"
            key_file.touch(mode=0o600)
            key_file.write_text(self.config.key.hex() + "\n")
            slot["key-file"] = str(key_file)
        document = {
            "engine": "udp",
            "limits": {"flows": MAX_FLOWS, "new-flows-rate": 0},
            "services": [
                {
                    "name": "bench",
                    "listen": [f"{BALANCER}:{PORT}"],
                    "cid-configs": [slot],
                    "backends": [
                        {
                            "name": f"b{i}",
                            "address": f"{FIRST_BACKEND + i}:{PORT}",
                            "server-ids": {self.config.config_id: [server_id]},
                        }
                        for i, server_id in enumerate(self.server_ids)
                    ],
                    "health": {"probe": "none"},
                }
            ],
        }
        path = directory / "quiclb.yaml"
        path.write_text(json.dumps(document, indent=2))  # which is YAML, too
        return [*self.program, "run", "-c", str(path)]


@dataclass(frozen=True, slots=True)
class Nginx:
    """nginx's stream proxy as Debian builds it: one worker, round robin, everything else at its default."""

    program: Path
    modules: Path
    multi_accept: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "nginx, multi_accept on" if self.multi_accept else "nginx, default")

    def command(self, directory: Path) -> list[str]:
        backends = "\n".join(f"        server {FIRST_BACKEND + i}:{PORT};" for i in range(BACKENDS))
        # A flow takes two connections, so that the default of 512 would end at 256 flows.
        text = f"""
load_module {self.modules}/ngx_stream_module.so;
user root;
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {directory}/nginx.pid;
error_log stderr;
events {{
    worker_connections 16384;
    multi_accept {"on" if self.multi_accept else "off"};
}}
stream {{
    upstream backends {{
{backends}
    }}
    server {{
        listen {BALANCER}:{PORT} udp;
        proxy_pass backends;
    }}
}}
"""
        path = directory / "nginx.conf"
        path.write_text(text)
        return [str(self.program), "-p", str(directory), "-e", "stderr", "-c", str(path)]


class NginxError(Exception):
    """There is no nginx to compare with, and why."""


def find_nginx(directory: Path = BUILD / "nginx") -> tuple[Path, Path]:
    """Debian's nginx and its modules' folder: installed, or fetched with apt-get and unpacked in `directory`.

    Unpacked rather than installed: a benchmark should not leave a web server running on port 80.
    Raises NginxError if neither works.
    """
    installed = shutil.which("nginx")
    modules = Path("/usr/lib/nginx/modules")
    if installed and (modules / "ngx_stream_module.so").exists():
        return Path(installed), modules
    program, modules = directory / "usr/sbin/nginx", directory / "usr/lib/nginx/modules"
    if not program.exists():
        _unpack_nginx(directory)
    if not program.exists():
        raise NginxError(f"none of {', '.join(NGINX_PACKAGES)} holds usr/sbin/nginx")
    version = subprocess.run([str(program), "-v"], capture_output=True, text=True, check=False)
    if version.returncode:  # a library that it needs is not here
        raise NginxError(version.stderr.strip())
    return program, modules


@contextmanager
def started(balancer: Balancer, network: Network, directory: Path, descriptors: int = 20_000) -> Iterator[Running]:
    """A balancer, listening on its core under a limit of open files, until the block ends.

    `directory` is an empty one, for its configuration and what it prints.
    Raises BenchError if it does not listen in time, and for whatever goes wrong in the block because of it.
    """
    log = directory / "log"
    command = ["prlimit", f"--nofile={descriptors}:{descriptors}", *balancer.command(directory)]
    environment = os.environ | {"RUNTIME_DIRECTORY": str(directory)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            network.command(network.balancer, BALANCER_CORE, command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
    with process:
        try:
            _wait_until_listening(process)
            yield Running(process)
            if process.poll() is not None:
                raise BenchError("it ended by itself")
        except (BenchError, OSError) as error:
            _stop(process)
            raise BenchError(f"{balancer.name}: {error}. It printed:\n{log.read_text()[-1500:].strip()}") from error
        finally:
            _stop(process)


def _wait_until_listening(process: subprocess.Popen[bytes]) -> None:
    # Its own view of /proc/net is its namespace's; addresses there are little endian, so the port is enough.
    wanted = f":{PORT:04X} "
    end = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < end:
        if wanted in Path(f"/proc/{process.pid}/net/udp").read_text():
            return
        time.sleep(0.02)
    raise BenchError("it does not listen")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        for pid in reversed(descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _unpack_nginx(directory: Path) -> None:
    if shutil.which("apt-get") is None:
        raise NginxError("nginx is not installed, and without apt-get this does not know how to get it")
    directory.mkdir(parents=True, exist_ok=True)
    fetch = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *NGINX_PACKAGES]
    for command in (fetch, ["apt-get", "-q", "update"], fetch):
        fetched = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if fetched.returncode == 0 and command is fetch:
            break
    if fetched.returncode:
        raise NginxError(f"{' '.join(fetch)}: {fetched.stderr.strip()}")
    for package in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(directory)], check=True)
