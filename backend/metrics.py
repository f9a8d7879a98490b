"""Metrics of the reference backend, as Prometheus sees them. docs/servers/aioquic.md explains each.

Everything is collected at the scrape, on the server's own event loop. Label values are names of our enums and config
IDs, never from the network, so that nobody outside can make the number of time series grow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from backend.paths import PathEvent
from backend.reload import ServerFile
from backend.server import Outcome, Server
from backend.tickets import EarlyVerdict, TicketVerdict
from backend.tokens import TokenVerdict
from lb.address import Address
from lb.cid import CONFIG_IDS, UNROUTABLE

# Ours.
MAX_SCRAPES = 16  # at a time
PATIENCE = 5.0  # seconds for a request to come, and for its answer to be taken
LONGEST_REQUEST = 8192  # octets


class BackendCollector(Collector):
    """What a server counts."""

    def __init__(self, server: Server, file: ServerFile) -> None:
        self._server = server
        self._file = file

    def collect(self) -> Iterator[Metric]:
        yield from self._nonces_and_cids()
        yield from self._datagrams()
        yield from self._paths()
        yield from self._tokens()
        yield from self._process()

    def _nonces_and_cids(self) -> Iterator[Metric]:
        identity, ledger = self._server.identity, self._server.ledger
        yield CounterMetricFamily(
            "quiclb_backend_nonces_used",
            "Nonces that went into connection IDs, those of Retry packets included.",
            value=identity.nonces_used,
        )
        yield GaugeMetricFamily(
            "quiclb_backend_nonces_remaining",
            "Connection IDs that can still be made under the configuration in use.",
            value=identity.nonces_remaining,
        )
        issued = CounterMetricFamily(
            "quiclb_backend_cids_issued", "Connection IDs given to clients.", labels=["config_id"]
        )
        retired = CounterMetricFamily(
            "quiclb_backend_cids_retired", "Connection IDs that clients have retired.", labels=["config_id"]
        )
        live = GaugeMetricFamily(
            "quiclb_backend_cids", "Connection IDs that clients may use now.", labels=["config_id"]
        )
        for config_id in (*CONFIG_IDS, UNROUTABLE):
            for metric, counted in ((issued, ledger.issued), (retired, ledger.retired), (live, ledger.live)):
                metric.add_metric([str(config_id)], counted[config_id])
        yield from (issued, retired, live)
        yield GaugeMetricFamily(
            "quiclb_backend_old_cids",
            "Connection IDs of earlier configurations that clients have not retired yet.",
            value=ledger.old,
        )

    def _datagrams(self) -> Iterator[Metric]:
        server = self._server
        yield GaugeMetricFamily(
            "quiclb_backend_connections", "Connections that there are now.", value=len(server.connections)
        )
        yield GaugeMetricFamily(
            "quiclb_backend_accepting", "1 while new connections are accepted.", value=server.is_accepting
        )
        outcomes = CounterMetricFamily(
            "quiclb_backend_outcomes",
            "Datagrams that were for no connection, by what became of them.",
            labels=["outcome"],
        )
        for outcome in Outcome:
            outcomes.add_metric([outcome.name.lower()], server.outcomes[outcome])
        yield outcomes
        yield CounterMetricFamily(
            "quiclb_backend_resets_sent", "Stateless Resets sent.", value=server.outcomes[Outcome.RESET]
        )

    def _paths(self) -> Iterator[Metric]:
        paths = CounterMetricFamily(
            "quiclb_backend_paths", "Moves of clients, by what became of them.", labels=["event"]
        )
        for path_event in PathEvent:
            paths.add_metric([path_event.name.lower()], self._server.paths.counts[path_event])
        yield paths

    def _tokens(self) -> Iterator[Metric]:
        tokens, tickets = self._server.tokens, self._server.tickets
        if tokens is not None:
            checked = CounterMetricFamily(
                "quiclb_backend_tokens",
                "Tokens in clients' Initials, by what became of them.",
                labels=["kind", "verdict"],
            )
            for kind, counts in tokens.counts.items():
                for verdict in TokenVerdict:
                    checked.add_metric([kind.name.lower(), verdict.name.lower()], counts[verdict])
            yield checked
        if tickets is not None:
            opened = CounterMetricFamily(
                "quiclb_backend_tickets", "Session tickets from clients, by what became of them.", labels=["verdict"]
            )
            for ticket in TicketVerdict:
                opened.add_metric([ticket.name.lower()], tickets.counts[ticket])
            yield opened
            early = CounterMetricFamily(
                "quiclb_backend_early_data", "Offers of 0-RTT data, by what became of them.", labels=["verdict"]
            )
            for offer in EarlyVerdict:
                early.add_metric([offer.name.lower()], tickets.early_counts[offer])
            yield early

    def _process(self) -> Iterator[Metric]:
        reloads = CounterMetricFamily("quiclb_backend_reloads", "Reloads of the server's file.", labels=["result"])
        for result, count in self._file.reloads.items():
            reloads.add_metric([result], count)
        yield reloads


class Scrapes:
    """Answers `GET /metrics` over HTTP/1.1 at one address, one request per connection. An asynchronous context."""

    def __init__(self, address: Address, collector: Collector) -> None:
        self.address = address
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        self._count = 0

    async def __aenter__(self) -> Self:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_server(self._serve, *self.address, limit=LONGEST_REQUEST)
        self.address = Address(*self._server.sockets[0].getsockname()[:2])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._count += 1
        try:
            with contextlib.suppress(TimeoutError, EOFError, asyncio.LimitOverrunError, OSError):
                async with asyncio.timeout(PATIENCE):
                    if self._count <= MAX_SCRAPES:
                        writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                        await writer.drain()
        finally:
            self._count -= 1
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        request, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path != "/metrics":
            return _response("404 Not Found", "text/plain", b"expected /metrics\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "text/plain", b"expected GET or HEAD\n", "Allow: GET, HEAD\r\n")
        encode, content_type = choose_encoder(fields.get("accept", ""))
        body = encode(self._registry)
        return _response("200 OK", content_type, b"" if method == "HEAD" else body, length=len(body))


def _response(status: str, content_type: str, body: bytes, more: str = "", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{more}"
    return f"{head}Connection: close\r\n\r\n".encode() + body
