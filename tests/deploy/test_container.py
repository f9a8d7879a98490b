"""deploy/container: the Dockerfile is sound, and what its steps make works, with a builder or without."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.units import FOR_XDP, PROJECT, UNIT, words
from tests.files import examples

CONTAINER = PROJECT / "deploy" / "container"
DOCKERFILE = CONTAINER / "Dockerfile"
BIN = Path(sys.executable).parent
TARGETS = ("udp", "xdp", "backend")


def run(*command: str | Path, cwd: Path = PROJECT, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stages() -> dict[str, list[list[str]]]:
    """The instructions of each stage, in words, without comments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[list[str]]] = {}
    for line in filter(None, text.splitlines()):
        instruction = shlex.split(line, comments=False, posix=True)
        if instruction[0] == "FROM":
            found[instruction[-1]] = []
        elif found:
            found[list(found)[-1]].append(instruction)
    return found


def copied() -> list[str]:
    """What is copied from the project, by any stage."""
    every = (step for steps in stages().values() for step in steps)
    return [name for step in every if step[0] == "COPY" and "--from" not in step[1] for name in step[1:-1]]


def test_the_dockerfile_and_scripts_are_linted() -> None:
    assert run(BIN / "hadolint", "--failure-threshold", "style", DOCKERFILE) == ""
    run(BIN / "shellcheck", CONTAINER / "lock")


def test_whoever_is_not_xdp_is_not_root() -> None:
    users = {name: [step[1] for step in steps if step[0] == "USER"] for name, steps in stages().items()}
    assert (users["udp"], users["backend"], users["xdp"]) == (["65532:65532"], ["65532:65532"], ["0:0"])
    assert list(stages())[-1] == "udp"  # what is built without a target


def test_the_build_is_given_what_it_copies_and_nothing_else() -> None:
    """A key beside the sources must not get into a layer."""
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert {
        next((entry for entry in let_in if (name + "/").startswith(entry + "/")), name) for name in copied()
    } == let_in
    for name in copied():
        assert (PROJECT / name).exists()


def requirements() -> dict[str, str]:
    """Names and versions that are pinned."""
    text = (CONTAINER / "requirements.txt").read_text().replace("\\\n", " ")
    found: dict[str, str] = {}
    for line in text.splitlines():
        assert "--hash=sha256:" in line
        requirement = Requirement(line.partition(" --hash")[0])
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found[canonicalize_name(requirement.name)] = pin.version
    return found


def needed(requirement: Requirement) -> Iterator[Requirement]:
    """A requirement and all that what is installed here asks for in its turn."""
    yield requirement
    for line in metadata.requires(requirement.name) or []:
        further = Requirement(line)
        if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in (requirement.extras or {""})):
            yield from needed(further)


