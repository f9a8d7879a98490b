"""The command line: `quiclb run | check | keygen | cid | schema | xdp | decap`. It parses, calls and prints."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib.metadata
import ipaddress
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lb import cid_tool, config, describe, keygen, server_config
from lb.cid import ConfigId, ServerId
from lb.errors import ConfigErrors
from lb.keyfile import read_key
from lb.keys import XdpConfig
from lb.reset import RESET_KEY_LENGTH, server_reset_key
from lb.router import Verdict
from lb.routing import RoutingTable

OK, FAILED, MISTAKEN = 0, 1, 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE

VERIFIER_LINES = 10  # of the kernel's verifier's last words

STATUSES = "Exit status: 0 done, 1 failed, 2 mistakes in the configuration or the arguments."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; raises SystemExit for --help and for wrong arguments."""
    try:
        args = _parser().parse_args(argv)
        status: int = args.command(args)
        sys.stdout.flush()
    except ConfigErrors as errors:
        for error in errors.exceptions:
            print(error, file=sys.stderr)
        return MISTAKEN
    except BrokenPipeError:
        # Whoever read has seen enough. The interpreter would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"quiclb: {where}{error.strerror or error}", file=sys.stderr)
        return FAILED
    except _ArgumentError as error:
        print(f"quiclb: {error}", file=sys.stderr)
        return MISTAKEN
    return status


class _ArgumentError(Exception):
    """An argument that parses and makes no sense all the same."""


def _run(args: argparse.Namespace) -> int:
    from lb.control import run  # noqa: PLC0415 - the other commands need no event loop

    return run(args.config)


def _check(args: argparse.Namespace) -> int:
    path = args.config or args.file
    if path is None or (args.config and args.file):
        raise _ArgumentError("check: expected one configuration file")
    loaded = config.load_config(path)
    described = describe.describe(loaded)
    if args.engine:
        described["machine"] = _machine(loaded)
    if args.json:
        print(json.dumps(described, indent=2))
    else:
        sys.stdout.write(describe.render(str(path), described))
    lacks: list[str] = described.get("machine", {}).get("lacks", [])
    for reason in lacks:
        print(f"this machine: {reason}", file=sys.stderr)
    return FAILED if lacks else OK


def _machine(loaded: config.LbConfig) -> dict[str, Any]:
    """What the machine that we are on makes of a configuration."""
    from lb.control import missing, xdp_settings  # noqa: PLC0415 - the other commands need no event loop

    lacks = missing(loaded)
    found: dict[str, Any] = {"lacks": lacks, "verified-instructions": None}
    if loaded.engine == "xdp" and not lacks:
        from lb.xdp import requirements  # noqa: PLC0415 - the other commands need no libbpf

        try:
            found["verified-instructions"] = requirements.load(xdp_settings(loaded)).verified_insns
        except OSError as error:
            lacks.append(error.strerror or str(error))
            lacks += getattr(error, "log", "").splitlines()[-VERIFIER_LINES:]
    return found


def _xdp_status(args: argparse.Namespace) -> int:
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


def _xdp_sample(args: argparse.Namespace) -> int:
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


def _xdp_detach(args: argparse.Namespace) -> int:
    from lb.xdp import attachment  # noqa: PLC0415 - the other commands need no libbpf

    mode = attachment.detach(_interface(args.interface), args.pin_directory)
    print(f"{args.interface}: the balancer's program ({mode}) is off; what it knew is forgotten")
    return OK


def _decap(args: argparse.Namespace) -> int:
    from lb.xdp import decap  # noqa: PLC0415 - the other commands need no libbpf

    if args.detach:
        if args.address:
            raise _ArgumentError("decap: --detach takes no --address")
        decap.detach(_interface(args.interface), args.pin_directory)
        print(f"{args.interface}: what tunnels bring is not unpacked any more")
        return OK
    done = decap.attach(_interface(args.interface), args.address, args.pin_directory)
    print(
        f"{args.interface}: unpacks what tunnels bring to {', '.join(done.addresses)} "
        f"({done.mode}, {'replaced' if done.has_replaced else 'new'}, pinned at {done.pin})"
    )
    return OK


def _schema(args: argparse.Namespace) -> int:
    sys.stdout.write(server_config.schema() if args.server else config.schema())
    return OK


def _keygen(make: Callable[[], str], args: argparse.Namespace) -> int:
    keygen.write(make(), args.output)
    return OK


