"""explain: against a file, against a running balancer, of a capture; it is the Router that is asked."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lb import cid_tool
from lb.address import Address
from lb.commands import explain as command
from lb.config import load_config
from lb.pcap import Datagram
from lb.router import Router, RouterLimits
from lb.routing import BackendState, FourTuple, RoutingTable
from tests.admin.fake import Running
from tests.builders import cid_of, deterministic_random, long, short
from tests.captures import ethernet, ip, pcap, pcapng, udp
from tests.commands.conftest import Quiclb
from tests.files import CID_KEY, OTHER_CID_KEY, write_keys
from tests.test_config import GOOD

CLIENTS = [("198.51.100.7", 50000), ("198.51.100.8", 50001), ("2001:db8::7", 50000)]
WEB, WEB6 = ("192.0.2.1", 443), ("2001:db8::1", 443)


class Stdin(io.TextIOWrapper):
    """Standard input with something in it."""

    def __init__(self, octets: bytes) -> None:
        super().__init__(io.BytesIO(octets))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    (tmp_path / "quiclb.yaml").write_text(GOOD)
    return tmp_path / "quiclb.yaml"


def web_cid(config_id: int = 0, server_id: str = "3fa91c02", nonce: str = "11" * 12, key: str = CID_KEY) -> str:
    fields = {"config_id": config_id, "key": key, "server_id": server_id, "nonce": nonce}
    cid: str = cid_tool.encode(fields)["cid"]
    return cid


def a_capture() -> bytes:
    """What a balancer sees: two clients' handshakes and what follows, one that moves, answers, and strangers."""
    cid = bytes.fromhex(web_cid())
    down = [
        udp(long(b"\xff" * 8, b"c0"), CLIENTS[0], WEB),
        udp(long(b"\xff" * 9, b"c1"), CLIENTS[1], WEB),
        udp(short(cid), CLIENTS[0], WEB),
        udp(short(b"\x51" * 18), CLIENTS[0], WEB),  # nobody's; its addresses are known
        udp(short(cid), CLIENTS[2], WEB6),  # that client has moved to IPv6
        udp(b"", CLIENTS[1], WEB),
    ]
    others = [
        udp(bytes(100), WEB, CLIENTS[0]),
        ip(6, bytes(20), CLIENTS[0][0], WEB[0]),
        udp(b"dns", CLIENTS[0], ("8.8.8.8", 53)),
    ]
    return pcap([ethernet(packet) for packet in (*down, *others)])


def test_a_cid_against_a_configuration(quiclb: Quiclb, config: Path) -> None:
    cid = web_cid()
    status, out, err = quiclb("explain", "-c", config, "--service", "web", cid)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"cid: {cid}",
        "config-id: 0",
        "",
        "service: web",
        "algorithm: single-pass",
        "cid-length: 17",
        f"cid: {cid}",
        "server-id: 3fa91c02",
        f"nonce: {'11' * 12}",
        "backend: a",
        "address: 10.0.0.11:443",
        "state: active",
        "verdict: cid",
        "why: its CID carries the server ID of a backend that is ACTIVE",
    ]


def test_a_file_that_drains_is_held_against(quiclb: Quiclb, config: Path) -> None:
    cid = web_cid(3, "81d5e4", "22" * 6, OTHER_CID_KEY)
    (service,) = json.loads(quiclb("explain", "-c", config, "--service", "web", "--json", cid)[1])["services"]
    assert (service["backend"], service["state"], service["algorithm"]) == ("b", "draining", "four-pass")


def test_a_datagram_and_a_cid_are_told_apart_by_their_lengths(quiclb: Quiclb, config: Path) -> None:
    def asked(*argv: str) -> set[str]:
        return set(json.loads(quiclb("explain", "-c", config, "--json", *argv)[1]))

    assert asked("41" + web_cid() + "00" * 4) == {"octets", "header", "config-id", "services"}
    assert asked(web_cid()) == {"cid", "config-id", "services"}
    assert asked("--datagram", "41" + web_cid()) == {"octets", "header", "config-id", "services"}
    assert asked(" 0x" + web_cid()[:2] + ":" + web_cid()[2:] + "\n") == {"cid", "config-id", "services"}


