"""What every test run has in common."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run; a failing one is printed. No time limits: two cores are shared with others.
settings.register_profile("quiclb", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("quiclb")
