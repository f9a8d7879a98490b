"""A request, its answer, and what is wrong with it: HTTP as far as the API has to know it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lb.admin.access import Peer

JSON = "application/json"
PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Request:
    """`path` is as it was sent, without the query. `body` reads it all, and raises Problem
    if it has more octets than its argument."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # finds names in any case
    peer: Peer
    body: Callable[[int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = field(default=())


class Problem(Exception):  # noqa: N818 - an answer, as others are
    """A request that is answered with what is wrong about it: one line, and more of them if there is more to say."""

    def __init__(self, status: int, error: str, *reasons: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(error)
        self.status = status
        self.reasons = reasons
        self.headers = headers

    def response(self) -> Response:
        found: dict[str, Any] = {"error": str(self)}
        if self.reasons:
            found["reasons"] = list(self.reasons)
        return answer(found, status=self.status, headers=self.headers)


def answer(value: Any, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """A value as JSON."""
    return Response(status, json.dumps(value, separators=(",", ":")).encode() + b"\n", headers=headers)
