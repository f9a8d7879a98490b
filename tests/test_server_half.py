"""The servers' half: what a server gets, and that it gets nothing else."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lb.cid import ConfigId, ServerId
from lb.cli import main
from lb.config import load_config
from lb.operations import Refused
from lb.reset import server_reset_key
from lb.server_config import load_server_config
from lb.server_half import server_half
from tests.files import CID_KEY, OTHER_CID_KEY, OTHER_RESET_KEY, RESET_KEY, write_keys

CONFIG = """\
services:
  - name: web
    listen: ["192.0.2.1:443"]
    cid-configs:
      - {config-id: 0, server-id-length: 4, nonce-length: 12, key-file: secrets/cid-0.key,
         reset-key-file: secrets/reset-0.key, phase: retiring}
      - {config-id: 5, server-id-length: 3, nonce-length: 6, key-file: secrets/cid-1.key, encodes-length: true,
         reset-key-file: secrets/reset-1.key, appended-length: 2}
      - {config-id: 6, server-id-length: 2, nonce-length: 6, phase: prepared}
    backends:
      - {name: a, address: "10.0.0.1:443", server-ids: {0: ["3fa91c02"], 5: ["abcdef"], 6: ["0102"]}}
      - {name: b, address: "10.0.0.2:443", server-ids: {0: ["81d5e47a"], 5: ["fedcba"], 6: ["0304", "0506"]}}
  - name: other
    listen: ["192.0.2.2:443"]
    backends:
      - {name: b, address: "10.0.0.3:443"}
"""
A0, A5 = ServerId(bytes.fromhex("3fa91c02")), ServerId(bytes.fromhex("abcdef"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    path = tmp_path / "lb.yaml"
    path.write_text(CONFIG)
    return path


def test_a_server_gets_the_active_configuration_its_id_and_its_reset_key(path: Path, tmp_path: Path) -> None:
    assert main(["server-config", "a", "-c", str(path), "--output", str(tmp_path / "half")]) == 0
    loaded = load_server_config(tmp_path / "half" / "server.yaml")
    config = load_config(path).services[0].service.cid_slots[1].config
    assert (loaded.name, loaded.cid_config, loaded.server_id, loaded.nonce_file) == ("a", config, A5, None)
    assert loaded.reset_key == server_reset_key(bytes.fromhex(OTHER_RESET_KEY), ConfigId(5), A5)


def test_a_server_gets_nothing_more(path: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    server_half(load_config(path), "a").write(half)
    files = sorted(half.iterdir())
    assert [each.name for each in files] == ["cid-5-abcdef.key", "reset-5-abcdef.key", "server.yaml"]
    assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o600}
    assert stat.S_IMODE(half.stat().st_mode) == 0o700
    text = "".join(each.read_text() for each in files).lower()
    mine = server_reset_key(bytes.fromhex(OTHER_RESET_KEY), ConfigId(5), A5).hex()
    others = server_reset_key(bytes.fromhex(OTHER_RESET_KEY), ConfigId(5), ServerId(b"\xfe\xdc\xba")).hex()
    earlier = server_reset_key(bytes.fromhex(RESET_KEY), ConfigId(0), A0).hex()
    assert OTHER_CID_KEY in text
    assert mine in text
    for secret in (CID_KEY, RESET_KEY, OTHER_RESET_KEY, others, earlier, "fedcba", "81d5e47a", "3fa91c02", "10.0.0"):
        assert secret not in text


def test_a_server_can_be_given_the_next_configuration_before_it_is_active(path: Path, tmp_path: Path) -> None:
    words = ["--config-id", "6", "--server-id", "0506", "--nonce-file", "/var/lib/b/nonces"]
    assert main(["server-config", "web/b", "-c", str(path), *words, "--output", str(tmp_path / "half")]) == 0
    loaded = load_server_config(tmp_path / "half" / "server.yaml")
    assert loaded.cid_config is not None
    assert (loaded.cid_config.config_id, loaded.cid_config.algorithm) == (6, "plaintext")
    assert (loaded.server_id, loaded.reset_key) == (b"\x05\x06", None)
    assert loaded.nonce_file == Path("/var/lib/b/nonces")


def test_a_file_says_when_it_was_made(path: Path, tmp_path: Path) -> None:
    """So that a server that runs knows one that comes too late."""
    assert main(["server-config", "a", "-c", str(path), "--output", str(tmp_path / "half")]) == 0
    made = load_server_config(tmp_path / "half" / "server.yaml").made
    assert made is not None
    age = datetime.now(UTC) - datetime.strptime(made, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert timedelta(0) <= age < timedelta(minutes=2)
    server_half(load_config(path), "a", made="2026-11-21T09:42:25Z").write(tmp_path / "half")
    assert load_server_config(tmp_path / "half" / "server.yaml").made == "2026-11-21T09:42:25Z"


def test_a_directory_takes_the_next_half_over_the_last(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    for config_id in (0, 5, 0):
        server_half(config, "a", config_id=config_id).write(tmp_path / "half")
        loaded = load_server_config(tmp_path / "half" / "server.yaml")
        assert loaded.cid_config is not None
        assert loaded.cid_config.config_id == config_id


def test_keys_are_printed_only_if_they_are_asked_for(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = server_reset_key(bytes.fromhex(OTHER_RESET_KEY), ConfigId(5), A5).hex()
    for words in ([], ["--json"]):
        assert main(["server-config", "a", "-c", str(path), *words]) == 0
        out = capsys.readouterr().out
        assert OTHER_CID_KEY not in out
        assert mine not in out
    assert main(["server-config", "a", "-c", str(path), "--json", "--with-keys"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["cid-config"]["key"], said["reset-key"]) == (OTHER_CID_KEY, mine)
    half = server_half(load_config(path), "a")
    assert OTHER_CID_KEY not in repr(half)
    assert str(half.reset_key) not in repr(half)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"backend": "z"}, "z: expected a backend: a, b, b"),
        ({"backend": "a", "service": "wob"}, "wob: expected a service: web, other"),
        ({"backend": "b"}, "b: a backend of several services: expected one of them: web, other"),
        ({"backend": "b", "service": "other"}, "no configuration is active in other: expected a config ID"),
        ({"backend": "a", "config_id": 3}, "config ID 3: expected one of web: 0, 5, 6"),
        ({"backend": "b", "service": "web", "config_id": 6}, "b has 2 server IDs: expected one of them: 0304, 0506"),
        ({"backend": "a", "server_id": "fedcba"}, "fedcba: expected a server ID of a under config ID 5"),
    ],
)
def test_what_cannot_be_given_is_refused(path: Path, asked: dict[str, object], reason: str) -> None:
    with pytest.raises(Refused) as refused:
        server_half(load_config(path), **asked)  # type: ignore[arg-type]
    assert str(refused.value) == reason
