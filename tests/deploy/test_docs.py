"""docs/deploy.md: its commands are understood, its files are there, its figures are true."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml

from lb.cli import _parser
from tests.deploy.test_container import TARGETS
from tests.deploy.test_systemd import UDP_EXPOSURE, XDP_EXPOSURE
from tests.deploy.units import PROJECT

PAGE = (PROJECT / "docs" / "deploy.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = [line[2:] for block in blocks("console") for line in block.splitlines()]
INLINE = [found for found in re.findall(r"`(quiclb [a-z]+ [^`]*)`", PAGE) if found != "quiclb run --watch"]


def words_after_quiclb(command: str) -> list[str] | None:
    """A quiclb command's arguments, if there is one in a command."""
    words = shlex.split(command)
    for i, word in enumerate(words[:-1]):
        if word == "quiclb" and (i == 0 or words[i - 1] in ("quiclb", "--")):
            return words[i + 1 :]
    return None


QUICLB = [found for command in [*COMMANDS, *INLINE] if (found := words_after_quiclb(command))]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20
    assert len(QUICLB) > 8


@pytest.mark.parametrize("arguments", QUICLB, ids=" ".join)
def test_a_quiclb_command_is_understood(arguments: list[str]) -> None:
    assert _parser().parse_args(arguments).command


def test_every_file_that_is_named_is_there() -> None:
    page = re.sub(r"(?:exec|restart) deploy/quiclb", "", PAGE)  # kubectl's name of a Deployment
    named = set(re.findall(r"(?<![\w/.])((?:deploy|config|docs)/[\w./-]*[\w])", page))
    assert named
    assert [name for name in sorted(named) if not (PROJECT / name).exists()] == []


def test_the_images_targets_are_there() -> None:
    named = set(re.findall(r"--target (\w+)", PAGE))
    assert named
    assert named <= set(TARGETS)


def test_yaml_is_yaml() -> None:
    for block in blocks("yaml"):
        assert yaml.safe_load(block)


def test_the_figures_are_what_tests_hold() -> None:
    (udp, xdp) = map(float, re.findall(r"gives the unit (\d\.\d), and (\d\.\d) with", PAGE)[0])
    assert udp <= UDP_EXPOSURE
    assert xdp <= XDP_EXPOSURE
