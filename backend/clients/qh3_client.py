"""qh3 as a client: a QUIC stack of its own, in Rust, under aioquic's names."""

from __future__ import annotations

from typing import Any

import qh3.h3.events
import qh3.quic.events
from qh3.h3.connection import H3Connection
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection

from backend.clients.http3 import Http3Client, Stack


class Qh3Client(Http3Client):
    """A connection of qh3's."""

    stack = Stack("qh3", QuicConfiguration, QuicConnection, H3Connection, qh3.quic.events, qh3.h3.events)

    def was_reset(self, terminated: Any) -> bool:
        # It does not say so. Everything else that ends a connection leaves a reason, a frame type or an error code.
        return (terminated.error_code, terminated.frame_type, terminated.reason_phrase) == (0, None, "")
