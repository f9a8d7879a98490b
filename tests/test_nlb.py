"""In place of a cloud's network load balancer: its form of connection IDs, its spellings of server IDs, its drops."""

from __future__ import annotations

import asyncio
import base64
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.clients.aioquic_client import AioquicClient
from backend.demo.place import free_ports
from backend.demo.stage import START_TIMEOUT, Child
from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId, ServerId
from lb.cli import main
from lb.config import load_config
from lb.errors import ConfigErrors
from lb.kinds import server_id_octets
from lb.router import Route, Router, Verdict
from lb.routing import RoutingTable, UnknownServer, Unroutable
from lb.server_config import load_server_config
from tests.builders import deterministic_random, flow, long, short
from tests.files import examples

CONFIG = CidConfig(ConfigId(0), 8, 7, encodes_length=False)
A, B, NOBODY = (ServerId(bytes.fromhex(each)) for each in ("2d6575a16fa08ea4", "2d6575a16fa08ea5", "2d6575a16fa08ea6"))
PATIENCE = 10.0


def cid(server_id: ServerId) -> bytes:
    return Codec(CONFIG).encode(server_id, bytes(range(7)))


# The spellings of a server ID


@pytest.mark.parametrize(
    ("text", "octets"),
    [
        # One server ID, as three sides of one cloud have it: its API, its controller, and we.
        ("0x2d6575a16fa08ea4", A),
        ("LWV1oW+gjqQ=", A),
        ("2d6575a16fa08ea4", A),
        ("2D6575A16FA08EA4", A),
        ("base64:LWV1oW+gjqQ=", A),
        # What could be both is hex, unless it says otherwise.
        ("abcd", b"\xab\xcd"),
        ("base64:abcd", b"\x69\xb7\x1d"),
        ("0xabcd", b"\xab\xcd"),
        ("0xabcdQ=", base64.b64decode("0xabcdQ=")),  # it ends as base64 does
        ("00112233445566778899aabbccddee", bytes.fromhex("00112233445566778899aabbccddee")),
        ("base64:" + base64.b64encode(bytes(range(15))).decode(), bytes(range(15))),
        ("AA==", b"\0"),
    ],
)
def test_a_spelling(text: str, octets: bytes) -> None:
    assert server_id_octets(text) == octets


@given(st.binary(min_size=1, max_size=15))
def test_every_server_id_has_every_spelling_and_none_is_anothers(octets: bytes) -> None:
    encoded = base64.b64encode(octets).decode()
    for text in (octets.hex(), octets.hex().upper(), f"0x{octets.hex()}", f"base64:{encoded}"):
        assert server_id_octets(text) == octets
    if encoded.endswith("="):
        assert server_id_octets(encoded) == octets
    else:  # whether it looks like hex is chance: it is never taken for base64
        try:
            assert server_id_octets(encoded) == bytes.fromhex(encoded)
        except ValueError:
            assert not all(digit in "0123456789abcdefABCDEF" for digit in encoded) or len(encoded) % 2


@given(st.binary(min_size=8, max_size=8))
def test_what_the_controller_tells_a_pod_is_never_taken_for_hex(octets: bytes) -> None:
    told = base64.b64encode(octets).decode()
    assert (len(told), told[-1]) == (12, "=")
    assert server_id_octets(told) == octets


