"""deploy/grafana: the dashboards are what the script writes, and ask for nothing that there is not."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.observe.dashboards import (
    BUILT_IN,
    GRAFANA,
    NAMES,
    dashboard,
    documented,
    metrics_in,
    queries,
    recorded,
)
from tests.observe.prometheus import promtool


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "dashboards.py", tmp_path], check=True, timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json" for name in NAMES}
    for path in tmp_path.iterdir():
        assert (GRAFANA / path.name).read_text() == path.read_text(), path.name


@pytest.mark.parametrize("name", NAMES)
def test_grafanas_own_model_reads_them(name: str) -> None:
    read = Dashboard.from_json(dashboard(name))
    assert read.uid == f"quiclb-{name}"
    assert read.templating is not None
    assert [variable.name for variable in read.templating.list_val or []] == ["datasource", "instance", "service"]


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_numbers_and_places_of_their_own(name: str) -> None:
    panels: list[dict[str, Any]] = dashboard(name)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: Counter[tuple[int, int]] = Counter()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        columns, rows = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        taken.update(product(columns, rows))
    assert [place for place, panels_there in taken.items() if panels_there > 1] == []


def test_every_panel_asks_something_with_a_letter_of_its_own() -> None:
    for name in NAMES:
        for panel in dashboard(name)["panels"]:
            letters = [target["refId"] for target in panel.get("targets", [])]
            assert panel["type"] == "row" or letters, panel["title"]
            assert len(set(letters)) == len(letters), panel["title"]
            assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}", panel["title"]


def test_every_metric_in_them_exists() -> None:
    asked = {query: metrics_in(query.expression) for query in queries()}
    assert all(asked.values())
    known = documented() | recorded() | BUILT_IN
    assert {query.panel: unknown for query, names in asked.items() if (unknown := names - known)} == {}


def test_every_expression_is_one(tmp_path: Path) -> None:
    rules = [{"record": f"expression:{number}", "expr": query.with_values()} for number, query in enumerate(queries())]
    assert len(rules) > 30
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    done = subprocess.run([promtool(), "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (a) (rate(x_total{b="c", d=~"e"}[5m])) > 0', {"x_total"}),
        ("a:b:rate5m / on (job) group_left () c or vector(0)", {"a:b:rate5m", "c"}),
        ("time() - a_seconds > 90 * 86400 and ignoring (p) q == 1", {"a_seconds", "q"}),
    ],
)
def test_no_metric_is_overlooked(expression: str, names: set[str]) -> None:
    assert metrics_in(expression) == names
