"""The command line, mostly called as a function, and as a process where that is the point."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb import cid_tool
from lb.cid import ConfigId, ServerId
from lb.cli import main
from lb.reset import server_reset_key
from tests.files import CID_KEY, RESET_KEY, examples, write_key, write_keys
from tests.test_config import GOOD, XDP, edited

VECTORS = json.loads((Path(__file__).parent / "data" / "extra-vectors.json").read_text())["vectors"]
PLAINTEXT = {"server_id_length": 3, "nonce_length": 4, "cid": "07c4605e4504cc4f"}
DECODED = {"config_id": 0, "server_id_length": 3, "nonce_length": 4, "server_id": "c4605e", "nonce": "4504cc4f"}
COMMANDS = [
    [], ["run"], ["check"], ["schema"], ["keygen"], ["keygen", "cid"], ["keygen", "reset"], ["keygen", "server-reset"],
    ["keygen", "server-id"], ["cid"], ["cid", "encode"], ["cid", "decode"], ["explain"],
    ["xdp"], ["xdp", "status"], ["xdp", "sample"], ["xdp", "detach"], ["decap"],
    ["status"], ["top"], ["drain"], ["undrain"], ["weight"], ["fence"], ["unfence"], ["reload"], ["upgrade"],
    ["rotation"], ["rotation", "status"], ["rotation", "prepare"], ["rotation", "activate"], ["rotation", "retire"],
    ["server-config"],
    ["completion"],
]  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    (tmp_path / "quiclb.yaml").write_text(GOOD)
    return tmp_path


class Stdin(io.TextIOWrapper):
    """Standard input with something in it."""

    def __init__(self, octets: bytes) -> None:
        super().__init__(io.BytesIO(octets))


def quiclb(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    capsys.readouterr()
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as done:
        status = int(str(done.code))
    out, err = capsys.readouterr()
    return status, out, err


def process(*argv: object, **how: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lb", *map(str, argv)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_there_for_every_command(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    status, out, err = quiclb(capsys, *command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: quiclb{' ' if command else ''}{' '.join(command)} ")


@pytest.mark.parametrize("command", [command[0] for command in COMMANDS if len(command) == 1])
def test_help_has_examples_and_exit_statuses(capsys: pytest.CaptureFixture[str], command: str) -> None:
    out = quiclb(capsys, command, "--help")[1]
    assert re.search(rf"examples:\n(  .*\n)*  (.* && )?quiclb {command}\b", out)
    assert "Exit status: 0" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = quiclb(capsys, "--version")
    assert status == 0
    assert re.fullmatch(r"quiclb \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(
    "argv",
    [
        [], ["frobnicate"], ["check"], ["run"], ["keygen", "server-id"], ["xdp"], ["decap"],
        ["drain"], ["weight", "a"], ["rotation"], ["completion", "fish"], ["server-config", "a"],
        ["xdp", "detach"], ["xdp", "sample", "--interface", "lo"],
        ["xdp", "sample", "--interface", "lo", "--every", "0"], ["xdp", "sample", "--interface", "lo", "--every", "1s"],
        ["xdp", "sample", "--interface", "lo", "--every", "1", "--verdict", "lost"],
    ],
)  # fmt: skip
def test_wrong_arguments_are_status_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    status, out, err = quiclb(capsys, *argv)
    assert (status, out) == (2, "")
    assert err


# check


@pytest.mark.parametrize("name", ["minimal.yaml", "quiclb.yaml", "two-services.yaml", "xdp.yaml", "nlb.yaml"])
def test_check_says_what_the_examples_mean(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    path = examples(tmp_path) / name
    status, out, err = quiclb(capsys, "check", path)
    assert (status, err) == (0, "")
    assert out.startswith(f"{path}: ok\nengine {'xdp on eth0' if name == 'xdp.yaml' else 'udp'}, ")
    assert quiclb(capsys, "check", "-c", path) == (0, out, "")
    keys = [file.read_text().strip() for file in (tmp_path / "secrets").iterdir()]
    assert len(keys) == 5
    assert not [key for key in keys if key[:16] in out]


def test_check_shows_everything_that_matters(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    lines = quiclb(capsys, "check", directory / "quiclb.yaml")[1].splitlines()
    out = [line for line in lines if not line.startswith("admin: ")]
    assert len(lines) == len(out) + 1
    assert out[1:6] == [
        "engine udp, workers 2, runtime directory by default, metrics at 127.0.0.1:9100",
        "log: format json, level warning, flows 0%",
        "limits: flows 500, idle-timeout 90s, new-flow-timeout 2500ms, table-entries 65536, new-flows-rate 10000, "
        "sockets 20, socket-buffer 64KiB",
        "service web",
        "  listen 192.0.2.1:443, [2001:db8::1]:443",
    ]
    assert [re.sub("[0-9a-f]{8}(?=, reset|$)", "*", line) for line in out[6:9]] == [
        "  seed given, unknown-server drop",
        "  config ID 0: active, single-pass, 1 + 4 server ID + 12 nonce = 17 octets, the first says so, "
        "1 AES block per packet, key *, reset key *",
        "  config ID 3: retiring, four-pass, 1 + 3 server ID + 6 nonce + 2 appended = 12 octets, "
        "3 AES blocks per packet (1 if the lengths added up to 16), key *, reset key none",
    ]
    assert out[9:11] == [
        "  backend a 10.0.0.11:443, weight 1, 100.0% of new connections, server IDs 0: 3fa91c02; 3: 3fa91c",
        "  backend b [fd00::12]:443, weight 3, draining, 0.0% of new connections, "
        "server IDs 0: 81d5e47a, aaaaaaaa; 3: 81d5e4",
    ]
    assert [line.split(": ")[1] for line in out if line.startswith("note: ")] == [
        "services[0].cid-configs[1]",
        "services[1]",
        "services[1].cid-configs[0]",
        "services[1].cid-configs[0]",
    ]


def test_fingerprints_tell_keys_apart_and_nothing_else(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    def prints() -> list[str | None]:
        described = json.loads(quiclb(capsys, "check", "--json", directory / "quiclb.yaml")[1])
        configs = [cid_config for service in described["services"] for cid_config in service["cid-configs"]]
        return [c[key] for c in configs for key in ("key-fingerprint", "reset-key-fingerprint")]

    before = prints()
    assert [p is None for p in before] == [False, False, False, True, True, True]
    write_key(directory / "secrets" / "cid-0.key", "3c" * 16)
    after = prints()
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True, True, True, True]
    assert all(re.fullmatch("[0-9a-f]{8}", p) for p in after if p)


def test_check_as_json_has_the_words_of_the_file(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    described = json.loads(quiclb(capsys, "check", "--json", directory / "quiclb.yaml")[1])
    assert set(described) == {
        "engine", "workers", "interface", "forward", "xdp", "runtime-directory", "admin", "metrics", "log", "limits",
        "services", "advice",
    }  # fmt: skip
    assert [described[name] for name in ("engine", "interface", "forward", "xdp")] == ["udp", None, None, None]
    assert described["services"][1]["backends"] == [
        {
            "name": "x",
            "address": "10.0.1.21:443",
            "server-ids": {"0": ["b1946ac92492d234"]},
            "weight": 1,
            "drain": False,
            "ring-share": 1.0,
        }
    ]


def test_check_shows_what_the_xdp_engine_is_told(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    path = directory / "xdp.yaml"
    path.write_text(XDP)
    out = quiclb(capsys, "check", path)[1].splitlines()
    assert out[1:3] == [
        "engine xdp on eth0.100, forward nat, metrics not served",
        f"xdp: attach native, pin-directory {directory}/pins, source 10.0.0.2 and fd00::2, nat-ports 2048-4095, "
        "constant-time true",
    ]
    described = json.loads(quiclb(capsys, "check", "--json", path)[1])
    assert (described["engine"], described["interface"], described["forward"]) == ("xdp", "eth0.100", "nat")
    assert described["xdp"] == {
        "attach": "native",
        "pin-directory": f"{directory}/pins",
        "source": ["10.0.0.2", "fd00::2"],
        "nat-ports": "2048-4095",
        "constant-time": True,
    }


@pytest.mark.parametrize(
    ("old", "new", "path", "message"),
    [
        ("2048-4095", "2048-40000", "xdp.nat-ports", "Linux gives its own sockets ports from 32768"),
        ("forward: nat", "forward: l2", "xdp.source", "forward: l2 has no use for it"),
        ("forward: nat", "forward: nat\nlimits: {sockets: 7}", "limits.sockets", "engine: xdp has no use for it"),
    ],
)
def test_what_may_be_regretted_with_the_xdp_engine_is_advised_against(
    capsys: pytest.CaptureFixture[str], directory: Path, old: str, new: str, path: str, message: str
) -> None:
    def advice(text: str) -> list[tuple[str, str]]:
        (directory / "xdp.yaml").write_text(text)
        described = json.loads(quiclb(capsys, "check", "--json", directory / "xdp.yaml")[1])
        return [(note["path"], note["message"]) for note in described["advice"]]

    (new_note,) = set(advice(edited(old, new, XDP))) - set(advice(XDP))
    assert new_note[0] == path
    assert new_note[1].startswith(message)


def test_check_asks_the_machine_only_if_told_to(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    path = directory / "xdp.yaml"
    path.write_text(edited("eth0.100", "no-such-eth77", XDP))
    assert quiclb(capsys, "check", path)[::2] == (0, "")
    status, out, err = quiclb(capsys, "check", "--engine", path)
    assert status == 1
    assert out.startswith(f"{path}: ok\n")
    assert "this machine: no such network interface: no-such-eth77\n" in err
    assert "this machine: ok" not in out

    status, out, _ = quiclb(capsys, "check", "--engine", "--json", path)
    assert status == 1
    assert "no such network interface: no-such-eth77" in json.loads(out)["machine"]["lacks"]


def test_sockets_need_nothing_that_a_machine_may_lack(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    status, out, err = quiclb(capsys, "check", "--engine", directory / "quiclb.yaml")
    assert (status, err) == (0, "")
    assert "\nthis machine: ok\n" in out


def test_check_says_every_mistake_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    path = directory / "quiclb.yaml"
    path.write_text(GOOD.replace("workers: 2", "workers: 0").replace("weight: 3", "wieght: 3"))
    assert quiclb(capsys, "check", path) == (
        2,
        "",
        "workers: 0: expected an integer, 1 to 64\nservices[0].backends[1].wieght: unknown key; did you mean weight?\n",
    )


def test_check_of_no_file_is_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert quiclb(capsys, "check", path) == (2, "", f"{path}: cannot be read: No such file or directory\n")


def test_one_octet_server_ids_are_advised_against(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    path = directory / "one.yaml"
    path.write_text(
        "services: [{name: s, seed: x, listen: ['192.0.2.1:443'], cid-configs: [{config-id: 0, server-id-length: 1, "
        "nonce-length: 15, key-file: secrets/cid-0.key, reset-key-file: secrets/reset-0.key}], "
        "backends: [{name: a, address: '10.0.0.1:443', server-ids: {0: ['a1']}}]}]"
    )
    notes = [line for line in quiclb(capsys, "check", path)[1].splitlines() if line.startswith("note")]
    assert notes == [
        "note: services[0].cid-configs[0]: "
        "server IDs of 1 octet: many CIDs that nobody made will seem to be some server's"
    ]


# keygen


@pytest.mark.parametrize(("kind", "digits"), [("cid", 32), ("reset", 64)])
def test_keygen_writes_a_new_key_for_its_owner_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, digits: int
) -> None:
    path = tmp_path / "new.key"
    assert quiclb(capsys, "keygen", kind, "-o", path) == (0, "", "")
    first = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(f"[0-9a-f]{{{digits}}}\n", first)

    status, out, err = quiclb(capsys, "keygen", kind, "-o", path)
    assert (status, out, err) == (1, "", f"quiclb: {path}: File exists\n")
    assert path.read_text() == first

    printed = quiclb(capsys, "keygen", kind)[1]
    assert re.fullmatch(f"[0-9a-f]{{{digits}}}\n", printed)
    assert printed != first


def test_keygen_does_not_write_through_a_link(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert quiclb(capsys, "keygen", "cid", "-o", tmp_path / "link")[0] == 1
    assert not (tmp_path / "target").exists()


def test_keygen_server_reset_is_that_servers_key(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    argv = ["--master", directory / "secrets" / "reset-0.key", "--config-id", 3, "--server-id", "3fa91c02"]
    key = server_reset_key(bytes.fromhex(RESET_KEY), ConfigId(3), ServerId(bytes.fromhex("3fa91c02")))
    assert quiclb(capsys, "keygen", "server-reset", *argv) == (0, key.hex() + "\n", "")


def test_keygen_server_reset_wants_a_master_key(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    path = directory / "secrets" / "cid-0.key"
    status, out, err = quiclb(
        capsys, "keygen", "server-reset", "--master", path, "--config-id", 0, "--server-id", "3fa91c02"
    )
    assert (status, out) == (2, "")
    assert err == f"quiclb: {path}: holds 32 characters: expected 64 hex digits (32 octets)\n"


@pytest.mark.parametrize(("length", "count"), [(1, 256), (4, 1), (15, 100)])
def test_keygen_server_ids_are_different(capsys: pytest.CaptureFixture[str], length: int, count: int) -> None:
    status, out, _ = quiclb(capsys, "keygen", "server-id", "--length", length, "--count", count)
    ids = out.split()
    assert status == 0
    assert len(ids) == len(set(ids)) == count
    assert {len(bytes.fromhex(server_id)) for server_id in ids} == {length}


@pytest.mark.parametrize(("length", "count"), [(0, 1), (16, 1), (1, 257), (4, 0), (4, -1), (15, 1 << 20)])
def test_keygen_server_ids_that_there_cannot_be(capsys: pytest.CaptureFixture[str], length: int, count: int) -> None:
    status, out, err = quiclb(capsys, "keygen", "server-id", "--length", length, "--count", count)
    assert (status, out) == (2, "")
    assert "expected 1 to" in err


# cid


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_encode_and_decode_do_every_vector(vector: dict[str, Any]) -> None:
    known = {"config_id": vector["config_id"], "key": vector["key"]}
    lengths = {"server_id_length": vector["server_id_len"], "nonce_length": vector["nonce_len"]}
    parts = {"server_id": vector["server_id"], "nonce": vector["nonce"]}
    appended = {"appended": vector["appended"]} if vector.get("appended") else {}
    first = int(vector["cid"][:2], 16)
    how = {"encodes_length": vector["length_self_encoded"], "low_bits": first & 31}
    whole = {"config_id": vector["config_id"]} | lengths | parts | {"cid": vector["cid"]} | appended
    assert cid_tool.encode(known | parts | appended | how) == whole
    assert cid_tool.decode({"key": vector["key"], "cid": vector["cid"]} | lengths) == whole


@pytest.mark.parametrize("action", ["encode", "decode"])
def test_the_command_does_every_vector_in_one_conversation(action: str) -> None:
    """The draft's own, as repaired, and ours; each line with those fields alone that the answer needs."""
    data = Path(__file__).parent / "data" / "test-vectors.json"
    drafts = [vector["usable"] for vector in json.loads(data.read_text())["quic_lb_vectors"]]
    asked, expected = [], []
    for vector in [*drafts, *VECTORS]:
        key, cid = {"key": vector["key"]}, {"cid": vector["cid"]}
        lengths = {"server_id_length": vector["server_id_len"], "nonce_length": vector["nonce_len"]}
        parts = {"config_id": vector["config_id"], "server_id": vector["server_id"], "nonce": vector["nonce"]}
        appended = {"appended": vector["appended"]} if vector.get("appended") else {}
        how = {"encodes_length": vector["length_self_encoded"], "low_bits": int(vector["cid"][:2], 16) & 31}
        asked.append(key | parts | appended | how if action == "encode" else key | lengths | cid)
        expected.append(parts | lengths | cid | appended)
    with process("cid", action, "--json-lines") as talk:
        out, err = talk.communicate("\n".join(map(json.dumps, asked)).encode(), timeout=60)

    assert (talk.returncode, err) == (0, b"")
    assert [json.loads(line) for line in out.splitlines()] == expected


