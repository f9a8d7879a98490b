"""Which module of lb/ may import what: read from the source, so that a new import has to be argued for here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LB = ROOT / "lb"

# Bottom up. A module imports from lower layers only, never from its own.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "address", "log", "forward", "systemd", "watching", "files"),
    ("cid",),
    ("packet",),
    ("reset",),
    ("generator", "reset_scheme"),
    ("routing",),
    ("limiter",),
    ("flows",),
    ("router",),
    ("document",),
    ("keyfile", "schema"),
    ("kinds",),
    ("keys",),
    ("checks",),
    ("config", "server_config"),
    ("engine", "healthcheck", "silence", "slowstart", "places", "overrides", "changes", "yamltext"),
    ("probing",),
    ("activity", "rotation", "runtimefile", "mmsg", "returnpath", "highwater", "handover"),
    ("sockets",),
    ("upstream",),
    ("nat",),
    ("takeover",),
    ("udp", "negotiation", "http3"),
    ("workers", "health"),
    ("snapshot", "fleet"),
    ("xdp/layout", "xdp/aes128", "xdp/abi", "xdp/netlink"),
    ("xdp/slots", "xdp/maps", "xdp/interface"),
    ("xdp/image", "xdp/libbpf"),
    ("xdp/difference", "xdp/program", "xdp/counting", "xdp/natflows", "xdp/sample"),
    ("xdp/tables", "xdp/attachment", "xdp/neighbours", "xdp/farewell", "xdp/watch", "xdp/status"),
    ("xdp/plane", "xdp/decap"),
    ("xdp/engine", "xdp/requirements"),
    ("engines",),
    ("metrics", "operations", "describe", "keygen", "pcap", "terminal", "upgrade"),
    ("explain", "rewrite"),
    ("server_half", "cid_tool"),
    ("envoy",),
    (
        "conformance/datagrams",
        "conformance/observed",
        "conformance/randomness",
        "conformance/stale",
        "conformance/subject",
    ),
    ("conformance/judgement", "conformance/client"),
    ("conformance/report", "conformance/examination"),
    ("admin/access", "admin/shapes", "admin/views", "admin/client"),
    ("admin/http", "admin/openapi", "admin/files"),
    ("admin/connection", "admin/api"),
    ("admin/server",),
    ("control",),
    ("commands/arguments",),
    ("commands/balancer", "commands/screen"),
    (
        "commands/backends",
        "commands/cid",
        "commands/completion",
        "commands/conformance",
        "commands/explain",
        "commands/keygen",
        "commands/reload",
        "commands/rotation",
        "commands/run",
        "commands/status",
        "commands/xdp",
    ),
    ("cli",),
    ("__main__",),
)
EXCEPTIONS = {
    ("schema", "config"),  # only as a program: `python -m lb.schema` prints what config.py's tables say
}
SANS_IO = {
    "errors",
    "address",
    "cid",
    "packet",
    "reset",
    "reset_scheme",
    "generator",
    "routing",
    "limiter",
    "flows",
    "router",
    "healthcheck",
    "silence",
    "slowstart",
    "overrides",
    "changes",
    "activity",
    "rotation",
    "snapshot",
    "explain",
    "terminal",
    "admin/access",
    "admin/views",
    "conformance/observed",
    "conformance/randomness",
    "conformance/stale",
    "conformance/subject",
    "conformance/judgement",
}
IO = {"asyncio", "socket", "time", "random", "secrets", "logging", "os", "ctypes"}
# Third parties stay fenced.
FENCED = {
    "aiohttp": {"admin/connection"},
    "aioquic": {"http3", "conformance/client"},
    "cryptography": {"cid"},
    "dpkt": {"pcap"},
    "shtab": {"commands/completion"},
    "yaml": {"document", "yamltext", "rewrite"},
    "uvloop": {"control", "workers"},
    "prometheus_client": {"metrics"},
    "ctypes": {"mmsg", "xdp/abi", "xdp/maps", "xdp/libbpf"},
}
PACKAGES = {"lb", "lb.admin", "lb.commands", "lb.conformance", "lb.xdp"}
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def imports(source: str) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it; `from lb import cid` counts as `lb.cid`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the layer"
            if node.module in PACKAGES:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def found(module: str) -> list[str]:
    return sorted(set(imports((LB / f"{module}.py").read_text())))


MODULES = sorted(str(path.relative_to(LB).with_suffix("")) for path in LB.rglob("*.py"))
NAMED = [module for module in MODULES if Path(module).name != "__init__"]


def test_every_module_has_a_place() -> None:
    assert [module for module in NAMED if module not in LEVEL] == []


@pytest.mark.parametrize("module", [module for module in NAMED if module in LEVEL])
def test_a_module_imports_only_from_below(module: str) -> None:
    ours = [name.removeprefix("lb.").replace(".", "/") for name in found(module) if name.startswith("lb.")]
    allowed = {below for below in LEVEL if LEVEL[below] < LEVEL[module]}
    allowed |= {name for importer, name in EXCEPTIONS if importer == module}
    wrong = [name for name in ours if name not in allowed]
    assert wrong == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_the_backend(module: str) -> None:
    assert [name for name in found(module) if name.split(".")[0] in ("backend", "tests", "bench")] == []


@pytest.mark.parametrize("module", sorted(SANS_IO))
def test_the_core_has_no_socket_clock_log_or_randomness(module: str) -> None:
    assert [name for name in found(module) if name.split(".")[0] in IO] == []


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_stay_fenced(module: str) -> None:
    outside = [name for name in found(module) if module not in FENCED.get(name.split(".")[0], {module})]
    assert outside == []


@pytest.mark.parametrize(
    "package", ["__init__", "admin/__init__", "commands/__init__", "conformance/__init__", "xdp/__init__"]
)
def test_a_package_imports_nothing_at_its_own_import(package: str) -> None:
    assert found(package) in ([], ["__future__"])


def test_the_udp_engine_needs_no_libbpf() -> None:
    """Nor do the commands that only read configurations: what is in lb/xdp is imported by whoever means it."""
    wanted = "import sys, lb.control, lb.cli; print(*(name for name in sys.modules if name.startswith('lb.xdp')))"
    done = subprocess.run([sys.executable, "-c", wanted], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "\n"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import os", ["os"]),
        ("import os.path as p, sys", ["os.path", "sys"]),
        ("from lb import cid, packet", ["lb.cid", "lb.packet"]),
        ("from lb.cid import Codec", ["lb.cid"]),
        ("from lb.xdp import layout", ["lb.xdp.layout"]),
        ("from lb.xdp.layout import Flow", ["lb.xdp.layout"]),
        ("def f():\n    if x:\n        import socket", ["socket"]),
        ("'import os'", []),
    ],
)
def test_no_import_is_overlooked(source: str, names: list[str]) -> None:
    assert list(imports(source)) == names


def test_a_layer_names_a_module_once() -> None:
    assert len(LEVEL) == sum(len(modules) for modules in LAYERS)
    assert LEVEL.keys() >= SANS_IO
