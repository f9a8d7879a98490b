"""The servers' half of a CID configuration: what one server has to know of a balancer's file, and nothing of others.

It has the configuration and its key, one server ID, and the reset key of that server ID. The master key, from which
everybody's reset keys follow, stays with the balancers, unless the service says that all have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lb.cid import CidConfig, ConfigId, ServerId
from lb.files import sync_directory, write_file
from lb.keys import LbConfig, Phase, ServiceConfig
from lb.kinds import server_id_octets
from lb.operations import Refused
from lb.reset_scheme import ResetRule, Scheme
from lb.routing import Backend

SERVER_FILE = "server.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHalf:
    """What one server has to know. `key` and `reset_key` are None where the configuration has none.

    `reset_key` is what the server's make is configured with, and `reset_rule` says which make that is.
    """

    name: str
    service: str
    phase: Phase
    config: CidConfig
    server_id: ServerId
    reset_key: bytes | None = field(repr=False)
    reset_rule: ResetRule
    worker: int | None = None
    bound_to: str = ""
    nonce_file: str | None = None
    made: str | None = None  # RFC 3339, UTC, whole seconds: by it servers know a file that comes too late

    def as_yaml(self) -> str:
        """The server's file. It names the files of keys and holds none."""
        config = self.config
        lines = [
            f"# What {self.name} has to know of service {self.service}: made by quiclb server-config.",
            f"name: {quoted(self.name)}",
            *([f'made: "{self.made}"'] if self.made else []),
            "cid-config:",
            f"  config-id: {config.config_id}",
            f"  server-id-length: {config.server_id_length}",
            f"  nonce-length: {config.nonce_length}",
        ]
        if config.key is not None:
            lines.append(f"  key-file: {self._key_name}")
        # A server's file and a balancer's have different defaults.
        lines.append(f"  encodes-length: {str(config.encodes_length).lower()}")
        if config.appended_length:
            lines.append(f"  appended-length: {config.appended_length}")
        lines.append(f'server-id: "{self.server_id.hex()}"')
        if self.reset_key is not None and self.reset_rule.scheme is Scheme.HMAC_SHA256:
            lines.append(f"reset-key-file: {self._reset_key_name}")
        elif self.reset_key is not None:
            # Whoever reads this file makes other tokens: the key is for somebody else.
            lines.append(f"# Stateless resets ({self.reset_rule.scheme}), key in hex in {self._reset_key_name}:")
            lines += [f"#   {hint}" for hint in self._hints]
        if self.nonce_file is not None:
            lines.append(f"nonce-file: {quoted(self.nonce_file)}")
        return "\n".join(lines) + "\n"

    def as_json(self, with_keys: bool) -> dict[str, Any]:
        """The same as one object. Without keys it says whether there are any."""
        config = self.config
        return {
            "name": self.name,
            "service": self.service,
            "phase": str(self.phase),
            "cid-config": {
                "config-id": config.config_id,
                "server-id-length": config.server_id_length,
                "nonce-length": config.nonce_length,
                "encodes-length": config.encodes_length,
                "appended-length": config.appended_length,
                "algorithm": config.algorithm,
                "key": _shown(config.key, with_keys=with_keys),
            },
            "server-id": self.server_id.hex(),
            "reset-scheme": str(self.reset_rule.scheme),
            "reset-key": _shown(self.reset_key, with_keys=with_keys),
        }

    def write(self, directory: Path) -> list[Path]:
        """Write server.yaml and the key files that it names, the owner's alone. Returns them. Raises OSError.

        Each takes its predecessor's place as a whole, server.yaml last: keys of another configuration have other
        names.
        """
        files = {}
        if self.config.key is not None:
            files[self._key_name] = f"{self.config.key.hex()}\n"
        if self.reset_key is not None:
            files[self._reset_key_name] = f"{self.reset_key.hex()}\n"
        return write_files(directory, files | {SERVER_FILE: self.as_yaml()})

    @property
    def _hints(self) -> tuple[str, ...]:
        """How the key gets into a server of another make."""
        octets, rule = f"$(xxd -r -p {self._reset_key_name})", self.reset_rule
        if rule.scheme is Scheme.HAPROXY:
            return (f'global: cluster-secret "{octets}"',)
        if rule.scheme is Scheme.NGINX:
            file = self._reset_key_name.removesuffix(".key") + ".bin"
            number = () if self.worker is None else (f"this server ID is for worker {self.worker}",)
            return (f"xxd -r -p {self._reset_key_name} {file}", f"http: quic_host_key {file};", *number)
        if rule.scheme is Scheme.MVFST:
            return ("TransportSettings::statelessResetTokenSecret", f"the server is bound to {self.bound_to}")
        return ("picoquic_create: reset_seed",)

    @property
    def _key_name(self) -> str:
        return f"cid-{self.config.config_id}-{self.server_id.hex()}.key"

    @property
    def _reset_key_name(self) -> str:
        return f"reset-{self.config.config_id}-{self.server_id.hex()}.key"


