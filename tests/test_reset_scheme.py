"""lb/reset_scheme.py: tokens of other people's servers, where their keys come from, and what the files say of them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lb.cid import ConfigId, ServerId
from lb.cli import main
from lb.config import load_config
from lb.errors import ConfigErrors
from lb.explain import explain
from lb.reset import reset_token, server_reset_key
from lb.reset_scheme import (
    MAX_KEY,
    MAX_SUFFIX,
    SECRET_LENGTHS,
    Arithmetic,
    Keys,
    ResetRule,
    Scheme,
    TokenKey,
    hmac_sha256,
    mvfst,
    picoquic,
)
from lb.router import Router, Verdict
from lb.routing import BackendState, RoutingTable
from lb.server_config import load_server_config
from tests.builders import RESET_KEY as MASTER
from tests.builders import cid_of, deterministic_random, flow, server_id, service, short
from tests.files import CID_KEY, RESET_KEY, write_key, write_keys
from tests.reset_vectors import VECTORS, Vector

PAGE = Path(__file__).parent.parent / "docs" / "resets.md"
SHARED = {
    Scheme.HMAC_SHA256: "0f" * 32,
    Scheme.HAPROXY: b"dragons be here".hex(),
    Scheme.NGINX: "5a" * 80,
    Scheme.MVFST: "c3" * 32,
    Scheme.PICOQUIC: "96" * 16,
}
CONFIG = """\
runtime-directory: run
services:
  - name: web
    listen: ["192.0.2.1:443"]
    seed: sesame
    cid-configs:
      - {config-id: 0, server-id-length: 4, nonce-length: 12, key-file: secrets/cid-0.key,
         reset-key-file: secrets/reset-0.key}
    backends:
      - {name: a, address: "10.0.0.1:443", server-ids: {0: ["ffa91c02", "11d5e47a"]}}
      - {name: b, address: "[2001:db8::2]:443", server-ids: {0: ["c60b92ef"]}}
    resets: {RESETS}
