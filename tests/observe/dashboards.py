"""What the committed dashboards ask Prometheus, and which metrics there are to ask for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
NAMES = ("fleet", "connection-ids")

# Prometheus' own.
BUILT_IN = {"up", "ALERTS"}


class Query(NamedTuple):
    """One expression of a panel, with Grafana's variables still in it."""

    dashboard: str
    panel: str
    expression: str

    def with_values(self, interval: str = "5m", span: str = "1h", instance: str = ".*", service: str = ".*") -> str:
        """The expression as Grafana would send it."""
        given = {"__rate_interval": interval, "__range": span, "instance": instance, "service": service}
        return re.sub(r"\$(\w+)", lambda found: given[found[1]], self.expression)


def dashboard(name: str) -> dict[str, Any]:
    return json.loads((GRAFANA / f"{name}.json").read_text())  # type: ignore[no-any-return]


def queries() -> list[Query]:
    return [
        Query(name, panel["title"], target["expr"])
        for name in NAMES
        for panel in dashboard(name)["panels"]
        for target in panel.get("targets", [])
    ]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def documented() -> set[str]:
    """The metrics of docs/metrics.md, which tests/test_metrics.py compares with those there are."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    return set(re.findall(r"^\| `([a-z_]+)` \| (?:counter|gauge) \|", text, re.MULTILINE))


def metrics_in(expression: str) -> set[str]:
    """The metrics that an expression reads: names in front of a selector, or by themselves."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right) *\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", bare)
    words = set(re.findall(r"[a-zA-Z_:][\w:]*", bare))
    functions = set(re.findall(r"([a-zA-Z_]\w*) *\(", bare))
    return words - functions - {"and", "or", "unless", "offset", "bool"}
