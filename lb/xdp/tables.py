"""The maps that Python fills: writes them step by step, and reads back what a predecessor wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lb.address import Address, unpacked
from lb.xdp import layout
from lb.xdp.difference import GENERATION, Step
from lb.xdp.image import (
    BACKEND_NAMES,
    BACKENDS,
    CID_CONFIGS,
    DNAT_RETURNS,
    LISTENERS,
    RESET_KEYS,
    RINGS,
    SERVERS,
    SERVICE_NAMES,
    Image,
    ring_index,
)
from lb.xdp.layout import BACKEND, CID_CONFIG, MAX_SERVICES, RESET_KEY, RING, SERVICE, SLOT_NAMES, U32_KEY
from lb.xdp.libbpf import Map, MapType
from lb.xdp.slots import Allocation, Occupant, Slot

HASHES = (LISTENERS, SERVERS, RESET_KEYS, DNAT_RETURNS, BACKEND_NAMES, SERVICE_NAMES)

_ONLY = U32_KEY.pack(0)


class Tables:
    """The maps of a program, by name. All methods block."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        self._maps = maps
        self._rings: dict[bytes, Map] = {}  # elements of `rings`, by key

    @property
    def capacities(self) -> dict[str, int]:
        return {name: one.max_entries for name, one in self._maps.items()}

    def write(self, steps: Sequence[Step]) -> None:
        """Raises BpfError; then some of it is written."""
        for name, updates, deletes in steps:
            if name == RINGS:
                self._write_rings(updates)
                continue
            one = self._maps[name]
            if len(updates) == 1:
                ((key, value),) = updates.items()
                one.update(key, value)
            else:
                one.update_batch(updates)
            if one.definition.type in (MapType.ARRAY, MapType.PERCPU_ARRAY):
                one.update_batch(dict.fromkeys(deletes, bytes(one.value_size)))
            else:
                one.delete_batch(deletes)

    def read(self) -> Image:
        """What is in the maps, and who has which slot."""
        entries = {name: dict(self._maps[name].items()) for name in HASHES}
        for name, size in ((CID_CONFIGS, CID_CONFIG.size), (BACKENDS, BACKEND.size)):
            entries[name] = {key: value for key, value in self._maps[name].items() if value != bytes(size)}
        # What the program has added to them is its own.
        entries[RESET_KEYS] = {
            key: RESET_KEY.pack(RESET_KEY.unpack(value)._replace(inner=bytes(32), outer=bytes(32), is_prepared=0))
            for key, value in entries[RESET_KEYS].items()
        }
        rings: dict[int, tuple[int, bytes]] = {}
        for value in entries[LISTENERS].values():
            service = SERVICE.unpack(value)
            half = service.ring // MAX_SERVICES
            if service.index not in rings:
                rings[service.index] = (half, self._read_ring(ring_index(service.index, half)))
        entries[RINGS] = {ring_index(index, half): octets for index, (half, octets) in rings.items()}
        generation = U32_KEY.unpack(self._maps[GENERATION].lookup(_ONLY) or _ONLY)[0]
        return Image(
            _allocation(entries, self._maps[BACKENDS].max_entries),
            {name: (found,) for name, found in entries.items()},
            rings,
            generation=generation,
        )

    def close(self) -> None:
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()

    def _write_rings(self, updates: Mapping[bytes, bytes]) -> None:
        """Both rings of a service are made at once: putting one into `rings` waits for all CPUs."""
        made: dict[bytes, Map] = {}
        for key in updates:
            for each in _halves(key):
                if self._ring(each) is None and each not in made:
                    made[each] = Map.create(MapType.ARRAY, "ring", U32_KEY.size, RING.size, 1)
        self._maps[RINGS].update_batch({key: U32_KEY.pack(one.fd) for key, one in made.items()})
        self._rings |= made
        for key, octets in updates.items():
            self._rings[key].update(_ONLY, RING.pack(layout.Ring(octets)))

    def _read_ring(self, key: bytes) -> bytes:
        ring = self._ring(key)
        value = ring.lookup(_ONLY) if ring is not None else None
        return b"" if value is None else RING.unpack(value).backend

    def _ring(self, key: bytes) -> Map | None:
        if key not in self._rings:
            number = self._maps[RINGS].lookup(key)
            if number is None:
                return None
            self._rings[key] = Map.from_id(U32_KEY.unpack(number)[0])
        return self._rings[key]


def _halves(key: bytes) -> tuple[bytes, bytes]:
    service = U32_KEY.unpack(key)[0] % MAX_SERVICES
    return ring_index(service, 0), ring_index(service, 1)


def _allocation(entries: Mapping[str, Mapping[bytes, bytes]], capacity: int) -> Allocation:
    services = {_text(name): U32_KEY.unpack(key)[0] for key, name in entries[SERVICE_NAMES].items()}
    backends = {}
    incarnations = {}
    for key, value in entries[BACKENDS].items():
        backend = BACKEND.unpack(value)
        number = U32_KEY.unpack(key)[0]
        incarnations[number] = backend.last_incarnation
        if backend.incarnation and key in entries[BACKEND_NAMES]:
            service, _, name = _text(entries[BACKEND_NAMES][key]).partition("/")
            where = Address(unpacked(backend.address), int.from_bytes(backend.port))
            backends[Occupant(service, name, where)] = Slot(number, backend.incarnation)
    return Allocation(
        capacity,
        services,
        backends,
        incarnations,
        (max(services.values(), default=-1) + 1) % MAX_SERVICES,
        (max(incarnations, default=-1) + 1) % capacity,
    )


def _text(name: bytes) -> str:
    return SLOT_NAMES.unpack(name).name.rstrip(b"\0").decode()