"""


def written(directory: Path, resets: str, key: str = RESET_KEY) -> Path:
    write_keys(directory)
    write_key(directory / "secrets" / "reset-0.key", key)
    path = directory / "quiclb.yaml"
    path.write_text(CONFIG.replace("RESETS", resets[1:-1]))
    return path


def token_key(path: Path, server: str) -> TokenKey:
    key = (
        RoutingTable.build(load_config(path).services[0].service).servers(ConfigId(0))[bytes.fromhex(server)].reset_key
    )
    assert key is not None
    return key


# The arithmetic


@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_a_token_is_the_one_that_the_server_makes(vector: Vector) -> None:
    assert vector.token_key.token(vector.cid) == vector.token


def test_every_scheme_has_vectors_and_most_are_of_running_servers() -> None:
    sources = {(vector.rule.scheme, vector.source) for vector in VECTORS}
    assert {scheme for scheme, _ in sources} == set(Scheme)
    assert {scheme for scheme, source in sources if source == "stack"} == {
        Scheme.HMAC_SHA256,
        Scheme.NGINX,
        Scheme.PICOQUIC,
    }
    assert {
        (v.rule.worker_number, v.worker) for v in VECTORS if v.rule.scheme is Scheme.NGINX and v.source == "stack"
    } == {
        (True, 0),
        (True, 1),
        (True, 2),
        (False, 0),
    }


def test_every_octet_of_a_cid_counts_and_so_does_its_length() -> None:
    """But for HKDF, where the CID is a salt: zeros at its end are as none, and CIDs need to have one length."""
    one_length = [bytes(20), *(bytes(at) + b"\1" + bytes(19 - at) for at in range(20))]
    zeros = [bytes(size) for size in range(1, 21)]
    for scheme in Scheme:
        key = ResetRule(scheme, Keys.SHARED).token_key(bytes.fromhex(SHARED[scheme]), "192.0.2.1")
        assert len({key.token(cid) for cid in one_length}) == len(one_length)
        assert len({key.token(cid) for cid in zeros}) == (1 if key.arithmetic is Arithmetic.HKDF else len(zeros))


def test_no_scheme_needs_more_room_than_the_xdp_engine_has() -> None:
    for scheme, lengths in SECRET_LENGTHS.items():
        key = ResetRule(scheme, Keys.SHARED).token_key(bytes(lengths[-1]), "2001:db8::1", 1023)
        assert len(key.key) <= MAX_KEY
        assert len(key.suffix) <= MAX_SUFFIX


def test_hmac_sha256_is_what_it_was() -> None:
    cid = bytes(range(17))
    assert hmac_sha256(MASTER).token(cid) == reset_token(MASTER, cid)


def test_a_key_is_not_shown() -> None:
    for vector in VECTORS:
        shown = repr(vector.token_key)
        assert vector.token_key.key.hex() not in shown
        assert repr(vector.token_key.key)[2:-1] not in shown


# Where a server's key comes from


@pytest.mark.parametrize("scheme", Scheme)
def test_with_keys_per_server_each_has_its_own_and_it_follows_from_the_master(scheme: Scheme) -> None:
    rule = ResetRule(scheme)
    own = server_reset_key(MASTER, ConfigId(0), ServerId(b"\1\2"))
    expected = {Scheme.HAPROXY: own.hex().encode(), Scheme.PICOQUIC: own[:16]}.get(scheme, own)

    assert rule.secret(MASTER, ConfigId(0), ServerId(b"\1\2")) == expected
    assert rule.secret(MASTER, ConfigId(1), ServerId(b"\1\2")) != expected
    assert rule.secret(MASTER, ConfigId(0), ServerId(b"\1\3")) != expected
    assert len(expected) in SECRET_LENGTHS[scheme]
    assert list(rule.key_lengths) == [32]


@pytest.mark.parametrize("scheme", Scheme)
def test_a_shared_key_is_everybodys(scheme: Scheme) -> None:
    rule = ResetRule(scheme, Keys.SHARED)
    for server in (b"\1\2", b"\1\3"):
        assert rule.secret(b"a key", ConfigId(0), ServerId(server)) == b"a key"
    assert rule.key_lengths == SECRET_LENGTHS[scheme]


@pytest.mark.parametrize("keys", Keys)
@pytest.mark.parametrize("scheme", Scheme)
def test_a_new_key_is_one_that_a_file_may_hold(scheme: Scheme, keys: Keys) -> None:
    rule = ResetRule(scheme, keys)
    made = [rule.new_key(random) for random in [deterministic_random()] * 2]
    assert made[0] != made[1]
    assert all(len(key) in rule.key_lengths for key in made)
    if keys is Keys.SHARED and scheme is Scheme.HAPROXY:
        assert re.fullmatch("[0-9a-f]{64}", made[0].decode())


# A balancer's file


@pytest.mark.parametrize("scheme", Scheme)
def test_a_service_with_a_key_that_its_servers_share(tmp_path: Path, scheme: Scheme) -> None:
    path = written(tmp_path, f"{{scheme: {scheme}, keys: shared}}", SHARED[scheme])
    secret, cid = bytes.fromhex(SHARED[scheme]), bytes(range(17))
    rule = ResetRule(scheme, Keys.SHARED)

    assert load_config(path).services[0].service.reset_rule == rule
    assert token_key(path, "ffa91c02").token(cid) == rule.token_key(secret, "10.0.0.1", 0).token(cid)
    assert token_key(path, "c60b92ef").token(cid) == rule.token_key(secret, "2001:db8::2", 0).token(cid)


def test_the_order_of_server_ids_tells_the_workers_of_nginx(tmp_path: Path) -> None:
    path = written(tmp_path, "{scheme: nginx}")
    rule, cid = ResetRule(Scheme.NGINX), bytes(20)
    # In the order of the file, which is not that of their octets; the key is that of the first.
    secret = server_reset_key(bytes.fromhex(RESET_KEY), ConfigId(0), ServerId(bytes.fromhex("ffa91c02")))
    expected = [rule.token_key(secret, "", worker).token(cid) for worker in (0, 1)]

    assert [token_key(path, server).token(cid) for server in ("ffa91c02", "11d5e47a")] == expected
    before = written(tmp_path, "{scheme: nginx, worker-number: false}")
    first, second = (token_key(before, server).token(cid) for server in ("ffa91c02", "11d5e47a"))
    assert first == second
    assert first not in expected


def test_mvfst_servers_are_bound_to_their_backends_address_or_to_one_that_is_said(tmp_path: Path) -> None:
    secret = bytes.fromhex(SHARED[Scheme.MVFST])
    keys = {
        said: [
            token_key(written(tmp_path, f"{{scheme: mvfst, keys: shared{said}}}", secret.hex()), server)
            for server in ("ffa91c02", "c60b92ef")
        ]
        for said in ("", ', server-address: "0.0.0.0"', ', server-address: "::"')
    }
    assert keys == {
        "": [mvfst(secret, "10.0.0.1"), mvfst(secret, "2001:db8::2")],
        ', server-address: "0.0.0.0"': [mvfst(secret, "0.0.0.0")] * 2,
        ', server-address: "::"': [mvfst(secret, "::")] * 2,
    }


RESETS = "services[0].resets"
FILE = "services[0].cid-configs[0].reset-key-file"
MISTAKES = {
    "no such scheme": ("{scheme: quinn}", RESET_KEY, f"{RESETS}.scheme", "quinn: expected hmac-sha256, haproxy"),
    "no such kind of keys": ("{keys: private}", RESET_KEY, f"{RESETS}.keys", "private: expected per-server or shared"),
    "an address for nobody": (
        '{server-address: "::"}',
        RESET_KEY,
        f"{RESETS}.server-address",
        "scheme: hmac-sha256 has no use",
    ),
    "an address that is none": (
        "{scheme: mvfst, server-address: here}",
        RESET_KEY,
        f"{RESETS}.server-address",
        "expected an IP address",
    ),
    "a worker for nobody": (
        "{worker-number: false}",
        RESET_KEY,
        f"{RESETS}.worker-number",
        "scheme: hmac-sha256 has no use",
    ),
    "a shared key for a master": (
        "{scheme: picoquic}",
        "96" * 16,
        FILE,
        "holds 32 characters: expected 64 hex digits (32 octets)",
    ),
    "a master for a shared key": (
        "{scheme: picoquic, keys: shared}",
        RESET_KEY,
        FILE,
        "holds 64 characters: expected 32 hex digits (16 octets)",
    ),
    "a key too short": (
        "{scheme: nginx, keys: shared}",
        "5a" * 15,
        FILE,
        "holds 30 characters: expected 32 to 200 hex digits (16 to 100 octets)",
    ),
    "a key too long": ("{scheme: nginx, keys: shared}", "5a" * 101, FILE, "holds 202 characters: expected 32 to 200"),
    "half an octet": (
        "{scheme: nginx, keys: shared}",
        "5a" * 16 + "5",
        FILE,
        "holds 33 characters: expected 32 to 200",
    ),
    "no text": (
        "{scheme: haproxy, keys: shared}",
        "00" * 16,
        FILE,
        "expected the octets of cluster-secret, a text, in hex",
    ),
}


@pytest.mark.parametrize(("resets", "key", "path", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_with_their_place_and_without_the_key(
    tmp_path: Path, resets: str, key: str, path: str, message: str
) -> None:
    with pytest.raises(ConfigErrors) as caught:
        load_config(written(tmp_path, resets, key))
    told = [str(error) for error in caught.value.exceptions]
    assert len(told) == 1
    assert told[0].startswith(f"{path}: ")
    assert message in told[0]
    assert key[:16] not in told[0]


# What commands say


def test_check_says_which_scheme_it_is_and_warns_of_shared_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "{scheme: haproxy, keys: shared}", SHARED[Scheme.HAPROXY])
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "resets: scheme haproxy, keys shared, " in out
    assert "note: services[0].resets.keys: shared: each server can end the connections of all" in out
    assert "dragons" not in out
    assert SHARED[Scheme.HAPROXY] not in out

    assert main(["check", str(written(tmp_path, "{}"))]) == 0
    out = capsys.readouterr().out
    assert "resets: scheme hmac-sha256, keys per-server, " in out
    assert "services[0].resets" not in out


def test_explain_says_whose_token_a_reset_has() -> None:
    for scheme, said in ((Scheme.HMAC_SHA256, ""), (Scheme.NGINX, ", with the token that nginx would make")):
        table = RoutingTable.build(replace(service(), reset_rule=ResetRule(scheme)), {"b1": BackendState.DOWN}, ["b1"])
        (answer,) = explain([table], {"cid": cid_of(1).hex()})["services"]
        assert answer["why"] == f"its server is declared dead, and its client is told by a stateless reset{said}"


# The udp engine


@pytest.mark.parametrize("keys", Keys)
@pytest.mark.parametrize("scheme", Scheme)
def test_clients_of_a_dead_server_get_its_tokens(scheme: Scheme, keys: Keys) -> None:
    rule = ResetRule(scheme, keys)
    usual = service()
    key = bytes.fromhex(SHARED[scheme]) if keys is Keys.SHARED else MASTER
    slots = tuple(replace(slot, reset_key=key) for slot in usual.cid_slots)
    table = RoutingTable.build(replace(usual, cid_slots=slots, reset_rule=rule), {"b1": BackendState.DOWN}, ["b1"])
    router = Router(table, random=deterministic_random())
    expected = rule.token_key(rule.secret(key, ConfigId(0), server_id(1)), "10.0.0.1").token(cid_of(1))

    asked, pushed = router.route(short(cid_of(1)), flow(), 0.0), router.farewell(cid_of(1))
    assert asked.verdict is Verdict.RESET
    assert asked.reply is not None
    assert pushed is not None
    assert (asked.reply[-16:], pushed[-16:]) == (expected, expected)
    assert router.farewell(cid_of(2)) is None


# The servers' half


def half(path: Path, directory: Path, *arguments: str) -> dict[str, str]:
    assert main(["server-config", "a", "-c", str(path), "--output", str(directory), *arguments]) == 0
    return {file.name: file.read_text() for file in directory.iterdir()}


@pytest.mark.parametrize(
    ("resets", "hints"),
    [
        ("{scheme: haproxy}", ['#   global: cluster-secret "$(xxd -r -p reset-0-11d5e47a.key)"']),
        (
            "{scheme: nginx}",
            [
                "#   xxd -r -p reset-0-11d5e47a.key reset-0-11d5e47a.bin",
                "#   http: quic_host_key reset-0-11d5e47a.bin;",
                "#   this server ID is for worker 1",
            ],
        ),
        (
            "{scheme: mvfst}",
            ["#   TransportSettings::statelessResetTokenSecret", "#   the server is bound to 10.0.0.1"],
        ),
        ("{scheme: picoquic}", ["#   picoquic_create: reset_seed"]),
    ],
    ids=lambda given: given[1:-1].partition(" ")[2] if isinstance(given, str) else "",
)
def test_servers_of_other_makes_get_their_key_and_are_told_where_it_goes(
    tmp_path: Path, resets: str, hints: list[str]
) -> None:
    path = written(tmp_path, resets)
    found = half(path, tmp_path / "half", "--server-id", "11d5e47a")
    rule = load_config(path).services[0].service.reset_rule
    key = found["reset-0-11d5e47a.key"].strip()

    lines = found["server.yaml"].splitlines()
    at = lines.index(f"# Stateless resets ({rule.scheme}), key in hex in reset-0-11d5e47a.key:")
    assert lines[at + 1 :] == hints
    assert rule.token_key(bytes.fromhex(key), "10.0.0.1", 1) == token_key(path, "11d5e47a")
    # Whoever reads this file in the reference's way makes no tokens with a key that is not for it.
    assert load_server_config(tmp_path / "half" / "server.yaml").reset_key is None
    assert ((tmp_path / "half" / "reset-0-11d5e47a.key").stat().st_mode & 0o777) == 0o600


def test_a_shared_key_is_what_every_server_gets(tmp_path: Path) -> None:
    path = written(tmp_path, "{keys: shared}", SHARED[Scheme.HMAC_SHA256])
    for server in ("ffa91c02", "11d5e47a"):
        half(path, tmp_path / server, "--server-id", server)
        key = load_server_config(tmp_path / server / "server.yaml").reset_key
        assert key == bytes.fromhex(SHARED[Scheme.HMAC_SHA256])


def test_as_json_it_says_the_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "{scheme: picoquic}")
    assert main(["server-config", "b", "-c", str(path), "--json", "--with-keys"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["reset-scheme"] == "picoquic"
    assert picoquic(bytes.fromhex(told["reset-key"])) == token_key(path, "c60b92ef")
    assert told["cid-config"]["key"] == CID_KEY


def test_keygen_makes_shared_keys_and_servers_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scheme in Scheme:
        assert main(["keygen", "reset", "--shared", str(scheme)]) == 0
        made = bytes.fromhex(capsys.readouterr().out)
        assert len(made) in SECRET_LENGTHS[scheme]
        master = write_key(tmp_path / "master.key", RESET_KEY)
        given = ["--master", str(master), "--config-id", "0", "--server-id", "LWV1oW+gjqQ="]
        assert main(["keygen", "server-reset", *given, "--scheme", str(scheme)]) == 0
        own = bytes.fromhex(capsys.readouterr().out)
        assert own == ResetRule(scheme).secret(
            bytes.fromhex(RESET_KEY), ConfigId(0), ServerId(bytes.fromhex("2d6575a16fa08ea4"))
        )


# docs/resets.md


def test_the_pages_table_is_the_code() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    lengths = {
        scheme: f"{some[0]}" if len(some) == 1 else f"{some[0]} to {some[-1]}"
        for scheme, some in SECRET_LENGTHS.items()
    }
    assert [(name, length) for name, _, length, _ in rows] == [(str(s), lengths[s]) for s in Scheme]
    for name, _, _, made_by in rows:
        stacks = {
            v.stack.split()[0].split("-proto")[0] for v in VECTORS if v.rule.scheme == name and v.source == "stack"
        }
        assert {
            stack for stack in ("quic-go", "quinn", "msquic", "nginx", "picoquic") if stack in made_by.partition(";")[0]
        } == stacks
        assert ("formula" in made_by) == any(v.rule.scheme == name and v.source == "formula" for v in VECTORS)


def test_the_pages_conversion_of_a_cluster_secret_is_right() -> None:
    """HAProxy keeps 16 octets of the SHA-1 of the text; the file holds the text."""
    (vector,) = [v for v in VECTORS if v.rule.scheme is Scheme.HAPROXY and len(v.cid) == 8]
    assert vector.token_key.key == hashlib.sha1(vector.secret, usedforsecurity=False).digest()[:16]
    assert vector.secret.isascii()
    assert 'printf %s "$CLUSTER_SECRET" | xxd -p' in PAGE.read_text()


@pytest.mark.parametrize("keys", Keys)
@pytest.mark.parametrize("scheme", Scheme)
def test_a_rotation_makes_a_reset_key_as_the_scheme_needs_it(tmp_path: Path, scheme: Scheme, keys: Keys) -> None:
    key = SHARED[scheme] if keys is Keys.SHARED else RESET_KEY
    path = written(tmp_path, f"{{scheme: {scheme}, keys: {keys}}}", key)
    assert main(["rotation", "prepare", "-c", str(path)]) == 0
    section = load_config(path).services[0]
    before, made = (slot.reset_key for slot in section.service.cid_slots)
    assert before == bytes.fromhex(key)
    assert made not in (None, before)
