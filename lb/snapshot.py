"""Snapshot: everything that there is to report at one moment. Metrics, API, page and terminal are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lb.activity import Activity
from lb.cid import ConfigId
from lb.config import LbConfig
from lb.engine import Counters
from lb.healthcheck import HealthSnapshot
from lb.overrides import Overrides
from lb.rotation import SlotView
from lb.routing import RoutingTable


class XdpInfo(NamedTuple):
    """Where the xdp engine's program is, how it got there, and how it forwards."""

    interface: str
    mode: str  # native, generic
    forward: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of a balancer.

    `tables` are those that the engine obeys, `weights` those that they were built with, by service and backend.
    `xdp` is None with another engine. `started_at` and `reloaded_at` are seconds since 1970. `now` is the clock of
    `activity` and of health's `since`. `reloads` counts by result, `ok` or `refused`; `reload_errors` are the reasons
    if the latest one was refused. `generation` is another number after every change.
    """

    config: LbConfig
    counters: Counters
    health: HealthSnapshot
    tables: Mapping[str, RoutingTable]
    engine: str
    workers: int
    started_at: float
    now: float
    reloads: Mapping[str, int]
    reloaded_at: float
    reload_errors: tuple[str, ...] = ()
    generation: int = 0
    overrides: Overrides = field(default_factory=Overrides)
    activity: Activity = field(default_factory=Activity)
    rotation: Mapping[str, Mapping[ConfigId, SlotView]] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    xdp: XdpInfo | None = None