def test_the_clients_address_decides_where_the_cid_does_not(quiclb: Quiclb, config: Path) -> None:
    initial = long(b"\xff" * 8).hex()
    at = ["explain", "-c", config, "--json"]
    (service,) = json.loads(quiclb(*at, "--service", "web", "--client", "198.51.100.7:50000", initial)[1])["services"]
    table = RoutingTable.build(load_config(config).services[0].service, {})
    assert (service["verdict"], service["backend"]) == ("fallback", "a")
    assert table.fallback(FourTuple("198.51.100.7", 50000, *WEB)) is not None
    several = json.loads(quiclb(*at, "--client", "198.51.100.7:50000", "--local", "192.0.2.1:443", initial)[1])
    assert [one["service"] for one in several["services"]] == ["web"]


def test_questions_by_lines(quiclb: Quiclb, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"cid": web_cid(), "service": "web"}, {"datagram": "80"}, {"cid": "zz"}, {}, {"cid": "00", "nonsense": 1}]
    monkeypatch.setattr(sys, "stdin", Stdin("\n".join(map(json.dumps, lines)).encode()))
    status, out, _ = quiclb("explain", "-c", config)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert answers[0]["services"][0]["backend"] == "a"
    assert {service["verdict"] for service in answers[1]["services"]} == {"malformed"}
    assert answers[2:] == [
        {"error": "cid: expected hex digits, two for each octet"},
        {"error": "expected one of cid, datagram and datagrams"},
        {"error": "nonsense: unknown field, or one of another question"},
    ]


def test_a_running_balancer_is_asked_about_what_it_is_now(quiclb: Quiclb, balancer: Running) -> None:
    """The same question before and after a fence."""
    (table,) = [t for name, t in balancer.balancer.tables.items() if name == "video"]
    (server_id,) = table.backends[1].server_ids[table.service.cid_slots[0].config.config_id]
    fields = {
        "config_id": 3,
        "key": table.service.cid_slots[0].config.key.hex() if table.service.cid_slots[0].config.key else None,
        "server_id": server_id.hex(),
        "nonce": "22" * 12,
    }
    cid = cid_tool.encode(fields)["cid"]

    def asked() -> dict[str, Any]:
        status, out, err = quiclb("explain", "--service", "video", "--json", cid)
        assert (status, err) == (0, "")
        (service,) = json.loads(out)["services"]
        assert isinstance(service, dict)
        return service

    assert [asked()[key] for key in ("backend", "state", "verdict", "server-id")] == [
        "b1", "active", "cid", server_id.hex(),
    ]  # fmt: skip
    quiclb("fence", "video/b1")
    assert [asked()[key] for key in ("issued-by", "verdict")] == ["b1", "reset"]


def test_a_capture_against_a_configuration(quiclb: Quiclb, config: Path, tmp_path: Path) -> None:
    (tmp_path / "some.pcap").write_bytes(a_capture())
    status, out, err = quiclb("explain", "-c", config, "--json", tmp_path / "some.pcap")
    *packets, sums = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [(p["packet"], p["flow"], p["services"][0]["verdict"]) for p in packets] == [
        (1, 1, "fallback"), (2, 2, "fallback"), (3, 1, "cid"), (4, 1, "table_flow"), (5, 3, "cid"), (6, 2, "empty"),
    ]  # fmt: skip
    assert [p["services"][0].get("backend") for p in packets] == ["a", "a", "a", "a", "a", None]
    assert packets[2]["services"][0]["server-id"] == "3fa91c02"
    assert sums == {
        "verdicts": {"fallback": 2, "cid": 2, "table_flow": 1, "empty": 1},
        "flows": 3,
        "skipped": {"not for a service": 2, "not UDP": 1},
    }


