"""deploy/prometheus: rules that promtool takes, alerts that fire when they should, and a word for whoever is paged."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observe.dashboards import BUILT_IN, ROOT, documented, metrics_in, recorded, rules
from tests.observe.prometheus import promtool

PLACE = ROOT / "deploy" / "prometheus"

# The situations that issue 4 names, and what tells of them.
NAMED = {
    "no healthy backend": "QuiclbNoHealthyBackend",
    "fail-open": "QuiclbFailOpen",
    "nonce or key age": "QuiclbCidKeyOld",
    "unroutable surge": "QuiclbUnroutableSurge",
    "resets surge": "QuiclbResetsSurge",
    "config retired while in use": "QuiclbConfigIdFreedWhileInUse",
    "flow table full": "QuiclbFlowTableFull",
    "fd limit near": "QuiclbDescriptorLimitNear",
    "reload failed": "QuiclbReloadFailed",
    "XDP in generic mode": "QuiclbXdpGenericMode",
}


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_promtool_takes_the_rules_and_the_example() -> None:
    for what, file in (("rules", "rules.yml"), ("config", "prometheus.yml")):
        done = subprocess.run([promtool(), "check", what, PLACE / file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_alert_fires_in_its_case_and_not_in_the_nearest_that_is_none() -> None:
    done = subprocess.run(
        [promtool(), "test", "rules", "rules-test.yml"], cwd=PLACE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    cases: dict[str, set[bool]] = {}
    for test in yaml.safe_load((PLACE / "rules-test.yml").read_text())["tests"]:
        for asked in test["promql_expr_test"]:
            (name,) = re.findall(r'alertname="(\w+)"', asked["expr"])
            cases.setdefault(name, set()).add(bool(asked["exp_samples"]))
    assert cases == {name: {True, False} for name in alerts()}


def test_a_test_of_the_rules_can_fail(tmp_path: Path) -> None:
    text = (PLACE / "rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(text.replace("quiclb_fail_open == 1", "quiclb_fail_open == 2"))
    (tmp_path / "rules-test.yml").write_text((PLACE / "rules-test.yml").read_text())
    done = subprocess.run(
        [promtool(), "test", "rules", "rules-test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0


@pytest.mark.parametrize("situation", NAMED)
def test_every_situation_has_an_alert(situation: str) -> None:
    assert NAMED[situation] in alerts()


def test_every_metric_in_the_rules_exists() -> None:
    known = documented() | recorded() | BUILT_IN
    for rule in rules():
        names = metrics_in(rule["expr"])
        assert names, rule
        assert names <= known, rule


def test_every_alert_says_how_bad_it_is_what_it_is_and_what_to_do() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    }
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}, name
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert file == "docs/operations.md", name
        assert anchor in anchors, name


def test_recorded_names_say_their_level_and_operation() -> None:
    assert [name for name in recorded() if not re.fullmatch(r"[a-z_]+:[a-z_]+:[a-z0-9_]+", name)] == []
