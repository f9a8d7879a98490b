"""aioquic as a client. It keeps the tokens of Stateless Resets and never looks for them; here they are."""

from __future__ import annotations

import hmac

import aioquic.h3.events
import aioquic.quic.events
from aioquic.h3.connection import H3Connection
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from backend.clients.http3 import Http3Client, Stack
from lb.packet import LONG_HEADER
from lb.reset import MIN_RESET, TOKEN_LENGTH


class AioquicClient(Http3Client):
    """A connection of aioquic's."""

    stack = Stack("aioquic", QuicConfiguration, QuicConnection, H3Connection, aioquic.quic.events, aioquic.h3.events)

    def is_stateless_reset(self, data: bytes) -> bool:
        # RFC 9000, section 10.3.1. Only the token of the connection ID in use counts. Whether the packet could be
        # decrypted does not matter: none that can be ends in these 16 octets by chance.
        token = self._quic._peer_cid.stateless_reset_token
        return (
            len(data) >= MIN_RESET
            and not data[0] & LONG_HEADER
            and len(token) == TOKEN_LENGTH
            and hmac.compare_digest(data[-TOKEN_LENGTH:], token)
        )
