"""quinn's adapter does what every server behind a balancer has to do."""

from __future__ import annotations

import pytest

from backend.adapters.registry import ADAPTERS, BUILT
from tests.adapters.several_clients import SeveralClients

pytestmark = pytest.mark.e2e


class TestQuinn(SeveralClients):
    adapter = ADAPTERS["quinn"]
    unit_tests = (
        "cargo",
        "test",
        "--release",
        "--locked",
        "--offline",
        "--target-dir",
        str(BUILT / "quinn" / "target"),
    )
