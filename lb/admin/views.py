"""What the API answers: the shapes, as types that the OpenAPI description is made from, and how a Snapshot fills them.

Keys are those of the configuration file where it has them. Times are seconds since 1970, or seconds ago where a key
says `last` or `age`; durations are seconds. No view holds a key, a token or the seed.
"""

from __future__ import annotations

from heapq import nsmallest
from typing import Annotated, Literal, TypedDict

from lb.activity import INTERVAL, ServiceActivity
from lb.address import Address
from lb.cid import ConfigId
from lb.config import ServiceConfig
from lb.engine import BackendCounters, ServiceCounters
from lb.healthcheck import BackendHealth
from lb.keys import Phase
from lb.rotation import SlotView
from lb.router import Verdict
from lb.routing import CidSlot, RoutingTable, Unroutable
from lb.snapshot import Snapshot

FEW = 8  # server IDs of one backend and config ID that are shown

BackendState = Literal["active", "draining", "down", "dead", "fenced"]
Rights = Literal["read", "write"]


class XdpView(TypedDict):
    interface: str
    mode: Annotated[str, "Where the program is: native (in the driver) or generic."]
    forward: Annotated[str, "How packets reach backends."]


class ReloadView(TypedDict):
    at: Annotated[float, "When the configuration in force was read, in seconds since 1970."]
    taken: int
    refused: int
    errors: Annotated[list[str], "What was wrong with the file, if the latest reload was refused."]


class ResetsView(TypedDict):
    answered: int
    pushed: int


CidConfigView = TypedDict(
    "CidConfigView",
    {
        "config-id": int,
        "algorithm": Annotated[str, "plaintext, single-pass or four-pass."],
        "server-id-length": int,
        "nonce-length": int,
        "phase": Annotated[str, "prepared, active or retiring."],
        "packets": Annotated[int, "Datagrams that were routed by it since the start."],
        "packets-per-second": float,
        "last-packet": Annotated[float | None, "Seconds since the latest one; null if there was none."],
        "key-age": Annotated[float | None, "Seconds since its key file was written; null without one."],
        "guard": Annotated[float, "Seconds that it must be quiet for before its config ID is free."],
        "free-in": Annotated[float | None, "Seconds until then; null while it is not retiring."],
        "resets": Annotated[bool, "Whether there is a reset key."],
    },
)

SlotJson = TypedDict(
    "SlotJson",
    {
        "config-id": int,
        "phase": Annotated[str, "prepared, active, retiring or free."],
        "algorithm": Annotated[str | None, "null if the config ID is free."],
        "packets": int,
        "packets-per-second": float,
        "last-packet": float | None,
        "guard": float,
        "free-in": float | None,
        "may-be-freed": bool,
        "key-age": float | None,
    },
)

BackendView = TypedDict(
    "BackendView",
    {
        "name": str,
        "address": str,
        "state": BackendState,
        "since": Annotated[float | None, "When it got into this state, in seconds since 1970; null if not known."],
        "drain": Annotated[bool, "Whether it is to get no new connections, by the file or by the operator."],
        "fence": Annotated[bool, "Whether the operator declared it dead."],
        "overridden": Annotated[
            list[Literal["drain", "weight", "fence"]], "What the operator said, which is stronger than the file."
        ],
        "weight": int,
        "effective-weight": Annotated[float, "The weight that is in force now: less during a slow start."],
        "ring-share": Annotated[float, "The part of new connections that it gets, 0 to 1."],
        "flows": int,
        "datagrams-to": int,
        "datagrams-from": int,
        "octets-to": int,
        "octets-from": int,
        "packets-per-second": Annotated[float, "Datagrams to it."],
        "last-packet": Annotated[float | None, "Seconds since the latest datagram to it; null if there was none."],
        "unreachable": Annotated[int, "ICMP errors that came back."],
        "reason": Annotated[str, "Why the latest probe that failed did so; empty if none did."],
        "round-trip": Annotated[float | None, "Seconds that the latest answered probe took."],
        "probe": Annotated[dict[str, int], "Health probes, by what became of them."],
        "server-ids": Annotated[dict[str, list[str]], f"By config ID, the first {FEW} of them."],
    },
)

