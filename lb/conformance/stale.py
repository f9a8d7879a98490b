"""The four-pass cipher of draft-ietf-quic-load-balancers-15 to -18, to know servers that still have it.

In those drafts `expand` put the length and the pass in front of the half; since -19 they are behind it. What their
servers issue looks like a CID with a wrong key, and is none.
"""

from __future__ import annotations

from lb.cid import AES_BLOCK, CidConfig, FourPass, ServerId


class StaleFourPass(FourPass):
    """The same network around the older `expand`."""

    def _from_left(self, left: int, pass_number: int) -> int:
        return int.from_bytes(self._expanded(left << self._pad_left, pass_number)) >> self._pad_right & self._mask

    def _from_right(self, right: int, pass_number: int) -> int:
        return int.from_bytes(self._expanded(right << self._pad_right, pass_number)) >> self._pad_left

    def _expanded(self, half: int, pass_number: int) -> bytes:
        octets = bytes((self._length, pass_number)) + half.to_bytes(AES_BLOCK)
        return self._aes(octets[:AES_BLOCK])


def is_stale(config: CidConfig, server_id: ServerId, cid: bytes) -> bool:
    """Whether a CID with this server ID was made by the older cipher."""
    if config.algorithm != "four-pass" or config.key is None or len(cid) <= config.routing_block_length:
        return False
    cipher = StaleFourPass(config.key, config.routing_block_length, config.server_id_length)
    return cipher.decrypt_server_id(cid[1 : 1 + config.routing_block_length]) == server_id