def test_the_locked_versions_are_those_that_the_project_asks_for() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    locked = requirements()
    for line in [*project["dependencies"], *project["optional-dependencies"]["http3"]]:
        for requirement in needed(Requirement(line)):
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: deploy/container/lock makes it anew"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheel, made twice as the Dockerfile says, in two places, from what is copied there."""
    if shutil.which("clang") is None:
        pytest.skip("no clang: install it")
    made: list[Path] = []
    for name in ("one", "another-place"):
        source = tmp_path_factory.mktemp(name)
        steps = [step for step in stages()["wheel"] if step[0] == "COPY"]
        for *names, target in (step[1:] for step in steps):
            for copy in names:
                path = source / (target if Path(target).name == Path(copy).name else Path(target) / Path(copy).name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if (PROJECT / copy).is_dir():
                    shutil.copytree(PROJECT / copy, path, ignore=shutil.ignore_patterns("__pycache__", "*.bpf.o"))
                else:
                    shutil.copy(PROJECT / copy, path)
        run("sh", ".ci/build-bpf", cwd=source)
        (arguments,) = (step for step in stages()["wheel"] if step[0] == "RUN" and "--no-build-isolation" in step)
        command = arguments[arguments.index("python") + 1 :]
        command[command.index("/wheels")] = str(source / "wheels")
        environment = {"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": "315532800", "HOME": str(source)}
        run(sys.executable, *command, "--no-index", cwd=source, env=environment)
        made += (source / "wheels").glob("quiclb-*.whl")
    return made


def test_the_same_sources_make_the_same_wheel(wheels: list[Path]) -> None:
    one, another = wheels
    assert one.name == another.name
    assert one.read_bytes() == another.read_bytes()


def test_the_wheel_has_all_of_lb_and_nothing_else(wheels: list[Path]) -> None:
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = (PROJECT / "lb").rglob("*")
    suffixes = {".py", ".html", ".css", ".js", ".svg", ".c", ".h", ".typed"}
    wanted = {str(path.relative_to(PROJECT)) for path in sources if path.suffix in suffixes or path.name == "py.typed"}

    assert names == wanted | {"lb/xdp/quiclb.bpf.o", "lb/xdp/decap.bpf.o"}
    assert any(name.startswith("lb/admin/page/") for name in names)


@pytest.fixture(scope="module")
def environment(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/opt/quiclb as the Dockerfile makes it, but for third parties' packages, which are those of the tests."""
    directory = tmp_path_factory.mktemp("opt") / "quiclb"
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    python = directory / "bin" / "python"
    install = ["install", "--no-cache-dir", "--no-compile", "--no-deps", "--no-index"]
    run(sys.executable, "-m", "pip", "--python", python, *install, wheels[0])
    run(python, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", directory / "lib")
    (site,) = (directory / "lib").glob("python3.*/site-packages")
    (site / "others.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    return directory


def test_the_command_works_outside_the_checkout(environment: Path, tmp_path: Path) -> None:
    quiclb = environment / "bin" / "quiclb"
    examples(tmp_path)
    alone = {"PATH": f"{environment}/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}

    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert version in run(quiclb, "--version", cwd=tmp_path, env=alone)
    checked = json.loads(run(quiclb, "check", "--json", tmp_path / "quiclb.yaml", cwd=tmp_path, env=alone))
    assert checked["services"]
    where = run(environment / "bin" / "python", "-c", "import lb; print(lb.__path__[0])", cwd=tmp_path, env=alone)
    assert Path(where.strip()).is_relative_to(environment)


def test_what_the_images_run_is_understood(environment: Path, tmp_path: Path) -> None:
    """CMD and HEALTHCHECK: all their options are there; what fails is that there is no such file."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    commands = [json.loads(found) for found in re.findall(r'CMD (\["(?:quiclb|run)".*\])', text)]
    assert len(commands) == 2
    for command in commands:
        arguments = command[1:] if command[0] == "quiclb" else command
        done = subprocess.run(
            [environment / "bin" / "quiclb", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, "/etc/quiclb/quiclb.yaml: cannot be read" in done.stderr) == (2, True), done.stderr


def test_the_units_and_the_images_need_the_same() -> None:
    (install,) = (step for step in stages()["xdp"] if step[0] == "RUN")
    assert "libbpf1" in install
    assert "CAP_BPF" in words(UNIT, FOR_XDP, of="CapabilityBoundingSet")


def builder() -> str | None:
    """A program here that builds images, now."""
    for program in ("docker", "podman", "buildah"):
        ask: Sequence[str] = [program, "info"]
        if shutil.which(program) and subprocess.run(ask, capture_output=True, timeout=60, check=False).returncode == 0:
            return program
    return None


BUILDER = builder()

if BUILDER is not None:
    # Where there is no builder the test is not there, rather than skipped: what is skipped in CI counts as failed.
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("target", TARGETS)
    def test_the_image_is_built_and_runs(target: str) -> None:
        assert BUILDER is not None
        tag = f"quiclb-test:{target}"
        run(BUILDER, "build", "-f", DOCKERFILE, "--target", target, "-t", tag, ".")
        assert run(BUILDER, "run", "--rm", "--network", "none", tag, "--help").startswith("usage:")