def _keygen_server_reset(args: argparse.Namespace) -> int:
    if not 1 <= len(args.server_id) <= keygen.MAX_SERVER_ID_LENGTH:
        raise _ArgumentError(f"--server-id: {len(args.server_id)} octets: expected 1 to 15")
    master = _key_from(args.master, RESET_KEY_LENGTH)
    key = server_reset_key(master, ConfigId(args.config_id), ServerId(args.server_id))
    keygen.write(key.hex(), args.output)
    return OK


def _keygen_server_id(args: argparse.Namespace) -> int:
    try:
        ids = keygen.server_ids(args.length, args.count)
    except ValueError as error:
        raise _ArgumentError(str(error)) from None
    keygen.write("\n".join(server_id.hex() for server_id in ids), args.output)
    return OK


def _cid_encode(args: argparse.Namespace) -> int:
    given = _given(args, "config_id", "server_id", "nonce", "appended", "low_bits")
    if args.no_length:
        given["encodes_length"] = False
    if args.json_lines or args.server_id is None:
        return _json_lines(cid_tool.encode, given)
    return _answer(cid_tool.encode, given, lambda answer: answer["cid"], args)


def _cid_decode(args: argparse.Namespace) -> int:
    given = _given(args, "config_id", "server_id_length", "nonce_length")
    if args.json_lines or args.cid in (None, "-"):
        return _json_lines(cid_tool.decode, given)
    return _answer(cid_tool.decode, given | {"cid": args.cid}, _lines, args)


def _cid_explain(args: argparse.Namespace) -> int:
    loaded = config.load_config(args.config)
    services = [section.service for section in loaded.services if args.service in (None, section.service.name)]
    if not services:
        raise _ArgumentError(f"--service {args.service}: expected a service of {args.config}")
    explain = functools.partial(cid_tool.explain, tables=[RoutingTable.build(service) for service in services])
    if args.json_lines or args.octets in (None, "-"):
        return _json_lines(explain, {})
    is_datagram = args.datagram or len(args.octets) > 2 * cid_tool.MAX_CID_V1
    given = {"datagram" if is_datagram else "cid": args.octets}
    return _answer(explain, given, _explained, args)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those arguments that were given, as the fields of the same names."""
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.key_file is not None:
        given["key"] = _key_from(args.key_file, 16).hex()
    return given


def _answer(
    answer: Callable[[cid_tool.Fields], dict[str, Any]],
    given: cid_tool.Fields,
    as_text: Callable[[dict[str, Any]], str],
    args: argparse.Namespace,
) -> int:
    try:
        answered = answer(given)
    except ValueError as error:
        print(f"quiclb: {error}", file=sys.stderr)
        return FAILED
    print(json.dumps(answered) if args.json else as_text(answered))
    return OK


def _json_lines(answer: Callable[[cid_tool.Fields], cid_tool.Fields], given: cid_tool.Fields) -> int:
    if sys.stdin.isatty():
        print("quiclb: reading JSON lines from the terminal; --help says more", file=sys.stderr)
    return cid_tool.json_lines(answer, given, sys.stdin.buffer, sys.stdout)


def _lines(answered: dict[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', '-')}: {value}" for name, value in answered.items() if value is not None)


def _explained(answered: dict[str, Any]) -> str:
    services = answered.pop("services")
    return "\n".join([_lines(answered), *("\n" + _lines(service) for service in services)])


def _key_from(path: Path, length: int) -> bytes:
    try:
        return read_key(path, length)
    except ValueError as error:
        raise _ArgumentError(str(error)) from None


def _interface(name: str) -> str:
    """A name that there is. Raises OSError, naming it, for any other."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, "no such network interface", name) from None
    return name


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:12]) < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer, 1 to {(1 << 32) - 1}")
    return int(text)


def _ip_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an IP address") from None


def _octets(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected hex digits, two for each octet") from None


def _version() -> str:
    try:
        return f"quiclb {importlib.metadata.version('quiclb')}"
    except importlib.metadata.PackageNotFoundError:
        return "quiclb (not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "quiclb",
        description="A QUIC-aware UDP load balancer: it routes by what servers put into connection IDs.",
        epilog=f"`quiclb COMMAND --help` has examples. {STATUSES}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    _add_check(commands)
    _add_keygen(commands)
    _add_cid(commands)
    _add_schema(commands)
    _add_xdp(commands)
    _add_decap(commands)
    return parser


def _add(commands: Any, name: str, help: str, details: str, epilog: str) -> argparse.ArgumentParser:  # noqa: A002
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=details,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _add_run(commands: Any) -> None:
    parser = _add(
        commands,
        "run",
        "balance until told to stop",
        """Balance as a configuration file says, until SIGTERM or SIGINT.

SIGHUP reads the file again. With any mistake in it, or with a change that a
running process cannot make, the old configuration stays and the log says why.

With `engine: xdp` packets keep flowing when the process ends, by the tables that
it had last; `quiclb xdp detach` ends that.""",
        """examples:
  quiclb check /etc/quiclb/quiclb.yaml && quiclb run -c /etc/quiclb/quiclb.yaml

Exit status: 0 stopped when told to, 1 failed, 2 mistakes in the configuration.""",
    )
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="the configuration")
    parser.set_defaults(command=_run)


