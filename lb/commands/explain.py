"""`quiclb explain`: where a connection ID, a datagram or each datagram of a capture goes, and why."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from lb import cid_tool, explain, terminal
from lb.address import Address
from lb.admin.client import Client, RefusedError
from lb.cid import MAX_CID_LENGTH_V1
from lb.commands.arguments import FAILED, OK, ArgumentError, add, file, json_flag, udp_address
from lb.commands.balancer import MAX_SHOWN, add_admin, client, service
from lb.config import load_config
from lb.pcap import Capture, Datagram
from lb.routing import BackendState, RoutingTable

# Ours.
MAX_FLOWS = 100_000  # that numbers are remembered of
MAX_QUESTION = 192 << 10  # octets; the API takes some more
REFUSALS = (400, 422)

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def add_to(commands: Any) -> None:
    parser = add(
        commands,
        "explain",
        "where a connection ID, a packet or a capture goes, and why",
        """Say where something goes, and why: its header, its config ID and algorithm, the
server ID and the nonce that its CID carries, the backend, the verdict. The code that
says so is the code that routes.

WHAT is a CID in hex (up to 20 octets), a UDP datagram in hex (with more, or with
--datagram), or a file that tcpdump or Wireshark wrote (pcap or pcapng); - is a
capture on standard input. Hex may have blanks and colons. Without WHAT each line of
standard input is a question in JSON, {"cid": HEX} or {"datagram": HEX} with
"client", "local" and "service" at will, and each is answered by a line.

It is held against a configuration (-c FILE), with all backends up, or against a
running balancer as it is now (--admin, or the one in the default runtime directory).

Of a capture those datagrams are explained that went to an address of a service, or
to --local (with --service, if none listens there), one after the other: what a
balancer would remember of one counts for the next. A running balancer is asked in
portions of 256, and remembers within each.
Flows have numbers instead of addresses: who sees which server a client has learns
something that CIDs are encrypted for. --addresses shows both all the same.
Fragments are skipped and counted, and so is whatever else is no UDP.""",
        """examples:
  quiclb explain -c quiclb.yaml 07c4605e4504cc4f
  quiclb explain --client 198.51.100.7:50000 c0000000011107c4605e4504cc4f1122334455667788990000
  tcpdump -i eth0 -w - udp port 443 | quiclb explain -c quiclb.yaml -
  quiclb explain --service web --summary capture.pcapng
  quiclb explain -c quiclb.yaml --json capture.pcap | jq 'select(.services[]?.verdict == "fallback")'

