"""What `quiclb check` has understood of a configuration, for people and for programs; no secrets in it."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lb.cid import CidConfig
from lb.config import (
    AdminConfig,
    Forward,
    HealthConfig,
    LbConfig,
    Limits,
    LogConfig,
    Phase,
    Probe,
    ResetConfig,
    RotationConfig,
    ServiceConfig,
    XdpConfig,
)
from lb.reset_scheme import Keys
from lb.routing import RING_SLOTS, BackendState, CidSlot, RoutingTable, UnknownServer
from lb.schema import Record

FEW = 8  # server IDs of one backend that are printed
KERNELS_FIRST_PORT = 32_768  # of net.ipv4.ip_local_port_range, unless somebody changed it
MIN_GOOD_SERVER_ID = 2  # octets; with one, chance alone makes up to every CID somebody's


def describe(config: LbConfig) -> dict[str, Any]:
    """The configuration as values that JSON has, in the words of the file."""
    return {
        "engine": config.engine,
        "workers": config.workers,
        "interface": config.interface,
        "forward": config.forward.name.lower() if config.engine == "xdp" else None,
        "xdp": Record(XdpConfig).to_json(config.xdp) if config.engine == "xdp" else None,
        "runtime-directory": None if config.runtime_directory is None else str(config.runtime_directory),
        "admin": Record(AdminConfig).to_json(config.admin),
        "metrics": None if config.metrics is None else str(config.metrics),
        "log": Record(LogConfig).to_json(config.log),
        "limits": Record(Limits).to_json(config.limits),
        "services": [_service(service) for service in config.services],
        "advice": [{"path": path, "message": message} for path, message in advice(config)],
    }


def advice(config: LbConfig) -> Iterator[tuple[str, str]]:
    """What is allowed and may be meant, but may be regretted: path and message."""
    if config.engine == "xdp":
        yield from _xdp_advice(config)
    admin = config.admin
    if admin.certificate_file is None and (admin.read_token_file or admin.write_token_file):
        yield "admin", "tokens without certificate-file: whoever can listen on the way can use them"
    for i, section in enumerate(config.services):
        service = section.service
        if not service.cid_slots:
            yield f"services[{i}]", "no cid-configs: new addresses of a client mean another server"
        if not service.seed:
            yield f"services[{i}]", "no seed: anybody can tell which server a client's address leads to"
        for j, slot in enumerate(service.cid_slots):
            path = f"services[{i}].cid-configs[{j}]"
            if slot.config.key is None:
                yield path, "plaintext: whoever sees a CID sees which server it leads to, and can choose one"
            if slot.config.server_id_length < MIN_GOOD_SERVER_ID:
                yield path, "server IDs of 1 octet: many CIDs that nobody made will seem to be some server's"
            if slot.reset_key is None:
                yield path, "no reset-key-file: clients of a dead server wait out their idle timeout"
        if section.resets.keys is Keys.SHARED and any(slot.reset_key for slot in service.cid_slots):
            yield (
                f"services[{i}].resets.keys",
                "shared: each server can end the connections of all, and so can whoever gets a packet to a wrong one",
            )


def _xdp_advice(config: LbConfig) -> Iterator[tuple[str, str]]:
    mode = config.forward.name.lower()
    if config.forward is Forward.NAT and config.xdp.nat_ports[-1] >= KERNELS_FIRST_PORT:
        yield (
            "xdp.nat-ports",
            f"Linux gives its own sockets ports from {KERNELS_FIRST_PORT} (net.ipv4.ip_local_port_range): "
            "answers to those among these ports may go to clients",
        )
    if config.xdp.source and config.forward in (Forward.DNAT, Forward.L2):
        yield "xdp.source", f"forward: {mode} has no use for it: packets keep their sender's address"
    if config.limits.sockets is not None:
        yield "limits.sockets", "engine: xdp has no use for it"
    if config.log.flows:
        yield "log.flows", "engine: xdp has no use for it: quiclb xdp sample shows packets"


def render(name: str, described: Mapping[str, Any]) -> str:
    """A description as text, for the file `name`."""
    metrics = f"metrics {'at ' + described['metrics'] if described['metrics'] else 'not served'}"
    if described["xdp"] is None:
        directory = described["runtime-directory"] or "by default"
        engine = f"engine udp, workers {described['workers']}, runtime directory {directory}"
    else:
        engine = f"engine xdp on {described['interface']}, forward {described['forward']}"
    lines = [f"{name}: ok", f"{engine}, {metrics}"]
    admin = {name: value for name, value in described["admin"].items() if value not in (None, [])}
    lines += [f"xdp: {_pairs(described['xdp'])}"] if described["xdp"] else []
    lines.append(f"admin: {_pairs(admin) or 'by default'}")
    lines += [f"{section}: {_pairs(described[section])}" for section in ("log", "limits")]
    for service in described["services"]:
        lines.append(f"service {service['name']}")
        lines.append(f"  listen {', '.join(service['listen'])}")
        lines.append(f"  seed {'given' if service['seed'] else 'none'}, unknown-server {service['unknown-server']}")
        lines += [f"  {_cid_config_line(cid_config)}" for cid_config in service["cid-configs"]]
        lines += [f"  {_backend_line(backend)}" for backend in service["backends"]]
        asks_for_a_page = service["health"]["probe"] == Probe.HTTP3
        health = {name: value for name, value in service["health"].items() if name != "http3" or asks_for_a_page}
        lines.append(f"  health: {_pairs(health)}")
        lines += [f"  {section}: {_pairs(service[section])}" for section in ("resets", "rotation")]
    machine = described.get("machine")
    if machine is not None and not machine["lacks"]:
        verified = machine["verified-instructions"]
        program = "" if verified is None else f"; the kernel's verifier took the program, after {verified} instructions"
        lines.append(f"this machine: ok{program}")
    lines += [f"note: {note['path']}: {note['message']}" for note in described["advice"]]
    return "\n".join(lines) + "\n"


def fingerprint(key: bytes) -> str:
    """32 bits by which two people can tell that they have the same key; too few to find the key by."""
    return hmac.digest(key, b"quiclb key fingerprint", "sha256")[:4].hex()


def aes_blocks(config: CidConfig) -> int:
    """AES operations that the server ID of one CID takes (sections 5.4.1 and 5.5.2)."""
    if config.algorithm != "four-pass":
        return int(config.algorithm == "single-pass")
    return 4 if 2 * config.server_id_length > config.routing_block_length else 3


def _service(section: ServiceConfig) -> dict[str, Any]:
    service = section.service
    states = dict.fromkeys(section.draining, BackendState.DRAINING)
    ring = RoutingTable.build(service, states).ring
    slots_of = Counter(ring)
    return {
        "name": service.name,
        "listen": [str(address) for address in service.listen],
        "seed": bool(service.seed),
        "unknown-server": UnknownServer(service.unknown_server).name.lower(),
        "cid-configs": [_cid_config(slot, section) for slot in service.cid_slots],
        "backends": [
            {
                "name": backend.name,
                "address": str(backend.address),
                "server-ids": {
                    str(config_id): sorted(server_id.hex() for server_id in ids)
                    for config_id, ids in backend.server_ids.items()
                },
                "weight": backend.weight,
                "drain": backend.name in section.draining,
                "ring-share": round(slots_of[position] / RING_SLOTS, 4),
            }
            for position, backend in enumerate(service.backends)
        ],
        "health": Record(HealthConfig).to_json(section.health),
        "resets": Record(ResetConfig).to_json(section.resets),
        "rotation": Record(RotationConfig).to_json(section.rotation),
    }


def _cid_config(slot: CidSlot, section: ServiceConfig) -> dict[str, Any]:
    config = slot.config
    return {
        "config-id": config.config_id,
        "phase": str(section.phases.get(config.config_id, Phase.ACTIVE)),
        "algorithm": config.algorithm,
        "aes-blocks-per-packet": aes_blocks(config),
        "server-id-length": config.server_id_length,
        "nonce-length": config.nonce_length,
        "appended-length": config.appended_length,
        "cid-length": config.cid_length,
        "encodes-length": config.encodes_length,
        "key-fingerprint": None if config.key is None else fingerprint(config.key),
        "reset-key-fingerprint": None if slot.reset_key is None else fingerprint(slot.reset_key),
    }


def _cid_config_line(described: Mapping[str, Any]) -> str:
    blocks = described["aes-blocks-per-packet"]
    cost = "no AES" if not blocks else f"{blocks} AES block{'s' if blocks > 1 else ''} per packet"
    if blocks > 1:
        cost += " (1 if the lengths added up to 16)"
    appended = f" + {described['appended-length']} appended" if described["appended-length"] else ""
    return (
        f"config ID {described['config-id']}: {described['phase']}, {described['algorithm']}, "
        f"1 + {described['server-id-length']} server ID + {described['nonce-length']} nonce{appended}"
        f" = {described['cid-length']} octets{', the first says so' if described['encodes-length'] else ''}, {cost}, "
        f"key {described['key-fingerprint'] or 'none'}, reset key {described['reset-key-fingerprint'] or 'none'}"
    )


def _backend_line(described: Mapping[str, Any]) -> str:
    ids = "; ".join(
        f"{config_id}: {', '.join(ids[:FEW])}{f' and {len(ids) - FEW} more' if len(ids) > FEW else ''}"
        for config_id, ids in described["server-ids"].items()
    )
    return (
        f"backend {described['name']} {described['address']}, weight {described['weight']}, "
        f"{'draining, ' if described['drain'] else ''}{described['ring-share']:.1%} of new connections"
        f"{', server IDs ' + ids if ids else ''}"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} ({_pairs(value)})" if isinstance(value, dict) else f"{name} {_word(value)}"
        for name, value in values.items()
    )


def _word(value: object) -> str:
    if value is None:
        return "by default"
    if isinstance(value, list):
        return " and ".join(value) or "by default"
    return str(value).lower() if isinstance(value, bool) else str(value)
