"""What the keys of a balancer's file must not say together, each mistake with both places named."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lb.address import Address
from lb.cid import KEY_LENGTH, CidConfig, ConfigId, ServerId
from lb.document import Node, shown_file
from lb.forward import Forward
from lb.keyfile import read_token
from lb.keys import AdminConfig, LbConfig, Limits, Probe, ServiceConfig, ServiceKeys, XdpConfig, read_key_file
from lb.kinds import Duration
from lb.reset_scheme import Keys, Scheme
from lb.routing import Backend, CidSlot, Service
from lb.schema import INVALID, Reading, noun

# Ours.
XDP_ONLY = ("interface", "forward", "xdp")
MAX_CA_FILE = 1 << 20  # octets that are looked at
MAX_XDP_BACKENDS = 0xFFFF  # in all: rings name them in 16 bits, and one number is nobody's

H = TypeVar("H")


class Section:
    """One of `services`, as it was read, and the key files it names."""

    def __init__(self, keys: ServiceKeys, path: str, reading: Reading) -> None:
        self.keys = keys
        self.path = path
        self.configs: dict[int, CidConfig] = {}  # by position; INVALID if mistaken
        self.reset_keys: dict[int, bytes | None] = {}
        for i, cid_keys in valid(keys.cid_configs):
            where = f"{path}.cid-configs[{i}]"
            self.configs[i] = cid_keys.cid_config(where, reading)
            self.reset_keys[i] = self._read_reset_key(cid_keys.reset_key_file, f"{where}.reset-key-file", reading)
        self._check_cid_configs(reading)
        self._check_backends(reading)
        self._check_server_ids(reading)
        self._check_times(reading)
        self._check_http3(reading)
        self._check_resets(reading)

    def build(self) -> ServiceConfig:
        """The service, once there are no mistakes."""
        keys = self.keys
        has_workers = keys.resets.scheme is Scheme.NGINX
        backends = tuple(
            Backend(
                b.name,
                b.address,
                {c: frozenset(ids) for c, ids in b.server_ids.items()},
                b.weight,
                {c: tuple(ids) for c, ids in b.server_ids.items()} if has_workers else {},
            )
            for b in keys.backends
        )
        slots = tuple(CidSlot(config, self.reset_keys[i]) for i, config in self.configs.items())
        return ServiceConfig(
            service=Service(
                keys.name,
                keys.listen,
                slots,
                backends,
                keys.seed,
                keys.unknown_server,
                keys.health.panic_threshold,
                keys.resets.rule,
            ),
            health=keys.health,
            resets=keys.resets,
            rotation=keys.rotation,
            draining=frozenset(b.name for b in keys.backends if b.drain),
            phases={c.config_id: c.phase for c in keys.cid_configs},
            key_files={c.config_id: c.key_file for c in keys.cid_configs if c.key_file is not None},
            reset_key_files={c.config_id: c.reset_key_file for c in keys.cid_configs if c.reset_key_file is not None},
        )

    def server_ids(self) -> Iterable[tuple[str, int, ConfigId, ServerId]]:
        """Every server ID: path, position of its backend, config ID, octets."""
        for i, backend in valid(self.keys.backends):
            for config_id, ids in backend.server_ids.items():
                for j, server_id in valid(ids):
                    yield f"{self.path}.backends[{i}].server-ids.{config_id}[{j}]", i, config_id, server_id

    def _check_cid_configs(self, reading: Reading) -> None:
        path, configs = f"{self.path}.cid-configs", self.keys.cid_configs
        _unique(((f"{path}[{i}].config-id", keys.config_id) for i, keys in valid(configs)), reading)

    def _check_backends(self, reading: Reading) -> None:
        path, backends = f"{self.path}.backends", list(valid(self.keys.backends))
        _unique(((f"{path}[{i}].name", backend.name) for i, backend in backends), reading)
        _unique(((f"{path}[{i}].address", backend.address) for i, backend in backends), reading)
        for i, backend in backends:
            if backend.address is not INVALID and _is_nobodys(backend.address.host):
                reading.mistake(f"{path}[{i}].address", f"{backend.address}: expected the address of one machine")
        if backends and all(backend.weight == 0 for _, backend in backends):
            reading.mistake(path, "every weight is 0: expected somebody to take new connections")

    def _check_server_ids(self, reading: Reading) -> None:
        _unique(
            ((path, (config_id, server_id)) for path, _, config_id, server_id in self.server_ids()),
            reading,
            show=lambda found: f"{found[1].hex()} of config ID {found[0]}",
        )
        configs = [(i, keys) for i, keys in valid(self.keys.cid_configs) if keys.config_id is not INVALID]
        places = {keys.config_id: i for i, keys in configs}
        if self.keys.cid_configs is INVALID or len(places) != len(self.keys.cid_configs):
            return  # which configuration a server ID belongs to cannot be told
        lengths = {keys.config_id: keys.server_id_length for _, keys in configs}
        for path, _, config_id, server_id in self.server_ids():
            length = lengths.get(config_id, INVALID)
            if length is not INVALID and len(server_id) != length:
                octets = "1 octet" if len(server_id) == 1 else f"{len(server_id)} octets"
                where = f"{self.path}.cid-configs[{places[config_id]}].server-id-length"
                reading.mistake(path, f"{server_id.hex()}: {octets}, but {where} is {length}")
        for i, backend in valid(self.keys.backends):
            if backend.server_ids is INVALID:
                continue
            path = f"{self.path}.backends[{i}].server-ids"
            for config_id in backend.server_ids:
                if config_id not in places:
                    reading.mistake(f"{path}.{config_id}", f"{config_id}: expected the config-id of one of cid-configs")
            for config_id, place in places.items():
                if config_id not in backend.server_ids:
                    where = f"{self.path}.cid-configs[{place}]"
                    reading.mistake(path, f"nothing for config ID {config_id}: expected a server ID, as {where} has it")

    def _check_times(self, reading: Reading) -> None:
        health, resets = self.keys.health, self.keys.resets
        if INVALID in (health, resets) or INVALID in (health.timeout, resets.hold_off):
            return
        times = Duration(0, 0)
        if health.max_interval is not None and INVALID not in (health.max_interval, health.interval):
            where = f"{self.path}.health.interval"
            if health.max_interval < health.interval:
                reading.mistake(
                    f"{self.path}.health.max-interval",
                    f"{times.to_json(health.max_interval)}: expected at least {where}, "
                    f"which is {times.to_json(health.interval)}",
                )
        # Nobody may be declared dead before an answer to the last probe could have come.
        if health.probe is not Probe.NONE and resets.hold_off < health.timeout:
            path = f"{self.path}.resets.hold-off"
            reading.mistake(
                path,
                f"{times.to_json(resets.hold_off)}: expected at least {self.path}.health.timeout, "
                f"which is {times.to_json(health.timeout)}",
            )

    def _read_reset_key(self, name: Path | None, path: str, reading: Reading) -> Any:
        resets = self.keys.resets
        if resets is INVALID or INVALID in (resets.scheme, resets.keys):
            return INVALID if name is not None else None  # how long it is cannot be told
        lengths = resets.rule.key_lengths
        key = read_key_file(name, lengths[0], path, reading, lengths[-1])
        is_text = resets.scheme is Scheme.HAPROXY and resets.keys is Keys.SHARED
        if name is not None and is_text and isinstance(key, bytes) and not all(0x20 <= octet <= 0x7E for octet in key):
            reading.mistake(path, f"{shown_file(name)}: expected the octets of cluster-secret, a text, in hex")
        return key

    def _check_resets(self, reading: Reading) -> None:
        resets, path = self.keys.resets, f"{self.path}.resets"
        if resets is INVALID or resets.scheme is INVALID:
            return
        if resets.server_address is not None and resets.scheme is not Scheme.MVFST:
            reading.mistake(f"{path}.server-address", f"scheme: {resets.scheme} has no use for it")
        if resets.worker_number is False and resets.scheme is not Scheme.NGINX:
            reading.mistake(f"{path}.worker-number", f"scheme: {resets.scheme} has no use for it")

    def _check_http3(self, reading: Reading) -> None:
        if self.keys.health is INVALID or self.keys.health.http3 is INVALID:
            return
        path, http3 = f"{self.path}.health.http3.ca-file", self.keys.health.http3
        if http3.ca_file is None or http3.ca_file is INVALID:
            return
        try:
            if not http3.ca_file.is_file() and http3.ca_file.exists():  # a pipe would be waited for
                reading.mistake(path, f"{shown_file(http3.ca_file)}: expected a regular file")
                return
            with http3.ca_file.open("rb") as file:
                found = b"-----BEGIN CERTIFICATE-----" in file.read(MAX_CA_FILE)
        except OSError as error:
            reading.mistake(path, f"{shown_file(http3.ca_file)}: cannot be read: {error.strerror}")
            return
        if not found:
            reading.mistake(path, f"{shown_file(http3.ca_file)}: holds no certificate in PEM")
        if http3.verify is False:
            reading.mistake(path, "without verify: true nobody looks at it: expected both or neither")


def check_limits(limits: Limits, reading: Reading) -> None:
    if limits is INVALID or INVALID in (limits.idle_timeout, limits.new_flow_timeout):
        return
    if limits.new_flow_timeout > limits.idle_timeout:
        times = Duration(0, 0)
        reading.mistake(
            "limits.new-flow-timeout",
            f"{times.to_json(limits.new_flow_timeout)}: expected at most limits.idle-timeout, "
            f"which is {times.to_json(limits.idle_timeout)}",
        )


def check_admin(admin: AdminConfig, metrics: Address | None, reading: Reading) -> None:
    """Who may come in from where. `metrics` is a TCP address as well."""
    if admin is INVALID:
        return
    for name, path in (("read-token-file", admin.read_token_file), ("write-token-file", admin.write_token_file)):
        if path is not None and path is not INVALID:
            try:
                read_token(path)
            except ValueError as error:
                reading.mistake(f"admin.{name}", str(error))
    for name, is_given, needs, other in (
        ("certificate-file", admin.certificate_file is not None, "key-file", admin.key_file),
        ("key-file", admin.key_file is not None, "certificate-file", admin.certificate_file),
        ("client-ca-file", admin.client_ca_file is not None, "certificate-file", admin.certificate_file),
        ("writers", bool(admin.writers), "client-ca-file", admin.client_ca_file),
    ):
        if is_given and other is None:
            reading.mistake(f"admin.{name}", f"expected admin.{needs} as well")
    listen = list(valid(admin.listen or ()))
    _unique(((f"admin.listen[{i}]", where) for i, where in listen), reading)
    proofs = (admin.read_token_file, admin.write_token_file, admin.client_ca_file)
    for i, where in listen:
        if isinstance(where, Path):
            continue
        if where == metrics:
            reading.mistake(f"admin.listen[{i}]", f"{where}: metrics has it already")
        if all(proof is None for proof in proofs) and not ipaddress.ip_address(where.host).is_loopback:
            reading.mistake(
                f"admin.listen[{i}]",
                f"{where}: expected a loopback address or unix:PATH, "
                "or a read-token-file, write-token-file or client-ca-file",
            )


def check_engine(config: LbConfig, given: Mapping[str, Node], sections: list[Section], reading: Reading) -> None:
    """What fits one engine and not the other. `given` is the file's top level."""
    if config.engine == "udp":
        for name in XDP_ONLY:
            if name in given:
                reading.mistake(name, f"{noun(given[name])}: expected no such key, or engine: xdp")
    elif config.engine == "xdp":
        if "interface" not in given:
            reading.mistake("interface", "missing: expected the name of a network interface, or engine: udp")
        if config.workers not in (1, INVALID):
            reading.mistake(
                "workers", f"{config.workers}: expected 1 with engine: xdp, which is on every CPU by itself"
            )
        _check_sources(config.xdp, reading)
        _check_reach(config.forward, sections, reading)


