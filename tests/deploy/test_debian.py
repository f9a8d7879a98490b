"""deploy/debian: a package is built, has what it should, and its command works where it is unpacked."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.test_container import BIN, run, wheels
from tests.deploy.units import PROJECT, UNIT

__all__ = ["wheels"]

DEBIAN = PROJECT / "deploy" / "debian"
SCRIPTS = ("build", "postinst", "prerm")

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb: not a Debian")


def test_the_scripts_are_linted() -> None:
    run(BIN / "shellcheck", *(DEBIAN / name for name in SCRIPTS))


def build(wheel: Path, directory: Path) -> Path:
    """Without third parties' packages, which are those of the tests; their place is theirs either way."""
    nothing = directory / "requirements.txt"
    nothing.touch()
    environment = {"PATH": "/usr/sbin:/usr/bin:/bin", "PYTHON": sys.executable, "REQUIREMENTS": str(nothing)}
    run("sh", DEBIAN / "build", wheel, directory, env=environment)
    (package,) = directory.glob("*.deb")
    return package


@needs_dpkg
def test_the_package_is_built_and_its_command_works(wheels: list[Path], tmp_path: Path) -> None:
    package = build(wheels[0], tmp_path)
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert run("dpkg-deb", "--field", package, "Package", "Version") == f"Package: quiclb\nVersion: {version}\n"
    assert f"python3 (>= {python})" in run("dpkg-deb", "--field", package, "Depends")

    root = tmp_path / "root"
    run("dpkg-deb", "--raw-extract", package, root)
    assert (root / "lib/systemd/system/quiclb.service").read_text() == UNIT.read_text()
    for name in ("postinst", "prerm"):
        assert (root / "DEBIAN" / name).stat().st_mode & 0o111
    command = (root / "usr/bin/quiclb").read_text().replace("/usr/lib/quiclb", f"{root}/usr/lib/quiclb:{others()}")
    (root / "usr/bin/quiclb").write_text(command)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(sys.executable)
    done = subprocess.run(
        [root / "usr/bin/quiclb", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
        env={"PATH": f"{programs}:/usr/bin:/bin"},
    )
    assert version in done.stdout


def others() -> str:
    return str(Path(pytest.__file__).parent.parent)


@needs_dpkg
def test_the_same_wheel_makes_the_same_package(wheels: list[Path], tmp_path: Path) -> None:
    made = []
    for i, wheel in enumerate(wheels):
        directory = tmp_path / str(i)
        directory.mkdir()
        made.append(build(wheel, directory).read_bytes())

    assert made[0] == made[1]
