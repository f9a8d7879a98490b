"""The loaded program, once for each way of loading it; and what a run tells at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from lb.forward import Forward
from tests.xdp import bpf

Summary: TypeAlias = list[str]
SUMMARY = pytest.StashKey[Summary]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUMMARY] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[SUMMARY]:
        terminalreporter.section("xdp")
        for line in config.stash[SUMMARY]:
            terminalreporter.write_line(line)


@pytest.fixture
def summary(pytestconfig: pytest.Config) -> Summary:
    """Lines that are printed when all tests are over."""
    return pytestconfig.stash[SUMMARY]


@pytest.fixture(scope="session")
def loaded() -> Iterator[Callable[..., bpf.Balancer]]:
    """Balancers by their options, each loaded when somebody first asks for it."""
    reason = bpf.missing()
    if reason:
        pytest.skip(reason)
    there: dict[str, bpf.Balancer] = {}

    def load(forward: Forward, **options: Any) -> bpf.Balancer:
        key = repr((forward, sorted(options.items())))
        if key not in there:
            there[key] = bpf.Balancer(forward, **options)
        return there[key]

    yield load
    for balancer in there.values():
        balancer.close()


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Limits and caches are each CPU's own: stay on one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)
