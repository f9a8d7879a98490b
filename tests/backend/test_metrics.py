"""What the reference backend counts, and its page: what is counted is shown, and what is shown is explained."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import QuicEvent, StreamDataReceived
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from backend.metrics import LONGEST_REQUEST, MAX_SCRAPES, BackendCollector, Scrapes
from backend.options import parser_of_options
from backend.paths import PathEvent
from backend.reload import ServerFile
from backend.seal import Kind, Seal
from backend.server import Outcome
from backend.tickets import EarlyVerdict, Tickets, TicketVerdict
from backend.tokens import Tokens, TokenVerdict
from lb.address import Address
from lb.cid import Codec, config_id_of
from lb.server_config import ServerConfig
from tests.observe.prometheus import promtool
from tests.test_backend import (
    CERTIFICATE,
    DEADLINE,
    ENVIRONMENT,
    SERVER_ID,
    SINGLE_PASS,
    Backend,
    Wire,
    connect,
    files,
    identity,
    own_cid,
    scenario,
    serve,
    short,
    until,
)
from tests.test_backend_rotation import NEXT, NEXT_ID, NEXT_RESET_KEY

__all__ = ["files"]  # a fixture

pytestmark = pytest.mark.e2e

PAGE = (Path(__file__).parents[2] / "docs" / "servers" / "aioquic.md").read_text()
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"

Samples = dict[str, dict[tuple[str, ...], float]]


@contextlib.asynccontextmanager
async def scraped(backend: Backend) -> AsyncIterator[Address]:
    """Where a server's metrics are."""
    file = ServerFile(Path("server.yaml"), ServerConfig(name="a"), backend.server.identity)
    async with Scrapes(Address("127.0.0.1", 0), BackendCollector(backend.server, file)) as scrapes:
        yield scrapes.address


async def ask(address: Address, request: bytes = GET) -> tuple[str, dict[str, str], str]:
    """Status line, fields and body of the answer."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request)
    answer = b""
    with contextlib.suppress(ConnectionError):  # what it did not want to read
        answer = await reader.read()
    await close(writer)
    head, _, body = answer.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    return status, dict(line.lower().split(": ", 1) for line in lines), body


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def samples(address: Address) -> Samples:
    """Every sample of a server's own, by name and label values."""
    _, _, body = await ask(address)
    found: Samples = {}
    for family in parse_text(body):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def everything(**also: Any) -> dict[str, Any]:
    """Options of a server that counts all there is to be counted."""
    seal = Seal([bytes(32)], os.urandom)
    return {"tokens": Tokens(seal, lambda: 0.0), "tickets": Tickets(seal, lambda: 0.0, early_data=True), **also}


@scenario
async def test_every_metric_is_on_the_page_as_it_is_and_no_other() -> None:
    async with serve(**everything()) as backend, scraped(backend) as address:
        _, _, body = await ask(address)
        found = {
            (sample.name, family.type, tuple(sorted(sample.labels)))
            for family in parse_text(body)
            for sample in family.samples
            if family.name.startswith("quiclb_") and not sample.name.endswith("_created")
        }
    rows = re.findall(r"^\| `(quiclb_\w+)` \| (\w+) \| ([^|]*)\|", PAGE, re.MULTILINE)
    told = {(name, kind, tuple(sorted(re.findall(r"`(\w+)`", labels)))) for name, kind, labels in rows}
    assert told == found


def test_every_option_is_on_the_page_with_its_default_and_no_other() -> None:
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", PAGE, re.MULTILINE)
    told = {option: default for options, default in rows for option in re.findall(r"`(--[\w-]+)", options)}
    actions = {action.option_strings[-1]: action for action in parser_of_options()._actions}
    del actions["--help"]
    assert told.keys() == actions.keys()
    for option, action in actions.items():
        default = action.default
        if isinstance(default, int | float | str) and not isinstance(default, bool):
            written = f"{default:g}" if isinstance(default, float) else str(default)
            assert told[option].strip("`") == written, option


