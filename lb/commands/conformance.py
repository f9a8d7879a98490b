"""`quiclb conformance`: whether a server is fit to stand behind a balancer."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lb.address import MAX_PORT, Address
from lb.commands.arguments import FAILED, OK, ArgumentError, add, duration, file, positive
from lb.conformance import report
from lb.conformance.subject import Subject, tokens_of
from lb.keyfile import read_key
from lb.reset_scheme import SECRET_LENGTHS, Scheme
from lb.server_config import load_server_config

# Ours.
MOST_CONNECTIONS = 1_000_000
COMMAND_TIMEOUT = 60.0  # seconds that --restart and --rotate may take
LAST_WORDS = 200  # characters of what a command says when it fails
FORMATS: Mapping[str, Callable[[report.Report], str]] = {
    "text": report.as_text,
    "json": report.as_json,
    "junit": report.as_junit,
}


def add_to(commands: Any) -> None:
    parser = add(
        commands,
        "conformance",
        "whether a server is fit to stand behind a balancer",
        """Examine a QUIC server: does it make the connection IDs and stateless reset tokens that
its file, server.yaml, asks for, and do clients that move stay with it? Each check passes,
fails or is skipped with a reason; docs/conformance.md says what they mean.

It makes real connections, thousands of them, and breaks most off when the server's
connection ID is known. It is meant for the server's own address; a balancer in front
must have no other server. Certificates are not verified. Needs quiclb[conformance].

--restart and --rotate are commands for the shell, and at most a minute is waited for
each: one restarts the server, the other has it read the file that --rotated-config
names a copy of.""",
        """examples:
  quiclb conformance 192.0.2.11:443 --server-config server-a/server.yaml
  quiclb conformance web-a.internal:443 --server-config server.yaml --restart 'systemctl restart web'
  quiclb conformance 192.0.2.11:443 --server-config old/server.yaml \\
      --rotate 'cp new/* /etc/web/ && systemctl reload web' --rotated-config new/server.yaml
  quiclb conformance 192.0.2.11:443 --server-config server.yaml --format junit > conformance.xml

Exit status: 0 nothing failed, 1 something failed or there is no server, 2 wrong arguments.""",
    )
    parser.add_argument("target", metavar="HOST:PORT", help="where the server listens")
    file(parser, "--server-config", required=True, help="its file, as quiclb server-config writes it")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the report (default: %(default)s)")
    file(parser, "-o", "--output", help="write the report there (standard output)")
    parser.add_argument(
        "--connections", type=positive, metavar="N", help="handshakes to look for patterns in (2000)", default=2000
    )
    parser.add_argument("--concurrency", type=positive, metavar="N", help="handshakes at a time (16)", default=16)
    parser.add_argument(
        "--alpn", action="append", metavar="NAME", help="application protocol, as often as there are (h3)"
    )
    parser.add_argument("--server-name", metavar="NAME", help="server name to ask for (HOST if it is a name)")
    parser.add_argument("--restart", metavar="COMMAND", help="restarts the server")
    parser.add_argument("--rotate", metavar="COMMAND", help="gives the server another configuration")
    file(parser, "--rotated-config", help="the server's file with that configuration")
    parser.add_argument(
        "--within", type=duration, default=5.0, metavar="TIME", help="until a new configuration is obeyed (5s)"
    )
    parser.add_argument("--timeout", type=duration, default=5.0, metavar="TIME", help="for any one answer (5s)")
    parser.add_argument("--deadline", type=duration, default=300.0, metavar="TIME", help="for everything (300s)")
    parser.add_argument(
        "--reset-scheme",
        type=Scheme,
        choices=list(Scheme),
        default=Scheme.HMAC_SHA256,
        metavar="NAME",
        help=f"how the server makes reset tokens: {', '.join(Scheme)} (hmac-sha256)",
    )
    file(parser, "--reset-key-file", help="with what key, where the server's file names none")
    parser.set_defaults(command=_conformance)


def _conformance(args: argparse.Namespace) -> int:
    # The other commands need no aioquic.
    from lb.conformance import client  # noqa: PLC0415

    if (args.rotate is None) != (args.rotated_config is None):
        raise ArgumentError("--rotate and --rotated-config: expected both or neither")
    if args.reset_scheme is not Scheme.HMAC_SHA256 and args.reset_key_file is None:
        raise ArgumentError(f"--reset-scheme {args.reset_scheme}: expected --reset-key-file as well")
    if args.connections > MOST_CONNECTIONS:
        raise ArgumentError(f"--connections {args.connections}: expected at most {MOST_CONNECTIONS}")
    host, address = _resolved(args.target)
    if (reason := client.missing()) is not None:
        raise ArgumentError(reason)
    subject = _subject(args.server_config, args, address)
    if args.reset_key_file is not None:
        subject = replace(subject, token=_tokens(args.reset_scheme, args.reset_key_file, address))
    if args.rotated_config is not None:
        rotated = _subject(args.rotated_config, args, address)
        if (subject.config, subject.server_id) == (rotated.config, rotated.server_id):
            raise ArgumentError(f"{args.rotated_config}: the same configuration as {args.server_config}")
        subject = replace(subject, rotated=rotated)
    began = time.time()
    clock = time.monotonic()
    try:
        findings = report.judged(subject, asyncio.run(_examined(args, host, address, subject)))
    except (client.ExaminationError, OSError) as error:
        reason = f"{address}: {(error.strerror if isinstance(error, OSError) else None) or error}"
        if args.format == "text":
            print(f"quiclb: {report.plain(reason)}", file=sys.stderr)
            return FAILED
        findings = report.unreachable(reason)
    done = report.Report(args.target, subject, findings, began, time.monotonic() - clock)
    written = FORMATS[args.format](done)
    if args.output is not None:
        args.output.write_text(written)
    else:
        sys.stdout.write(written)
    return OK if done.is_fit else FAILED


async def _examined(args: argparse.Namespace, host: str, address: Address, subject: Subject) -> Any:
    from lb.conformance.examination import Examination, Plan  # noqa: PLC0415

    plan = Plan(
        alpn=tuple(args.alpn or ("h3",)),
        server_name=args.server_name or host,
        connections=args.connections,
        concurrency=min(args.concurrency, args.connections),
        restart=_command("--restart", args.restart),
        rotate=_command("--rotate", args.rotate),
        within=args.within,
        timeout=args.timeout,
        deadline=args.deadline,
    )
    return await Examination(address, subject, plan).run()


def _subject(path: Path, args: argparse.Namespace, address: Address) -> Subject:
    """What a server's file asks for. Its reset key is one of hmac-sha256. Raises ArgumentError, ConfigErrors."""
    config = load_server_config(path)
    if config.cid_config is None:
        raise ArgumentError(f"{path}: no cid-config: expected one, or there is nothing to be routed by")
    token = None
    if config.reset_key is not None and args.reset_scheme is Scheme.HMAC_SHA256:
        token = tokens_of(Scheme.HMAC_SHA256, config.reset_key, address.host)
    return Subject(config.name, config.cid_config, config.server_id, token)


