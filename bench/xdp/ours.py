"""The engine's program with tables for one path, loaded and attached to nothing."""

from __future__ import annotations

from types import TracebackType

from bench.balancers import BenchError
from bench.xdp import frames
from bench.xdp.paths import Path
from lb.address import Address, packed
from lb.forward import Forward
from lb.router import RouterLimits, Verdict
from lb.routing import Backend, BackendState, CidSlot, RoutingTable, Service
from lb.upstream import ServicePolicy
from lb.xdp import aes128
from lb.xdp.difference import GENERATION, SERVICE_COUNT, difference
from lb.xdp.image import Image, NextHop, Surroundings, render
from lb.xdp.layout import SERVICE_COUNTERS, U32_KEY, Settings, sum_u64
from lb.xdp.libbpf import Program
from lb.xdp.program import load_program
from lb.xdp.slots import Allocation
from lb.xdp.tables import Tables

SOURCE, SOURCE6 = "192.0.2.2", "2001:db8:1::2"  # ours towards backends
MTU = 1500
MAP_ENTRIES = 65536  # of 4-tuples and nat flows
SLOTS = frames.BACKENDS + 1
_RESET_KEY = bytes(range(32))
_UNLIMITED = 4e9  # resets per second: as many as the layout can say; 0 would leave the limiter out
_NAME = "bench"


class Ours:
    """A context manager. Raises BpfError."""

    def __init__(self, path: Path) -> None:
        table = _table(path)
        rates = (_UNLIMITED if path.limits else 0, _UNLIMITED if path.is_reset else 0)
        image = render([table], surroundings(table, path.mode, *rates), Image(Allocation(SLOTS)))
        sizes = {"backends": SLOTS, "backend_count": SLOTS}
        if path.mode is Forward.NAT:
            sizes |= dict.fromkeys(("nat_out", "nat_in"), MAP_ENTRIES)
        self._loaded = load_program(settings(path.mode, path.constant_time), sizes | {"flows": MAP_ENTRIES})
        Tables(self._loaded.maps).write(difference(Image(Allocation(SLOTS)), image))
        self.program: Program = self._loaded.program
        self.generation = self._loaded.maps[GENERATION]

    def verdicts(self) -> list[int]:
        """How often there was which."""
        counted = self._loaded.maps[SERVICE_COUNT].lookup(U32_KEY.pack(0))
        assert counted is not None
        return sum_u64(counted, SERVICE_COUNTERS.size // 8)[: len(Verdict)]

    def check(self, path: Path, before: list[int], packets: int) -> None:
        """Raises BenchError if not every packet since `before` took the path."""
        counted = {
            Verdict(verdict): now - then
            for verdict, (then, now) in enumerate(zip(before, self.verdicts(), strict=True))
            if now != then
        }
        expected = {} if path.verdict is None else {path.verdict: packets}
        if counted != expected:
            raise BenchError(f"{path.name}: it counted {counted}, and not {expected}")

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._loaded.close()


def _table(path: Path) -> RoutingTable:
    """All server IDs are in force. For resets all backends are dead but one, which has none."""
    backends = tuple(
        Backend(
            f"b{number}",
            _address(number, path),
            {config.config_id: frozenset({frames.server_id(number, config)}) for config in frames.CONFIGS},
        )
        for number in range(frames.BACKENDS)
    )
    slots = tuple(CidSlot(config, _RESET_KEY if path.is_reset else None) for config in frames.CONFIGS)
    listen = tuple(Address(str(vip), frames.PORT) for vip in (frames.VIP, frames.VIP6))
    alive = Backend("alive", _address(frames.BACKENDS, path), {})
    dead = [backend.name for backend in backends] if path.is_reset else []
    service = Service(_NAME, listen, slots, (*backends, alive))
    return RoutingTable.build(service, dict.fromkeys(dead, BackendState.DOWN), dead)


def _address(backend: int, path: Path) -> Address:
    return Address(str(frames.backend_address(backend, is_ipv6=path.is_ipv6)), frames.PORT)


def surroundings(
    table: RoutingTable, forward: Forward, new_flows_rate: float = 0, reset_rate: float = 0
) -> Surroundings:
    """Every backend has a next hop of its own."""
    limits = RouterLimits(new_flows_rate=new_flows_rate, reset_rate=reset_rate, reset_prefix_rate=reset_rate)
    policy = ServicePolicy(router=limits, push_rate=0, silence=0)
    hops = {
        backend.address.host: NextHop(b"\x02\0\0\1" + number.to_bytes(2), MTU)
        for number, backend in enumerate(table.backends)
    }
    return Surroundings(forward=forward, policies={_NAME: policy}, addresses=(), hops=hops, cpus=1)


def settings(forward: Forward, constant_time: bool = False) -> Settings:
    return Settings(
        forward_mode=forward,
        constant_time=constant_time,
        interface_mac=frames.BALANCER_MAC,
        zero=bytes(5),
        source_ipv4=packed(SOURCE),
        source_ipv6=packed(SOURCE6),
        nat_port_first=1024,
        nat_port_count=64512,
        interface_mtu=MTU,
        hash_seed=0x9E3779B97F4A7C15,
        random_key=aes128.encrypt_schedule(bytes(aes128.KEY_LENGTH)),
    )