ServiceView = TypedDict(
    "ServiceView",
    {
        "name": str,
        "listen": list[str],
        "fail-open": Annotated[bool, "Whether the health checks are not believed."],
        "verdicts": Annotated[dict[str, int], "Datagrams from clients, by what became of them."],
        "unroutable": Annotated[
            dict[str, int], "Datagrams whose connection ID did not say where to go, by the reason."
        ],
        "moves": Annotated[int, "Flows that began in the middle of a connection."],
        "rescued": Annotated[int, "Connections that a 4-tuple balancer would have broken."],
        "resets": ResetsView,
        "cid-configs": list[CidConfigView],
        "backends": list[BackendView],
    },
)

StateView = TypedDict(
    "StateView",
    {
        "version": str,
        "engine": str,
        "workers": int,
        "xdp": XdpView | None,
        "generation": Annotated[int, "Another number after every change."],
        "started-at": float,
        "now": float,
        "reload": ReloadView,
        "flows": int,
        "flow-limit": int,
        "flows-evicted": int,
        "sockets": int,
        "socket-limit": int,
        "send-failures": Annotated[dict[str, int], "Datagrams that could not be sent on, by the reason."],
        "rights": Annotated[Rights, "What the caller may do."],
        "services": list[ServiceView],
    },
)


class ServiceHistory(TypedDict):
    verdicts: dict[str, list[float]]
    moves: list[float]
    rescued: list[float]
    resets: list[float]
    backends: Annotated[dict[str, list[float]], "Datagrams to each."]


class HistoryView(TypedDict):
    interval: Annotated[float, "Seconds between two observations, about."]
    services: Annotated[dict[str, ServiceHistory], "Per second between each two observations, newest last."]


def state(now: Snapshot, *, version: str, time: float, rights: Rights) -> StateView:
    """All of it. `time` is seconds since 1970."""
    counters = now.counters
    return {
        "version": version,
        "engine": now.engine,
        "workers": now.workers,
        "xdp": None if now.xdp is None else {"interface": now.xdp[0], "mode": now.xdp[1], "forward": now.xdp[2]},
        "generation": now.generation,
        "started-at": now.started_at,
        "now": time,
        "reload": {
            "at": now.reloaded_at,
            "taken": now.reloads.get("ok", 0),
            "refused": now.reloads.get("refused", 0),
            "errors": list(now.reload_errors),
        },
        "flows": counters.flows,
        "flow-limit": counters.flow_limit,
        "flows-evicted": counters.flows_evicted,
        "sockets": counters.sockets,
        "socket-limit": counters.socket_limit,
        "send-failures": dict(counters.failures),
        "rights": rights,
        "services": [
            _service(now, section, now.tables[section.service.name], time)
            for section in now.config.services
            if section.service.name in now.tables
        ],
    }


def backend(now: Snapshot, service: str, name: str, time: float) -> BackendView | None:
    """One backend of `state`; None if there is no such."""
    for section in now.config.services:
        table = now.tables.get(section.service.name)
        if section.service.name == service and table is not None and name in table.index:
            return _backend(now, section, table, table.index[name], time)
    return None


def history(now: Snapshot) -> HistoryView:
    return {
        "interval": INTERVAL,
        "services": {name: _history(activity) for name, activity in now.activity.services.items()},
    }


def rotation(now: Snapshot) -> dict[str, list[SlotJson]]:
    """By service, all config IDs that there is something to say about."""
    return {
        service: [_slot(now, service, config_id, view) for config_id, view in sorted(slots.items())]
        for service, slots in now.rotation.items()
    }


def _service(now: Snapshot, section: ServiceConfig, table: RoutingTable, time: float) -> ServiceView:
    service = section.service
    counted = now.counters.services.get(service.name, ServiceCounters())
    return {
        "name": service.name,
        "listen": [str(address) for address in service.listen],
        "fail-open": table.fail_open,
        "verdicts": {verdict.name.lower(): counted.verdicts[verdict] for verdict in Verdict},
        "unroutable": {reason.name.lower(): counted.unroutable[reason] for reason in Unroutable},
        "moves": counted.moves,
        "rescued": counted.rescued,
        "resets": {"answered": counted.verdicts[Verdict.RESET], "pushed": counted.resets_pushed},
        "cid-configs": [_cid_config(now, section, slot) for slot in service.cid_slots],
        "backends": [_backend(now, section, table, place, time) for place in range(len(table.backends))],
    }