@scenario
async def test_the_figures_are_those_of_the_server() -> None:
    who = identity()
    async with serve(who, **everything()) as backend, scraped(backend) as address:
        server = backend.server
        async with connect(backend.address) as client:
            await until(lambda: len(client.cids()) == 8)
            who.switch(Codec(NEXT), NEXT_ID, NEXT_RESET_KEY)
            client.is_frozen = True
            server.renew_cids()
            now = await samples(address)
            assert now["quiclb_backend_nonces_used_total"][()] == 16
            assert now["quiclb_backend_nonces_remaining"][()] == pytest.approx(2.0**88)
            assert now["quiclb_backend_cids"] == {(str(i),): 8.0 if i in (2, 4) else 0.0 for i in range(8)}
            assert now["quiclb_backend_old_cids"][()] == 8
            client.is_frozen = False
            await until(lambda: server.ledger.old == 0)
            with Wire(backend.address) as wire:
                await wire.ask(short(own_cid()))
            await client.move()
            assert (await client.request("GET", "/whoami")).status == 200
            await until(lambda: server.paths.counts[PathEvent.VALIDATED])

            server.tokens.counts[Kind.RETRY_TOKEN][TokenVerdict.EXPIRED] += 3  # type: ignore[union-attr]
            server.tickets.counts[TicketVerdict.RESUMED] += 4  # type: ignore[union-attr]
            server.tickets.early_counts[EarlyVerdict.REPLAYED] += 5  # type: ignore[union-attr]
            server.is_accepting = False
            now = await samples(address)
            assert now["quiclb_backend_cids_issued_total"][("2",)] == 8
            assert now["quiclb_backend_cids_retired_total"][("2",)] == 8
            assert now["quiclb_backend_connections"][()] == 1
            assert now["quiclb_backend_accepting"][()] == 0
            assert now["quiclb_backend_outcomes_total"][("accepted",)] == 1
            assert now["quiclb_backend_resets_sent_total"][()] == now["quiclb_backend_outcomes_total"][("reset",)] == 1
            assert now["quiclb_backend_paths_total"][("validated",)] == server.paths.counts[PathEvent.VALIDATED]
            assert now["quiclb_backend_tokens_total"][("retry_token", "expired")] == 3
            assert now["quiclb_backend_tickets_total"][("resumed",)] == 4
            assert now["quiclb_backend_early_data_total"][("replayed",)] == 5
            assert now["quiclb_backend_outcomes_total"].keys() == {(outcome.name.lower(),) for outcome in Outcome}


@scenario
async def test_prometheus_has_nothing_to_complain_about() -> None:
    program = promtool()
    async with serve(**everything()) as backend, scraped(backend) as address:
        _, _, body = await ask(address)
        accept = b"Accept: application/openmetrics-text; version=1.0.0\r\n\r\n"
        status, fields, openmetrics = await ask(address, GET.removesuffix(b"\r\n") + accept)
    assert status == "HTTP/1.1 200 OK"
    assert fields["content-type"].startswith("application/openmetrics-text")
    assert list(parse_openmetrics(openmetrics))  # type: ignore[no-untyped-call]
    done = await asyncio.to_thread(
        subprocess.run, [program, "check", "metrics"], input=body, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", "200 OK"),
        (b"\r\n\r\n", "404 Not Found"),
        (b"\xff\xfe \x00\r\n\r\n", "404 Not Found"),
        (b"x" * (LONGEST_REQUEST + 1000), ""),
    ],
)
@scenario
async def test_requests_of_all_kinds_are_answered_or_dropped(request_: bytes, status: str) -> None:
    async with serve(**everything()) as backend, scraped(backend) as address:
        line, fields, body = await ask(address, request_)
        assert line == (f"HTTP/1.1 {status}" if status else "")
        if request_.startswith(b"HEAD"):
            assert (int(fields["content-length"]) > 1000, body) == (True, "")
        assert (await ask(address))[0] == "HTTP/1.1 200 OK"


@scenario
async def test_those_who_say_nothing_are_bounded_and_harm_nobody_for_long() -> None:
    async with serve() as backend, scraped(backend) as address:
        mute = [await asyncio.open_connection(*address) for _ in range(MAX_SCRAPES)]
        assert (await ask(address))[0] == "", "one too many"
        for _, writer in mute:
            await close(writer)
        while (await ask(address))[0] == "":
            pass
        async with connect(backend.address) as client:
            assert (await client.request("GET", "/whoami")).status == 200


def test_the_program_of_the_page_is_a_routable_server(files: Path) -> None:
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (files / "program.py").write_text(program)
    (files / "cert.pem").write_bytes(CERTIFICATE.pem())
    key: Any = CERTIFICATE.key
    (files / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    class Caller(QuicConnectionProtocol):
        """A client that says a word and hears it."""

        heard = b""

        def quic_event_received(self, event: QuicEvent) -> None:
            if isinstance(event, StreamDataReceived):
                self.heard += event.data

    async def talk(address: Address) -> None:
        configuration = QuicConfiguration(is_client=True, alpn_protocols=["echo"], server_name="localhost")
        configuration.load_verify_locations(cadata=CERTIFICATE.pem())
        quic = QuicConnection(configuration=configuration)
        loop = asyncio.get_running_loop()
        transport, caller = await loop.create_datagram_endpoint(lambda: Caller(quic), local_addr=("127.0.0.1", 0))
        caller.connect(tuple(address))
        await caller.wait_connected()
        quic.send_stream_data(0, b"hello", end_stream=True)
        caller.transmit()
        await until(lambda: caller.heard == b"hello")
        decoded = Codec(SINGLE_PASS).decode(quic._peer_cid.cid)
        assert decoded is not None
        assert (config_id_of(quic._peer_cid.cid), decoded.server_id) == (2, SERVER_ID)
        caller.close()
        transport.close()

    command = [sys.executable, "program.py", "server.yaml", "cert.pem", "key.pem"]
    with subprocess.Popen(command, cwd=files, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            word, written = process.stdout.readline().split()
            assert word == "ready"
            asyncio.run(asyncio.wait_for(talk(Address.parse(written)), DEADLINE))
        finally:
            process.terminate()
        assert process.wait(DEADLINE) == 0
