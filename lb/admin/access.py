"""Who may come in, and what for. Pure: what is known of a caller goes in, rights or a refusal come out.

A unix socket's mode has decided already. Over TCP a bearer token or a client certificate decides, as soon as any of
them is configured; without, only loopback is served and everybody there may do everything. Browsers on the same
machine are somebody else's hands: a page of another site must not use them.
"""

from __future__ import annotations

import binascii
import hmac
import ipaddress
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from lb.address import Address
from lb.keys import AdminConfig

READING = ("GET", "HEAD")
MAX_CREDENTIALS = 1024  # characters of an Authorization header


class Peer(NamedTuple):
    """Who is at the other end, as far as the transport knows. `uid` is a unix socket's, `common_name` that of a client
    certificate that was verified."""

    address: Address | None = None
    uid: int | None = None
    tls: bool = False
    common_name: str | None = None

    @property
    def is_unix(self) -> bool:
        return self.address is None

    def __str__(self) -> str:
        return f"uid {self.uid}" if self.address is None else self.address.host


class Tokens(NamedTuple):
    """Those in force. None: nobody gets in by such a token."""

    read: str | None = None
    write: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration says. `needs_proof`: over TCP nobody gets in without token or certificate."""

    needs_proof: bool = False
    writers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: AdminConfig) -> Policy:
        proofs = (config.read_token_file, config.write_token_file, config.client_ca_file)
        return cls(any(proof is not None for proof in proofs), frozenset(config.writers))


class Rights(NamedTuple):
    """`who` is how the log calls the caller."""

    who: str
    may_write: bool


class Refusal(NamedTuple):
    """`status` is 401 or 403. `reason` is for the log and nobody else."""

    status: int
    reason: str


def admit(policy: Policy, tokens: Tokens, peer: Peer, method: str, headers: Mapping[str, str]) -> Rights | Refusal:
    """What a caller may do. `headers` finds names in any case. The path has no say, so that nobody learns of any."""
    rights = _identify(policy, tokens, peer, headers)
    if isinstance(rights, Refusal):
        return rights
    host, origin = headers.get("Host"), headers.get("Origin")
    # A name that an attacker's DNS says is ours (rebinding). TLS and tokens are beyond him.
    is_proven = peer.tls or (policy.needs_proof and not peer.is_unix)
    if host is not None and not is_proven and not _is_literal(host):
        return Refusal(403, "Host is neither an IP address nor localhost")
    if method not in READING and origin is not None:
        site = origin.partition("://")[2]
        if not site or host is None or site.lower() != host.lower():
            return Refusal(403, "Origin is another site")
    return rights


def _identify(policy: Policy, tokens: Tokens, peer: Peer, headers: Mapping[str, str]) -> Rights | Refusal:
    if peer.is_unix:
        return Rights(f"{peer} by unix socket", may_write=True)
    given = headers.get("Authorization")
    if given is not None and policy.needs_proof:
        token = _token(given)
        if token is None:
            return Refusal(401, "Authorization is not a token")
        writes, reads = _equal(token, tokens.write), _equal(token, tokens.read)
        if writes or reads:
            return Rights(f"{peer} by {'write' if writes else 'read'} token", may_write=writes)
        return Refusal(401, "wrong token")
    if peer.common_name is not None:
        return Rights(f"{peer} by certificate of {peer.common_name}", may_write=peer.common_name in policy.writers)
    if policy.needs_proof:
        return Refusal(401, "no token and no certificate")
    return Rights(f"{peer} without proof", may_write=True)


def _token(given: str) -> str | None:
    """The token in an Authorization header: RFC 6750's, or the password that a browser asked for (RFC 7617)."""
    scheme, _, credentials = given.strip().partition(" ")
    credentials = credentials.strip()
    if not credentials or len(credentials) > MAX_CREDENTIALS:
        return None
    if scheme.lower() == "bearer":
        return credentials
    if scheme.lower() == "basic":
        try:
            return b64decode(credentials, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _equal(given: str, token: str | None) -> bool:
    """Takes as long for any token that is wrong. A digest hides its length too."""
    expected = sha256((token or "").encode()).digest()
    same = hmac.compare_digest(sha256(given.encode(errors="surrogateescape")).digest(), expected)
    return same and token is not None


def _is_literal(host: str) -> bool:
    """Whether a Host header names a machine in a way that no DNS can lie about."""
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
    else:
        name, colon, rest = host.partition(":")
        rest = colon + rest
    if rest and not (rest[0] == ":" and rest[1:].isascii() and rest[1:].isdigit()):
        return False
    if name.lower() == "localhost" or name.lower().endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