def _add_check(commands: Any) -> None:
    parser = _add(
        commands,
        "check",
        "say what is wrong with a configuration, or what it means",
        """Read a configuration and the key files it names, and say what was understood:
services, CID configurations and what a packet of each costs, server IDs, shares
of new connections. Keys are shown as fingerprints of 32 bits, for comparing.
If there are mistakes, say all of them, one per line, on standard error.

With --engine and `engine: xdp` the machine is asked too: for privileges, libraries,
the interface. If it has everything, the kernel's verifier looks at the program.
Nothing is attached.""",
        """examples:
  quiclb check quiclb.yaml
  quiclb check --engine quiclb.yaml
  quiclb check --json quiclb.yaml | jq '.services[].backends'

Exit status: 0 no mistakes, 1 the machine lacks something (--engine), 2 mistakes.
Advice (`note:` lines) changes nothing.""",
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="the configuration")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="the same")
    parser.add_argument("--engine", action="store_true", help="ask this machine as well whether it can run the engine")
    parser.add_argument("--json", action="store_true", help="print what was understood as JSON")
    parser.set_defaults(command=_check)


def _add_schema(commands: Any) -> None:
    parser = _add(
        commands,
        "schema",
        "print the JSON Schema of the configuration",
        """Print the JSON Schema (draft 2020-12) of the configuration file, for editors.
`quiclb check` knows more: a schema sees no key files and compares no two places.""",
        """examples:
  quiclb schema > quiclb.schema.json
  quiclb schema --server

Exit status: 0.""",
    )
    parser.add_argument("--server", action="store_true", help="that of a server's file instead")
    parser.set_defaults(command=_schema)


def _add_keygen(commands: Any) -> None:
    parser = _add(
        commands,
        "keygen",
        "make keys and server IDs",
        """Make new keys and server IDs, at random. Without -o they go to standard output;
a file must not exist yet, and nobody but its owner can read it.""",
        """examples:
  quiclb keygen cid -o secrets/cid-0.key
  quiclb keygen reset -o secrets/reset-0.key
  quiclb keygen server-id --length 4 --count 3
  quiclb keygen server-reset --master secrets/reset-0.key --config-id 0 \\
      --server-id 3fa91c02 -o secrets/reset-a.key

Exit status: 0 done, 1 cannot write (the file exists, say), 2 wrong arguments.""",
    )
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("-o", "--output", type=Path, metavar="FILE", help="a new file (standard output)")

    cid = kinds.add_parser(
        "cid", parents=[output], help="a key for CIDs", description="A key for CIDs (key-file): 32 hex digits."
    )
    cid.set_defaults(command=functools.partial(_keygen, keygen.cid_key))
    reset = kinds.add_parser(
        "reset",
        parents=[output],
        help="a master key for resets",
        description="A master key for stateless resets (a balancer's reset-key-file): 64 hex digits.",
    )
    reset.set_defaults(command=functools.partial(_keygen, keygen.reset_key))
    server_reset = kinds.add_parser(
        "server-reset",
        parents=[output],
        help="one server's own reset key",
        description="The reset key of one server ID (a server's reset-key-file), which follows from the master key.",
    )
    server_reset.add_argument("--master", type=Path, required=True, metavar="FILE", help="the master key's file")
    server_reset.add_argument("--config-id", type=int, choices=range(7), required=True, help="its config ID")
    server_reset.add_argument("--server-id", type=_octets, required=True, metavar="HEX", help="its server ID")
    server_reset.set_defaults(command=_keygen_server_reset)
    server_id = kinds.add_parser(
        "server-id",
        parents=[output],
        help="server IDs",
        description="Different random server IDs, one per line. Random ones tell nobody how many servers there are.",
    )
    server_id.add_argument("--length", type=int, required=True, metavar="N", help="octets of each, 1 to 15")
    server_id.add_argument("--count", type=int, default=1, metavar="K", help="how many (1)")
    server_id.set_defaults(command=_keygen_server_id)


