"""deploy/compose: what docker compose takes, a configuration that quiclb takes, and addresses that fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lb.config import LbConfig, load_config
from lb.server_config import load_server_config
from tests.deploy.units import PROJECT

COMPOSE = PROJECT / "deploy" / "compose"
RULES = PROJECT / "deploy" / "prometheus" / "rules.yml"
BIN = Path(sys.executable).parent
SERVERS = ("a", "b", "c")


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    return found


def against_the_schema(file: Path) -> subprocess.CompletedProcess[str]:
    """The schema of compose-spec.org, of which check-jsonschema has a copy."""
    command: list[str | Path] = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_is_a_compose_file() -> None:
    done = against_the_schema(COMPOSE / "compose.yaml")
    assert done.returncode == 0, done.stdout


def test_what_compose_does_not_know_would_be_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((COMPOSE / "compose.yaml").read_text().replace("stop_grace_period", "grace_period"))

    assert "grace_period" in against_the_schema(wrong).stdout


@pytest.fixture
def prepared(tmp_path: Path) -> LbConfig:
    """What the service `keys` makes, twice: the second time it leaves everything as it is."""
    shutil.copy(COMPOSE / "quiclb.yaml", tmp_path)
    for name in ("secrets", "servers"):
        (tmp_path / name).mkdir()
    made = []
    for _ in range(2):
        command: list[str | Path] = ["sh", COMPOSE / "prepare", tmp_path]
        path = f"{BIN}:{os.environ['PATH']}"
        subprocess.run(command, check=True, capture_output=True, timeout=60, env={"PATH": path})
        made.append({file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()})
    assert made[0] == made[1]
    return load_config(tmp_path / "quiclb.yaml")


def test_the_balancer_finds_each_server_where_compose_puts_it(prepared: LbConfig) -> None:
    (web,) = prepared.services
    found = {backend.name: str(backend.address) for backend in web.service.backends}
    for name in SERVERS:
        command = services()[name]["command"]
        listen = command[command.index("--listen") + 1]
        assert listen.startswith(services()[name]["networks"]["quic"]["ipv4_address"] + ":")
        assert found.pop(name) == listen
    assert found == {}


def test_each_server_has_its_half_of_the_configuration(prepared: LbConfig, tmp_path: Path) -> None:
    (web,) = prepared.services
    for backend in web.service.backends:
        command = services()[backend.name]["command"]
        file = Path(command[command.index("--server-config") + 1]).relative_to("/etc/quiclb")
        half = load_server_config(tmp_path / file)

        assert half.cid_config is not None
        assert (
            half.cid_config.key
            == {slot.config.config_id: slot.config.key for slot in web.service.cid_slots}[half.cid_config.config_id]
        )
        assert half.server_id in backend.server_ids[half.cid_config.config_id]


def test_what_is_published_is_listened_on(prepared: LbConfig) -> None:
    (web,) = prepared.services
    assert prepared.metrics is not None
    listened = [f"{address.port}/udp" for address in web.service.listen] + [f"{prepared.metrics.port}"]
    assert [port.rpartition(":")[2] for port in services()["quiclb"]["ports"]] == listened


def test_nobody_has_more_rights_than_needed() -> None:
    for name, service in services().items():
        if service["image"].startswith("quiclb:"):
            assert (name, service["read_only"], service["cap_drop"]) == (name, True, ["ALL"])
            assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.skipif(not (BIN / "promtool").exists() and not shutil.which("promtool"), reason="no promtool")
def test_prometheus_takes_its_configuration_and_asks_the_balancer(prepared: LbConfig, tmp_path: Path) -> None:
    shutil.copy(COMPOSE / "prometheus.yml", tmp_path)
    shutil.copy(RULES, tmp_path)
    promtool = shutil.which("promtool", path=f"{BIN}:{os.environ['PATH']}")
    assert promtool is not None
    subprocess.run(
        [promtool, "check", "config", tmp_path / "prometheus.yml"], check=True, capture_output=True, timeout=60
    )
    (job,) = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())["scrape_configs"]
    assert prepared.metrics is not None
    assert job["job_name"] == "quiclb"  # the rules ask for it
    assert job["static_configs"][0]["targets"] == [f"quiclb:{prepared.metrics.port}"]


def test_the_script_is_linted() -> None:
    done = subprocess.run(
        [BIN / "shellcheck", COMPOSE / "prepare"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == ""
