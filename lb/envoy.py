"""The servers' half of a CID configuration in Envoy's own words: its `quic_lb` connection ID generator.

Envoy reads the configuration as two pieces. The generator stands in the listener and is read once. Key and config ID
are a secret of their own, which Envoy reads again whenever the file changes: so a rotation needs no restart, as long
as server ID and lengths stay.
Source: Envoy's API, envoy.extensions.quic.connection_id_generator.quic_lb.v3.Config.
"""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

from lb.cid import CidConfig
from lb.operations import Refused
from lb.server_half import ServerHalf, quoted, write_files

ENVOY_FILE = "envoy.yaml"
SECRET_FILE = "envoy-secret.yaml"  # noqa: S105 - a file name

# Envoy's.
WORKER_LENGTH = 1  # octets that it appends: the worker's number
MAX_NONCE_LENGTH = 16
MAX_ROUTING_BLOCK = 18
_TYPE = "type.googleapis.com/envoy.extensions"
_NO_KEY = b"0" * 16  # asked for, and not looked at, in unencrypted mode


def envoy_yaml(half: ServerHalf, secret: Path | str = SECRET_FILE) -> str:
    """The generator, for a listener's `udp_listener_config.quic_options`. It holds no key, and names `secret`.

    Raises Refused for connection IDs that Envoy cannot make.
    """
    config = half.config
    _check(config)
    lines = [
        f"# What Envoy has to know as {half.name} of service {half.service}: made by quiclb server-config.",
        "# It belongs into the listener, under udp_listener_config.quic_options.",
        "# Envoy's stateless reset tokens follow from no key: no balancer can reset its clients when it is dead.",
        "connection_id_generator_config:",
        "  name: envoy.quic.connection_id_generator.quic_lb",
        "  typed_config:",
        f'    "@type": {_TYPE}.quic.connection_id_generator.quic_lb.v3.Config',
        f'    server_id: {{inline_bytes: "{_base64(half.server_id)}"}}  # {half.server_id.hex()}',
        f"    expected_server_id_length: {config.server_id_length}",
        f"    nonce_length_bytes: {config.nonce_length}",
    ]
    if config.key is None:
        lines.append("    unencrypted_mode: true")
    lines += [
        "    encryption_parameters:",
        "      name: quic-lb",
        "      sds_config:",
        "        resource_api_version: V3",
        f"        path_config_source: {{path: {quoted(str(secret))}}}",
    ]
    return "\n".join(lines) + "\n"


def envoy_secret_yaml(half: ServerHalf) -> str:
    """The secret: the key and the config ID, as Envoy's file-based discovery reads it."""
    _check(half.config)
    return "\n".join(
        (
            "resources:",
            f'  - "@type": {_TYPE}.transport_sockets.tls.v3.Secret',
            "    name: quic-lb",
            "    generic_secret:",
            "      secrets:",
            f'        encryption_key: {{inline_bytes: "{_base64(half.config.key or _NO_KEY)}"}}',
            f'        configuration_version: {{inline_bytes: "{_base64(bytes((half.config.config_id,)))}"}}',
            "",
        )
    )


def write_envoy(half: ServerHalf, directory: Path) -> list[Path]:
    """Write both files, the owner's alone, the secret first. Returns them. Raises Refused and OSError."""
    secret = directory.absolute() / SECRET_FILE
    return write_files(directory, {SECRET_FILE: envoy_secret_yaml(half), ENVOY_FILE: envoy_yaml(half, secret)})


def _check(config: CidConfig) -> None:
    reasons = []
    if config.nonce_length > MAX_NONCE_LENGTH:
        reasons.append(f"nonce-length {config.nonce_length}: Envoy makes nonces of 4 to {MAX_NONCE_LENGTH} octets")
    if config.routing_block_length > MAX_ROUTING_BLOCK:
        found = f"server ID and nonce take {config.routing_block_length} octets"
        reasons.append(f"{found}: Envoy has room for {MAX_ROUTING_BLOCK}")
    if config.appended_length != WORKER_LENGTH:
        found = f"appended-length {config.appended_length}"
        reasons.append(f"{found}: expected {WORKER_LENGTH}, since Envoy appends the number of its worker")
    if reasons:
        raise Refused("invalid", *(f"config ID {config.config_id}: {reason}" for reason in reasons))


def _base64(octets: bytes) -> str:
    return b64encode(octets).decode()
