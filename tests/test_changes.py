"""What a reload says that it changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lb.changes import changes
from lb.config import load_config
from lb.describe import describe

BASE: dict[str, Any] = {
    "workers": 1,
    "limits": {"flows": 10},
    "services": [
        {
            "name": "web",
            "listen": ["192.0.2.1:443"],
            "cid-configs": [{"config-id": 0, "phase": "active", "cid-length": 17}],
            "backends": [
                {"name": "a", "address": "10.0.0.1:443", "weight": 1, "ring-share": 0.5, "server-ids": {"0": ["aa"]}},
                {"name": "b", "address": "10.0.0.2:443", "weight": 1, "ring-share": 0.5, "server-ids": {"0": ["bb"]}},
            ],
        }
    ],
}


def edited(**service: Any) -> dict[str, Any]:
    return BASE | {"services": [BASE["services"][0] | service]}


def test_equal_configurations_differ_in_nothing() -> None:
    assert changes(BASE, edited()) == ()


def test_every_difference_is_one_line_with_its_path() -> None:
    a, b = BASE["services"][0]["backends"]
    after = edited(
        listen=["192.0.2.1:443", "192.0.2.2:443"],
        backends=[
            a | {"weight": 3, "ring-share": 0.75, "server-ids": {"0": ["aa", "ac"]}},
            b | {"name": "c", "address": "10.0.0.3:443"},
        ],
    )
    after["workers"] = 2
    assert changes(BASE, after) == (
        "workers: 1 -> 2",
        "services.web.listen: [192.0.2.1:443] -> [192.0.2.1:443, 192.0.2.2:443]",
        "services.web.backends.a.weight: 1 -> 3",
        "services.web.backends.a.server-ids.0: [aa] -> [aa, ac]",
        "services.web.backends.b: removed",
        "services.web.backends.c: added (address 10.0.0.3:443, weight 1)",
    )


def test_a_service_and_a_configuration_come_and_go() -> None:
    slots = BASE["services"][0]["cid-configs"]
    after = edited(**{"cid-configs": [slots[0] | {"phase": "retiring"}, {"config-id": 1, "phase": "active"}]})
    assert changes(BASE, after) == (
        "services.web.cid-configs.0.phase: active -> retiring",
        "services.web.cid-configs.1: added (phase active)",
    )
    assert changes(BASE, BASE | {"services": []}) == ("services.web: removed",)


def test_what_is_described_can_be_compared(tmp_path: Path) -> None:
    """The lists of a real description are known by their names."""
    path = tmp_path / "quiclb.yaml"
    path.write_text(
        """services: [{name: web, listen: ["192.0.2.1:443"], backends: [{name: a, address: "10.0.0.1:443"}]}]"""
    )
    config = load_config(path)
    described = describe(config)
    described["services"][0]["backends"][0]["weight"] = 7
    [line] = changes(describe(config), described)
    assert line.endswith(".weight: 1 -> 7")
