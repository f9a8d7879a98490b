"""The prototype that ours is compared with. It is no part of the project: `--prototype` names its sources' folder.

What it takes to compile and to fill it is known here, and nowhere else: lb.bpf.c forwards, sr.bpf.c resets.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import TracebackType

from bench.balancers import BenchError
from bench.xdp import frames
from bench.xdp.compiler import CompilerError, compile_bpf
from bench.xdp.ours import MAP_ENTRIES
from lb.cid import CidConfig
from lb.routing import RING_SLOTS
from lb.xdp.image import cid_config
from lb.xdp.layout import CID_CONFIG, sum_u64
from lb.xdp.libbpf import Map, Object, Program

RESET = "reset"

_SOURCES = ("lb.bpf.c", "sr.bpf.c", "gen_tables.py")
_VARIABLES = ".data"  # one, in fact
_U32 = struct.Struct("<I")
# What it takes from libbpf's headers, which need not be here: ours has most of it.
_SHIMS = {
    "bpf/bpf_helpers.h": '#include "bpf.h"\n'
    "static __u64 (*const bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;\n",
    "bpf/bpf_endian.h": "",
}


class Loaded:
    """One program with its tables. A context manager."""

    def __init__(self, program: Program, maps: dict[str, Map]) -> None:
        self.program = program
        self.generation = maps.get(_VARIABLES)  # of what is in its cache, if it has one
        self._maps = maps

    def check(self, path: str, is_by_cid: bool) -> None:
        """Raises BenchError if it did not route as ours did, by CID or by 4-tuple; it counts no more than that."""
        if counted := self._maps.get("gstats"):
            totals = [sum_u64(counted.lookup(_U32.pack(reason)) or b"", 1)[0] for reason in range(2)]
            others, expected = totals[is_by_cid], totals[not is_by_cid]
            if others or not expected:
                raise BenchError(f"{path}: the prototype routed {totals[0]} by CID and {totals[1]} by 4-tuple")

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for owned in (self.program, *self._maps.values()):
            owned.close()


class Prototype:
    """Its sources, compiled once per set of flags into `place`."""

    def __init__(self, sources: Path, place: Path) -> None:
        """Raises CompilerError if they are not there."""
        if missing := [name for name in _SOURCES if not (sources / name).is_file()]:
            raise CompilerError(f"{sources} has no {', '.join(missing)}")
        self._place = place
        for source in (*sources.glob("*.h"), *sources.glob("*.bpf.c")):
            # A tail call leads from a program that takes fragments to one that does.
            text = source.read_text().replace('SEC("xdp")', 'SEC("xdp.frags")')
            (place / source.name).write_text(text)
        for name, text in _SHIMS.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(text)
        made = subprocess.run(
            [sys.executable, sources / "gen_tables.py"], capture_output=True, text=True, check=False, cwd=place
        )
        if made.returncode:
            raise CompilerError(f"gen_tables.py: {made.stderr.strip()}")
        (place / "aes_tables.h").write_text(made.stdout)

    def compiled(self, flags: str) -> Path:
        program = self._place / f"{hashlib.sha256(flags.encode()).hexdigest()[:8]}.o"
        if not program.exists():
            source = "sr.bpf.c" if flags == RESET else "lb.bpf.c"
            # Without -DNOLIMIT its bucket is empty after a thousand packets.
            defined = ["-DNOLIMIT"] if flags == RESET else flags.split()
            compile_bpf(self._place / source, program, (f"-I{self._place}", "-w", *defined))
        return program

    def load(self, flags: str) -> Loaded:
        """Freshly loaded, with the tables of frames.py."""
        with Object(self.compiled(flags)) as loaded:
            for name in loaded.definitions().keys() & {"flows", "nat_f", "nat_r"}:
                loaded.set_max_entries(name, MAP_ENTRIES)
            loaded.load()
            maps = loaded.maps()
            if "dmc" in maps:
                maps[_VARIABLES] = loaded.map(_VARIABLES)  # the object's name is before it in the map's own
            if flags == RESET:
                return Loaded(loaded.program("sr"), maps)
            _fill(maps)
            return Loaded(loaded.program("lb"), maps)


def _fill(maps: Mapping[str, Map]) -> None:
    backends = range(frames.BACKENDS)
    tables = {
        "cfgs": {_U32.pack(config.config_id): _cfg(config) for config in frames.CONFIGS},
        "vips": {frames.VIP.packed + struct.pack(">H", frames.PORT) + struct.pack("<H", 17): bytes(8)},
        "sids": {
            (bytes([config.config_id]) + frames.server_id(backend, config)).ljust(16, b"\0"): _U32.pack(backend)
            for config, backend in product(frames.CONFIGS, backends)
        },
        "ring": {_U32.pack(slot): _U32.pack(slot % frames.BACKENDS) for slot in range(RING_SLOTS)},
        "backends": {
            _U32.pack(backend): struct.pack(">4sI6sH", frames.backend_address(backend).packed, 0, bytes(6), 0)
            for backend in backends
        },
    }
    for name, entries in tables.items():
        maps[name].update_batch(entries)


def _cfg(config: CidConfig) -> bytes:
    """Its struct cfg: most of it is in ours too."""
    ours = CID_CONFIG.unpack(cid_config(config))
    last_pass = 1 if ours.needs_last_pass else 2
    octets = (ours.algorithm, ours.server_id_length, ours.block_end, last_pass, ours.block_length, ours.right_at, 0, 0)
    return b"".join(
        (
            bytes(octets),
            *(ours.left_mask, ours.right_mask, ours.server_id_mask),
            *(ours.encrypt_key, ours.decrypt_key, ours.sliced_key),
            (b"\xff" * ours.block_end).ljust(24, b"\0")[8:],
        )
    )
