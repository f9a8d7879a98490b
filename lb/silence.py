"""When a backend that is sent traffic and answers nothing becomes suspicious. No clock here: `now` is an argument."""

from __future__ import annotations

# Ours.
SILENT_DATAGRAMS = 8  # unanswered datagrams that make silence suspicious


class SilenceWatch:
    """Notices a backend that is sent traffic and answers nothing."""

    __slots__ = ("heard", "sent", "since")

    def __init__(self) -> None:
        self.since = 0.0
        self.sent = 0
        self.heard = -1

    def suspicious(self, sent: int, heard: int, now: float, patience: float) -> bool:
        """Whether so many datagrams went unanswered over `patience` seconds; it asks again after as long."""
        if heard != self.heard or sent == self.sent:
            self.heard, self.sent, self.since = heard, sent, now
            return False
        if now - self.since < patience or sent - self.sent < SILENT_DATAGRAMS:
            return False
        self.sent, self.since = sent, now
        return True
