"""Envoy: what `quiclb server-config --format envoy` makes, read with the messages and rules of Envoy's own API."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lb.cli import main
from tests.files import CID_KEY, write_keys

CHECK = Path(__file__).parents[2] / "build" / "adapters" / "envoy" / "check"
CONFIG = """\
services:
  - name: web
    listen: ["192.0.2.1:443"]
    cid-configs:
      - {config-id: 5, server-id-length: 4, nonce-length: 12, appended-length: 1, key-file: secrets/cid-0.key}
      - {config-id: 6, server-id-length: 8, nonce-length: 7, appended-length: 1, phase: prepared}
      - {config-id: 0, server-id-length: 1, nonce-length: 18, phase: prepared}
    backends:
      - {name: a, address: "10.0.0.1:443", server-ids: {5: ["3fa91c02"], 6: ["0102030405060708"], 0: ["07"]}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_keys(tmp_path)
    path = tmp_path / "lb.yaml"
    path.write_text(CONFIG)
    return path


def made(config: Path, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    directory = config.parent / "envoy"
    assert main(["server-config", "a", "-c", str(config), "--format", "envoy", "-o", str(directory), *options]) == 0
    files = [directory / name for name in ("envoy.yaml", "envoy-secret.yaml")]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    generator, secret = (yaml.safe_load(file.read_text()) for file in files)
    return generator, secret


def read_as_envoy_does(generator: dict[str, Any], secret: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    if not CHECK.exists():
        pytest.skip(f"no {CHECK.name} of Envoy's API: `make adapters` builds it where there is a Go")
    documents = json.dumps({"generator": generator, "secret": secret})
    return subprocess.run([CHECK], input=documents, capture_output=True, text=True, check=False, timeout=30)


def test_envoy_reads_server_id_lengths_key_and_config_id(config: Path) -> None:
    result = read_as_envoy_does(*made(config))
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "extension": "envoy.quic.connection_id_generator.quic_lb",
        "server_id": base64.b64encode(bytes.fromhex("3fa91c02")).decode(),
        "expected": 4,
        "nonce_length": 12,
        "unencrypted": False,
        "secret": "quic-lb",
        "path": str(config.parent / "envoy" / "envoy-secret.yaml"),
        "name": "quic-lb",
        "key": base64.b64encode(bytes.fromhex(CID_KEY)).decode(),
        "version": base64.b64encode(b"\5").decode(),
    }


def test_a_plaintext_configuration_is_unencrypted_mode(config: Path) -> None:
    read = json.loads(read_as_envoy_does(*made(config, "--config-id", "6")).stdout)
    assert (read["unencrypted"], read["expected"], read["nonce_length"]) == (True, 8, 7)
    assert len(base64.b64decode(read["key"])) == 16  # Envoy asks for one all the same


@pytest.mark.parametrize(
    ("field", "value"), [("nonce_length_bytes", 17), ("nonce_length", 12), ("encryption_parameters", None)]
)
def test_the_check_refuses_what_envoy_would(config: Path, field: str, value: object) -> None:
    generator, secret = made(config)
    generator["connection_id_generator_config"]["typed_config"][field] = value
    assert read_as_envoy_does(generator, secret).returncode == 1


def test_connection_ids_that_envoy_cannot_make_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server-config", "a", "-c", str(config), "--format", "envoy", "--config-id", "0"]) == 2
    _, error = capsys.readouterr()
    assert "config ID 0: nonce-length 18: Envoy makes nonces of 4 to 16 octets" in error
    assert "server ID and nonce take 19 octets: Envoy has room for 18" in error
    assert "appended-length 0: expected 1" in error


def test_the_printed_half_holds_no_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server-config", "a", "-c", str(config), "--format", "envoy"]) == 0
    printed, _ = capsys.readouterr()
    assert base64.b64encode(bytes.fromhex(CID_KEY)).decode() not in printed
    assert CID_KEY not in printed
    assert main(["server-config", "a", "-c", str(config), "--format", "envoy", "--json"]) == 2
