"""Which connection IDs are out: counted by config ID as they come and go, and by whether they are of a past one.

It is told by the server, and knows no connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

# The specification's.
CONFIG_ID_SHIFT = 5  # the config ID is in the three most significant bits of the first octet
CODEPOINTS = 8  # 7 is that of connection IDs without a configuration


class Ledger:
    """The connection IDs that clients may use. `on_rotated` is called when the last one of a past configuration goes.

    `issued` and `retired` are counts by config ID; a connection ID that ends with its connection was not retired.
    """

    def __init__(self, on_rotated: Callable[[], None]) -> None:
        self.issued = [0] * CODEPOINTS
        self.retired = [0] * CODEPOINTS
        self._ended = [0] * CODEPOINTS
        self._old: set[bytes] = set()
        self._on_rotated = on_rotated

    @property
    def live(self) -> list[int]:
        """How many clients may use now, by config ID."""
        counts = zip(self.issued, self.retired, self._ended, strict=True)
        return [issued - retired - ended for issued, retired, ended in counts]

    @property
    def old(self) -> int:
        """How many of the earlier configurations are left."""
        return len(self._old)

    def issue(self, cid: bytes) -> None:
        self.issued[cid[0] >> CONFIG_ID_SHIFT] += 1

    def retire(self, cid: bytes) -> None:
        """The client uses it no more."""
        self.retired[cid[0] >> CONFIG_ID_SHIFT] += 1
        self._leave(cid)

    def end(self, cid: bytes) -> None:
        """Its connection is gone."""
        self._ended[cid[0] >> CONFIG_ID_SHIFT] += 1
        self._leave(cid)

    def switch(self, cids: Iterable[bytes]) -> None:
        """What is issued from now on is of another configuration than `cids`, which are all that are out."""
        self._old = set(cids)
        self._tell()

    def _leave(self, cid: bytes) -> None:
        if cid in self._old:
            self._old.remove(cid)
            self._tell()

    def _tell(self) -> None:
        if not self._old:
            self._on_rotated()
