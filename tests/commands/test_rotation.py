"""rotation and server-config: their arguments, and a whole rotation of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lb.config import load_config
from lb.keys import Phase
from lb.server_config import load_server_config
from tests.admin.fake import Running
from tests.commands.conftest import Quiclb
from tests.files import CID_KEY, RESET_KEY, write_keys

ONE = """\
services:
  - name: web  # the only one
    listen: ["192.0.2.1:443"]
    cid-configs:
      - {config-id: 0, server-id-length: 4, nonce-length: 12, key-file: secrets/cid-0.key,
         reset-key-file: secrets/reset-0.key}
    backends:
      - {name: a, address: "10.0.0.11:443", server-ids: {0: ["3fa91c02"]}}
      - {name: b, address: "10.0.0.12:443", server-ids: {0: ["81d5e47a"]}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    path = tmp_path / "quiclb.yaml"
    path.write_text(ONE)
    return path


def phases(config: Path) -> dict[int, Phase]:
    return {int(config_id): phase for config_id, phase in load_config(config).services[0].phases.items()}


def test_status_is_a_table_and_json(quiclb: Quiclb, balancer: Running) -> None:
    status, out, err = quiclb("rotation", "status", "--service", "web")
    assert (status, err) == (0, "")
    assert [line.split()[:3] for line in out.splitlines()] == [
        ["SERVICE", "ID", "PHASE"], ["web", "0", "retiring"], ["web", "1", "active"], ["web", "2", "prepared"],
    ]  # fmt: skip
    assert "free in 5m00s" in out
    slots = json.loads(quiclb("rotation", "status", "--json")[1])
    assert {name: [slot["config-id"] for slot in ids] for name, ids in slots.items()} == {
        "web": [0, 1, 2],
        "video": [3],
    }


def test_steps_are_taken_by_the_balancer(quiclb: Quiclb, balancer: Running) -> None:
    assert quiclb("rotation", "prepare", "--service", "web", "5")[::2] == (0, "")
    assert quiclb("rotation", "activate", "2", "--service", "web")[0] == 0
    answer = json.loads(quiclb("rotation", "retire", "1", "--service", "web", "--force", "--json")[1])
    assert answer["generation"] == 4
    assert [what for _, what in balancer.balancer.changes] == ["web prepare 5", "web activate 2", "web retire 1"]


def test_a_refused_step_is_told_with_all_reasons(quiclb: Quiclb, balancer: Running) -> None:
    status, out, err = quiclb("rotation", "prepare", "0", "--service", "web")
    assert (status, out) == (1, "")
    assert "config ID 0 is in use" in err
    assert "expected one that is free" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["activate"], "the following arguments are required: CONFIG-ID"),
        (["activate", "7"], "argument CONFIG-ID: '7': expected an integer, 0 to 6"),
        (["activate", "0000999"], "argument CONFIG-ID: '0000999': expected an integer, 0 to 6"),
        (["retire", "x"], "argument CONFIG-ID: 'x': expected an integer, 0 to 6"),
        (["retire", "0", "--plaintext"], "unrecognized arguments: --plaintext"),
        (["prepare", "--server-id-length", "16"], "'16': expected an integer, 1 to 15"),
        (["prepare", "--nonce-length", "3"], "'3': expected an integer, 4 to 18"),
        (["activate", "2"], "--service: expected one of web, video"),
        (["activate", "2", "--service", "wob"], "--service wob: expected one of web, video"),
        (["free", "2"], "invalid choice: 'free'"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(quiclb: Quiclb, balancer: Running, argv: list[str], message: str) -> None:
    status, out, err = quiclb("rotation", *argv)
    assert (status, out) == (2, "")
    assert message in err
    assert balancer.balancer.changes == []


def test_a_rotation_of_a_file_without_a_balancer(quiclb: Quiclb, config: Path) -> None:
    """Prepared, activated; retired only by force, since nobody says whether packets still come."""
    at = ["-c", config]
    status, out, err = quiclb("rotation", "prepare", *at)
    assert status == 0
    assert err.endswith("no balancer is there; the file is changed all the same\n")
    assert out
    (new,) = {config_id for config_id, phase in phases(config).items() if phase is Phase.PREPARED}
    assert phases(config)[0] is Phase.ACTIVE
    assert quiclb("rotation", "activate", new, *at)[0] == 0
    assert phases(config)[new] is Phase.ACTIVE
    assert "# the only one" in config.read_text()
    again = quiclb("rotation", "activate", new, *at)
    assert again[:2] == (1, "")
    assert f"config ID {new}" in again[2]


def test_server_config_prints_a_servers_half_without_keys(quiclb: Quiclb, config: Path) -> None:
    for name in ("a", "web/a"):
        status, out, err = quiclb("server-config", name, "-c", config)
        assert (status, err) == (0, "")
        assert "3fa91c02" in out
        assert not any(secret in out for secret in (CID_KEY, RESET_KEY, "81d5e47a"))


def test_server_config_writes_files_that_a_server_can_read(quiclb: Quiclb, config: Path, tmp_path: Path) -> None:
    status, out, err = quiclb("server-config", "a", "-c", config, "--output", tmp_path / "server-a")
    written = [Path(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert {path.stat().st_mode & 0o777 for path in written} == {0o600}
    (yaml,) = [path for path in written if path.suffix == ".yaml"]
    server = load_server_config(yaml)
    assert (server.server_id.hex(), server.cid_config and server.cid_config.key) == ("3fa91c02", bytes.fromhex(CID_KEY))
    assert server.reset_key not in (None, bytes.fromhex(RESET_KEY))


def test_server_config_as_json_has_keys_only_if_asked_for(quiclb: Quiclb, config: Path) -> None:
    said = quiclb("server-config", "a", "-c", config, "--json")[1]
    assert CID_KEY not in said
    said = quiclb("server-config", "a", "-c", config, "--json", "--with-keys")[1]
    assert CID_KEY in said
    assert RESET_KEY not in said
    assert isinstance(json.loads(said), dict)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x"], "quiclb: x: expected a backend: "),
        (["wob/a"], "quiclb: wob: expected a service: "),
        (["a", "--config-id", "3"], "config ID 3"),
        (["a", "--config-id", "7"], "argument --config-id: '7': expected an integer, 0 to 6"),
        (["a", "--server-id", "00"], "00: expected a server ID of a"),
        (["a", "--with-keys"], "--with-keys: expected --json as well; --output writes keys in any case"),
    ],
)
def test_wrong_arguments_of_server_config(quiclb: Quiclb, config: Path, argv: list[str], message: str) -> None:
    status, out, err = quiclb("server-config", *argv, "-c", config)
    assert (status, out) == (2, "")
    assert message in err