def _check_sources(xdp: XdpConfig, reading: Reading) -> None:
    if xdp is INVALID:
        return
    families: dict[bool, str] = {}
    for i, host in valid(xdp.source):
        path = f"xdp.source[{i}]"
        first = families.setdefault(":" in host, path)
        if first != path:
            reading.mistake(path, f"{host}: of the same family as {first}: expected one address per family")
        if _is_nobodys(host):
            reading.mistake(path, f"{host}: expected the address of one machine")


def _check_reach(forward: Forward, sections: list[Section], reading: Reading) -> None:
    """What must hold for packets to be understood at the other end. INVALID is no forward mode at all."""
    backends = 0
    known_by: dict[Address, str] = {}
    for section in sections:
        listen = list(valid(section.keys.listen))
        for i, address in listen:
            path = f"{section.path}.listen[{i}]"
            # A backend's answer says where it comes from, and not which of our addresses its client knows.
            if forward is Forward.DNAT and (address.is_wildcard or address != listen[0][1]):
                reading.mistake(path, f"{address}: expected one listening address per service with forward: dnat")
        for i, backend in valid(section.keys.backends):
            backends += 1
            path, address = f"{section.path}.backends[{i}].address", backend.address
            if address is INVALID:
                continue
            if forward is Forward.DNAT:
                first = known_by.setdefault(address, path)
                if first != path:
                    reading.mistake(path, f"{address}: {first} has it already: expected another with forward: dnat")
                if listen and listen[0][1].is_ipv6 != address.is_ipv6:
                    where = f"{section.path}.listen[{listen[0][0]}]"
                    reading.mistake(path, f"{address}: expected an address of the family of {where}, as dnat keeps it")
            elif forward is not INVALID and forward.returns_directly:
                others = [j for j, listener in listen if listener.port != address.port]
                if others:
                    where = f"{section.path}.listen[{others[0]}]"
                    reading.mistake(
                        path,
                        f"{address}: expected the port of {where}, as forward: {forward.name.lower()} changes none",
                    )
    if backends > MAX_XDP_BACKENDS:
        reading.mistake("services", f"{backends} backends: expected at most {MAX_XDP_BACKENDS} with engine: xdp")