Exit status: 0 done, 1 something could not be answered, 2 mistakes in the configuration or the arguments.""",
    )
    file(parser, "what", nargs="?", metavar="WHAT", help="a CID or a datagram in hex, a capture, or - for one")
    file(parser, "-c", "--config", help="hold it against this configuration, and not a running balancer")
    parser.add_argument("--service", metavar="NAME", help="ask this service only")
    parser.add_argument(
        "--client", type=udp_address, metavar="ADDRESS:PORT", help="whom it comes from; the ring asks for that"
    )
    parser.add_argument(
        "--local",
        type=udp_address,
        metavar="ADDRESS:PORT",
        help="whom it was sent to (the service's first listen address)",
    )
    parser.add_argument("--datagram", action="store_true", help="the hex is a datagram, however short")
    parser.add_argument("--json-lines", action="store_true", help="questions on standard input, one per line")
    parser.add_argument("--summary", action="store_true", help="of a capture: how many of what only")
    parser.add_argument("--addresses", action="store_true", help="of a capture: show clients' addresses")
    json_flag(parser, "answer in JSON; of a capture a line for each datagram, and a last one for the sums")
    add_admin(parser, has_config=False)
    parser.set_defaults(command=_explain)


def _explain(args: argparse.Namespace) -> int:
    asked = _Configuration(args) if args.config is not None else _Balancer(args)
    given = _given(args)
    what = None if args.what is None or args.json_lines else str(args.what)
    if what is None:
        return cid_tool.json_lines(lambda line: asked.answer({**given, **line}), {}, sys.stdin.buffer, sys.stdout)
    octets = _hex(what)
    if octets is None:
        if what != "-" and (what == "." or not os.path.exists(what)):  # "." is what an empty argument becomes
            shown = terminal.plain(what[:MAX_SHOWN])
            raise ArgumentError(f"{shown}: neither hex digits, two for each octet, nor a file")
        return _capture(asked, what, args)
    question = "datagram" if args.datagram or len(octets) > MAX_CID_LENGTH_V1 else "cid"
    try:
        answer = asked.answer(given | {question: octets.hex()})
    except ValueError as error:
        print(f"quiclb: {error}", file=sys.stderr)
        return FAILED
    print(json.dumps(answer) if args.json else terminal.explained(answer))
    return OK


class _Configuration:
    """What a configuration makes of a question."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._tables = [
            RoutingTable.build(section.service, dict.fromkeys(section.draining, BackendState.DRAINING))
            for section in load_config(args.config).services
        ]
        if args.service is not None:
            service([table.service.name for table in self._tables], args.service)

    def answer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ValueError."""
        return explain.explain(self._tables, given)

    def listen(self) -> Mapping[str, Sequence[Address]]:
        """Where each service listens."""
        return {table.service.name: table.service.listen for table in self._tables}

    def explained(
        self, datagrams: Iterable[Datagram], name: str | None
    ) -> Iterator[tuple[Datagram, Mapping[str, Any]]]:
        """Each datagram, explained in the light of those before it, to be thrown away before the next one."""
        explainer = explain.Explainer(self._tables, name)
        for datagram in datagrams:
            flow = explain.Flow(datagram.source, datagram.destination)
            whole = datagram.payload.ljust(datagram.length, b"\0")
            yield datagram, explainer.datagram(whole, flow, datagram.at)


class _Balancer:
    """What a running balancer makes of a question."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._client: Client = client(args)
        self._state: dict[str, Any] | None = None
        if args.service is not None:
            service(list(self.listen()), args.service)

    def answer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ValueError."""
        try:
            return self._client.explain(given)
        except RefusedError as error:
            if error.status not in REFUSALS:
                raise
            raise ValueError("; ".join((error.error, *error.reasons))) from None

    def listen(self) -> Mapping[str, Sequence[Address]]:
        """Where each service listens."""
        if self._state is None:
            self._state = self._client.state()
        return {one["name"]: [Address.parse(address) for address in one["listen"]] for one in self._state["services"]}

    def explained(
        self, datagrams: Iterable[Datagram], name: str | None
    ) -> Iterator[tuple[Datagram, Mapping[str, Any]]]:
        """As above, in portions."""
        for portion in _portions(datagrams):
            questions = [question for _, question in portion]
            answers = self.answer({"datagrams": questions} | ({} if name is None else {"service": name}))
            yield from zip((datagram for datagram, _ in portion), answers["datagrams"], strict=True)


def _portions(datagrams: Iterable[Datagram]) -> Iterator[list[tuple[Datagram, dict[str, Any]]]]:
    portion: list[tuple[Datagram, dict[str, Any]]] = []
    size = 0
    for datagram in datagrams:
        question = {
            "datagram": explain.head(datagram.payload).hex(),
            "length": datagram.length,
            "client": str(datagram.source),
            "local": str(datagram.destination),
            "at": datagram.at,
        }
        length = len(json.dumps(question)) + 2
        if portion and (len(portion) == explain.MAX_DATAGRAMS or size + length > MAX_QUESTION):
            yield portion
            portion, size = [], 0
        portion.append((datagram, question))
        size += length
    if portion:
        yield portion


class _Flows:
    """A number for each flow, in the order in which they came; that of one which was idle for long is a new one."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[tuple[Address, Address], int] = OrderedDict()
        self.seen = 0

    def number(self, datagram: Datagram) -> int:
        key = datagram.source, datagram.destination
        if key in self._numbers:
            self._numbers.move_to_end(key)
            return self._numbers[key]
        if len(self._numbers) >= MAX_FLOWS:
            self._numbers.popitem(last=False)
        self.seen += 1
        self._numbers[key] = self.seen
        return self.seen


def _capture(asked: _Configuration | _Balancer, name: str, args: argparse.Namespace) -> int:
    with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as stream:
        try:
            capture = Capture(cast("Any", stream))
        except ValueError as error:
            raise ArgumentError(f"{name}: {error}, and not hex digits, two for each octet") from None
        flows = _Flows()
        verdicts: Counter[str] = Counter()
        datagrams = _wanted(capture, asked.listen(), args)
        for datagram, answer in asked.explained(datagrams, args.service):
            number = flows.number(datagram)
            verdicts.update(service["verdict"] for service in answer["services"])
            if not args.summary:
                _say(datagram, number, answer, args)
    _say_sums(verdicts, flows.seen, capture.skipped, args)
    return OK


def _wanted(capture: Capture, listen: Mapping[str, Sequence[Address]], args: argparse.Namespace) -> Iterator[Datagram]:
    """The datagrams that are for a service; the others are counted with what is skipped."""
    places = [place for name, places in listen.items() if args.service in (None, name) for place in places]
    if args.local is not None:
        places = [args.local]
    for datagram in capture:
        if not explain.listens_at(places, datagram.destination):
            capture.skipped["not for a service"] += 1
        elif not explain.suffices(datagram.payload, datagram.length):
            capture.skipped["cut short"] += 1
        else:
            yield datagram


def _say(datagram: Datagram, flow: int, answer: Mapping[str, Any], args: argparse.Namespace) -> None:
    told: dict[str, Any] = {"packet": datagram.number, "flow": flow, "at": datagram.at}
    if args.addresses:
        told |= {"client": str(datagram.source), "local": str(datagram.destination)}
    told |= answer
    print(json.dumps(told) if args.json else terminal.explained_briefly(told))


def _say_sums(verdicts: Counter[str], flows: int, skipped: Counter[str], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"verdicts": dict(verdicts), "flows": flows, "skipped": dict(skipped)}))
        return
    for what, sums in ((f"{flows} flow{'' if flows == 1 else 's'}", verdicts), ("skipped", skipped)):
        told = ", ".join(f"{name} {number}" for name, number in sums.most_common())
        print(f"{what}: {told or 'nothing'}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    given = {"service": args.service, "client": args.client, "local": args.local}
    return {name: str(value) for name, value in given.items() if value is not None}


def _hex(what: str) -> bytes | None:
    """The octets, or None for what must be a file's name."""
    try:
        return explain.octets(what, "what", explain.MAX_DATAGRAM)
    except ValueError:
        return None
