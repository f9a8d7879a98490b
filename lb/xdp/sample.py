"""Samples of packets, for debugging: the program puts the first octets of some into a ring buffer if it is told to."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator

from lb.router import Verdict
from lb.xdp.layout import SAMPLE, SAMPLING, SLOT_NAMES, U32_KEY, Sample, Sampling
from lb.xdp.libbpf import Map, Program, RingBuffer

POLL = 0.1  # seconds; the program wakes nobody, which would cost it a hundred times as much as a sample
OCTETS_IN_LINE = 16

_ONLY = U32_KEY.pack(0)


def samples(program: Program, every: int, verdicts: Iterable[Verdict] = ()) -> Generator[tuple[str, Sample]]:
    """One packet in `every`, or of those with the given verdicts, with its service's name, until nobody wants more.

    Whoever iterates closes the generator, which ends the sampling, or lets an exception do it.
    """
    maps = program.maps()
    try:
        names = _service_names(maps["service_names"])
        taken: list[bytes] = []
        with RingBuffer(maps["samples"], taken.append) as ring:
            ring.consume()
            taken.clear()  # what somebody else has left there
            wanted = sum(1 << verdict for verdict in set(verdicts))
            maps["sampling"].update(_ONLY, SAMPLING.pack(Sampling(every, wanted)))
            try:
                while True:
                    if not ring.consume():
                        time.sleep(POLL)
                    while taken:
                        sample = SAMPLE.unpack(taken.pop(0))
                        yield names.get(sample.service, str(sample.service)), sample
            finally:
                maps["sampling"].update(_ONLY, SAMPLING.pack(Sampling(0, 0)))
    finally:
        for one in maps.values():
            one.close()


def every(sampling: Map) -> int:
    """One packet in how many is sampled now; 0: none."""
    return SAMPLING.unpack(sampling.lookup(_ONLY) or bytes(SAMPLING.size)).every


def as_text(service: str, sample: Sample, now: float) -> str:
    """A sample as a line that says what it is, and its octets."""
    clock = time.strftime("%H:%M:%S", time.localtime(now))
    octets = sample.octets[: sample.captured]
    head = f"{clock} {service} {Verdict(sample.verdict).name.lower()}, {sample.length} octets"
    return "\n".join([head, *_dump(octets)])


def _dump(octets: bytes) -> Iterator[str]:
    for at in range(0, len(octets), OCTETS_IN_LINE):
        line = octets[at : at + OCTETS_IN_LINE]
        shown = "".join(chr(octet) if 0x20 <= octet < 0x7F else "." for octet in line)
        yield f"    {at:04x}  {line.hex(' '):<{3 * OCTETS_IN_LINE - 1}}  {shown}"


def _service_names(names: Map) -> dict[int, str]:
    return {
        U32_KEY.unpack(index)[0]: SLOT_NAMES.unpack(name).name.rstrip(b"\0").decode(errors="replace")
        for index, name in names.items()
    }