def check_fleet(sections: list[Section], reading: Reading) -> None:
    """What services must not do to each other."""
    _unique(((f"{section.path}.name", section.keys.name) for section in sections), reading)
    _check_listeners(sections, reading)
    _check_shared_ids(sections, reading)
    _check_keys(sections, reading)


def _check_listeners(sections: list[Section], reading: Reading) -> None:
    listeners: dict[Address, str] = {}
    wildcards: dict[tuple[bool, int], tuple[str, Section]] = {}
    ports: dict[tuple[bool, int], tuple[str, Section]] = {}
    for section in sections:
        for i, address in valid(section.keys.listen):
            path = f"{section.path}.listen[{i}]"
            # Datagrams for a specific address and for all addresses would go to different services.
            port = (address.is_ipv6, address.port)
            rivals = ports if address.is_wildcard else wildcards
            rival, owner = rivals.get(port, ("", section))
            if address in listeners:
                reading.mistake(path, f"{address}: {listeners[address]} has it already")
            elif owner is not section:
                reading.mistake(path, f"{address}: overlaps with {rival}")
            listeners.setdefault(address, path)
            ports.setdefault(port, (path, section))
            if address.is_wildcard:
                wildcards.setdefault(port, (path, section))
    for section in sections:
        for i, backend in valid(section.keys.backends):
            if backend.address is not INVALID and backend.address in listeners:
                path = f"{section.path}.backends[{i}].address"
                reading.mistake(path, f"{backend.address}: {listeners[backend.address]} has it, which makes a loop")


