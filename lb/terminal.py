"""What the API answers, as text for a terminal: plain ASCII, cut to its width. It has no terminal and no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# ECMA-48, "select graphic rendition".
_GREEN, _YELLOW, _RED, _BOLD, _FAINT = "32", "33", "31", "1", "2"
STATE_COLOURS = {"active": _GREEN, "draining": _YELLOW, "down": _RED, "dead": _RED, "fenced": _RED}

# Ours.
GAP = 2  # blanks between columns
MIN_NOTE = 12  # characters that a note is worth showing with
NEVER = "-"


class Column(NamedTuple):
    """A column of a table. The one with the highest `dispensable` goes first if there is no room; 0 stays."""

    title: str
    dispensable: int = 0
    is_number: bool = True


class Paint(NamedTuple):
    """How text is coloured, if at all."""

    is_on: bool

    def __call__(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.is_on and colour else text


BACKENDS = (
    Column("BACKEND", is_number=False),
    Column("STATE", is_number=False),
    Column("WEIGHT", 3),
    Column("SHARE", 2),
    Column("FLOWS"),
    Column("PPS"),
    Column("LAST", 1),
    Column("RTT", 4),
)


def status(state: Mapping[str, Any], width: int, paint: Paint, services: Iterable[str] | None = None) -> list[str]:
    """A whole balancer, or only these services of it."""
    lines = _header(state, paint)
    for service in state["services"]:
        if services is None or service["name"] in services:
            lines += ["", *_service(state, service, width, paint)]
    return [_cut(line, width) for line in lines]


def top(state: Mapping[str, Any], before: Mapping[str, Any] | None, size: tuple[int, int], paint: Paint) -> list[str]:
    """What there is most of, in as many columns and lines; `before` is the state some time ago, to count from."""
    width, height = size
    lines = _header(state, paint)
    lines += [_verdicts(state, before), ""]
    has_one = len(state["services"]) == 1
    members = [(service, shown) for service in state["services"] for shown in service["backends"]]
    members.sort(key=lambda member: -member[1]["packets-per-second"])
    rows = [
        _backend_row(shown, shown["name"] if has_one else f"{service['name']}/{shown['name']}")
        for service, shown in members
    ]
    notes = [_note(state, shown) for _, shown in members]
    table = _table(BACKENDS, rows, width, paint, notes)
    room = max(1, height - len(lines) - 1)  # the last line is whoever asked's
    if len(table) > room:
        left = len(table) - room + 1
        table = [*table[: room - 1], f"and {left} more"]
    return [_cut(line, width) for line in [*lines, *table]][: max(0, height - 1)]


def traffic(name: str, shown: Mapping[str, Any]) -> str:
    """One line on what still goes to a backend."""
    flows = f"{shown['flows']} flow{'' if shown['flows'] == 1 else 's'}"
    weight = f", weight {shown['weight']}" + _effective(shown)
    return (
        f"{name}: {shown['state']}{weight}, {flows}, {rate(shown['packets-per-second'])} packets/s, "
        f"last packet {ago(shown['last-packet'])}"
    )


def rotation(slots: Mapping[str, Sequence[Mapping[str, Any]]], width: int, paint: Paint) -> list[str]:
    """Where each config ID of each service is."""
    columns = (
        Column("SERVICE", is_number=False),
        Column("ID"),
        Column("PHASE", is_number=False),
        Column("ALGORITHM", 2, is_number=False),
        Column("PACKETS", 3),
        Column("PPS"),
        Column("LAST", 1),
        Column("KEY AGE", 4),
    )
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for service, ids in slots.items():
        untouched = [str(slot["config-id"]) for slot in ids if slot["phase"] == "free" and not slot["packets"]]
        for slot in ids:
            if str(slot["config-id"]) in untouched:
                continue
            rows.append(
                (
                    service,
                    str(slot["config-id"]),
                    slot["phase"],
                    slot["algorithm"] or NEVER,
                    count(slot["packets"]),
                    rate(slot.get("packets-per-second", 0.0)),
                    ago(slot["last-packet"]),
                    NEVER if slot["key-age"] is None else duration(slot["key-age"]),
                )
            )
            notes.append(_slot_note(slot))
        if untouched:
            rows.append((service, ",".join(untouched), "free", *[NEVER] * 5))
            notes.append("")
    return [_cut(line, width) for line in _table(columns, rows, width, paint, notes)]


def explained(answer: Mapping[str, Any]) -> str:
    """An answer of `lb.explain`, a line for each thing known; services after a blank line each."""
    parts = [{name: value for name, value in answer.items() if name != "services"}, *answer["services"]]
    return "\n\n".join(
        "\n".join(f"{name}: {value}" for name, value in part.items() if value is not None) for part in parts
    )


def explained_briefly(answer: Mapping[str, Any]) -> str:
    """The same of a datagram in a capture, a line for each service that was asked."""
    packet = f"{answer['packet']} flow {answer['flow']}"
    if "client" in answer:
        packet += f" {answer['client']} > {answer['local']}"
    packet += f" {answer.get('header', 'no')} header, {answer['octets']} octets"
    lines = []
    for service in answer["services"]:
        cid = answer.get("cid") or service.get("cid")
        decoded = f", server ID {service['server-id']} nonce {service['nonce']}" if "server-id" in service else ""
        config_id = answer.get("config-id")
        by = f", config ID {config_id} {service['algorithm']}" if "algorithm" in service else ""
        to = f" -> {service['backend']} ({service['state']})" if "backend" in service else ""
        lines.append(
            f"{packet}{f', CID {cid}' if cid else ''}{by}{decoded}: "
            f"{service['service']} {service['verdict']}{to}: {service['why']}"
        )
    return "\n".join(lines or [f"{packet}: no service listens there; --service says which to ask"])


def duration(seconds: float) -> str:
    """About how long, in at most six characters or so: 0.2s, 12s, 3m20s, 5h12m, 12d."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m{rest:02}s"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours}h" if days else f"{hours}h{minutes:02}m"


def ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{duration(seconds)} ago"


def rate(per_second: float) -> str:
    return f"{per_second:.1f}" if per_second < 100 else count(round(per_second))


def count(number: int) -> str:
    """With at most five digits or so: 1234, 56.7k, 890M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 10 * scale:
            scaled = number / scale
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return str(number)


def plain(text: str) -> str:
    """Text of somebody else's without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _header(state: Mapping[str, Any], paint: Paint) -> list[str]:
    workers = f", {state['workers']} workers" if state["workers"] > 1 else ""
    xdp = state["xdp"]
    engine = f"xdp on {xdp['interface']} ({xdp['mode']}, {xdp['forward']})" if xdp else f"{state['engine']}{workers}"
    reload = state["reload"]
    lines = [
        f"quiclb {plain(state['version'])}: {engine}, up {duration(state['now'] - state['started-at'])}, "
        f"file read {ago(state['now'] - reload['at'])}",
        f"{count(state['flows'])} of {count(state['flow-limit'])} flows, "
        f"{count(state['sockets'])} of {count(state['socket-limit'])} sockets"
        + (f", {count(state['flows-evicted'])} flows evicted" if state["flows-evicted"] else "")
        + "".join(f", not sent: {count(n)} {reason}" for reason, n in state["send-failures"].items() if n),
    ]
    return lines + [paint(_RED, f"last reload refused: {plain(error)}") for error in reload["errors"]]


def _service(state: Mapping[str, Any], service: Mapping[str, Any], width: int, paint: Paint) -> list[str]:
    lines = [paint(_BOLD, f"{service['name']}") + f"  {', '.join(service['listen'])}"]
    if service["fail-open"]:
        lines.append(paint(_RED, "  too few backends are up: the health checks are not believed"))
    shown = service["backends"]
    rows = [_backend_row(backend, backend["name"]) for backend in shown]
    lines += [
        f"  {line}" for line in _table(BACKENDS, rows, width - 2, paint, [_note(state, backend) for backend in shown])
    ]
    for slot in service["cid-configs"]:
        note = _slot_note(slot)
        lines.append(
            f"  config ID {slot['config-id']} {slot['phase']}, {slot['algorithm']}, "
            f"{rate(slot['packets-per-second'])} packets/s, last {ago(slot['last-packet'])}"
            + (f", {note}" if note else "")
        )
    resets = service["resets"]
    lines.append(
        f"  moves {count(service['moves'])}, rescued {count(service['rescued'])}, "
        f"resets {count(resets['answered'] + resets['pushed'])}"
    )
    return lines


