"""`quiclb decap`: the program that unpacks, on a backend, what the modes `ipip` and `gue` have packed."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from lb.address import packed
from lb.forward import Attach
from lb.xdp import attachment
from lb.xdp.attachment import Attachment
from lb.xdp.interface import read_interface
from lb.xdp.layout import U32_KEY
from lb.xdp.libbpf import Object, Program
from lb.xdp.netlink import Netlink

OBJECT = Path(__file__).parent / "decap.bpf.o"
PROGRAM = "decap"

_PINS = "decap"  # a directory in the pin directory, so that nobody takes one for a balancer's
_PRESENT = U32_KEY.pack(1)


class Unpacking(NamedTuple):
    """What `attach` has brought about."""

    addresses: tuple[str, ...]  # where tunnels end
    mode: str  # native, generic
    pin: Path
    has_replaced: bool  # the program of an earlier call


def attach(name: str, addresses: Sequence[str], pins: Path) -> Unpacking:
    """Unpack what tunnels bring to these addresses; if there are none, to all of the interface.

    It stays when the process ends. The program of an earlier call is replaced between two packets. Raises OSError, with
    nothing changed.
    """
    with Netlink() as netlink:
        interface = read_interface(name, netlink)
    ends = tuple(addresses) or interface.global_addresses
    if not ends:
        raise OSError(errno.EADDRNOTAVAIL, "it has no address at which a tunnel could end", name)
    with closing(Attachment(name, interface.index, pins / _PINS, PROGRAM)) as place, _load(ends) as program:
        place.attach(program, Attach.AUTO)
        return Unpacking(ends, str(place.mode), place.pin, place.predecessor is not None)


def detach(name: str, pins: Path) -> None:
    """Raises OSError if there is nothing to detach."""
    attachment.detach(name, pins / _PINS, PROGRAM)


def _load(ends: Sequence[str]) -> Program:
    with Object(OBJECT) as compiled:
        compiled.load()
        with compiled.map("local") as local:
            local.update_batch({packed(end): _PRESENT for end in ends})
        return compiled.program(PROGRAM)
