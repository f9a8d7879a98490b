"""What the operator said about backends, in memory and in its file; and the file of those who were DOWN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lb.overrides import NOTHING, Change, Override, Overrides
from lb.runtimefile import read_down, read_overrides, write_down, write_overrides

SAID = Overrides(
    {
        ("web", "a"): Override(drain=True),
        ("web", "b"): Override(weight=0, fence=True),
        ("dns", "a"): Override(drain=False),
    }
)


def test_what_is_taken_back_is_as_if_it_had_never_been_said() -> None:
    changes: list[Change] = [{"drain": True}, {"weight": 7}, {"fence": True}]
    said = Overrides()
    for change in changes:
        said = said.changed("web", "a", change)
    assert said.of("web", "a") == Override(drain=True, weight=7, fence=True)
    assert said.of("web", "a").keys == ("drain", "weight", "fence")
    for taken_back in ({"drain": None}, {"weight": None}, {"fence": False}):
        said = said.changed("web", "a", taken_back)  # type: ignore[arg-type]
    assert said == Overrides()
    assert said.of("web", "a") == NOTHING


def test_overrides_of_backends_that_are_gone_are_forgotten() -> None:
    assert dict(SAID.only([("web", "a"), ("web", "z")])) == {("web", "a"): Override(drain=True)}


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "overrides.json"
    write_overrides(path, SAID)
    assert read_overrides(path) == SAID
    assert path.stat().st_mode & 0o777 == 0o600
    write_overrides(path, Overrides())
    assert read_overrides(path) == Overrides()
    assert [p.name for p in path.parent.iterdir()] == ["overrides.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        "[" * 100_000,
        json.dumps([{"service": "web", "backend": "a", "drain": 1, "weight": None, "fence": False}]),
        json.dumps([{"service": "web", "backend": "a", "drain": None, "weight": True, "fence": False}]),
        json.dumps([{"service": "web", "backend": "a", "drain": None, "weight": 1001, "fence": False}]),
        json.dumps([{"service": "web", "backend": "a", "drain": None, "weight": 1}]),
    ],
)
def test_a_file_that_makes_no_sense_says_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "overrides.json"
    path.write_text(content)
    assert read_overrides(path) == Overrides()


def test_a_file_that_is_not_there_or_not_one_says_nothing(tmp_path: Path) -> None:
    assert read_overrides(tmp_path / "overrides.json") == Overrides()
    (tmp_path / "directory").mkdir()
    assert read_overrides(tmp_path / "directory") == Overrides()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "overrides.json"
    write_overrides(path, SAID)

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lb.files.os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_overrides(path, Overrides())
    assert read_overrides(path) == SAID
    assert [p.name for p in tmp_path.iterdir()] == ["overrides.json"]


def test_who_was_down_is_known_to_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "run" / "down.json"
    assert read_down(path) == frozenset()
    down = {("web", "b", "10.0.0.2:443"), ("web", "a", "[fd00::1]:443")}
    write_down(path, down)
    assert read_down(path) == down
    for nonsense in ('{"web": "a"}', '[["web", "a"]]', '[["web", "a", 1]]', '"web"', "[[[["):
        path.write_text(nonsense)
        assert read_down(path) == frozenset()
