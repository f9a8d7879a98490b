"""`quiclb rotation` and `server-config`: another key for connection IDs, while the old one is still in use."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lb import terminal
from lb.admin.client import Client, RefusedError, UnreachableError
from lb.commands.arguments import DIRECTORIES, OK, ArgumentError, add, file, json_flag
from lb.commands.balancer import FINDING, add_admin, client, service
from lb.commands.screen import paint, width
from lb.config import load_config
from lb.operations import RotationStep
from lb.rotation import views_of


def add_to(commands: Any) -> None:
    _add_rotation(commands)
    _add_server_config(commands)


def _add_rotation(commands: Any) -> None:
    parser = add(
        commands,
        "rotation",
        "rotate CID configurations and their keys",
        f"""Where each config ID of a service is, and the steps of a rotation:

  prepare   a free config ID gets a new configuration and key, which balancers know
  activate  servers issue a prepared one; the one before it is retiring
  retire    a retiring one that was quiet for the guard time is free again

To activate a retiring one is the way back.

The steps are written to the configuration file: by the balancer that is asked, which
reads it again, or with -c FILE by this command, which then has the balancer of that
file read it, if it runs. Other balancers need the same file. Steps that would break
connections are refused, unless --force is given; a balancer that runs takes those from
nobody but itself. `quiclb server-config` prints the servers' half.

{FINDING}""",
        """examples:
  quiclb rotation status
  quiclb rotation prepare --service web
  quiclb rotation activate 1 --service web
  quiclb rotation status
  quiclb rotation retire 0 --service web

Exit status: 0 done, 1 failed or refused, 2 wrong arguments.""",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--service", metavar="NAME", help="the service (the only one)")
    json_flag(common, "answer in JSON")
    add_admin(common)
    step = argparse.ArgumentParser(add_help=False)
    step.add_argument("--force", action="store_true", help="even if it breaks connections")

    status = actions.add_parser(
        "status",
        parents=[common],
        help="where each config ID is",
        description="Say where each config ID is, how many packets still come with it, and how old its key is.",
    )
    status.set_defaults(command=_status)

    prepare = actions.add_parser(
        "prepare",
        parents=[common, step],
        help="make a new configuration, and have the balancer know it",
        description="Make a new key and configuration under a free config ID, and have the balancer know it. "
        "Lengths are those of the active configuration unless said otherwise.",
    )
    prepare.add_argument(
        "config_id", type=_config_id, nargs="?", metavar="CONFIG-ID", help="its config ID, 0 to 6 (one that is free)"
    )
    prepare.add_argument("--server-id-length", type=_server_id_length, metavar="N", help="octets of a server ID")
    prepare.add_argument("--nonce-length", type=_nonce_length, metavar="N", help="octets of a nonce")
    prepare.add_argument("--plaintext", action="store_true", help="without a key")
    prepare.set_defaults(command=_prepare)

    for name, help, description in (  # noqa: A001
        (
            "activate",
            "servers issue it from now on",
            "Say that servers issue a configuration that all balancers know. The one that they issued is retiring: "
            "its packets are routed, and counted.",
        ),
        (
            "retire",
            "forget one that is quiet",
            "Forget a retiring configuration that no packet came with for the guard time. Its config ID is free then.",
        ),
    ):
        action = actions.add_parser(name, parents=[common, step], help=help, description=description)
        action.add_argument("config_id", type=_config_id, metavar="CONFIG-ID", help="its config ID, 0 to 6")
        action.set_defaults(command=_step, do=name)


def _add_server_config(commands: Any) -> None:
    parser = add(
        commands,
        "server-config",
        "what a server has to know of a configuration, and nothing more",
        """Make a server's half of a balancer's configuration: its file, the key of its CIDs,
and the reset key of its own server ID. No other server's keys are in it.
Without --output the file is printed, which names the keys' files.""",
        """examples:
  quiclb server-config a -c quiclb.yaml
  quiclb server-config web/a -c quiclb.yaml --config-id 1 --output server-a
  quiclb server-config a -c quiclb.yaml --format envoy --output envoy-a
  quiclb server-config a -c quiclb.yaml --json --with-keys | vault kv put secret/quic/a -

Exit status: 0 done, 1 failed, 2 mistakes in the configuration or the arguments.""",
    )
    parser.add_argument("backend", metavar="BACKEND", help="a name, or SERVICE/NAME")
    file(parser, "-c", "--config", required=True, help="the balancer's configuration")
    parser.add_argument(
        "--config-id", type=_config_id, metavar="N", help="of this CID configuration (the one that servers issue)"
    )
    parser.add_argument("--server-id", metavar="HEX", help="with this one of its server IDs (its only one)")
    parser.add_argument("--nonce-file", metavar="FILE", help="where the server is to note which nonces are used up")
    parser.add_argument(
        "--format", choices=("quiclb", "envoy"), default="quiclb", help="whose words it is in (default: %(default)s)"
    )
    output = parser.add_argument("-o", "--output", type=Path, metavar="DIRECTORY", help="write files there, owner-only")
    output.complete = DIRECTORIES  # type: ignore[attr-defined]
    json_flag(parser, "print it as JSON")
    parser.add_argument("--with-keys", action="store_true", help="with --json: and the keys themselves")
    parser.set_defaults(command=_server_config)


