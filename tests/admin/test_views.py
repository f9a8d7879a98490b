"""lb/admin/views.py: a snapshot as the API shows it. Values that differ, so that a mix-up shows."""

from __future__ import annotations

from dataclasses import replace

from lb.activity import Activity
from lb.admin import views
from lb.cid import ConfigId
from lb.config import LbConfig, ServiceConfig
from lb.engine import BackendCounters, Counters, Drop, ServiceCounters
from lb.healthcheck import BackendHealth
from lb.keys import Phase
from lb.overrides import Override, Overrides
from lb.rotation import SlotView
from lb.router import Verdict
from lb.routing import BackendState, RoutingTable, Unroutable
from lb.snapshot import Snapshot, XdpInfo
from tests.builders import server_id, service

NOW = 1_800_000_000.0
STATES = {
    "b0": BackendState.ACTIVE,
    "b1": BackendState.DRAINING,
    "b2": BackendState.DOWN,
    "b3": BackendState.DOWN,
    "b4": BackendState.ACTIVE,
}


def counted(scale: int) -> Counters:
    """Every counter another number."""
    web = ServiceCounters(
        verdicts=[scale * (1 + i) for i in range(len(Verdict))],
        unroutable=[scale * (31 + i) for i in range(len(Unroutable))],
        config_ids=[scale * (41 + i) for i in range(7)],
        moves=scale * 51,
        rescued=scale * 52,
        resets_pushed=scale * 53,
        backends={"b0": BackendCounters(scale * 61, 62, 63, 64, 65, 66)},
    )
    failures = {reason: 71 + i for i, reason in enumerate(Drop.ALL)}
    return Counters({"web": web}, failures, flows=81, flow_limit=82, flows_evicted=83, sockets=84, socket_limit=85)


def snapshot() -> Snapshot:
    activity = Activity()
    for second, scale in enumerate((1, 2, 4)):
        activity.observe(counted(scale), 100.0 + second)
    made = service(5)
    return Snapshot(
        config=LbConfig(services=(ServiceConfig(service=made, draining=frozenset(["b1"])),)),
        counters=counted(4),
        health={"web": {"b0": BackendHealth(round_trip=0.25, since=90.0, reason="timeout", results={"answered": 5})}},
        tables={"web": RoutingTable.build(made, STATES, ["b3"], fenced=["b4"])},
        engine="xdp",
        workers=1,
        started_at=NOW - 1000,
        now=110.0,
        reloads={"ok": 91, "refused": 92},
        reloaded_at=NOW - 500,
        reload_errors=("no",),
        generation=7,
        overrides=Overrides({("web", "b0"): Override(weight=9), ("web", "b4"): Override(fence=True, drain=False)}),
        activity=activity,
        rotation={"web": {ConfigId(0): SlotView(Phase.RETIRING, 164, 8.0, 300.0, 292.0, False, "single-pass", 77.0)}},
        weights={"web": {"b0": 4.5}},
        xdp=XdpInfo("eth0", "native", "l2"),
    )


def state(now: Snapshot) -> views.StateView:
    return views.state(now, version="1.2", time=NOW, rights="read")


def test_everything_is_shown_where_it_belongs() -> None:
    shown = state(snapshot())
    (web,) = shown["services"]

    assert {name: value for name, value in shown.items() if name != "services"} == {
        "version": "1.2",
        "engine": "xdp",
        "workers": 1,
        "xdp": {"interface": "eth0", "mode": "native", "forward": "l2"},
        "generation": 7,
        "started-at": NOW - 1000,
        "now": NOW,
        "reload": {"at": NOW - 500, "taken": 91, "refused": 92, "errors": ["no"]},
        "flows": 81,
        "flow-limit": 82,
        "flows-evicted": 83,
        "sockets": 84,
        "socket-limit": 85,
        "send-failures": {reason: 71 + i for i, reason in enumerate(Drop.ALL)},
        "rights": "read",
    }
    assert web["verdicts"] == {verdict.name.lower(): 4 * (1 + i) for i, verdict in enumerate(Verdict)}
    assert web["unroutable"] == {reason.name.lower(): 4 * (31 + i) for i, reason in enumerate(Unroutable)}
    assert (web["moves"], web["rescued"]) == (204, 208)
    assert web["resets"] == {"answered": 4 * (1 + Verdict.RESET), "pushed": 212}
    assert web["cid-configs"] == [
        {
            "config-id": 0,
            "algorithm": "single-pass",
            "server-id-length": 4,
            "nonce-length": 12,
            "phase": "retiring",
            "packets": 164,
            "packets-per-second": 61.5,
            "last-packet": 8.0,
            "key-age": 77.0,
            "guard": 300.0,
            "free-in": 292.0,
            "resets": True,
        }
    ]


