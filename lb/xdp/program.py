"""The compiled program: what is set in it before it is loaded, and its maps afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from lb.xdp import aes128
from lb.xdp.layout import SETTINGS, U32_KEY, Settings
from lb.xdp.libbpf import Map, MapDefinition, Object, Program, possible_cpus

OBJECT = Path(__file__).parent / "quiclb.bpf.o"
PROGRAM = "quiclb"
GENERATION = ".data.generation"
CACHE = "cache"  # in the object, of one CPU
CACHES = {CACHE, "listener_cache"}
KERNEL_NAME = 15  # octets of a name that the kernel keeps
SETTINGS_SECTION = ".rodata.settings"
# Maps that name each other's slots and indexes, so that a successor carries on all of them or none.
TABLES = frozenset(
    {
        "listeners",
        "cid_configs",
        "servers",
        "reset_keys",
        "backends",
        "rings",
        "dnat_returns",
        "backend_names",
        "service_names",
        "backend_count",
        "service_count",
    }
)
NAT = frozenset({"nat_out", "nat_in"})  # the two halves of flows


class LoadedProgram:
    """The program in the kernel, its maps by their full names, and which of them were there before."""

    def __init__(self, program: Program, maps: dict[str, Map], reused: frozenset[str], log: str) -> None:
        self.program = program
        self.maps = maps
        self.reused = reused
        self.verifier_log = log  # statistics, if they were asked for

    def close(self) -> None:
        """Let go of it; what is attached or pinned stays."""
        for one in self.maps.values():
            one.close()
        self.program.close()


def load_program(
    settings: Settings,
    sizes: Mapping[str, int] | None = None,
    reuse: Mapping[str, Map] | None = None,
    *,
    path: Path = OBJECT,
    statistics: bool = False,
) -> LoadedProgram:
    """Load the program. Raises BpfError.

    `sizes` are numbers of entries of maps, by name. `reuse` has maps of a predecessor, by the names that the kernel
    knows; those of equal definition are carried on, if what they refer to is.
    """
    with Object(path) as compiled, ExitStack() as undo:
        compiled.section(SETTINGS_SECTION)[:] = SETTINGS.pack(settings)
        compiled.section(".rodata.aes")[:] = aes128.tables()
        compiled.set_max_entries(CACHE, compiled.definitions()[CACHE].max_entries * possible_cpus())
        for name, entries in (sizes or {}).items():
            compiled.set_max_entries(name, entries)
        reused = _reusable(settings, compiled.definitions(), reuse or {})
        for name in reused:
            compiled.reuse_map(name, (reuse or {})[name[:KERNEL_NAME]])
        compiled.load(statistics=statistics)
        log = compiled.verifier_log(PROGRAM)
        program = undo.enter_context(compiled.program(PROGRAM))
        maps = {name: undo.enter_context(compiled.map(name)) for name in compiled.definitions()}
        used = set(program.info.map_ids)
        for one in maps.values():
            if one.id not in used:  # Python's own: they live and die with the program all the same
                program.bind_map(one)
        undo.pop_all()
    return LoadedProgram(program, maps, reused, log)


def _reusable(
    settings: Settings, definitions: Mapping[str, MapDefinition], existing: Mapping[str, Map]
) -> frozenset[str]:
    """Full names of the maps to carry on."""
    equal = {
        name
        for name, definition in definitions.items()
        # Variables, which are in sections, and what was decoded under them are each program's own.
        if name not in CACHES
        and "." not in name
        and (one := existing.get(name[:KERNEL_NAME])) is not None
        and one.definition == definition
    }
    if not equal >= TABLES:
        return frozenset()
    before = existing.get(SETTINGS_SECTION[:KERNEL_NAME])
    octets = before.lookup(U32_KEY.pack(0)) if before is not None else None
    if octets is None or _towards_backends(SETTINGS.unpack(octets)) != _towards_backends(settings) or not equal >= NAT:
        equal -= NAT
    return frozenset(equal)


def _towards_backends(settings: Settings) -> tuple[object, ...]:
    """What a flow's other half is found by."""
    return settings.source_ipv4, settings.source_ipv6, settings.nat_port_first, settings.nat_port_count