@pytest.mark.parametrize(
    "text",
    [
        *("", "0x", "abc", "0xabc", "zz", "0x" + "00" * 16, "LWV1oW+gjqQ", "LWV1oW-gjqQ=", "LWV1oW+gjqR=", "=", "===="),
        *("base64:", "base64:abc", "LWV1 oW+gjqQ=", "LWV1oW+gjqQ=\n", "base64:" + "A" * 24, "A" * 22 + "=="),
    ],
)
def test_no_spelling(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whoever calls it says what was expected
        server_id_octets(text)


def test_a_mistake_says_what_is_expected_and_what_is_wrong(tmp_path: Path) -> None:
    path = examples(tmp_path) / "nlb.yaml"
    text = path.read_text()
    for wrong, message in (
        ('"LWV1oW+gjqU"', "expected 1 to 15 octets, two hex digits each, in quotes; or base64 that ends in ="),
        ('"LWV1oW+gjqV="', "LWV1oW+gjqV=: not what base64 makes of any octets"),
        ('"0x2d6575a16fa08ea4"', "2d6575a16fa08ea4 of config ID 0: services[0].backends[0].server-ids.0[0] has it"),
        ('"LWV1oW+gjqQ="', "2d6575a16fa08ea4 of config ID 0: services[0].backends[0].server-ids.0[0] has it"),
        ('"LWV1oW8="', "2d6575a16f: 5 octets"),
        ("0x2d6575a16fa08ea5", "YAML takes this for an integer; put it in quotes"),
    ):
        path.write_text(text.replace('"LWV1oW+gjqU="', wrong))
        with pytest.raises(ConfigErrors) as caught:
            load_config(path)
        (told,) = map(str, caught.value.exceptions)
        assert told.startswith("services[0].backends[1].server-ids.0[0]: ")
        assert message in told


# The example


def test_the_example_is_the_clouds_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = examples(tmp_path) / "nlb.yaml"
    (section,) = load_config(path).services
    assert [slot.config for slot in section.service.cid_slots] == [CONFIG]
    assert (CONFIG.cid_length, CONFIG.algorithm) == (16, "plaintext")
    assert section.service.unknown_server is UnknownServer.DROP
    assert [backend.server_ids[ConfigId(0)] for backend in section.service.backends] == [{A}, {B}]

    assert main(["check", str(path)]) == 0
    assert "server IDs 0: 2d6575a16fa08ea5" in capsys.readouterr().out
    for spelling in ("2d6575a16fa08ea5", "0x2d6575a16fa08ea5", "LWV1oW+gjqU="):
        assert main(["server-config", "b", "-c", str(path), "--server-id", spelling]) == 0
        assert '\nserver-id: "2d6575a16fa08ea5"\n' in capsys.readouterr().out
    assert main(["server-config", "b", "-c", str(path), "--server-id", "LWV1oW+gjqQ="]) == 2
    assert "expected a server ID of b under config ID 0" in capsys.readouterr().err


def test_what_the_example_does_with_packets(tmp_path: Path) -> None:
    table = RoutingTable.build(load_config(examples(tmp_path) / "nlb.yaml").services[0].service)
    router = Router(table, random=deterministic_random())
    for form in (short, long):
        for place, server_id in enumerate((A, B)):
            assert router.route(form(cid(server_id)), flow(), 0.0) == Route(Verdict.CID, place, ConfigId(0))
    dropped = Route(Verdict.UNKNOWN_SERVER, unroutable=Unroutable.UNKNOWN_SERVER)
    assert router.route(short(cid(NOBODY)), flow(), 0.0) == dropped
    # A client chose it: it may look like anything.
    assert router.route(long(cid(NOBODY)), flow(9), 0.0).verdict is Verdict.FALLBACK


@pytest.mark.parametrize("said", ["LWV1oW+gjqQ=", "0x2d6575a16fa08ea4", "2d6575a16fa08ea4"])
def test_a_servers_file_takes_what_the_controller_says(tmp_path: Path, said: str) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(server_file("a", said))
    loaded = load_server_config(path)
    assert (loaded.server_id, loaded.cid_config) == (A, CONFIG)


def server_file(name: str, server_id: str) -> str:
    """As docs/resets.md has a pod write it."""
    page = (Path(__file__).parent.parent / "docs" / "resets.md").read_text()
    text = page.partition("cat > server.yaml <<END\n")[2].partition("END\n")[0]
    return text.replace("$HOSTNAME", name).replace("$AWS_LBC_QUIC_SERVER_ID", server_id)


# Real servers, a real client, `quiclb run`


def test_real_servers_with_ids_from_a_cloud_are_routable_and_unknown_ids_are_dropped_and_counted(
    tmp_path: Path,
) -> None:
    asyncio.run(_play(tmp_path))


async def _play(directory: Path) -> None:
    front, metrics = (Address("127.0.0.1", port) for port in free_ports(2))
    said = {"a": "LWV1oW+gjqQ=", "b": "0x2d6575a16fa08ea5"}
    servers = {}
    for name, server_id in said.items():
        file = directory / f"{name}.yaml"
        file.write_text(server_file(name, server_id))
        command = [sys.executable, "-m", "backend", "--listen", "127.0.0.1:0", "--server-config", str(file)]
        servers[name] = Child(name, command, directory / f"{name}.log")
    lb = Child("balancer", [sys.executable, "-m", "lb", "run", "-c", str(directory / "nlb.yaml")], directory / "lb.log")
    try:
        await asyncio.gather(*(server.start() for server in servers.values()))
        listens = {name: (await server.is_ready())[0] for name, server in servers.items()}
        text = (examples(directory) / "nlb.yaml").read_text()
        for old, new in (
            ('"192.0.2.1:443", "[2001:db8::1]:443"', f'"{front}"'),
            ("10.0.0.11:443", str(listens["a"])),
            ("10.0.0.12:443", str(listens["b"])),
            ("services:", f'metrics: "{metrics}"\nruntime-directory: run\nlog: {{format: json}}\nservices:'),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        (directory / "nlb.yaml").write_text(text)
        (directory / "run").mkdir(mode=0o700)
        since = time.time()
        await lb.start()
        await lb.logged("started", since, within=START_TIMEOUT)
        await _look(front, metrics)
    finally:
        await asyncio.gather(lb.stop(), *(server.stop() for server in servers.values()))


async def _look(front: Address, metrics: Address) -> None:
    met: dict[str, set[bytes]] = {}
    while len(met) < 2:
        async with await AioquicClient.connect(front) as client:
            told = await client.whoami()
            used = client._quic._peer_cid.cid
            assert len(used) == CONFIG.cid_length
            decoded = Codec(CONFIG).decode(used)
            assert decoded is not None
            assert (told["name"], decoded.server_id) in (("a", A), ("b", B))
            met.setdefault(told["name"], set()).add(used)
            client._quic.change_connection_id()  # and goes on by another of the server's
            assert (await client.whoami())["name"] == told["name"]

    before = await _datagrams(metrics)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.connect(tuple(front))
        for _ in range(10):
            stranger.send(short(cid(NOBODY)))
    async with asyncio.timeout(PATIENCE):
        while (now := await _datagrams(metrics)).get("unknown_server", 0) < 10:  # noqa: ASYNC110 - of a process, which sets no event
            await asyncio.sleep(0.05)
    assert before.get("unknown_server", 0) == 0
    assert now["unknown_server"] == 10
    assert now["fallback"] == before["fallback"]


async def _datagrams(metrics: Address) -> dict[str, float]:
    """The balancer's datagrams, by verdict."""

    def scrape() -> str:
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=PATIENCE) as page:
            return str(page.read().decode())

    lines = [
        line for line in (await asyncio.to_thread(scrape)).splitlines() if line.startswith("quiclb_datagrams_total{")
    ]
    return {line.partition('verdict="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}
