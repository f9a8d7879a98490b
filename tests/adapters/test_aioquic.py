"""The reference backend does what every server behind a balancer has to do."""

from __future__ import annotations

import pytest

from backend.adapters.registry import ADAPTERS
from tests.adapters.contract import Contract

pytestmark = pytest.mark.e2e


class TestAioquic(Contract):
    adapter = ADAPTERS["aioquic"]
    wrong = ("unknown key", "config ID 7", "readable key", "not there")  # the others: tests/test_server_config.py
