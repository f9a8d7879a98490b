"""quic-go's adapter does what every server behind a balancer has to do."""

from __future__ import annotations

import pytest

from backend.adapters.registry import ADAPTERS
from tests.adapters.several_clients import SeveralClients

pytestmark = pytest.mark.e2e


class TestQuicGo(SeveralClients):
    adapter = ADAPTERS["quic-go"]
    keeps_reset_key = True
    unit_tests = ("go", "test", "./...")
