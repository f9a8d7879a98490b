"""`quiclb xdp` and `quiclb decap`: the programs that quiclb has put on interfaces."""

from __future__ import annotations

import argparse
import errno
import itertools
import signal
import socket
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from lb.commands.arguments import FAILED, OK, ArgumentError, add, ip_address, json_flag, positive
from lb.keys import XdpConfig
from lb.router import Verdict


def add_to(commands: Any) -> None:
    _add_xdp(commands)
    _add_decap(commands)


def _add_xdp(commands: Any) -> None:
    parser = add(
        commands,
        "xdp",
        "look at the xdp engine's program, sample packets, take it off",
        """What `quiclb run` with `engine: xdp` has put on an interface stays there when the
process ends, and packets keep flowing. These commands show it, look at packets
that go through it, and end it. They need root.""",
        """examples:
  quiclb xdp status
  quiclb xdp sample --interface eth0 --every 1000
  quiclb xdp sample --interface eth0 --every 1 --verdict reset_limited --count 10
  quiclb xdp detach --interface eth0

Exit status: 0 done, 1 failed (nothing of quiclb's is there, say), 2 wrong arguments.""",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    pins = argparse.ArgumentParser(add_help=False)
    pins.add_argument(
        "--pin-directory",
        type=Path,
        default=XdpConfig().pin_directory,
        metavar="DIRECTORY",
        help="the configuration's xdp.pin-directory (%(default)s)",
    )
    interface = argparse.ArgumentParser(add_help=False)
    interface.add_argument("--interface", required=True, metavar="NAME", help="the configuration's interface")

    status = actions.add_parser(
        "status",
        parents=[pins],
        help="what is loaded, and how full its maps are",
        description="Say which programs of quiclb's are on which interfaces, native or generic, since when, what they "
        "took the verifier, and how full their maps are. Without --interface, of all interfaces.",
    )
    status.add_argument("--interface", metavar="NAME", help="this interface only")
    json_flag(status)
    status.set_defaults(command=_status)

    sample = actions.add_parser(
        "sample",
        parents=[interface],
        help="the first octets of some packets",
        description="Print the first octets of one packet in N that came for a service, with what became of it, until "
        "SIGINT. What others see of an interface (tcpdump, say) has not got these packets.",
    )
    sample.add_argument("--every", type=positive, required=True, metavar="N", help="one packet in N")
    sample.add_argument(
        "--verdict",
        action="append",
        default=[],
        choices=[verdict.name.lower() for verdict in Verdict],
        metavar="VERDICT",
        help="of those with this verdict only (docs/metrics.md lists them); more than once: with any of these",
    )
    sample.add_argument("--count", type=positive, metavar="K", help="stop after K samples")
    sample.set_defaults(command=_sample)

    detach = actions.add_parser(
        "detach",
        parents=[interface, pins],
        help="take the program off an interface",
        description="Take the program off an interface, and forget what is pinned. From then on nobody forwards. A "
        "`quiclb run` that is still there has to be started again.",
    )
    detach.set_defaults(command=_detach)


def _add_decap(commands: Any) -> None:
    parser = add(
        commands,
        "decap",
        "on a backend: unpack what an xdp balancer has packed",
        """For backends behind `forward: ipip` or `forward: gue` that have no tunnel devices.
It puts a small program on an interface that takes the outer header off packets
that are addressed to this machine; everything else passes as it is. It stays
when the command ends. Run again, it replaces itself. `quiclb xdp status` shows it.
It needs root, and services' addresses on lo.""",
        """examples:
  ip address add 192.0.2.1/32 dev lo
  quiclb decap --interface eth0
  quiclb decap --interface eth0 --address 10.0.0.11 --address fd00::11
  quiclb decap --interface eth0 --detach

Exit status: 0 done, 1 failed, 2 wrong arguments.""",
    )
    parser.add_argument("--interface", required=True, metavar="NAME", help="where packed packets come in")
    parser.add_argument(
        "--address",
        action="append",
        default=[],
        type=ip_address,
        metavar="ADDRESS",
        help="where tunnels end; more than once: at any of these (every address of the interface)",
    )
    parser.add_argument(
        "--pin-directory",
        type=Path,
        default=XdpConfig().pin_directory,
        metavar="DIRECTORY",
        help="a directory of a BPF file system, to outlive the command in (%(default)s)",
    )
    parser.add_argument("--detach", action="store_true", help="take it off again")
    parser.set_defaults(command=_decap)


def _status(args: argparse.Namespace) -> int:
    from lb.xdp import status  # noqa: PLC0415 - the other commands need no libbpf

    interfaces = [_interface(args.interface)] if args.interface else [name for _, name in socket.if_nameindex()]
    found = status.loaded(interfaces, args.pin_directory)
    if args.json:
        print(status.as_json(found))
    elif found:
        print(status.as_text(found, time.time()))
    if found:
        return OK
    where = args.interface or "any interface"
    print(f"quiclb: nothing of quiclb's is on {where}", file=sys.stderr)
    return FAILED


def _sample(args: argparse.Namespace) -> int:
    from lb.xdp import sample, status  # noqa: PLC0415 - the other commands need no libbpf

    verdicts = [Verdict[name.upper()] for name in args.verdict]
    # Whoever ends us by SIGTERM, timeout(1) say, wants no sampling to be left behind either.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        status.balancer(_interface(args.interface)) as program,
        closing(sample.samples(program, args.every, verdicts)) as taken,
    ):
        for service, one in itertools.islice(taken, args.count):
            print(sample.as_text(service, one, time.time()), flush=True)
    return OK


def _detach(args: argparse.Namespace) -> int:
    from lb.xdp import attachment  # noqa: PLC0415 - the other commands need no libbpf

    mode = attachment.detach(_interface(args.interface), args.pin_directory)
    print(f"{args.interface}: the balancer's program ({mode}) is off; what it knew is forgotten")
    return OK


def _decap(args: argparse.Namespace) -> int:
    from lb.xdp import decap  # noqa: PLC0415 - the other commands need no libbpf

    if args.detach:
        if args.address:
            raise ArgumentError("decap: --detach takes no --address")
        decap.detach(_interface(args.interface), args.pin_directory)
        print(f"{args.interface}: what tunnels bring is not unpacked any more")
        return OK
    done = decap.attach(_interface(args.interface), args.address, args.pin_directory)
    print(
        f"{args.interface}: unpacks what tunnels bring to {', '.join(done.addresses)} "
        f"({done.mode}, {'replaced' if done.has_replaced else 'new'}, pinned at {done.pin})"
    )
    return OK


def _interface(name: str) -> str:
    """A name that there is. Raises OSError, naming it, for any other."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, "no such network interface", name) from None
    return name
