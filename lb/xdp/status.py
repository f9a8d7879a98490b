"""What of ours is on the machine's interfaces, as the kernel knows it: programs, and how full their maps are."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lb.forward import Forward
from lb.xdp import sample
from lb.xdp.layout import SETTINGS, U32_KEY, Settings, sum_u64
from lb.xdp.libbpf import Link, Map, MapType, Program, attached

# Names of programs.
BALANCER = "quiclb"
OURS = (BALANCER, "decap")
SETTINGS_MAP = ".rodata.settings"[:15]  # as long as the kernel keeps names
DECAP_COUNTERS = ("decapsulated", "dropped_ecn", "malformed", "passed")  # struct decap_counters in decap.bpf.c

TYPES = {kind.value: kind.name.lower().replace("_", "-") for kind in MapType}
HASHES = (MapType.HASH, MapType.LRU_HASH)


class MapUse(NamedTuple):
    """One map, and what it takes of memory with the maps in it. `entries` is None where there is nothing to count:
    rings of records, and what each CPU has by itself."""

    name: str
    type: str
    entries: int | None
    max_entries: int
    octets: int


class Loaded(NamedTuple):
    """One program of ours on one interface.

    `forward`, `constant_time` and `sampling` are a balancer's, `counted` is what `decap` has counted; None for others.
    """

    interface: str
    program: str
    mode: str
    forward: str | None
    constant_time: bool | None
    sampling: int | None  # one packet in so many is sampled; 0: none
    counted: dict[str, int] | None
    id: int
    tag: str
    loaded_at: float  # seconds since 1970
    verified_instructions: int
    jited_octets: int
    pin: Path | None
    maps: tuple[MapUse, ...]


def programs(interface: str) -> Iterator[tuple[str, Program]]:
    """Programs of ours on an interface, with their mode, `native` or `generic`; the taker closes them."""
    found = attached(socket.if_nametoindex(interface))
    for mode, number in (("native", found.native), ("generic", found.generic)):
        if number:
            program = Program.from_id(number)
            if program.info.name in OURS:
                yield mode, program
            else:
                program.close()


def balancer(interface: str) -> Program:
    """The balancer's program on an interface, to be closed. Raises OSError if there is none."""
    for _, program in programs(interface):
        if program.info.name == BALANCER:
            return program
        program.close()
    raise OSError(errno.ENOENT, "no program of a balancer is here", interface)


def pins(directory: Path) -> Iterator[tuple[Path, Link]]:
    """Links that are pinned in a directory; the taker closes them."""
    for path in sorted((*directory.glob("*"), *directory.glob("*/*"))):
        try:
            yield path, Link.open_pinned(path)
        except OSError as error:
            if error.errno == errno.EPERM:  # all others say that it is something else, or gone
                raise


def loaded(interfaces: list[str], directory: Path) -> list[Loaded]:
    """What of ours is on these interfaces. `directory` is where links are pinned."""
    pinned = {}
    for path, link in pins(directory):
        with link:
            pinned[link.info.program_id] = path
    found = []
    for interface in interfaces:
        for mode, program in programs(interface):
            with program:
                found.append(_loaded(interface, mode, program, pinned))
    return found


def as_json(found: list[Loaded]) -> str:
    return json.dumps([_described(program) for program in found], indent=2)


def as_text(found: list[Loaded], now: float) -> str:
    return "\n".join(line for program in found for line in _lines(program, now))


def _loaded(interface: str, mode: str, program: Program, pinned: dict[int, Path]) -> Loaded:
    info = program.info
    settings: Settings | None = None
    sampling: int | None = None
    counted: dict[str, int] | None = None
    uses = []
    for one in program.maps().values():
        with one:
            if one.name == SETTINGS_MAP and one.value_size == SETTINGS.size:  # another version's may be otherwise
                settings = SETTINGS.unpack(next(value for _, value in one.items()))
                continue
            if one.name == "sampling":
                sampling = sample.every(one)
            if one.name == "decap_count":
                sums = sum_u64(one.lookup(U32_KEY.pack(0)) or b"", len(DECAP_COUNTERS))
                counted = dict(zip(DECAP_COUNTERS, sums, strict=True))
            uses.append(_use(one))
    booted_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return Loaded(
        interface=interface,
        program=info.name,
        mode=mode,
        forward=None if settings is None else Forward(settings.forward_mode).name.lower(),
        constant_time=None if settings is None else bool(settings.constant_time),
        sampling=sampling,
        counted=counted,
        id=info.id,
        tag=info.tag,
        loaded_at=booted_at + info.loaded_at,
        verified_instructions=info.verified_insns,
        jited_octets=info.jited_octets,
        pin=pinned.get(info.id),
        maps=tuple(sorted(uses)),
    )


def _use(one: Map) -> MapUse:
    kind, octets = one.definition.type, _octets(one)
    entries: int | None = None
    if kind in HASHES:
        entries = sum(1 for _ in one.items())
    elif kind == MapType.ARRAY and one.max_entries > 1:
        entries = sum(any(value) for _, value in one.items())
    elif kind == MapType.ARRAY_OF_MAPS:
        inner = [U32_KEY.unpack(number)[0] for _, number in one.items() if any(number)]
        entries = len(inner)
        for number in inner:
            with Map.from_id(number) as held:
                octets += _octets(held)
    return MapUse(one.name, TYPES.get(kind, str(kind)), entries, one.max_entries, octets)


def _octets(one: Map) -> int:
    """What the kernel says that the map takes; before Linux 6.4 that was an estimate."""
    for line in Path(f"/proc/self/fdinfo/{one.fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "memlock":
            return int(value)
    return 0


def _described(program: Loaded) -> dict[str, Any]:
    described = program._asdict() | {
        "pin": None if program.pin is None else os.fspath(program.pin),
        "counted": None if program.counted is None else _hyphens(program.counted),
        "maps": [_hyphens(use._asdict()) for use in program.maps],
    }
    return _hyphens(described)


def _hyphens(fields: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in fields.items()}


def _lines(program: Loaded, now: float) -> Iterator[str]:
    what = f"{program.interface}: {program.program}, {program.mode}"
    if program.forward is not None:
        what += f", forward {program.forward}" + (", AES in constant time" if program.constant_time else "")
    yield what
    yield f"  program {program.id}, tag {program.tag}, loaded {_ago(now - program.loaded_at)} ago"
    yield f"  {program.verified_instructions} instructions verified, {program.jited_octets} octets of machine code"
    yield f"  pinned at {program.pin}" if program.pin else "  no pin of it in the pin directory (--pin-directory)"
    if program.counted is not None:
        yield "  " + ", ".join(f"{name.replace('_', '-')} {count}" for name, count in program.counted.items())
    if program.sampling:
        yield f"  one packet in {program.sampling} is sampled: quiclb xdp sample"
    yield f"  {'map':<16}{'type':<14}{'entries':>10}{'of':>10}{'fill':>6}{'memory':>12}"
    for use in program.maps:
        entries, fill = ("", "") if use.entries is None else (str(use.entries), f"{use.entries / use.max_entries:.0%}")
        yield f"  {use.name:<16}{use.type:<14}{entries:>10}{use.max_entries:>10}{fill:>6}{_size(use.octets):>12}"


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _size(octets: int) -> str:
    for unit, length in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if octets >= length:
            return f"{octets / length:.1f} {unit}"
    return f"{octets} B"