def _cid_config(now: Snapshot, section: ServiceConfig, slot: CidSlot) -> CidConfigView:
    config, name = slot.config, section.service.name
    view = now.rotation.get(name, {}).get(config.config_id) or SlotView(
        phase=section.phases.get(config.config_id, Phase.ACTIVE),
        packets=0,
        last_packet=None,
        guard=section.rotation.guard,
        free_in=None,
        may_be_freed=False,
        algorithm=config.algorithm,
        key_age=None,
    )
    return {
        "config-id": config.config_id,
        "algorithm": config.algorithm,
        "server-id-length": config.server_id_length,
        "nonce-length": config.nonce_length,
        "phase": str(view.phase),
        "packets": view.packets,
        "packets-per-second": now.activity.config_id(name, config.config_id).rate,
        "last-packet": view.last_packet,
        "key-age": view.key_age,
        "guard": view.guard,
        "free-in": view.free_in,
        "resets": slot.reset_key is not None,
    }


def _slot(now: Snapshot, service: str, config_id: ConfigId, view: SlotView) -> SlotJson:
    return {
        "config-id": config_id,
        "phase": str(view.phase),
        "algorithm": view.algorithm,
        "packets": view.packets,
        "packets-per-second": now.activity.config_id(service, config_id).rate,
        "last-packet": view.last_packet,
        "guard": view.guard,
        "free-in": view.free_in,
        "may-be-freed": view.may_be_freed,
        "key-age": view.key_age,
    }


def _backend(now: Snapshot, section: ServiceConfig, table: RoutingTable, place: int, time: float) -> BackendView:
    service, backend = section.service.name, table.backends[place]
    name = backend.name
    said = now.overrides.of(service, name)
    services = now.counters.services.get(service)
    counted = (services.backends.get(name) if services is not None else None) or BackendCounters()
    health = now.health.get(service, {}).get(name, BackendHealth())
    gauge = now.activity.backend(service, name)
    weight = backend.weight if said.weight is None else said.weight
    return {
        "name": name,
        "address": str(Address(*backend.address)),
        "state": _state(table, place),
        "since": None if health.since is None else time - (now.now - health.since),
        "drain": name in section.draining if said.drain is None else said.drain,
        "fence": said.fence,
        "overridden": list(said.keys),  # type: ignore[arg-type] # these three they are
        "weight": weight,
        "effective-weight": now.weights.get(service, {}).get(name, weight),
        "ring-share": table.shares[place],
        "flows": counted.flows,
        "datagrams-to": counted.datagrams_to,
        "datagrams-from": counted.datagrams_from,
        "octets-to": counted.octets_to,
        "octets-from": counted.octets_from,
        "packets-per-second": gauge.rate,
        "last-packet": None if gauge.last_seen is None else max(0.0, now.now - gauge.last_seen),
        "unreachable": counted.unreachable,
        "reason": health.reason,
        "round-trip": health.round_trip,
        "probe": dict(health.results),
        "server-ids": {
            str(config_id): [server_id.hex() for server_id in nsmallest(FEW, ids)]
            for config_id, ids in sorted(backend.server_ids.items())
        },
    }


def _state(table: RoutingTable, place: int) -> BackendState:
    name = table.backends[place].name
    if name in table.fenced:
        return "fenced"
    if name in table.dead:
        return "dead"
    return STATES[table.states[place]]


STATES: tuple[BackendState, ...] = ("active", "draining", "down")  # in the order of lb.routing.BackendState


def _history(activity: ServiceActivity) -> ServiceHistory:
    return {
        "verdicts": {verdict.name.lower(): activity.verdicts[verdict].series() for verdict in Verdict},
        "moves": activity.moves.series(),
        "rescued": activity.rescued.series(),
        "resets": activity.resets.series(),
        "backends": {name: gauge.series() for name, gauge in activity.backends.items()},
    }
