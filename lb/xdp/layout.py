"""The twin of bpf/shared.h: the numbers, sizes and layouts that the program and Python both know.

A C struct is a NamedTuple with the C names of all its fields, in order, and a `Layout` of the same name in capitals
that turns values into octets and back. `LAYOUTS` has all of them; a layout says `c_name`, `size` and `offsets`
(field name to offset), for comparison with what the compiler says.

Fields that Python does not calculate with are octets, as they lie in memory: addresses, ports, MAC addresses,
masks, keys and structs within structs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from itertools import chain
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, cast, get_args, get_type_hints

# The specification's.
AES_BLOCK = 16

# Ours.
MAX_SERVICES = 256
CONFIG_SLOTS = 8
NO_BACKEND_SLOT = 0xFFFF
SAMPLE_OCTETS = 128
SLOT_NAME = 136

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
Ip = Annotated[bytes, "16s"]  # union address: lb.address.packed
Port = Annotated[bytes, "2s"]  # __be16
Mac = Annotated[bytes, "6s"]
ServerIdOctets = Annotated[bytes, "16s"]
Mask = Annotated[bytes, "16s"]
KeySchedule = Annotated[bytes, "176s"]

NO_MAC = bytes(6)

T = TypeVar("T")


class Layout(Generic[T]):
    """How the values of one NamedTuple lie in memory: little-endian, every gap a field of its own."""

    def __init__(self, c_name: str, kind: type[T]) -> None:
        hints = get_type_hints(kind, include_extras=True)
        formats = {name: get_args(hint)[1] for name, hint in hints.items()}
        self.c_name = c_name
        self.struct = struct.Struct("<" + "".join(formats.values()))
        self.size = self.struct.size
        self.offsets: dict[str, int] = {}
        at = 0
        for name, format_ in formats.items():
            self.offsets[name] = at
            at += struct.calcsize("<" + format_)
        self._kind: Any = kind
        self._counts = [len(struct.unpack("<" + f, bytes(struct.calcsize("<" + f)))) for f in formats.values()]
        self._is_flat = set(self._counts) == {1}

    def pack(self, value: T) -> bytes:
        fields = cast("Iterable[Any]", value)
        if self._is_flat:
            return self.struct.pack(*fields)
        split = zip(fields, self._counts, strict=True)
        return self.struct.pack(*chain.from_iterable((field,) if count == 1 else field for field, count in split))

    def unpack(self, octets: bytes) -> T:
        found = self.struct.unpack(octets)
        if self._is_flat:
            return cast("T", self._kind._make(found))
        items = iter(found)
        return cast(
            "T",
            self._kind._make(next(items) if n == 1 else tuple(next(items) for _ in range(n)) for n in self._counts),
        )


class Algorithm(IntEnum):
    """How CIDs of a configuration are made; `enum algorithm`."""

    NONE = 0  # there is no such configuration
    PLAINTEXT = 1
    SINGLE_PASS = 2
    FOUR_PASS = 3


class Settings(NamedTuple):
    """What is constant once the program is loaded."""

    forward_mode: U32
    constant_time: U8
    interface_mac: Mac
    zero: Annotated[bytes, "5s"]
    source_ipv4: Ip
    source_ipv6: Ip
    nat_port_first: U16
    nat_port_count: U16
    interface_mtu: U32
    hash_seed: U64
    random_key: KeySchedule


class Endpoint(NamedTuple):
    """Key of `listeners` and `dnat_returns`. Port 0: any address that clients send to."""

    address: Ip
    port: Port
    zero: U16 = 0
    zero_too: U32 = 0


class Service(NamedTuple):
    """Value of `listeners`."""

    ring_seed: U64
    index: U32  # type: ignore[assignment]  # over tuple's method, which nobody calls here
    drops_unknown_servers: U32
    new_flows_rate: U32
    reset_rate: U32  # per CPU
    reset_prefix_rate: U32
    ring: U32


class CidConfig(NamedTuple):
    """Value of `cid_configs`; how its masks are meant is said in shared.h."""

    algorithm: U8
    block_length: U8
    block_end: U8
    cid_length: U8
    encodes_length: U8
    right_at: U8
    needs_last_pass: U8
    server_id_length: U8
    left_mask: Mask
    right_mask: Mask
    server_id_mask: Mask
    cid_mask: Annotated[bytes, "24s"]
    encrypt_key: KeySchedule
    decrypt_key: KeySchedule
    sliced_key: KeySchedule


class ServerKey(NamedTuple):
    """Key of `servers` and `reset_keys`."""

    service_and_config: U32  # service index << 8 | config ID
    server_id: ServerIdOctets


class Server(NamedTuple):
    """Value of `servers`."""

    backend: U32


class ResetKey(NamedTuple):
    """Value of `reset_keys`. The program fills in `inner`, `outer` and `is_prepared`."""

    key: Annotated[bytes, "56s"]
    suffix: Annotated[bytes, "40s"]
    inner: Annotated[bytes, "32s"]
    outer: Annotated[bytes, "32s"]
    is_prepared: U32
    arithmetic: U8
    key_length: U8
    suffix_length: U8
    zero: U8 = 0


class Backend(NamedTuple):
    """Value of `backends`."""

    address: Ip
    port: Port
    next_hop: Mac
    incarnation: U32
    action: U8
    is_ipv6: U8
    mtu: U16
    service: U32
    last_incarnation: U32
    zero: Annotated[bytes, "24s"] = bytes(24)


class Ring(NamedTuple):
    """The only element of a map in `rings`."""

    backend: Annotated[bytes, "131074s"]  # RING_SLOTS times u16
    zero: Annotated[bytes, "6s"] = bytes(6)


class Flow(NamedTuple):
    """Key of `flows`: a 4-tuple."""

    client: Ip
    local: Ip
    client_port: Port
    local_port: Port
    zero: U32 = 0


class Choice(NamedTuple):
    """Value of `flows`."""

    backend: U32
    incarnation: U32


class NatKey(NamedTuple):
    """Key of `nat_out`."""

    client: Ip
    local: Ip
    client_port: Port
    local_port: Port
    backend: U32


class NatFlow(NamedTuple):
    """Value of `nat_out`."""

    port: Port
    client_mac: Mac
    cid: Annotated[bytes, "20s"]
    cid_octets: U8
    short_header_seen: U8
    zero: Annotated[bytes, "2s"]
    incarnation: U32
    datagrams_to: U32


class ReturnKey(NamedTuple):
    """Key of `nat_in`."""

    backend: Ip
    backend_port: Port
    port: Port
    zero: U32 = 0


class NatReturn(NamedTuple):
    """Value of `nat_in`."""

    flow: Annotated[bytes, "40s"]  # a Flow
    backend: U32
    client_mac: Mac
    zero: U16
    datagrams_from: U32


class DnatReturn(NamedTuple):
    """Value of `dnat_returns`."""

    address: Ip
    port: Port
    zero: U16
    backend: U32


class Cached(NamedTuple):
    """Value of `cache`, which Python only sizes."""

    cid: Annotated[bytes, "16s"]
    cid_end: U32
    service: U32
    backend: U32
    generation: U32


class ServiceCounters(NamedTuple):
    """Value of `service_count`, per CPU."""

    verdicts: Annotated[tuple[int, ...], "15Q"]
    unroutable: Annotated[tuple[int, ...], "6Q"]
    config_ids: Annotated[tuple[int, ...], "7Q"]
    moves: U64
    rescued: U64


class BackendCounters(NamedTuple):
    """Value of `backend_count`, per CPU."""

    datagrams_to: U64
    octets_to: U64
    datagrams_from: U64
    octets_from: U64
    unreachable: U64
    zero: Annotated[tuple[int, ...], "3Q"]


class TotalCounters(NamedTuple):
    """Value of `total_count`, per CPU."""

    failures: Annotated[tuple[int, ...], "8Q"]
    icmp_forwarded: U64
    too_big_sent: U64
    too_big_limited: U64
    samples_lost: U64


class Sampling(NamedTuple):
    """Value of `sampling`."""

    every: U32  # 0: no samples
    verdicts: U32  # bits 1 << verdict; 0: all


class Sample(NamedTuple):
    """Record of `samples`."""

    verdict: U32
    length: U32
    service: U32
    captured: U32
    octets: Annotated[bytes, "128s"]


class SlotName(NamedTuple):
    """Value of `backend_names` and `service_names`: UTF-8, zeros behind it."""

    name: Annotated[bytes, "136s"]


SETTINGS = Layout("settings", Settings)
ENDPOINT = Layout("endpoint", Endpoint)
SERVICE = Layout("service", Service)
CID_CONFIG = Layout("cid_config", CidConfig)
SERVER_KEY = Layout("server_key", ServerKey)
SERVER = Layout("server", Server)
RESET_KEY = Layout("reset_key", ResetKey)
BACKEND = Layout("backend", Backend)
RING = Layout("ring", Ring)
FLOW = Layout("flow", Flow)
CHOICE = Layout("choice", Choice)
NAT_KEY = Layout("nat_key", NatKey)
NAT_FLOW = Layout("nat_flow", NatFlow)
RETURN_KEY = Layout("return_key", ReturnKey)
NAT_RETURN = Layout("nat_return", NatReturn)
DNAT_RETURN = Layout("dnat_return", DnatReturn)
CACHED = Layout("cached", Cached)
SERVICE_COUNTERS = Layout("service_counters", ServiceCounters)
BACKEND_COUNTERS = Layout("backend_counters", BackendCounters)
TOTAL_COUNTERS = Layout("total_counters", TotalCounters)
SAMPLING = Layout("sampling", Sampling)
SAMPLE = Layout("sample", Sample)
SLOT_NAMES = Layout("slot_name", SlotName)

LAYOUTS: tuple[Layout[Any], ...] = (
    SETTINGS,
    ENDPOINT,
    SERVICE,
    CID_CONFIG,
    SERVER_KEY,
    SERVER,
    RESET_KEY,
    BACKEND,
    RING,
    FLOW,
    CHOICE,
    NAT_KEY,
    NAT_FLOW,
    RETURN_KEY,
    NAT_RETURN,
    DNAT_RETURN,
    CACHED,
    SERVICE_COUNTERS,
    BACKEND_COUNTERS,
    TOTAL_COUNTERS,
    SAMPLING,
    SAMPLE,
    SLOT_NAMES,
)

U32_KEY = struct.Struct("<I")  # an index of an array, or a slot


def per_cpu(layout: Layout[T], octets: bytes) -> list[T]:
    """Each CPU's value out of one element of a per-CPU map."""
    return [layout.unpack(octets[at : at + layout.size]) for at in range(0, len(octets), layout.size)]


def sum_u64(octets: bytes, words: int) -> list[int]:
    """The sums over all CPUs of the 64-bit counters that an element of a per-CPU map consists of."""
    counters = memoryview(octets).cast("Q")
    return [sum(counters[at::words]) for at in range(words)]
