"""A server on ngtcp2 does what every server behind a balancer has to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backend.adapters.registry import ADAPTERS, BUILT
from tests.adapters.contract import BuiltContract

pytestmark = pytest.mark.e2e


class TestNgtcp2(BuiltContract):
    # With every access to memory checked, and every octet freed at the end.
    adapter = replace(ADAPTERS["ngtcp2"], command=(str(BUILT / "ngtcp2" / "server-checked"),))
