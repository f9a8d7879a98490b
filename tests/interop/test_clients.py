"""What the clients have in common that are not sans-IO: threads that can be ended, a browser that stays at home."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from backend.adapters.registry import Feature
from backend.clients import chromium
from backend.clients.threaded import CancelledInThreadError, Request, ThreadedSession
from backend.clients.transfer import ConnectionEndedError
from backend.clients.visitor import Wishes
from backend.clients.visitors import CLIENTS
from lb.address import Address
from tests import namespaces

PATIENCE = 10.0  # seconds


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await scene()

    asyncio.run(bounded())


def test_a_thread_asks_for_one_path_after_the_other() -> None:
    asked: list[str] = []

    def get(request: Request) -> None:
        asked.append(request.path)
        request.status(200)
        request.feed(request.path.encode())
        request.feed(b"!")

    async def scene() -> None:
        ended = threading.Event()
        session = await ThreadedSession(["/a", "/b"], get, ended.set).start()
        assert [await transfer.complete() for transfer in session.transfers] == [b"/a!", b"/b!"]
        assert not ended.is_set()
        await session.close()
        assert ended.is_set()

    run(scene)
    assert asked == ["/a", "/b"]


def test_what_a_library_raises_ends_all_that_is_not_answered() -> None:
    def get(request: Request) -> None:
        request.feed(b"a part")
        if request.path == "/b":
            raise RuntimeError("no more")

    async def scene() -> None:
        session = await ThreadedSession(["/a", "/b", "/c"], get, lambda: None).start()
        assert await session.transfers[0].complete() == b"a part"
        for transfer in session.transfers[1:]:
            with pytest.raises(ConnectionEndedError, match="RuntimeError: no more"):
                await transfer.complete()
        await session.close()

    run(scene)


def test_a_session_that_is_closed_ends_its_request() -> None:
    ended = threading.Event()

    def get(request: Request) -> None:
        request.feed(b"first")
        while not request.is_cancelled:
            threading.Event().wait(0.01)
        with pytest.raises(CancelledInThreadError):
            request.feed(b"second")

    async def scene() -> None:
        session = await ThreadedSession(["/a"], get, ended.set).start()
        await session.close()
        assert bytes(session.transfers[0].body) == b"first"

    run(scene)
    assert ended.is_set()


def test_nobody_there_is_an_error() -> None:
    async def connect(name: str) -> None:
        visitor = CLIENTS[name].visitor(Wishes())
        try:
            with pytest.raises((ConnectionEndedError, TimeoutError)):
                await visitor.open(Address("127.0.0.1", 9), "/whoami")
        finally:
            await visitor.close()

    async def scene() -> None:
        await asyncio.gather(*(connect(name) for name in names))

    names = [name for name in ("niquests", "curl_cffi", "pycurl", "chromium") if CLIENTS[name].missing() is None]
    if "chromium" not in names:
        run(scene)
        return
    with namespaces.namespaces("alone") as (alone,), namespaces.inside(alone):
        run(scene)


def test_a_browser_is_not_started_where_the_world_can_be_reached() -> None:
    if reason := chromium.missing() or namespaces.missing():
        pytest.skip(reason)

    async def scene() -> None:
        visitor = chromium.ChromiumVisitor(Wishes())
        try:
            with pytest.raises(OSError, match="not started where there is a default route"):
                await visitor.open(Address("127.0.0.1", 9), "/")
        finally:
            await visitor.close()

    for everywhere in ("0.0.0.0/0", "::/0"):
        with namespaces.namespaces("open") as (opened,):
            namespaces.ip(
                opened,
                "link add out type veth peer name there",
                "address add 192.0.2.1/24 dev out",
                "link set out up",
                "link set there up",
            )
            namespaces.ip(opened, f"route add {everywhere} dev out")
            with namespaces.inside(opened):
                run(scene)


def test_a_client_says_what_it_is_and_what_it_cannot() -> None:
    for client in CLIENTS.values():
        assert client.made_of()
        assert set(client.cannot) <= set(Feature)
        assert all(not reason.endswith(".") for reason in client.cannot.values())