def test_encode_and_decode_by_arguments(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    keyed = ["--config-id", 2, "--key-file", directory / "secrets" / "cid-0.key"]
    status, out, err = quiclb(capsys, "cid", "encode", *keyed, "--server-id", "3fa91c02", "--nonce", "00" * 12)
    assert (status, err) == (0, "")
    cid = out.strip()
    decoding = ["cid", "decode", *keyed, "--server-id-length", 4, "--nonce-length", 12]
    fields = [
        ("config-id", "2"),
        ("server-id-length", "4"),
        ("nonce-length", "12"),
        ("server-id", "3fa91c02"),
        ("nonce", "00" * 12),
        ("cid", cid),
    ]
    text = "".join(f"{name}: {value}\n" for name, value in fields)
    assert quiclb(capsys, *decoding, cid) == (0, text, "")
    assert quiclb(capsys, *decoding, cid + "beef") == (0, text.replace(cid, cid + "beef") + "appended: beef\n", "")
    assert json.loads(quiclb(capsys, *decoding, "--json", cid)[1])["server_id"] == "3fa91c02"


def test_encode_can_leave_the_length_out(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["cid", "encode", "--config-id", 1, "--server-id", "c4605e", "--nonce", "4504cc4f"]
    assert quiclb(capsys, *argv)[1] == "27c4605e4504cc4f\n"
    assert quiclb(capsys, *argv, "--no-length", "--low-bits", 31)[1] == "3fc4605e4504cc4f\n"
    assert quiclb(capsys, *argv, "--appended", "beef")[1] == "29c4605e4504cc4fbeef\n"


ARGUMENT_MISTAKES = {
    "odd digits": (["decode", "07c"], "cid: expected hex digits, two for each octet"),
    "no digits": (["decode", "zz"], "cid: expected hex digits, two for each octet"),
    "spaces": (["decode", "07 c4"], "cid: expected hex digits"),
    "empty": (["decode", ""], "unroutable: it has no octets"),
    "config ID 7": (["decode", "e7c4605e4504cc4f"], "unroutable: config ID 7 marks CIDs of servers without"),
    "another config ID": (["decode", "27c4605e4504cc4f", "--config-id", "0"], "unroutable: its config ID is 1, not 0"),
    "too short": (["decode", "07c4605e4504cc"], "unroutable: 7 octets, too short: expected at least 8"),
    "no nonce": (["encode", "--config-id", "0", "--server-id", "c4605e"], "nonce: missing"),
    "no config ID": (["encode", "--server-id", "c4605e", "--nonce", "4504cc4f"], "config_id: missing"),
    "encode config ID 7": (
        ["encode", "--config-id", "7", "--server-id", "c4605e", "--nonce", "4504cc4f"],
        "config_id: expected an integer, 0 to 6",
    ),
    "sum over 19": (
        ["encode", "--config-id", "0", "--server-id", "00" * 10, "--nonce", "00" * 10],
        "server ID and nonce take 20 octets together: expected at most 19",
    ),
}


@pytest.mark.parametrize(("argv", "message"), ARGUMENT_MISTAKES.values(), ids=ARGUMENT_MISTAKES.keys())
def test_a_cid_that_cannot_be_answered_is_status_1(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    lengths = ["--server-id-length", "3", "--nonce-length", "4"] if argv[0] == "decode" else []
    status, out, err = quiclb(capsys, "cid", *argv, *lengths)
    assert (status, out) == (1, "")
    assert err.startswith(f"quiclb: {message}")


def test_a_key_file_that_cannot_be_used_is_status_2(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    status, out, err = quiclb(capsys, "cid", "decode", "07c4605e4504cc4f", "--key-file", directory / "none")
    assert (status, out, err) == (2, "", f"quiclb: {directory / 'none'}: cannot be read: No such file or directory\n")


LINES = {
    "decode": (PLAINTEXT, DECODED | {"cid": PLAINTEXT["cid"]}),
    "null key": (PLAINTEXT | {"key": None, "config_id": None, "server_id": None}, DECODED | {"cid": PLAINTEXT["cid"]}),
    "unknown field": (PLAINTEXT | {"note": "x"}, DECODED | {"cid": PLAINTEXT["cid"]}),
    "no object": ([1], {"error": "line: expected a JSON object"}),
    "bool for int": (PLAINTEXT | {"nonce_length": True}, {"error": "nonce_length: expected an integer, 4 to 18"}),
    "float for int": (PLAINTEXT | {"nonce_length": 4.0}, {"error": "nonce_length: expected an integer, 4 to 18"}),
    "text for int": (PLAINTEXT | {"nonce_length": "4"}, {"error": "nonce_length: expected an integer, 4 to 18"}),
    "int for octets": (PLAINTEXT | {"cid": 7}, {"error": "cid: expected hex digits"}),
    "list for octets": (PLAINTEXT | {"cid": ["07"]}, {"error": "cid: expected hex digits"}),
    "no CID": ({"server_id_length": 3, "nonce_length": 4}, {"error": "cid: missing"}),
    "no lengths": ({"cid": "07c4605e4504cc4f"}, {"error": "server_id_length: missing"}),
    "key of 15 octets": (PLAINTEXT | {"key": CID_KEY[2:]}, {"error": "key: 15 octets: expected 16"}),
    "key that is no hex": (PLAINTEXT | {"key": "g" * 32}, {"error": "key: expected hex digits, two for each octet"}),
    "sum over 19": (
        PLAINTEXT | {"server_id_length": 15, "nonce_length": 5},
        {"error": "server ID and nonce take 20 octets together: expected at most 19"},
    ),
}


@pytest.mark.parametrize(("line", "answer"), LINES.values(), ids=LINES.keys())
def test_a_json_line_gets_one_line(line: object, answer: object) -> None:
    out = io.StringIO()
    status = cid_tool.json_lines(cid_tool.decode, {}, io.BytesIO(json.dumps(line).encode() + b"\n"), out)
    assert [json.loads(text) for text in out.getvalue().splitlines()] == [answer]
    assert status == (1 if isinstance(answer, dict) and "error" in answer else 0)
    assert CID_KEY[2:] not in out.getvalue()


def test_bad_lines_do_not_end_the_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = json.dumps(PLAINTEXT).encode()
    bad = [
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b"x" * (1 << 20),
        b'{"cid": "' + b"0" * (cid_tool.MAX_LINE - 9),
        b"9" * 5000,
    ]
    lines = [good, b"", *bad, good]
    monkeypatch.setattr(sys, "stdin", Stdin(b"\n".join(lines)))
    status, out, err = quiclb(capsys, "cid", "decode")
    answers = [json.loads(line) for line in out.splitlines()]
    whole = DECODED | {"cid": PLAINTEXT["cid"]}
    assert (status, err) == (1, "")
    assert answers == [
        whole,
        {"error": "line: not JSON"},
        {"error": "line: not JSON"},
        {"error": "line: not JSON"},
        {"error": "line: longer than 262144 octets"},
        {"error": "line: not JSON"},
        {"error": "line: not JSON"},
        whole,
    ]


def test_arguments_fill_in_what_lines_leave_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """So a key need not stand in the lines. And it does not come back."""
    keyed = ["--key-file", directory / "secrets" / "cid-0.key"]
    line = json.dumps({"config_id": 4, "server_id": "3fa91c02", "nonce": "11" * 12}).encode()
    monkeypatch.setattr(sys, "stdin", Stdin(line))
    status, out, _ = quiclb(capsys, "cid", "encode", *keyed)
    assert status == 0
    assert cid_tool.decode(json.loads(out) | {"key": CID_KEY}) == json.loads(out)
    assert "key" not in json.loads(out)


def test_a_script_can_hold_a_conversation() -> None:
    """Each line is answered before the next one is asked."""
    with process("cid", "decode") as talk:
        assert talk.stdin
        assert talk.stdout
        for _ in range(3):
            talk.stdin.write(json.dumps(PLAINTEXT).encode() + b"\n")
            talk.stdin.flush()
            assert json.loads(talk.stdout.readline()) == DECODED | {"cid": PLAINTEXT["cid"]}
        talk.stdin.close()
        assert talk.wait(30) == 0


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=20).map(bytes.hex),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
NAMES = ["config_id", "key", "server_id_length", "nonce_length", "server_id", "nonce", "cid", "appended", "low_bits"]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*NAMES, "encodes_length"]), JSON), st.sampled_from(["encode", "decode"]))
def test_no_fields_raise_anything_but_value_errors(fields: dict[str, Any], what: str) -> None:
    out = io.StringIO()
    answer = {"encode": cid_tool.encode, "decode": cid_tool.decode}[what]
    cid_tool.json_lines(answer, {}, io.BytesIO(json.dumps(fields).encode()), out)
    assert len(out.getvalue().splitlines()) == 1


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_no_line_raises_anything(octets: bytes) -> None:
    out = io.StringIO()
    assert cid_tool.json_lines(cid_tool.decode, {}, io.BytesIO(octets), out) in (0, 1)


# The process.


def test_a_reader_that_goes_away_is_no_error(directory: Path) -> None:
    with process("cid", "decode") as talk:
        assert talk.stdin
        assert talk.stdout
        assert talk.stderr
        talk.stdout.close()
        talk.stdin.write(json.dumps(PLAINTEXT).encode() + b"\n")
        talk.stdin.close()
        assert talk.wait(30) == 141
        assert talk.stderr.read() == b""


def test_control_c_is_no_error() -> None:
    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may have them ignore it

    with process("cid", "decode", start_new_session=True, preexec_fn=heed) as talk:
        assert talk.stdin
        assert talk.stdout
        assert talk.stderr
        talk.stdin.write(json.dumps(PLAINTEXT).encode() + b"\n")
        talk.stdin.flush()
        assert talk.stdout.readline()  # it is up
        os.kill(talk.pid, signal.SIGINT)
        assert talk.wait(30) == 130
        assert talk.stderr.read() == b""


def test_run_refuses_a_bad_file_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("services: []\n")
    with process("run", "-c", tmp_path / "bad.yaml") as balancer:
        out, err = balancer.communicate(timeout=60)
    assert (balancer.returncode, out, err) == (2, b"", b"services: 0 elements: expected 1 to 256\n")