def _server_config(args: argparse.Namespace) -> int:
    # The other commands write no YAML.
    from lb.envoy import envoy_yaml, write_envoy  # noqa: PLC0415
    from lb.server_half import server_half  # noqa: PLC0415

    if args.with_keys and not args.json:
        raise ArgumentError("--with-keys: expected --json as well; --output writes keys in any case")
    is_envoy = args.format == "envoy"
    if is_envoy and (args.json or args.nonce_file):
        raise ArgumentError("--format envoy: it has no JSON, and Envoy no nonce file")
    of, _, name = args.backend.rpartition("/")
    half = server_half(
        load_config(args.config),
        name,
        service=of or None,
        config_id=args.config_id,
        server_id=args.server_id,
        nonce_file=args.nonce_file,
        made=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    written = []
    if args.output is not None:
        written = write_envoy(half, args.output) if is_envoy else half.write(args.output)
    if args.json:
        print(json.dumps(half.as_json(with_keys=args.with_keys)))
    elif args.output is None:
        sys.stdout.write(envoy_yaml(half) if is_envoy else half.as_yaml())
    else:
        print("\n".join(str(path) for path in written))
    return OK


def _status(args: argparse.Namespace) -> int:
    slots = client(args).rotation()
    if args.service is not None:
        name = service(list(slots), args.service)
        slots = {name: slots[name]}
    if args.json:
        print(json.dumps(slots))
        return OK
    print("\n".join(terminal.rotation(slots, width(), paint())))
    return OK


def _prepare(args: argparse.Namespace) -> int:
    wanted = {
        "config-id": args.config_id,
        "server-id-length": args.server_id_length,
        "nonce-length": args.nonce_length,
        "plaintext": args.plaintext or None,
    }
    return _rotate({"do": "prepare"} | {name: value for name, value in wanted.items() if value is not None}, args)


def _step(args: argparse.Namespace) -> int:
    return _rotate({"do": args.do, "config-id": args.config_id}, args)


def _rotate(step: Mapping[str, Any], args: argparse.Namespace) -> int:
    balancer = client(args)
    step = dict(step) | ({"force": True} if args.force else {})
    if args.config is not None:
        answer = _rewritten(step, balancer, args)
    else:
        answer = balancer.rotate(service(list(balancer.rotation()), args.service), step)
    print(json.dumps(answer) if args.json else "\n".join(terminal.plain(line) for line in answer["changes"]))
    return OK


def _rewritten(step: Mapping[str, Any], balancer: Client, args: argparse.Namespace) -> dict[str, Any]:
    """Write a step to the file ourselves, by what its balancer knows about packets, and have it read that."""
    from lb import rewrite  # noqa: PLC0415 - the other commands edit no YAML

    name = service([section.service.name for section in load_config(args.config).services], args.service)
    try:
        slots = balancer.rotation().get(name)
    except UnreachableError as error:
        print(f"quiclb: {error}; the file is changed all the same", file=sys.stderr)
        slots = None
    if args.force and slots is not None:
        return balancer.rotate(name, step)  # a file that it is to read against its own word must be its own doing
    fields = {field.replace("-", "_"): value for field, value in step.items()}
    changes = rewrite.rotate(args.config, name, RotationStep(**fields), None if slots is None else views_of(slots))
    answer: dict[str, Any] = {"generation": None, "changes": list(changes)}
    if slots is not None:
        try:
            reloaded = balancer.reload()
        except RefusedError:
            print(f"quiclb: {args.config} is changed, and the balancer does not take it:", file=sys.stderr)
            raise
        answer = {"generation": reloaded["generation"], "changes": [*changes, *reloaded["changes"]]}
    return answer


def _between(text: str, low: int, high: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(high)) or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer, {low} to {high}")
    return int(text)


def _config_id(text: str) -> int:
    return _between(text, 0, 6)


def _server_id_length(text: str) -> int:
    return _between(text, 1, 15)


def _nonce_length(text: str) -> int:
    return _between(text, 4, 18)
