"""docs/interop.md: made of the results of a run, and of nothing that two runs differ in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from backend.adapters.registry import ADAPTERS, Feature
from backend.clients.visitors import CLIENTS
from tests.interop.cells import NEEDS_CIDS, Engine, Result, Verdict

SYMBOLS = {Verdict.PASS: "✓", Verdict.FAIL: "✗", Verdict.NOT_RUN: "·"}
TITLES = {
    Engine.UDP: "The udp engine",
    Engine.XDP: "The xdp engine",
    Engine.CONTROL: "The control: nginx's stream proxy, which knows 4-tuples only",
}
COLUMNS: Mapping[Feature, tuple[str, str]] = {
    Feature.REQUEST: ("request", "One request is answered, by the server whose ID is in the connection ID."),
    Feature.DOWNLOAD: ("10 MB", "A download of 10 MB, every octet compared."),
    Feature.NAT_REBINDING: ("NAT", "In mid-download a NAT gives the client another port, every second."),
    Feature.ADDRESS_MOVE: ("address", "In mid-download the client's address becomes another."),
    Feature.IPV6_TO_IPV4: (
        "6 to 4",
        "In mid-download the client's packets come by IPv4, and no longer by IPv6, as behind a NAT64.",
    ),
    Feature.ACTIVE_MIGRATION: (
        "migration",
        "In mid-download the client itself takes another port and another connection ID, which has to be the same "
        "server's.",
    ),
    Feature.RETRY: ("Retry", "The client has to prove its address first, and comes back to the same server."),
    Feature.EARLY_DATA_ELSEWHERE: (
        "0-RTT",
        "What one server gave the client for the next time is good at another: early data is sent, and taken as far "
        "as client or server say.",
    ),
    Feature.QUIC_V2: ("v2", "QUIC version 2 from the first packet to the last."),
    Feature.ROTATION: (
        "rotation",
        "In mid-download the servers go on with another configuration and key, and the client with connection IDs of "
        "that.",
    ),
    Feature.BACKEND_KILLED: (
        "server killed",
        "The client's server is killed: the client gets the right Stateless Reset within 8 seconds, gives up, and its "
        "next connection goes elsewhere.",
    ),
    Feature.BALANCER_RESTARTED: ("restart", "In mid-download the balancer is killed and started again."),
    Feature.BALANCERS_SWAP: (
        "swap",
        "Every second another balancer gets the client's packets; neither tells the other anything.",
    ),
}

HEAD = """\
# Who gets along with whom

Real clients at servers of every make, behind both engines, while something moves or dies.
This page is made by `make interop`, from the results of that run.

```console
$ make interop                                              # everything, and this page
$ make interop ARGS="--servers quinn --engines udp"         # some of it
$ make interop ARGS="--clients chromium --features rotation --jobs 1"
```

It takes root, Debian's `chromium`, `ngtcp2-client`, `ethtool` and nginx, and for the servers of other makes what \
`make adapters` takes.
What is not here is not run, and the table says why.

## What is done

Each place has three servers of one make, two balancers with the same configuration, and a network of its own.
Between client and balancer is a relay: it is the NAT that changes its mind, and it lets 10 Mbit/s through where a \
download is to last.
A download counts if every octet of it is right and it came on the connection that it began on: the relay sees no \
other Initial.
A connection ID counts if it decodes to the server that answers.
A cell that fails is played once more, in case the machine was busy; the run tells which ones.

✓ passed, ✗ failed, · was not run.
The numbers are those of the reasons at the end.

| column | what happens |
|---|---|
"""

CONTROL_WORDS = """\
The control must fail where connection IDs are needed, or those scenarios would show nothing: in the columns {columns}.
It must not in the others, or it would show nothing itself.
It has been played with one server only.
"""


def page(results: Iterable[Result]) -> str:
    """The whole page."""
    found = list(results)
    lines = [HEAD + "\n".join(f"| {name} | {what} |" for name, what in COLUMNS.values())]
    lines.append("\n## Versions\n\n| client | what it is |\n|---|---|")
    lines += [f"| {name} | {CLIENTS[name].made_of()} |" for name in _present(CLIENTS, (r.cell.client for r in found))]
    lines.append("\n| server | what it is |\n|---|---|")
    lines += [f"| {name} | {ADAPTERS[name].stack} |" for name in _present(ADAPTERS, (r.cell.server for r in found))]
    notes: dict[str, int] = {}
    for engine in Engine:
        rows = [result for result in found if result.cell.engine is engine]
        if not rows:
            continue
        lines.append(f"\n## {TITLES[engine]}\n")
        if engine is Engine.CONTROL:
            columns = [COLUMNS[feature][0] for feature in COLUMNS if feature in NEEDS_CIDS]
            lines.append(CONTROL_WORDS.format(columns=", ".join(columns)))
        lines += table(rows, notes)
    if notes:
        lines.append("\n## Why not, and what went wrong\n")
        lines += [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join(lines) + "\n"


def table(results: Sequence[Result], notes: dict[str, int]) -> list[str]:
    """One engine's cells as Markdown. Reasons go into `notes`, which numbers them."""
    features = [feature for feature in COLUMNS if any(r.cell.feature is feature for r in results)]
    lines = [
        "| server | client | " + " | ".join(COLUMNS[feature][0] for feature in features) + " |",
        "|---|---|" + ":-:|" * len(features),
    ]
    cells = {(r.cell.server, r.cell.client, r.cell.feature): r for r in results}
    for server in _present(ADAPTERS, (r.cell.server for r in results)):
        for client in _present(CLIENTS, (r.cell.client for r in results)):
            shown = [_shown(cells.get((server, client, feature)), notes) for feature in features]
            lines.append(f"| {server} | {client} | " + " | ".join(shown) + " |")
    return lines


def summary(results: Sequence[Result]) -> str:
    """How many cells say what, and all that are not as expected."""
    counts = {verdict: sum(r.verdict is verdict for r in results) for verdict in Verdict}
    expected = sum(r.cell.must_fail and r.verdict is Verdict.FAIL for r in results)
    wrong = [result for result in results if not result.is_as_expected]
    again = [result for result in results if result.attempts > 1]
    lines = [
        f"{len(results)} cells: {counts[Verdict.PASS]} pass, {counts[Verdict.FAIL]} fail "
        f"({expected} of the control, as they must), {counts[Verdict.NOT_RUN]} not run"
    ]
    lines += [f"at the second attempt: {r.cell}: {r.verdict}: {r.saw}" for r in again if r.is_as_expected]
    for result in wrong:
        what = "the control got through" if result.cell.must_fail else "failed"
        lines.append(f"{what}: {result.cell}: {result.saw}")
    return "\n".join(lines)


def _shown(result: Result | None, notes: dict[str, int]) -> str:
    if result is None:
        return ""
    symbol = SYMBOLS[result.verdict]
    if result.is_as_expected and result.verdict is not Verdict.NOT_RUN:
        return symbol
    got_through = result.verdict is Verdict.PASS
    note = "The control got through where it must not." if got_through else _sentence(result.saw)
    return f"{symbol} [{notes.setdefault(note, len(notes) + 1)}](#why-not-and-what-went-wrong)"


def _sentence(words: str) -> str:
    line = " ".join(words.split())
    return line + ("" if line.endswith(".") else ".")


def _present(known: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the known ones that occur, in their order."""
    found = set(names)
    return [name for name in known if name in found]