def _check_shared_ids(sections: list[Section], reading: Reading) -> None:
    """Which configurations may have server IDs in common.

    Section 9.7: a plaintext and an encrypted configuration must not, or the one gives the other's plaintext away.
    Section 9.6: two with the same key must not either: their servers' nonces would have to differ too.
    """
    plaintext: dict[ServerId, str] = {}
    encrypted: dict[ServerId, str] = {}
    for section in sections:
        configs = {
            keys.config_id: (i, keys) for i, keys in valid(section.keys.cid_configs) if keys.config_id is not INVALID
        }
        with_key: dict[tuple[bytes, ServerId], tuple[int, str]] = {}
        for path, _, config_id, server_id in section.server_ids():
            if config_id not in configs:
                continue
            i, keys = configs[config_id]
            mine, others, kind = (
                (plaintext, encrypted, "an encrypted")
                if keys.key_file is None
                else (encrypted, plaintext, "a plaintext")
            )
            mine.setdefault(server_id, path)
            if server_id in others:
                reading.mistake(
                    path, f"{server_id.hex()}: {others[server_id]} has it in {kind} configuration: expected another ID"
                )
            config = section.configs[i]
            if config is INVALID or config.key is None:
                continue
            j, other = with_key.setdefault((config.key, server_id), (i, path))
            if j != i:
                reading.mistake(
                    path,
                    f"{server_id.hex()}: {other} has it under the same key ({section.path}.cid-configs[{j}].key-file): "
                    "expected another ID or another key",
                )


def _check_keys(sections: list[Section], reading: Reading) -> None:
    """Servers know the CID keys: no reset key may follow from one."""
    cid_keys = {
        config.key: f"{section.path}.cid-configs[{i}].key-file"
        for section in sections
        for i, config in section.configs.items()
        if config is not INVALID and config.key is not None
    }
    for section in sections:
        for i, reset_key in section.reset_keys.items():
            if reset_key is None or reset_key is INVALID:
                continue
            for half in (reset_key[:KEY_LENGTH], reset_key[KEY_LENGTH:]):
                if half in cid_keys:
                    path = f"{section.path}.cid-configs[{i}].reset-key-file"
                    reading.mistake(path, f"contains the key of {cid_keys[half]}: expected one of its own")
                    break


def _unique(found: Iterable[tuple[str, H]], reading: Reading, show: Callable[[Any], str] = str) -> None:
    """Note each value that was there before, with the path of the first. INVALID ones do not count."""
    first: dict[H, str] = {}
    for path, value in found:
        if value is not INVALID and first.setdefault(value, path) != path:
            reading.mistake(path, f"{show(value)}: {first[value]} has it already")


def valid(items: Iterable[H]) -> Iterable[tuple[int, H]]:
    """The elements of a list that were read, with their positions."""
    return ((i, item) for i, item in enumerate(items) if item is not INVALID)


def _is_nobodys(host: str) -> bool:
    ip = ipaddress.ip_address(host)
    return ip.is_unspecified or ip.is_multicast
