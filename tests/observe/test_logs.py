"""What a running balancer writes to its log: new flows, if asked to, and never what a connection ID or a key says."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import KEY, RESET_KEY, server_id
from tests.fleet import eventually, udp_socket
from tests.observe.dashboards import ROOT
from tests.test_control import Site

# Fields that nobody should think of.
SECRET = re.compile(r"cid|dcid|scid|server_id|nonce|key|token|octets|datagram|payload|secret|seed")
# Numbers and names that are only called like those.
HARMLESS = {"config_id"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("format_", ["json", "text"])
def test_a_flow_is_logged_without_its_connection_id_or_server_id(site: Site, format_: str) -> None:
    file = site.directory / "lb.yaml"
    file.write_text(file.read_text().replace("log: {format: json}", f"log: {{format: {format_}, flows: 100%}}"))
    process = site.start(ready=False)
    cids = [site.cid(backend) for backend in (0, 1, 1)]
    with contextlib.ExitStack() as sockets:
        clients = [sockets.enter_context(udp_socket()) for _ in cids]
        eventually(lambda: any("started" in line for line in process.lines), patience=15)
        for client, cid, backend in zip(clients, cids, (0, 1, 1), strict=True):
            site.round_trip(client, cid, backend)
        wanted = [f"127.0.0.1:{client.getsockname()[1]}" for client in clients]
    process.send(signal.SIGTERM)
    assert process.wait() == 0

    text = "".join(process.lines)
    if format_ == "json":
        flows = [json.loads(line) for line in process.lines if '"flow"' in line]
        fields = {"time", "level", "event", "client", "service", "backend", "verdict", "is_move"}
        assert [flow.keys() for flow in flows] == [fields] * 3
        assert [(flow["client"], flow["backend"]) for flow in flows] == list(
            zip(wanted, ("b0", "b1", "b1"), strict=True)
        )
        assert {(flow["service"], flow["verdict"]) for flow in flows} == {("web", "cid")}
    else:
        assert re.findall(r"event=flow client=(\S+) service=web backend=\w+ verdict=cid is_move=\w+\n", text) == wanted
    for octets in (*cids, *(server_id(backend) for backend in range(2)), KEY, RESET_KEY):
        for spelling in (octets.hex(), octets.hex(":"), octets.hex(" "), repr(octets)[2:-1], str(list(octets))):
            assert spelling.lower() not in text.lower()


def test_no_event_has_a_field_for_what_must_not_be_logged() -> None:
    found = set()
    for path in (ROOT / "lb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "event":
                found |= {(path.name, keyword.arg) for keyword in node.keywords if keyword.arg}
    assert ("udp.py", "client") in found
    assert [(file, name) for file, name in found if SECRET.search(name) and name not in HARMLESS] == []
