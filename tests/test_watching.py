"""Files that are watched, as editors and mounted ConfigMaps replace them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from lb.watching import signature, watch

PATIENCE = 10.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(0.001)


def test_every_way_to_change_a_file_is_seen_and_told_once(tmp_path: Path) -> None:
    asyncio.run(_every_way(tmp_path))


async def _every_way(tmp_path: Path) -> None:
    config, key = tmp_path / "lb.yaml", tmp_path / "cid.key"
    config.write_text("one")
    told = 0
    files = [config]

    async def changed() -> None:
        nonlocal told
        told += 1

    looks = 0

    def looked() -> list[Path]:
        nonlocal looks
        looks += 1
        return files

    task = asyncio.create_task(watch(looked, changed, interval=0.005))
    try:
        await until(lambda: looks == 1)
        config.write_text("two, in place")
        await until(lambda: told == 1)
        (tmp_path / "new").write_text("three, moved there")
        (tmp_path / "new").replace(config)
        await until(lambda: told == 2)
        # What the new configuration names is watched from then on.
        files.append(key)
        config.write_text("four, with a key")
        await until(lambda: told == 3)
        key.write_text("secret")
        await until(lambda: told == 4)
        config.unlink()
        await until(lambda: told == 5)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_mounted_configmap_changes_by_a_symlink(tmp_path: Path) -> None:
    """The kubelet writes a new directory and moves a symlink to it over the old one: no file is ever written to."""
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "lb.yaml").write_text("same length")
        os.utime(tmp_path / version / "lb.yaml", (1, 1))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "lb.yaml").symlink_to("..data/lb.yaml")
    before = signature([tmp_path / "lb.yaml"])
    (tmp_path / "..tmp").symlink_to("v2")
    (tmp_path / "..tmp").replace(tmp_path / "..data")
    assert signature([tmp_path / "lb.yaml"]) != before


def test_what_is_written_while_the_files_are_read_is_not_missed(tmp_path: Path) -> None:
    asyncio.run(_written_meanwhile(tmp_path))


async def _written_meanwhile(tmp_path: Path) -> None:
    config = tmp_path / "lb.yaml"
    config.write_text("one")
    read: list[str] = []

    async def changed() -> None:
        read.append(config.read_text())
        if len(read) == 1:
            config.write_text("three, while two is being applied")

    as_read = signature([config])
    config.write_text("two, before anybody watches")
    task = asyncio.create_task(watch(lambda: [config], changed, known=as_read, interval=0.005))
    try:
        await until(lambda: len(read) == 2)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert read == ["two, before anybody watches", "three, while two is being applied"]
