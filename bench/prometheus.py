"""A real Prometheus on loopback that scrapes balancers, with the rules of the project."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lb.address import Address

RULES = Path(__file__).parents[1] / "deploy" / "prometheus" / "rules.yml"
START_PATIENCE = 60.0  # seconds
STOP_PATIENCE = 20.0  # seconds


class PrometheusError(Exception):
    """What Prometheus said instead of an answer."""


class Prometheus:
    """A running Prometheus."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query: a list of series. Raises PrometheusError."""
        return self._get("query", query=expression)["result"]  # type: ignore[no-any-return]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The same for a span of time, in seconds since 1970."""
        return self._get("query_range", query=expression, start=start, end=end, step=step)["result"]  # type: ignore[no-any-return]

    def value(self, expression: str) -> float | None:
        """The value of the only series; None if there is none. Raises PrometheusError if there are several."""
        found = self.query(expression)
        if len(found) > 1:
            raise PrometheusError(f"{expression}: {len(found)} series")
        return float(found[0]["value"][1]) if found else None

    def rules(self) -> list[dict[str, Any]]:
        """All rules, with their health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5) as page:
            return page.status == 200  # type: ignore[no-any-return]
        return False

    def _get(self, path: str, **parameters: object) -> dict[str, Any]:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as page:
                return json.load(page)["data"]  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            raise PrometheusError(json.load(error)["error"]) from error


def find(name: str) -> str | None:
    """The path of a program of Prometheus: `prometheus` or `promtool`."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@contextlib.contextmanager
def prometheus(directory: Path, *targets: Address, interval: str = "500ms") -> Iterator[Prometheus]:
    """Prometheus, scraping balancers as `job="quiclb"`, as long as the block lasts. Raises PrometheusError."""
    program = find("prometheus")
    if program is None:
        raise PrometheusError("prometheus (of Debian's prometheus) is not installed")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = Address(*sock.getsockname())
    configuration = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "quiclb", "static_configs": [{"targets": [str(t) for t in targets]}]}],
    }
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    options = {
        "config.file": file,
        "storage.tsdb.path": directory / "data",
        "web.listen-address": address,
        "query.lookback-delta": "10s",
        "log.level": "warn",
    }
    log = directory / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, *(f"--{name}={value}" for name, value in options.items())],
            stdout=output,
            stderr=output,
            env=os.environ | {"GOMAXPROCS": "1"},
        )
    try:
        made = Prometheus(address)
        give_up = time.monotonic() + START_PATIENCE
        while not made.is_ready():
            if process.poll() is not None or time.monotonic() > give_up:
                raise PrometheusError(f"it did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