def test_a_backend_in_full() -> None:
    now = snapshot()
    shown = views.backend(now, "web", "b0", NOW)

    assert shown == state(now)["services"][0]["backends"][0]
    assert shown == {
        "name": "b0",
        "address": "10.0.0.0:443",
        "state": "active",
        "since": NOW - 20,
        "drain": False,
        "fence": False,
        "overridden": ["weight"],
        "weight": 9,
        "effective-weight": 4.5,
        "ring-share": 1.0,
        "flows": 65,
        "datagrams-to": 244,
        "datagrams-from": 63,
        "octets-to": 62,
        "octets-from": 64,
        "packets-per-second": 91.5,
        "last-packet": 8.0,
        "unreachable": 66,
        "reason": "timeout",
        "round-trip": 0.25,
        "probe": {"answered": 5},
        "server-ids": {"0": [server_id(0).hex()]},
    }


def test_states_and_what_the_operator_said() -> None:
    backends = state(snapshot())["services"][0]["backends"]

    assert [b["state"] for b in backends] == ["active", "draining", "down", "dead", "fenced"]
    assert [b["drain"] for b in backends] == [False, True, False, False, False]
    assert [b["overridden"] for b in backends] == [["weight"], [], [], [], ["drain", "fence"]]
    assert [b["fence"] for b in backends] == [False, False, False, False, True]


def test_what_is_not_known_yet_is_null_or_nothing() -> None:
    now = replace(
        snapshot(), counters=Counters(), health={}, activity=Activity(), rotation={}, weights={}, overrides=Overrides()
    )
    backend = state(now)["services"][0]["backends"][0]
    slot = state(now)["services"][0]["cid-configs"][0]

    assert (backend["since"], backend["last-packet"], backend["round-trip"]) == (None, None, None)
    assert (backend["flows"], backend["packets-per-second"], backend["effective-weight"]) == (0, 0.0, 1)
    assert (slot["phase"], slot["packets"], slot["last-packet"], slot["key-age"]) == ("active", 0, None, None)
    assert views.history(now)["services"] == {}
    assert views.backend(now, "web", "nobody", NOW) is None
    assert views.backend(now, "nothing", "b0", NOW) is None


def test_of_many_server_ids_a_few_are_shown() -> None:
    made = service(1)
    many = replace(made.backends[0], server_ids={ConfigId(0): frozenset(server_id(i) for i in range(100))})
    made = replace(made, backends=(many,))
    now = replace(snapshot(), tables={"web": RoutingTable.build(made)})

    shown = state(now)["services"][0]["backends"][0]["server-ids"]
    assert shown == {"0": [server_id(i).hex() for i in range(views.FEW)]}


def test_history_is_per_second_and_newest_last() -> None:
    shown = views.history(snapshot())["services"]["web"]

    assert shown["verdicts"]["cid"] == [1.0, 2.0]
    assert (shown["moves"], shown["rescued"]) == ([51.0, 102.0], [52.0, 104.0])
    assert shown["resets"] == [60.0, 120.0]
    assert shown["backends"] == {"b0": [61.0, 122.0]}


def test_rotation_has_free_slots_too() -> None:
    free = SlotView("free", 0, None, 300.0, 0.0, True, None, None)
    now = snapshot()
    now = replace(now, rotation={"web": {ConfigId(3): free, **now.rotation["web"]}})

    first, second = views.rotation(now)["web"]
    assert (first["config-id"], first["phase"], first["free-in"], first["may-be-freed"]) == (
        0,
        "retiring",
        292.0,
        False,
    )
    assert (second["config-id"], second["phase"], second["algorithm"], second["may-be-freed"]) == (
        3,
        "free",
        None,
        True,
    )