def test_a_captures_verdicts_are_the_routers(quiclb: Quiclb, config: Path, tmp_path: Path) -> None:
    """The same packets, given to a Router by hand."""
    (tmp_path / "some.pcap").write_bytes(a_capture())
    lines = quiclb("explain", "-c", config, "--json", tmp_path / "some.pcap")[1].splitlines()
    section = load_config(config).services[0]
    table = RoutingTable.build(section.service, dict.fromkeys(section.draining, BackendState.DRAINING))
    router = Router(table, random=deterministic_random(), limits=RouterLimits(new_flows_rate=0))
    cid = bytes.fromhex(web_cid())
    by_hand = [
        (long(b"\xff" * 8, b"c0"), CLIENTS[0], WEB), (long(b"\xff" * 9, b"c1"), CLIENTS[1], WEB),
        (short(cid), CLIENTS[0], WEB), (short(b"\x51" * 18), CLIENTS[0], WEB), (short(cid), CLIENTS[2], WEB6),
        (b"", CLIENTS[1], WEB),
    ]  # fmt: skip
    for line, (packet, client, local) in zip(lines, by_hand, strict=False):
        route = router.route(packet, FourTuple(*client, *local), 0.0)
        (service,) = json.loads(line)["services"]
        assert service["verdict"] == route.verdict.name.lower()
        assert service.get("backend") == (None if route.backend is None else table.backends[route.backend].name)


def test_no_address_of_a_client_stands_beside_a_server_id_unless_asked_for(
    quiclb: Quiclb, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "some.pcap").write_bytes(a_capture())
    for how in ([], ["--json"], ["--summary"]):
        out = quiclb("explain", "-c", config, *how, tmp_path / "some.pcap")[1]
        assert not any(address in out for address, _ in CLIENTS)
    out = quiclb("explain", "-c", config, "--addresses", tmp_path / "some.pcap")[1]
    assert "3 flow 1 198.51.100.7:50000 > 192.0.2.1:443 short header, 60 octets, " in out
    assert "server ID 3fa91c02" in out


def test_a_capture_as_text_and_its_sums(quiclb: Quiclb, config: Path, tmp_path: Path) -> None:
    (tmp_path / "some.pcap").write_bytes(a_capture())
    cid = web_cid()
    out = quiclb("explain", "-c", config, tmp_path / "some.pcap")[1].splitlines()
    assert out[2] == (
        f"3 flow 1 short header, 60 octets, CID {cid}, config ID 0 single-pass, server ID 3fa91c02 "
        f"nonce {'11' * 12}: web cid -> a (active): its CID carries the server ID of a backend that is ACTIVE"
    )
    sums = ["3 flows: fallback 2, cid 2, table_flow 1, empty 1", "skipped: not for a service 2, not UDP 1"]
    assert out[-2:] == sums
    assert quiclb("explain", "-c", config, "--summary", tmp_path / "some.pcap")[1].splitlines() == sums


def test_a_capture_from_elsewhere_is_looked_at_by_its_own_address(quiclb: Quiclb, config: Path, tmp_path: Path) -> None:
    packets = [udp(short(bytes.fromhex(web_cid())), CLIENTS[0], ("10.9.9.9", 4433))]
    (tmp_path / "some.pcapng").write_bytes(pcapng([(0, ethernet(packet)) for packet in packets]))
    at = ["explain", "-c", config, "--summary", tmp_path / "some.pcapng"]
    assert quiclb(*at)[1] == "0 flows: nothing\nskipped: not for a service 1\n"
    assert "header, " in (line := quiclb(*at[:-2], "--local", "10.9.9.9:4433", at[-1])[1])
    assert "no service listens there; --service says which to ask\n" in line
    assert quiclb(*at, "--local", "10.9.9.9:4433", "--service", "web")[1] == "1 flow: cid 1\nskipped: nothing\n"


