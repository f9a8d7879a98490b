"""reload and upgrade, and how refusals of any kind are told."""

from __future__ import annotations

import asyncio
import json

import pytest

from lb.operations import Refusal, Refused
from tests.admin.fake import Running
from tests.commands.conftest import Quiclb


def test_reload_says_what_changed(quiclb: Quiclb, balancer: Running) -> None:
    assert quiclb("reload") == (0, "services.web.backends.b0.weight: 1 -> 2\n", "")
    assert json.loads(quiclb("reload", "--json")[1]) == {
        "generation": 3,
        "changes": ["services.web.backends.b0.weight: 1 -> 2"],
    }


def test_reload_of_what_is_the_same(quiclb: Quiclb, balancer: Running) -> None:
    async def nothing(**_: object) -> tuple[str, ...]:
        return ()

    balancer.balancer.reload = nothing  # type: ignore[method-assign]
    assert quiclb("reload") == (0, "nothing changed\n", "")


def test_a_bad_file_is_told_with_every_mistake(quiclb: Quiclb, balancer: Running) -> None:
    balancer.balancer.reload_errors = ("workers: 0: expected an integer, 1 to 64", "flows: unknown key")
    status, out, err = quiclb("reload")
    assert (status, out) == (2, "")
    assert err.splitlines()[1:] == ["workers: 0: expected an integer, 1 to 64", "flows: unknown key"]
    assert balancer.balancer.generation == 1


def test_upgrade_names_the_successor(quiclb: Quiclb, balancer: Running) -> None:
    assert quiclb("upgrade") == (0, "process 4242 has taken over\n", "")
    assert json.loads(quiclb("upgrade", "--json")[1]) == {"pid": 4242}


@pytest.mark.parametrize("kind", ["conflict", "stale", "failed"])
def test_an_upgrade_that_fails_is_told_whole(quiclb: Quiclb, balancer: Running, kind: Refusal) -> None:
    async def refuse(**_: object) -> int:
        await asyncio.sleep(0)
        raise Refused(kind, "the first reason", "the second")

    balancer.balancer.upgrade = refuse  # type: ignore[method-assign]
    status, out, err = quiclb("upgrade")
    assert (status, out) == (1, "")
    assert err.startswith("quiclb: ")
    assert "the first reason" in err
    assert err.endswith("the second\n")
