"""What adapters have to do is asserted in a module of its own, and its assertions shall say why they failed too."""

import pytest

pytest.register_assert_rewrite("tests.adapters.contract", "tests.adapters.several_clients", "tests.adapters.stand")
