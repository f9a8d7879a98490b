"""harness.bpf.c at work: what a program takes per packet, by the kernel's own clock."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from bench.balancers import BenchError
from lb.xdp.libbpf import Map, Object, Program

XDP_PASS, XDP_TX = 2, 3
_HEAD, _MORE = 64, 32  # octets of the elements of `heads` and `more`
_U32 = struct.Struct("<I")
_ZERO = bytes(4)


class Restoring(NamedTuple):
    """What the wrapper does to the packet before every run; `struct bench`."""

    frames: Sequence[bytes]  # a power of two
    fresh_clients: bool = False
    generation: Map | None = None  # renewed for every packet
    restores_tail: bool = False
    long_heads: bool = False

    def pack(self) -> bytes:
        return struct.pack(
            "<6I",
            len(self.frames[0]),
            len(self.frames) - 1,
            self.long_heads,
            self.fresh_clients,
            self.generation is not None,
            self.restores_tail,
        )

    def fill(self, loaded: Object) -> None:
        """Put the heads where the loaded programs find them."""
        for name, start, end in (("heads", 0, _HEAD), ("more", _HEAD, _HEAD + _MORE)):
            with loaded.map(name) as filled:
                filled.update_batch(
                    {
                        _U32.pack(flow): frame[start:end].ljust(end - start, b"\0")
                        for flow, frame in enumerate(self.frames)
                    }
                )


class Harness:
    """The wrapper, freshly loaded for some packets. A context manager."""

    def __init__(self, compiled: Path, restoring: Restoring) -> None:
        with Object(compiled) as loaded:
            loaded.section(".rodata.bench")[:] = restoring.pack()
            if restoring.generation is not None:
                loaded.reuse_map("generations", restoring.generation)
            loaded.load()
            self._wrap = loaded.program("wrap")
            self._transmits = loaded.program("null_tx")
            self._passes = loaded.program("null_pass")
            self._target = loaded.map("target")
            restoring.fill(loaded)
        self._frame = restoring.frames[0]

    def nanoseconds(self, program: Program, packets: int, expected: int = XDP_TX) -> int:
        """Of a packet, on average. Raises BenchError if the last one did not end as expected."""
        self._target.update(_ZERO, _U32.pack(program.fd))
        run = self._wrap.test_run(self._frame, repeat=packets)
        if run.retval != expected:
            raise BenchError(f"the program returned {run.retval}, and not {expected}")
        return run.duration

    def floor(self, packets: int) -> int:
        """The same of a program that only transmits."""
        return self.nanoseconds(self._transmits, packets)

    def passing(self, packets: int) -> int:
        """The same of a program that only hands the packet to the stack."""
        return self.nanoseconds(self._passes, packets, XDP_PASS)

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for owned in (self._wrap, self._transmits, self._passes, self._target):
            owned.close()