def test_a_capture_by_a_pipe(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lb", "explain", "-c", config, "--summary", "-"],
        input=a_capture(), capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"3 flows: fallback 2, cid 2, ")


def test_a_capture_against_a_running_balancer_in_portions(
    quiclb: Quiclb, balancer: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = balancer.balancer.tables["web"]
    config = table.service.cid_slots[0].config
    (server_id,) = table.backends[0].server_ids[config.config_id]
    assert config.key
    cid = cid_tool.encode(
        {"config_id": 0, "key": config.key.hex(), "server_id": server_id.hex(), "nonce": "33" * config.nonce_length}
    )["cid"]
    packets = [udp(short(bytes.fromhex(cid)), (f"198.51.100.{i % 200}", 1000 + i), WEB) for i in range(600)]
    packets += [udp(long(b"\xff" * 8, b"c"), CLIENTS[0], WEB)] * 3
    (tmp_path / "some.pcap").write_bytes(pcap([ethernet(packet) for packet in packets]))
    status, out, err = quiclb("explain", "--summary", tmp_path / "some.pcap")
    assert (status, err) == (0, "")
    assert out == "601 flows: cid 600, table_scid 2, fallback 1\nskipped: nothing\n"
    monkeypatch.setattr(command, "MAX_QUESTION", 500)  # octets: two datagrams
    (tmp_path / "less.pcap").write_bytes(pcap([ethernet(packet) for packet in packets[:5]]))
    lines = quiclb("explain", "--json", tmp_path / "less.pcap")[1].splitlines()
    assert [json.loads(line)["packet"] for line in lines[:-1]] == [1, 2, 3, 4, 5]
    assert {json.loads(line)["services"][0]["backend"] for line in lines[:-1]} == {"b0"}


def test_flows_are_numbered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MAX_FLOWS", 2)
    flows = command._Flows()

    def number(client: int) -> int:
        return flows.number(Datagram(1, 0.0, Address("192.0.2.9", client), Address(*WEB), b"", 0))

    assert [number(client) for client in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 4]
    assert flows.seen == 4


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["zz"], 2, "zz: neither hex digits, two for each octet, nor a file"),
        ([""], 2, "neither hex digits, two for each octet, nor a file"),
        (["z" * 100_000], 2, f"quiclb: {'z' * 200}: neither hex digits"),
        (["07c"], 2, "07c: neither hex digits, two for each octet, nor a file"),
        (["--service", "w", "00"], 2, "--service w: expected one of web, "),
        (["--client", "here", "00"], 2, "argument --client: 'here': expected ADDRESS:PORT"),
        (["--local", "192.0.2.1", "00"], 2, "argument --local: '192.0.2.1': expected ADDRESS:PORT"),
        (["/dev/null"], 2, "/dev/null: neither a pcap nor a pcapng file, and not hex digits, two for each octet"),
        (["/"], 1, "/: Is a directory"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(
    quiclb: Quiclb, config: Path, argv: list[str], status: int, message: str
) -> None:
    found, out, err = quiclb("explain", "-c", config, *argv)
    assert (found, out) == (status, "")
    assert message in err


def test_mistakes_in_the_configuration_are_told(quiclb: Quiclb, config: Path) -> None:
    config.write_text(GOOD.replace("workers: 2", "workers: 0"))
    assert quiclb("explain", "-c", config, "00") == (2, "", "workers: 0: expected an integer, 1 to 64\n")


def test_without_a_file_a_balancer_is_looked_for(quiclb: Quiclb, tmp_path: Path) -> None:
    status, _, err = quiclb("explain", cid_of(0).hex())
    assert (status, err) == (1, f"quiclb: unix:{tmp_path}/nowhere/admin.sock: no balancer is there\n")
