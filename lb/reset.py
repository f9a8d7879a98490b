"""Stateless resets (RFC 9000, section 10.3): keys per server ID, tokens, datagrams and their sizes.

A backend holds the key of its own server ID only, so that it cannot end anybody else's connections and a
misrouted packet cannot make it an oracle (RFC 9000, section 21.11). Balancers hold the master key of each
config ID, from which all of them follow. Whether a reset may be sent at all is the router's decision.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from lb.cid import ConfigId, ServerId

# RFC 9000, section 10.3.
TOKEN_LENGTH = 16
MIN_RESET = 21  # 38 unpredictable bits behind two fixed ones make 5 octets, and the token
ONE_SHORTER_UP_TO = 43  # a trigger of at most this many octets gets a reset exactly one octet shorter
SHORT_HEADER_FORM = 0b0100_0000

# Ours.
RESET_KEY_LENGTH = 32
MAX_RESET = 100
INCONSPICUOUS = 42  # below this a reset can be told from a data packet (section 10.3.3)
_LABEL = b"quiclb reset"


def server_reset_key(master: bytes, config_id: ConfigId, server_id: ServerId) -> bytes:
    """The reset key of one server ID, 32 octets: HKDF-Expand(master, "quiclb reset" || config ID || server ID).

    `master` is 32 octets of uniform randomness, so that HKDF's extract step has nothing to do (RFC 5869, section 3.3).
    """
    # One block of HKDF (RFC 5869, section 2.3).
    return hmac.digest(master, _LABEL + bytes((config_id,)) + server_id + b"\x01", "sha256")


def reset_token(key: bytes, cid: bytes) -> bytes:
    """The stateless reset token, 16 octets, of a CID exactly as on the wire: HMAC-SHA256(key, CID)[:16].

    The same function that quic-go, quinn and msquic apply to a configured key (RFC 9000, section 10.3.2).
    """
    return hmac.digest(key, cid, "sha256")[:TOKEN_LENGTH]


def reset_size(trigger: int, random: Callable[[int], bytes]) -> int | None:
    """How long a reset answering a datagram of `trigger` octets is; None if none may be sent.

    Always shorter than its trigger, so that two parties answering each other come to an end (section 10.3.3).
    `random(n)` returns n random octets.
    """
    if trigger <= MIN_RESET:
        return None
    if trigger <= ONE_SHORTER_UP_TO:
        return trigger - 1
    largest = min(trigger - 1, MAX_RESET)
    return INCONSPICUOUS + int.from_bytes(random(2)) % (largest - INCONSPICUOUS + 1)


def reset_datagram(token: bytes, size: int, random: Callable[[int], bytes]) -> bytes:
    """A whole UDP payload of `size` octets that ends in `token` and looks like a short header packet."""
    unpredictable = bytearray(random(size - TOKEN_LENGTH))
    unpredictable[0] = SHORT_HEADER_FORM | unpredictable[0] & 0b0011_1111
    return bytes(unpredictable) + token
