"""How servers of different makes make their stateless reset tokens, and what a balancer makes the same ones from.

Each scheme is a small function from the secret that a server is configured with to a `TokenKey`. There are three ways
to calculate a token from one, and both engines know all of them. docs/resets.md says where each formula is from.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import lru_cache
from typing import NamedTuple

from lb.cid import MAX_CID_LENGTH_V1, ConfigId, ServerId
from lb.reset import RESET_KEY_LENGTH, TOKEN_LENGTH, server_reset_key

# Ours.
MAX_KEY, MAX_SUFFIX = 55, 40  # octets of a TokenKey's: what the xdp engine has room for, and more than any scheme needs
SERVER_KEYS = 1 << 17  # of the keys of server IDs that are kept: a table is built anew whenever a state changes

# RFC 5869, section 2.3: what follows the info of an output that is no longer than one hash.
_ONE_BLOCK = b"\x01"


class Scheme(StrEnum):
    """Whose tokens they are."""

    HMAC_SHA256 = "hmac-sha256"
    HAPROXY = "haproxy"
    NGINX = "nginx"
    MVFST = "mvfst"
    PICOQUIC = "picoquic"


class Keys(StrEnum):
    """What the key in a balancer's file is: one that every server's own follows from, or the one that all have."""

    PER_SERVER = "per-server"
    SHARED = "shared"


class Arithmetic(IntEnum):
    """How a token follows from a CID. The same list as `enum token_arithmetic` in shared.h."""

    HMAC = 0  # HMAC(key, CID || suffix)
    HKDF = 1  # HMAC(HMAC(CID, key), suffix): HKDF with the CID for a salt
    HASH = 2  # SHA-256(key || CID, zeros up to 20 octets || its length)


@dataclass(frozen=True, slots=True)
class TokenKey:
    """All that makes the tokens of one server ID."""

    arithmetic: Arithmetic
    key: bytes = field(repr=False)
    suffix: bytes = b""

    def token(self, cid: bytes) -> bytes:
        """The stateless reset token, 16 octets, of a CID of at most 20 octets exactly as on the wire."""
        if self.arithmetic is Arithmetic.HASH:
            padded = self.key + cid.ljust(MAX_CID_LENGTH_V1, b"\0") + bytes((len(cid),))
            return hashlib.sha256(padded).digest()[:TOKEN_LENGTH]
        if self.arithmetic is Arithmetic.HKDF:
            return hmac.digest(hmac.digest(cid, self.key, "sha256"), self.suffix, "sha256")[:TOKEN_LENGTH]
        return hmac.digest(self.key, cid + self.suffix, "sha256")[:TOKEN_LENGTH]


def hmac_sha256(key: bytes) -> TokenKey:
    """quic-go, quinn, msquic and whoever follows RFC 9000, section 10.3.2: HMAC(key, CID)."""
    return TokenKey(Arithmetic.HMAC, key)


def haproxy(cluster_secret: bytes) -> TokenKey:
    """HAProxy: HKDF of the first 16 octets of the SHA-1 of `cluster-secret`, as it is written in its file."""
    # Not a signature: what HAProxy keeps of the text.
    key = hashlib.sha1(cluster_secret, usedforsecurity=False).digest()[:16]
    return TokenKey(Arithmetic.HKDF, key, b"stateless token" + _ONE_BLOCK)


def nginx(host_key: bytes, worker: int | None) -> TokenKey:
    """nginx: HKDF of a key that follows from the octets of `quic_host_key`, and of the number of the worker.

    None for `worker` is what nginx did before 1.29.6 and 1.28.3. The number is as in the memory of a 64-bit machine.
    """
    extracted = hmac.digest(b"ngx_quic", host_key, "sha256")
    key = hmac.digest(extracted, _nginx_info(32), "sha256")
    return TokenKey(
        Arithmetic.HKDF, key if worker is None else key + worker.to_bytes(8, "little"), _nginx_info(TOKEN_LENGTH)
    )


def mvfst(secret: bytes, address: str) -> TokenKey:
    """mvfst and proxygen: HKDF of `statelessResetTokenSecret` with the CID and the IP address that the server is
    bound to, IPv6 with all its zeros."""
    prk = hmac.digest(b"Stateless reset", secret, "sha256")
    return TokenKey(Arithmetic.HMAC, prk, ipaddress.ip_address(address).exploded.encode() + _ONE_BLOCK)


def picoquic(reset_seed: bytes) -> TokenKey:
    """picoquic: SHA-256 of its `reset_seed` and its struct of a CID."""
    return TokenKey(Arithmetic.HASH, reset_seed)


# Octets of the secret that a server is configured with. None but nginx and HAProxy leave a choice.
SECRET_LENGTHS: Mapping[Scheme, range] = {
    Scheme.HMAC_SHA256: range(RESET_KEY_LENGTH, RESET_KEY_LENGTH + 1),
    Scheme.HAPROXY: range(8, 101),
    Scheme.NGINX: range(16, 101),
    Scheme.MVFST: range(32, 33),
    Scheme.PICOQUIC: range(16, 17),
}


class ResetRule(NamedTuple):
    """How the servers of one service make their tokens.

    `server_address` is what mvfst servers are bound to, None: their backend's address. Without `worker_number`, nginx
    is one from before its tokens had one.
    """

    scheme: Scheme = Scheme.HMAC_SHA256
    keys: Keys = Keys.PER_SERVER
    server_address: str | None = None
    worker_number: bool = True

    @property
    def key_lengths(self) -> range:
        """Octets of the key in a balancer's file."""
        if self.keys is Keys.SHARED:
            return SECRET_LENGTHS[self.scheme]
        return range(RESET_KEY_LENGTH, RESET_KEY_LENGTH + 1)

    def secret(self, key: bytes, config_id: ConfigId, server_id: ServerId) -> bytes:
        """What a server is configured with, as octets. `key` is the one in a balancer's file.

        The workers of one nginx have one secret: it is that of the first one's server ID.
        """
        if self.keys is Keys.SHARED:
            return key
        own = server_reset_key(key, config_id, server_id)
        if self.scheme is Scheme.HAPROXY:
            return own.hex().encode()  # it goes into a configuration file, as text
        return own[:16] if self.scheme is Scheme.PICOQUIC else own

    def new_key(self, random: Callable[[int], bytes]) -> bytes:
        """A key for a balancer's file. `random(n)` returns n random octets."""
        if self.keys is Keys.SHARED and self.scheme is Scheme.HAPROXY:
            return random(RESET_KEY_LENGTH).hex().encode()
        return random(min(RESET_KEY_LENGTH, self.key_lengths[-1]))

    def token_key(self, secret: bytes, address: str, worker: int = 0) -> TokenKey:
        """What the tokens of a server with this secret are made from. `address` is its backend's; `worker` counts
        from 0."""
        if self.scheme is Scheme.HMAC_SHA256:
            return hmac_sha256(secret)
        if self.scheme is Scheme.HAPROXY:
            return haproxy(secret)
        if self.scheme is Scheme.NGINX:
            return nginx(secret, worker if self.worker_number else None)
        if self.scheme is Scheme.MVFST:
            return mvfst(secret, self.server_address or address)
        return picoquic(secret)


USUAL_RULE = ResetRule()


@lru_cache(maxsize=SERVER_KEYS)  # a table is built anew whenever a state changes
def server_token_key(
    rule: ResetRule, key: bytes, config_id: ConfigId, server_id: ServerId, address: str, worker: int = 0
) -> TokenKey:
    """What makes the tokens of one server: `rule.secret`, then `rule.token_key`."""
    return rule.token_key(rule.secret(key, config_id, server_id), address, worker)


def _nginx_info(length: int) -> bytes:
    label = b"sr_token_key"
    return bytes((0, length, len(label))) + label + b"\0" + _ONE_BLOCK