def server_half(
    config: LbConfig,
    backend: str,
    *,
    service: str | None = None,
    config_id: int | None = None,
    server_id: str | None = None,
    nonce_file: str | None = None,
    made: str | None = None,
) -> ServerHalf:
    """The half of a backend, under the active configuration if no other is asked for.

    `service` may be left out if one service alone has such a backend, and `server_id` (hex digits) if the backend has
    one alone. Raises Refused.
    """
    section, found = _backend(config, backend, service)
    slots = {slot.config.config_id: slot for slot in section.service.cid_slots}
    active = [c for c, phase in section.phases.items() if phase is Phase.ACTIVE]
    if config_id is None:
        if len(active) != 1:
            how_many = f"{len(active)} configurations are" if active else "no configuration is"
            raise Refused("conflict", f"{how_many} active in {section.service.name}: expected a config ID")
        config_id = active[0]
    slot = slots.get(ConfigId(config_id))
    if slot is None:
        known = ", ".join(map(str, slots)) or "there are none"
        raise Refused("unknown", f"config ID {config_id}: expected one of {section.service.name}: {known}")
    chosen = _server_id(found, slot.config.config_id, server_id)
    rule, workers = section.service.reset_rule, found.workers.get(slot.config.config_id, ())
    return ServerHalf(
        name=found.name,
        service=section.service.name,
        phase=section.phases[slot.config.config_id],
        config=slot.config,
        server_id=chosen,
        reset_key=rule.secret(slot.reset_key, slot.config.config_id, (workers or (chosen,))[0])
        if slot.reset_key
        else None,
        reset_rule=rule,
        worker=workers.index(chosen) if workers and rule.worker_number else None,
        bound_to=rule.server_address or found.address.host,
        nonce_file=nonce_file,
        made=made,
    )


def write_files(directory: Path, files: Mapping[str, str]) -> list[Path]:
    """Write files, the owner's alone, in their order; each takes its predecessor's place as a whole. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in files.items():
        new = directory / f".{name}.new"
        new.unlink(missing_ok=True)
        write_file(new, text.encode(), mode=0o600)
        new.rename(directory / name)
        sync_directory(directory)
    return [directory / name for name in files]


def quoted(text: str) -> str:
    """A text as a YAML string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _backend(config: LbConfig, name: str, service: str | None) -> tuple[ServiceConfig, Backend]:
    sections = [s for s in config.services if service in (None, s.service.name)]
    if not sections:
        names = ", ".join(s.service.name for s in config.services)
        raise Refused("unknown", f"{service}: expected a service: {names}")
    found = [(section, b) for section in sections for b in section.service.backends if b.name == name]
    if not found:
        names = ", ".join(b.name for section in sections for b in section.service.backends)
        raise Refused("unknown", f"{name}: expected a backend: {names}")
    if len(found) > 1:
        names = ", ".join(section.service.name for section, _ in found)
        raise Refused("invalid", f"{name}: a backend of several services: expected one of them: {names}")
    return found[0]


def _server_id(backend: Backend, config_id: ConfigId, wanted: str | None) -> ServerId:
    ids = sorted(backend.server_ids.get(config_id, ()))
    if wanted is not None:
        chosen = next((each for each in ids if each == _octets(wanted)), None)
        if chosen is None:
            raise Refused("unknown", f"{wanted}: expected a server ID of {backend.name} under config ID {config_id}")
        return chosen
    if len(ids) != 1:
        # Every process of a server has one of its own, or they would repeat each other's nonces.
        some = ", ".join(each.hex() for each in ids[:8]) + (", ..." if len(ids) > 8 else "")
        raise Refused("invalid", f"{backend.name} has {len(ids)} server IDs: expected one of them: {some}")
    return ids[0]


def _octets(wanted: str) -> bytes:
    try:
        return server_id_octets(wanted)
    except ValueError:
        return b""


def _shown(key: bytes | None, *, with_keys: bool) -> str | bool:
    if key is None:
        return False
    return key.hex() if with_keys else True
