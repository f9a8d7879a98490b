"""The rule of conftest.py: root in CI skips nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent / "conftest.py"


@pytest.mark.parametrize(
    ("ci", "user", "outcome"), [("true", 0, "1 failed"), ("true", 1000, "1 skipped"), ("", 0, "1 skipped")]
)
def test_a_skip_is_a_failure_for_root_in_ci_and_for_nobody_else(
    tmp_path: Path, ci: str, user: int, outcome: str
) -> None:
    rules = CONFTEST.read_text().replace("os.geteuid()", str(user))
    assert rules != CONFTEST.read_text()
    (tmp_path / "conftest.py").write_text(rules)
    (tmp_path / "test_it.py").write_text("import pytest\n\ndef test_it():\n    pytest.skip('no such thing here')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"CI": ci}, cwd=tmp_path)

    assert outcome in done.stdout
    assert "no such thing here" in done.stdout or outcome == "1 skipped"
