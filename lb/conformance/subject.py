"""What a server has to be, by its file: whose connection IDs are its own, and which tokens belong to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lb.cid import UNROUTABLE, CidConfig, Codec, ServerId, config_id_of
from lb.reset_scheme import ResetRule, Scheme

Random = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Subject:
    """A server with a CID configuration. `token` is None where its file has no reset key.

    `rotated` is what it is to be when the operator has changed its configuration; None if that is not tried.
    """

    name: str
    config: CidConfig
    server_id: ServerId
    token: Callable[[bytes], bytes] | None = field(default=None, repr=False)
    rotated: Subject | None = None

    @property
    def codec(self) -> Codec:
        return Codec(self.config)

    def misrouted(self, cid: bytes) -> str | None:
        """Why balancers would not route a CID to this server; None if they would."""
        if not cid:
            return "zero-length: nothing to route by"
        config_id, wanted = config_id_of(cid), self.config.config_id
        if config_id == UNROUTABLE:
            return "config ID 7: marked as unroutable (0b111)"
        if config_id != wanted:
            return f"config ID {config_id}: expected {wanted}"
        decoded = self.codec.decode(cid)
        if decoded is None:
            return f"{len(cid)} octets: too short for server ID and nonce, {1 + self.config.routing_block_length}"
        if decoded.server_id != self.server_id:
            return f"server ID {decoded.server_id.hex()}: expected {self.server_id.hex()}"
        return None

    def block(self, cid: bytes) -> bytes:
        """The routing block of a CID: equal blocks are equal nonces, since server ID and key are the same."""
        return cid[1 : 1 + self.config.routing_block_length]

    def tail(self, cid: bytes) -> bytes:
        """What of a CID must look random: all after the first octet if it is encrypted, all after the server ID if
        not."""
        return cid[1:] if self.config.key is not None else cid[1 + self.config.server_id_length :]

    def craft(self, random: Random) -> bytes:
        """A CID of this server that it has not issued, or so one hopes."""
        return self._craft(self.server_id, random)

    def craft_foreign(self, random: Random) -> bytes:
        """A CID under the same configuration and key that carries another server's ID."""
        while True:
            other = random(len(self.server_id))
            if other != self.server_id:
                return self._craft(ServerId(other), random)

    def craft_unroutable(self, random: Random) -> bytes:
        """A 0b111 CID of the same length (section 3.2 of the draft)."""
        return bytes((UNROUTABLE << 5 | self.config.cid_length - 1,)) + random(self.config.cid_length - 1)

    def _craft(self, server_id: ServerId, random: Random) -> bytes:
        config = self.config
        nonce, low_bits = random(config.nonce_length), random(1)[0]
        return self.codec.encode(server_id, nonce, low_bits=low_bits, appended=random(config.appended_length))


def tokens_of(scheme: Scheme, secret: bytes, host: str) -> Callable[[bytes], bytes]:
    """How a server with this secret makes the tokens of its CIDs. `host` is where it is; mvfst puts that in too."""
    return ResetRule(scheme).token_key(secret, host).token
