"""What every test run has in common."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# The same examples in every run; a failing one is printed. No time limits: two cores are shared with others.
settings.register_profile("quiclb", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("quiclb")

# Root in CI has everything that any test needs: what is skipped there has lost its meaning, and nobody would notice.
NO_SKIPS = os.environ.get("CI") == "true" and os.geteuid() == 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"not run, although root in CI can run it: {reason}"
    return report