def _add_cid(commands: Any) -> None:
    parser = _add(
        commands,
        "cid",
        "encode, decode and explain connection IDs",
        """Make connection IDs and look into them.

Without a CID among the arguments (or with --json-lines) each takes JSON objects
on standard input, one per line, and answers each with one line, at once. Fields:
config_id, server_id_length, nonce_length are integers; key, server_id, nonce, cid
are octets as hex digits, and key may be null (plaintext). Arguments fill in what
a line leaves out. A line that cannot be answered gets {"error": "..."}.""",
        """examples:
  quiclb cid encode --config-id 0 --key-file cid-0.key --server-id 3fa91c02 --nonce 000102030405060708090a0b
  quiclb cid decode 07c4605e4504cc4f --server-id-length 3 --nonce-length 4
  quiclb cid explain -c quiclb.yaml 07c4605e4504cc4f
  quiclb cid decode --json-lines < cids.jsonl

Exit status: 0 done, 1 something could not be answered, 2 wrong arguments.""",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json-lines", action="store_true", help="JSON objects on standard input, one per line")
    common.add_argument("--json", action="store_true", help="answer in JSON")
    keyed = argparse.ArgumentParser(add_help=False)
    keyed.add_argument("--config-id", type=int, metavar="N", help="the config ID, 0 to 6")
    keyed.add_argument("--key-file", type=Path, metavar="FILE", help="the key, 32 hex digits (none: plaintext)")

    encode = actions.add_parser(
        "encode",
        parents=[common, keyed],
        help="server ID and nonce to CID",
        description="Print the CID that carries a server ID and a nonce. A nonce must never serve twice.",
    )
    encode.add_argument("--server-id", metavar="HEX", help="the server ID")
    encode.add_argument("--nonce", metavar="HEX", help="the nonce")
    encode.add_argument("--appended", metavar="HEX", help="octets after the routing block")
    encode.add_argument("--no-length", action="store_true", help="do not put the length into the first octet")
    encode.add_argument("--low-bits", type=int, metavar="N", help="what to put there instead, 0 to 31 (0)")
    encode.set_defaults(command=_cid_encode)

    decode = actions.add_parser(
        "decode",
        parents=[common, keyed],
        help="CID to server ID and nonce",
        description="Print the server ID and the nonce that a CID carries, if it was made with this key and lengths.",
    )
    decode.add_argument("cid", nargs="?", metavar="CID", help="the CID, as hex digits")
    decode.add_argument("--server-id-length", type=int, metavar="N", help="octets of the server ID")
    decode.add_argument("--nonce-length", type=int, metavar="N", help="octets of the nonce")
    decode.set_defaults(command=_cid_decode)

    explain = actions.add_parser(
        "explain",
        parents=[common],
        help="where a CID or a datagram would go, and why",
        description="Say what each service of a configuration makes of a CID, or of a datagram's first packet. "
        "JSON lines have a field `cid` or `datagram`.",
    )
    explain.add_argument("octets", nargs="?", metavar="HEX", help="a CID; with more than 20 octets a datagram")
    explain.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="the configuration")
    explain.add_argument("--service", metavar="NAME", help="this service only")
    explain.add_argument("--datagram", action="store_true", help="it is a datagram, however short")
    explain.set_defaults(command=_cid_explain)


def _add_xdp(commands: Any) -> None:
    parser = _add(
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
    status.add_argument("--json", action="store_true", help="the same as JSON")
    status.set_defaults(command=_xdp_status)

    sample = actions.add_parser(
        "sample",
        parents=[interface],
        help="the first octets of some packets",
        description="Print the first octets of one packet in N that came for a service, with what became of it, until "
        "SIGINT. What others see of an interface (tcpdump, say) has not got these packets.",
    )
    sample.add_argument("--every", type=_positive, required=True, metavar="N", help="one packet in N")
    sample.add_argument(
        "--verdict",
        action="append",
        default=[],
        choices=[verdict.name.lower() for verdict in Verdict],
        metavar="VERDICT",
        help="of those with this verdict only (docs/metrics.md lists them); more than once: with any of these",
    )
    sample.add_argument("--count", type=_positive, metavar="K", help="stop after K samples")
    sample.set_defaults(command=_xdp_sample)

    detach = actions.add_parser(
        "detach",
        parents=[interface, pins],
        help="take the program off an interface",
        description="Take the program off an interface, and forget what is pinned. From then on nobody forwards. A "
        "`quiclb run` that is still there has to be started again.",
    )
    detach.set_defaults(command=_xdp_detach)


def _add_decap(commands: Any) -> None:
    parser = _add(
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
        type=_ip_address,
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
