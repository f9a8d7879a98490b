"""Small things that many tests are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from lb.address import Address
from lb.cid import CidConfig, Codec, ConfigId, ServerId
from lb.routing import Backend, CidSlot, FourTuple, Service, UnknownServer

KEY = bytes.fromhex("8f95f09245765f80256934e50c66207f")
RESET_KEY = bytes(range(32))
CONFIG = CidConfig(ConfigId(0), 4, 12, KEY)
VIP = Address("192.0.2.1", 443)


def deterministic_random(seed: str = "quiclb") -> Callable[[int], bytes]:
    """A `random(n)` that gives the same octets in every run, never the same twice."""
    state = [0]

    def random(count: int) -> bytes:
        state[0] += 1
        return hashlib.shake_256(f"{seed} {state[0]}".encode()).digest(count)

    return random


def server_id(number: int, length: int = 4) -> ServerId:
    return ServerId((0xA0000000 + number).to_bytes(4)[-length:].rjust(length, b"\xa5"))


def backends(count: int, *, config_ids: Iterable[int] = (0,), length: int = 4) -> tuple[Backend, ...]:
    """Backends b0, b1, … with one server ID each, the same under every config ID."""
    return tuple(
        Backend(
            f"b{i}",
            Address(f"10.0.{i >> 8}.{i & 255}", 443),
            {ConfigId(c): frozenset([server_id(i, length)]) for c in config_ids},
        )
        for i in range(count)
    )


def service(
    count: int = 4,
    *,
    slots: tuple[CidSlot, ...] = (CidSlot(CONFIG, RESET_KEY),),
    listen: tuple[Address, ...] = (VIP,),
    members: tuple[Backend, ...] | None = None,
    unknown_server: UnknownServer = UnknownServer.FALLBACK,
) -> Service:
    members = backends(count, config_ids=[s.config.config_id for s in slots]) if members is None else members
    return Service("web", listen, slots, members, "a seed", unknown_server)


def cid_of(number: int, nonce: int = 0, config: CidConfig = CONFIG) -> bytes:
    """A CID of backend `number`."""
    return Codec(config).encode(
        server_id(number, config.server_id_length),
        nonce.to_bytes(config.nonce_length),
        appended=bytes(config.appended_length),
    )


def short(dcid: bytes, size: int = 60) -> bytes:
    """A short header packet of `size` octets, or just long enough for its DCID."""
    return (b"\x41" + dcid).ljust(size, b"\x5a")


def long(dcid: bytes, scid: bytes = b"", size: int = 1200, version: int = 1) -> bytes:
    """A long header packet."""
    header = b"\xc3" + version.to_bytes(4) + bytes([len(dcid)]) + dcid + bytes([len(scid)]) + scid
    return header.ljust(size, b"\x5a")


def flow(number: int = 1, port: int = 50000) -> FourTuple:
    """The 4-tuple of client `number`."""
    return FourTuple(f"198.51.{number >> 8}.{number & 255}", port, VIP.host, VIP.port)
