"""hypercorn does what every server behind a balancer has to do, but for what it has no words for."""

from __future__ import annotations

import pytest

from backend.adapters.registry import ADAPTERS
from tests.adapters.contract import Contract

pytestmark = pytest.mark.e2e


class TestHypercorn(Contract):
    adapter = ADAPTERS["hypercorn"]
    wrong = ("unknown key", "config ID 7", "readable key", "not there")  # the others: tests/test_server_config.py
    gives_tickets = False