def _backend_row(shown: Mapping[str, Any], name: str) -> tuple[str, ...]:
    round_trip = shown["round-trip"]
    return (
        name,
        shown["state"],
        f"{shown['weight']}",
        f"{shown['ring-share']:.1%}",
        count(shown["flows"]),
        rate(shown["packets-per-second"]),
        NEVER if shown["last-packet"] is None else duration(shown["last-packet"]),
        NEVER if round_trip is None else f"{round_trip * 1000:.1f}ms",
    )


def _note(state: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    notes = []
    if shown["state"] != "active" and shown["since"] is not None:
        notes.append(f"for {duration(state['now'] - shown['since'])}")
    if shown["state"] in ("down", "dead") and shown.get("reason"):
        notes.append(plain(shown["reason"]))
    if shown["drain"] and shown["state"] != "draining":
        notes.append("to drain")
    effective = _effective(shown)
    if effective:
        notes.append(effective.strip())
    if shown["overridden"]:
        notes.append(f"by the operator: {' '.join(shown['overridden'])}")
    return ", ".join(notes)


def _effective(shown: Mapping[str, Any]) -> str:
    if shown["state"] != "active" or abs(shown["effective-weight"] - shown["weight"]) < 1e-9:
        return ""
    return f" (now {shown['effective-weight']:g})"


def _slot_note(slot: Mapping[str, Any]) -> str:
    if slot["phase"] != "retiring":
        return ""
    return "may be freed" if not slot["free-in"] else f"free in {duration(slot['free-in'])}"


def _verdicts(state: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Datagrams per second by verdict, over all services."""
    now, then = _sums(state), _sums(before) if before else {}
    passed = state["now"] - before["now"] if before else 0.0
    if passed <= 0:
        return "datagrams: " + ", ".join(f"{name} {count(n)}" for name, n in now.items() if n)
    rates = {name: max(0, n - then.get(name, 0)) / passed for name, n in now.items()}
    total = sum(rates.values())
    parts = [f"{name} {rate(n)}" for name, n in sorted(rates.items(), key=lambda item: -item[1]) if n]
    return f"{rate(total)} datagrams/s" + (f": {', '.join(parts)}" if parts else "")


def _sums(state: Mapping[str, Any]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for service in state["services"]:
        for name, n in service["verdicts"].items():
            sums[name] = sums.get(name, 0) + n
    return sums


def _table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, paint: Paint, notes: Sequence[str]
) -> list[str]:
    """Rows under titles, with as many columns as there is room for; notes behind them, cut off."""
    widths = [
        max(len(column.title), *(len(row[i]) for row in rows)) if rows else len(column.title)
        for i, column in enumerate(columns)
    ]
    kept = list(range(len(columns)))
    while sum(widths[i] + GAP for i in kept) - GAP > width:
        dispensable = max(kept, key=lambda i: columns[i].dispensable)
        if not columns[dispensable].dispensable:
            # Names give way at last.
            over = sum(widths[i] + GAP for i in kept) - GAP - width
            widths[kept[0]] = max(len(columns[kept[0]].title), widths[kept[0]] - over)
            break
        kept.remove(dispensable)
    room = width - sum(widths[i] + GAP for i in kept)
    lines = [paint(_FAINT, _row(columns, widths, kept, [column.title for column in columns]).rstrip())]
    for row, note in zip(rows, notes, strict=True):
        line = _row(columns, widths, kept, row, paint)
        lines.append(f"{line}{' ' * GAP}{_cut(note, room)}" if note and room >= MIN_NOTE else line.rstrip())
    return lines


def _row(
    columns: Sequence[Column],
    widths: Sequence[int],
    kept: Sequence[int],
    row: Sequence[str],
    paint: Paint = Paint(is_on=False),  # noqa: B008 - it is immutable
) -> str:
    cells = []
    for i in kept:
        text = _cut(row[i], widths[i])
        padded = text.rjust(widths[i]) if columns[i].is_number else text.ljust(widths[i])
        cells.append(paint(STATE_COLOURS.get(row[i], ""), padded) if columns[i].title == "STATE" else padded)
    return (" " * GAP).join(cells)


def _cut(line: str, width: int) -> str:
    """At most `width` characters, of which colours are none."""
    if "\x1b" not in line:
        return line if len(line) <= width else f"{line[: max(0, width - 1)]}~"[:width]
    kept, room, at = [], width, 0
    while at < len(line):
        if line[at] == "\x1b":
            end = line.index("m", at) + 1
            kept.append(line[at:end])
            at = end
            continue
        if room > 0:
            kept.append(line[at])
            room -= 1
        at += 1
    return "".join(kept)
