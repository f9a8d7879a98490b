"""`python -m tests.interop`: play the matrix, print each cell as it ends, and write the table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from backend.adapters.registry import ADAPTERS, Feature
from backend.clients.visitors import CLIENTS
from tests.interop.cells import Engine, Result, Verdict
from tests.interop.run import ROOT, Wanted, play
from tests.interop.table import page, summary

E = TypeVar("E", bound=StrEnum)

# Ours.
PAGE = ROOT / "docs" / "interop.md"
JOBS = 4  # places at a time: they mostly wait
TIMEOUT = 1500.0  # seconds for everything


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every cell is as expected, 1 if one failed, or if the control did not where it must; 2 wrong arguments."""
    args = _arguments(argv)
    wanted = Wanted(args.engines, args.servers, args.clients, args.features)
    began = time.monotonic()
    results = play(wanted, args.jobs, args.timeout, _tell)
    print(f"{summary(results)}\n{time.monotonic() - began:.0f} s in all")
    out = args.out or (PAGE if wanted.is_everything else None)
    if out is not None:
        out.write_text(page(results))
        print(f"written: {out}")
    return 0 if all(result.is_as_expected for result in results) else 1


def _tell(result: Result) -> None:
    cell = result.cell
    verdict = "FAIL" if not result.is_as_expected else str(result.verdict)
    if cell.must_fail and result.verdict is Verdict.FAIL:
        verdict = "fail, as it must"
    again = " (second attempt)" if result.attempts > 1 else ""
    print(
        f"{cell.engine:5} {cell.server:9} {cell.client:10} {cell.feature:18} {result.seconds:5.1f} s  "
        f"{verdict}: {result.saw.splitlines()[0] if result.saw else ''}{again}",
        flush=True,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.interop",
        description="Every client at every server behind every balancer, whatever moves or dies.",
    )
    for name, parse, everything in (
        ("engines", _some(list(Engine)), tuple(Engine)),
        ("servers", _some(list(ADAPTERS)), tuple(ADAPTERS)),
        ("clients", _some(list(CLIENTS)), tuple(CLIENTS)),
        ("features", _some(list(Feature)), tuple(Feature)),
    ):
        names = ",".join(everything)
        parser.add_argument(
            f"--{name}", type=parse, default=everything, metavar="NAME,NAME", help=f"of {names} (default: all)"
        )
    parser.add_argument("--jobs", type=int, default=JOBS, metavar="N", help="places at a time (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="for everything (default: %(default)g)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"where the page goes ({PAGE.relative_to(ROOT)}, if all is played)"
    )
    return parser.parse_args(argv)


def _some(known: Sequence[E] | Sequence[str]) -> Callable[[str], tuple[E | str, ...]]:
    by_name = {str(each): each for each in known}

    def parse(text: str) -> tuple[E | str, ...]:
        names = text.split(",")
        for name in names:
            if name not in by_name:
                raise argparse.ArgumentTypeError(f"{name!r}: expected some of {','.join(by_name)}")
        return tuple(by_name[name] for name in names)

    return parse


if __name__ == "__main__":
    sys.exit(main())
