"""Port: what becomes of datagrams that the kernel refuses. Its refusals come from a script here, in their order."""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from lb.engine import Drop
from lb.sockets import NO_CONTROL, SOL_UDP, UDP_SEGMENT, Port

TO = ("192.0.2.1", 443)
OK = 0


class ScriptedSocket:
    """Takes each sending as the script says: OK, or with an error; and remembers what it took."""

    family = socket.AF_INET

    def __init__(self, script: Sequence[int]) -> None:
        self.script = deque(script)
        self.taken: list[tuple[bytes, int]] = []  # octets, and the segment size that was set
        self._segment = 0

    def getsockname(self) -> tuple[str, int]:
        return "192.0.2.9", 5000

    def fileno(self) -> int:
        return 99

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if (level, option) == (SOL_UDP, UDP_SEGMENT):
            self._segment = value

    def sendto(self, octets: bytes, to: Any) -> int:
        return self.sendmsg([octets], [], 0, to)

    def sendmsg(self, views: Sequence[bytes], control: object, flags: int, to: Any) -> int:
        assert to == TO
        number = self.script.popleft()
        if number:
            raise OSError(number, "scripted")
        self.taken.append((b"".join(views), self._segment))
        return 0


@pytest.mark.parametrize(
    ("script", "drop"),
    [
        ([OK], None),
        ([errno.EAGAIN], Drop.BUFFER_FULL),
        ([errno.ENOBUFS], Drop.BUFFER_FULL),
        ([errno.ENOMEM], Drop.BUFFER_FULL),
        ([errno.EMSGSIZE], Drop.TOO_LARGE),
        ([errno.EPERM], Drop.UNREACHABLE),
        ([errno.ENETUNREACH, errno.ENETUNREACH], Drop.UNREACHABLE),
        # An error that came back for what was sent before: this one is sent all the same.
        ([errno.ECONNREFUSED, OK], None),
        ([errno.EHOSTUNREACH, OK], None),
        ([errno.ECONNREFUSED, errno.ENOBUFS], Drop.BUFFER_FULL),
    ],
    ids=lambda value: "-".join(errno.errorcode.get(n, "OK") for n in value) if isinstance(value, list) else None,
)
def test_a_datagram_that_is_refused_has_a_reason_and_raises_nothing(script: list[int], drop: str | None) -> None:
    sock = ScriptedSocket(script)
    port = Port(sock)  # type: ignore[arg-type]

    assert port.send([b"x" * 100], 100, 1, 0, TO, NO_CONTROL) == drop
    assert not sock.script
    assert sock.taken == ([(b"x" * 100, 0)] if drop is None else [])


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP])
def test_a_train_that_is_refused_is_sent_singly_and_what_is_lost_of_it_is_named(refusal: int) -> None:
    sock = ScriptedSocket([refusal, OK, errno.ENOBUFS, OK])
    port = Port(sock)  # type: ignore[arg-type]

    assert port.send([b"a" * 50 + b"b" * 50, b"c" * 20], 50, 3, 0, TO, NO_CONTROL) == Drop.BUFFER_FULL
    assert sock.taken == [(b"a" * 50, 0), (b"c" * 20, 0)]