def _tokens(scheme: Scheme, path: Path, address: Address) -> Callable[[bytes], bytes]:
    """How a server with a key in a file of its own makes tokens. Raises ArgumentError."""
    lengths = SECRET_LENGTHS[scheme]
    try:
        secret = read_key(path, lengths[0], lengths[-1])
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return tokens_of(scheme, secret, address.host)


def _resolved(target: str) -> tuple[str, Address]:
    """The host as it was written, and its first address. Raises ArgumentError."""
    host, colon, port = target.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) <= MAX_PORT:
        raise ArgumentError(f"{target!r}: expected HOST:PORT, as in 192.0.2.1:443, [2001:db8::1]:443 or name:443")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise ArgumentError(f"{target!r}: {getattr(error, 'strerror', None) or error}") from None
    return host, Address(str(found[0][4][0]).partition("%")[0], int(port))


def _command(option: str, line: str | None) -> Callable[[], Awaitable[None]] | None:
    """What runs an operator's command in a shell, and ends it if it takes too long."""
    if line is None:
        return None

    async def run() -> None:
        from lb.conformance.client import ExaminationError  # noqa: PLC0415

        # A file, and not a pipe: a server that the command leaves behind would hold a pipe open.
        with _scratch() as said:
            process = await asyncio.create_subprocess_exec(
                "/bin/sh", "-c", line, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
            try:
                async with asyncio.timeout(COMMAND_TIMEOUT):
                    status = await process.wait()
            except TimeoutError:
                raise ExaminationError(f"{option}: not done after {COMMAND_TIMEOUT:g} s") from None
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
            if status != 0:
                os.lseek(said, 0, os.SEEK_SET)
                words = " ".join(os.read(said, 1 << 16).decode(errors="replace").split())[-LAST_WORDS:]
                raise ExaminationError(f"{option}: exit status {status}{f': {words}' if words else ''}")

    return run


@contextlib.contextmanager
def _scratch() -> Any:
    """A file without a name."""
    scratch = os.memfd_create("quiclb-command")
    try:
        yield scratch
    finally:
        os.close(scratch)
