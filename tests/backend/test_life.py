"""What clients have of earlier configurations, how a server ends, and what it keeps for those who say nothing."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Any

import pytest
from aioquic.h3.connection import ErrorCode
from aioquic.quic import events
from aioquic.quic.packet import QuicErrorCode
from aioquic.tls import Epoch

from backend.app import Http3Protocol
from backend.demo.stage import Play, Stage
from backend.ledger import Ledger
from backend.server import Outcome
from backend.shutdown import shut_down
from lb.address import Address
from lb.cid import Codec, config_id_of
from tests.backend.test_reload import Log
from tests.e2e.theatre import perform, placed, session, whoami
from tests.test_backend import (
    DEADLINE,
    Backend,
    Client,
    Program,
    Wire,
    connect,
    files,
    identity,
    quic_client,
    running,
    scenario,
    serve,
    until,
    unverified,
    version_probe,
)
from tests.test_backend_rotation import NEXT, NEXT_ID, NEXT_RESET_KEY

__all__ = ["files"]  # a fixture

pytestmark = pytest.mark.e2e

GRACE = 20.0  # seconds, more than any of these tests takes


# Connection IDs that are out.


def test_a_ledger_balances() -> None:
    gone: list[int] = []
    ledger = Ledger(lambda: gone.append(ledger.old))
    old, new = [bytes([0x40, i]) for i in range(3)], [bytes([0x60, i]) for i in range(2)]
    for cid in old:
        ledger.issue(cid)
    ledger.switch(old)
    for cid in new:
        ledger.issue(cid)
    assert (ledger.old, ledger.live) == (3, [0, 0, 3, 2, 0, 0, 0, 0])
    ledger.retire(old[0])
    ledger.end(new[0])
    ledger.end(old[1])
    assert (ledger.old, gone) == (1, [])
    ledger.retire(old[2])
    assert (ledger.old, gone) == (0, [0])
    assert ledger.issued == [0, 0, 3, 2, 0, 0, 0, 0]
    assert ledger.retired == [0, 0, 2, 0, 0, 0, 0, 0]
    assert ledger.live == [0, 0, 0, 1, 0, 0, 0, 0]
    ledger.switch([])
    assert gone == [0, 0], "where nobody has any, all are gone at once"


@scenario
async def test_old_cids_are_good_until_their_clients_retire_them_and_are_counted() -> None:
    who = identity()
    async with serve(who) as backend, connect(backend.address, quic_client(cid_limit=4)) as client:
        await until(lambda: len(client.cids()) == 4)
        ledger = backend.server.ledger
        client.is_frozen = True  # it hears nothing of a rotation
        who.switch(Codec(NEXT), NEXT_ID, NEXT_RESET_KEY)
        backend.server.renew_cids()
        assert (ledger.old, ledger.live) == (4, [0, 0, 4, 0, 4, 0, 0, 0])

        heard = backend.connection._spaces[Epoch.ONE_RTT].largest_received_packet
        client.quic.send_ping(1)
        client.transmit()
        await until(lambda: backend.connection._spaces[Epoch.ONE_RTT].largest_received_packet > heard)
        assert config_id_of(backend.connection.host_cid) == 2
        assert (ledger.old, backend.server.outcomes[Outcome.RESET]) == (4, 0)

        client.is_frozen = False
        await until(lambda: ledger.old == 0)
        assert (ledger.retired[who_was()], ledger.live[who_was()]) == (4, 0)
        assert {config_id_of(cid) for cid in backend.connection.cids} == {4}


def who_was() -> Any:
    """The config ID of the configuration that tests begin with."""
    return config_id_of(identity().new_cid())


@scenario
async def test_the_last_old_cid_is_told_even_if_its_connection_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    who = identity()
    async with serve(who) as backend:
        async with connect(backend.address) as client, connect(backend.address) as other:
            await until(lambda: sum(backend.server.ledger.live) == 16)
            client.is_frozen = other.is_frozen = True
            who.switch(Codec(NEXT), NEXT_ID, NEXT_RESET_KEY)
            backend.server.renew_cids()
            assert backend.server.ledger.old == 16
            other.is_frozen = False
            await until(lambda: backend.server.ledger.old == 8)
            assert "rotated" not in caplog.messages
        await until(lambda: "rotated" in caplog.messages)
        await until(lambda: not backend.server.connections)
        assert not any(backend.server.ledger.live), "nothing is left of connections that are gone"


# The end.


class Listener:
    """What a client hears of the end, that its HTTP/3 library does not tell."""

    def __init__(self, client: Client) -> None:
        self.said = b""  # on the server's control stream from now on
        self.resets: dict[int, int] = {}
        self._next = client.quic_event_received
        client.quic_event_received = self._hear  # type: ignore[method-assign]

    @property
    def goaway(self) -> int | None:
        """The identifier in a GOAWAY frame, if one has come (RFC 9114, section 7.2.6)."""
        return self.said[2] if self.said[:2] == b"\x07\x01" else None

    def _hear(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.StreamDataReceived) and event.stream_id == 3:
            self.said += event.data
        elif isinstance(event, events.StreamReset):
            self.resets[event.stream_id] = event.error_code
        self._next(event)


def ending(backend: Backend, grace: float = GRACE, hurry: asyncio.Event | None = None) -> asyncio.Task[int]:
    return asyncio.create_task(shut_down(backend.server, grace, hurry or asyncio.Event()))


async def knock(address: Address) -> int | None:
    """The error that a new connection ends with."""
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_datagram_endpoint(lambda: Client(quic_client()), local_addr=("127.0.0.1", 0))
    client.connect(tuple(address))
    await until(lambda: client.ended)
    transport.close()
    return client.ended.error_code if client.ended else None


@scenario
async def test_what_was_asked_for_is_answered_and_nothing_else() -> None:
    async with serve() as backend, connect(backend.address) as client, connect(backend.address) as idle:
        listener, idle_listener = Listener(client), Listener(idle)
        _, slow = client.start("GET", "/slow/1")
        await until(lambda: slow.body)
        end = ending(backend)

        await until(lambda: idle.ended)
        assert idle_listener.goaway == 0
        await until(lambda: listener.goaway is not None)
        assert listener.goaway == 4, "the first request that it does not answer"
        late, _ = client.start("GET", "/whoami")
        await until(lambda: late in listener.resets)
        assert listener.resets == {late: ErrorCode.H3_REQUEST_REJECTED}

        assert await knock(backend.address) == QuicErrorCode.CONNECTION_REFUSED
        assert backend.server.outcomes[Outcome.REFUSED] == 1
        assert len(backend.server.connections) <= 2
        with Wire(backend.address) as wire:
            [answer] = await wire.ask(version_probe(b"12345678"))
            assert answer[1:5] == bytes(4), "health probes are answered to the end"
        assert not slow.is_complete

        assert await end == 0
        await until(lambda: client.ended)
        assert slow.body.endswith(b"19\nend\n")
        for each in (client, idle):
            assert each.ended is not None
            assert each.ended.error_code == ErrorCode.H3_NO_ERROR


@scenario
async def test_an_answer_that_was_sent_is_waited_for_until_it_has_arrived() -> None:
    async with serve() as backend, connect(backend.address) as client:
        client.is_frozen = True
        _, answer = client.start("GET", "/bytes/5000")
        await until(lambda: backend.connection.is_sending)
        await until(lambda: not protocol(backend)._tasks)
        end = ending(backend)
        await until(lambda: not backend.server.is_accepting)
        assert not end.done()
        client.is_frozen = False
        await until(lambda: client.ended)
        assert (len(answer.body), answer.is_complete) == (5000, True)
        assert await end == 0


def protocol(backend: Backend) -> Http3Protocol:
    found = backend.connection.protocol
    assert isinstance(found, Http3Protocol)
    return found


@scenario
async def test_a_handshake_that_has_begun_is_brought_to_its_end() -> None:
    ends: list[asyncio.Task[int]] = []

    class Ending(Http3Protocol):
        """A connection whose first datagram is followed by the end of the server."""

        def datagram_received(self, data: bytes | str, addr: Any) -> None:
            super().datagram_received(data, addr)
            if not ends:
                assert not backend.connection._handshake_complete
                ends.append(ending(backend))

    async with serve(protocol=Ending) as backend, connect(backend.address) as client:
        await until(lambda: client.ended)
        assert client.ended is not None
        assert client.ended.error_code == ErrorCode.H3_NO_ERROR
        assert await ends[0] == 0


@pytest.mark.parametrize("how", ["time is over", "there is a hurry", "no grace at all"])
@scenario
async def test_the_end_comes_all_the_same_when(how: str) -> None:
    async with serve() as backend, connect(backend.address) as client:
        _, slow = client.start("GET", "/slow/100")
        await until(lambda: slow.body)
        hurry = asyncio.Event()
        end = ending(backend, {"time is over": 0.2, "no grace at all": 0.0}.get(how, GRACE), hurry)
        if how == "there is a hurry":
            await until(lambda: not backend.server.is_accepting)
            hurry.set()
        assert await end == 1
        await until(lambda: client.ended)
        assert client.ended is not None
        assert (client.ended.error_code, slow.is_complete) == (ErrorCode.H3_NO_ERROR, False)


@scenario
async def test_a_client_that_leaves_meanwhile_is_not_waited_for() -> None:
    async with serve() as backend:
        async with connect(backend.address) as client:
            _, slow = client.start("GET", "/slow/100")
            await until(lambda: slow.body)
            end = ending(backend)
            await until(lambda: not backend.server.is_accepting)
        assert await end == 0


def test_a_second_sigterm_ends_at_once(files: Any) -> None:
    async def talk(program: Program) -> None:
        log = Log(program)
        async with connect(program.addresses[0], unverified()) as client:
            _, slow = client.start("GET", "/slow/100")
            await until(lambda: slow.body)
            program.process.send_signal(signal.SIGTERM)
            assert "connections=1" in await log.until("draining")
            program.process.send_signal(signal.SIGTERM)
            assert "unfinished=1" in await log.until("stopped")

    with running(files, "--grace", "600") as program:
        asyncio.run(asyncio.wait_for(talk(program), DEADLINE))
        program.process.communicate(timeout=DEADLINE)
        assert program.process.returncode == 0


def test_after_a_drain_a_server_ends_and_no_client_notices() -> None:
    """As docs/operations.md says: the balancer's drain first, then SIGTERM; the old connections finish."""

    async def scene(stage: Stage) -> None:
        front = stage.balancers["one"].address
        async with placed("aioquic", front, "a", "/slow/4") as client:
            answer = client.transfers[1]
            await answer.reached(1)
            drain = ["drain", "a", "--admin", f"unix:{stage.directory}/run-one/admin.sock"]
            command = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lb", *drain, stdout=asyncio.subprocess.DEVNULL
            )
            assert await command.wait() == 0
            leaving = stage.servers["a"].child
            leaving.signal(signal.SIGTERM)
            names = set()
            for _ in range(6):
                async with session("aioquic", front, "/whoami") as newcomer:
                    names.add((await whoami(newcomer))["name"])
            assert names == {"b"}
            assert (await answer.complete()).endswith(b"end\n")
        await until(lambda: not leaving.is_running)
        log = leaving.log_path.read_text()
        [stopped] = [line for line in log.splitlines() if "event=stopped" in line]
        assert "unfinished=0" in stopped
        assert "refused=" not in stopped

    perform(scene, Play(backends=("a", "b"), grace=GRACE))


# Those who say nothing.


@scenario
async def test_an_idle_connection_keeps_no_buffers_of_its_handshake() -> None:
    async with serve() as backend, connect(backend.address) as client, connect(backend.address) as other:
        await until(lambda: all(c._handshake_complete for c in backend.server.connections))
        one, two = backend.server.connections
        assert sum(buffer.capacity for buffer in one._crypto_buffers.values()) == 0
        ours, theirs = (vars(c)["_QuicConnection__frame_handlers"] for c in (one, two))
        assert all(ours[kind][1] is theirs[kind][1] for kind in ours)

        # Whoever writes to TLS all the same loses its connection by the rules, and nobody else does.
        client.quic._crypto_streams[Epoch.ONE_RTT].sender.write(b"\x01\x00\x00\x00")
        client.quic.send_ping(1)
        client.transmit()
        await until(lambda: client.ended)
        assert client.ended is not None
        assert client.ended.error_code & ~0xFF == QuicErrorCode.CRYPTO_ERROR
        assert (await other.request("GET", "/whoami")).status == 200
