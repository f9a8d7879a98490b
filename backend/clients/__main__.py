"""`python -m backend.clients 127.0.0.1:4433 /whoami`: one request, for looking around."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from backend.clients.fleet import LIBRARIES
from backend.clients.transfer import ConnectionEndedError
from lb.address import Address


def main(argv: Sequence[str] | None = None) -> int:
    """Print a response's body. 0 if there was one, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m backend.clients", description="Send one HTTP/3 request and print what comes, as it comes."
    )
    parser.add_argument("server", type=_address, metavar="ADDRESS:PORT", help="a balancer, or a server itself")
    parser.add_argument("path", nargs="?", default="/whoami", help="(default: /whoami)")
    parser.add_argument("--stack", choices=sorted(LIBRARIES), default="aioquic", help="(default: %(default)s)")
    parser.add_argument("--local", metavar="ADDRESS", help="send from this address (default: the kernel's choice)")
    args = parser.parse_args(argv)
    try:
        asyncio.run(_get(args))
    except (OSError, ValueError) as error:  # a connection's end and a timeout are OSErrors too
        why = "no answer in time" if isinstance(error, TimeoutError) else error or type(error).__name__
        print(f"{args.server}: {why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _address(written: str) -> Address:
    try:
        return Address.parse(written)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


async def _get(args: argparse.Namespace) -> None:
    async with await LIBRARIES[args.stack].connect(args.server, local=args.local) as client:
        transfer = client.begin(args.path)
        shown = 0
        while not transfer.is_over:
            try:
                await transfer.reached(shown + 1)
            except ConnectionEndedError:
                break
            sys.stdout.buffer.write(transfer.body[shown:])
            sys.stdout.buffer.flush()
            shown = len(transfer.body)
        body = await transfer.complete()
        sys.stdout.buffer.write(body[shown:])
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
