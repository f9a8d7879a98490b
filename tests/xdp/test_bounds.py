"""What the verifier says of the programs: that they load, what it took, and what it says when they do not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lb.forward import Forward
from lb.xdp import decap
from lb.xdp.libbpf import BpfError, Object
from lb.xdp.program import OBJECT, load_program
from tests.xdp import bpf
from tests.xdp.conftest import Summary
from tests.xdp.expectations import Loaded, by_forward

# The kernel's limits are a million instructions, and 512 octets of stack along any chain of calls. Ours leave room for
# what another compiler or kernel makes of the same source.
MOST_INSTRUCTIONS = 100_000
MOST_STACK = 256  # octets, of one function
MOST_MACHINE_CODE = 65_536  # octets: what stays of a first-level instruction cache is nobody else's


def stack_depths(log: str) -> list[int]:
    """Octets of stack of each function, the program's entry first."""
    (depths,) = re.findall(r"^stack depth ([\d+]+)", log, re.MULTILINE)
    return [int(depth) for depth in depths.split("+")]


@by_forward
@pytest.mark.parametrize("constant_time", [False, True], ids=["tables", "constant-time"])
def test_the_program_is_within_bounds(forward: Forward, constant_time: bool, loaded: Loaded, summary: Summary) -> None:
    program = loaded(forward, constant_time=constant_time).loaded
    info, depths = program.program.info, stack_depths(program.verifier_log)
    aes = "constant-time AES" if constant_time else "AES by tables"
    summary.append(
        f"{forward.name.lower()}, {aes}: {info.verified_insns} instructions verified, "
        f"stack {depths[0]} octets, {max(depths)} in the deepest of {len(depths)} functions, "
        f"{info.jited_octets} octets of machine code"
    )

    assert info.verified_insns <= MOST_INSTRUCTIONS
    assert max(depths) <= MOST_STACK
    assert info.jited_octets <= MOST_MACHINE_CODE


def test_the_decapsulation_program_is_within_bounds(loaded: Loaded, summary: Summary) -> None:
    with Object(decap.OBJECT) as compiled:
        compiled.load(statistics=True)
        depths = stack_depths(compiled.verifier_log("decap"))
        with compiled.program("decap") as program:
            verified = program.info.verified_insns
    summary.append(f"decap: {verified} instructions verified, stack {max(depths)} octets")

    assert verified <= MOST_INSTRUCTIONS
    assert max(depths) <= MOST_STACK


def test_a_program_that_is_refused_comes_with_the_verifiers_words(loaded: Loaded, tmp_path: Path) -> None:
    """And leaves nothing behind. It is refused for its licence, which takes away helpers that it needs."""
    loaded(Forward.DNAT)
    object_code = OBJECT.read_bytes()
    assert object_code.count(b"GPL\0") == 1
    refused = tmp_path / "refused.bpf.o"
    refused.write_bytes(object_code.replace(b"GPL\0", b"MIT\0"))
    before = os.listdir("/proc/self/fd")

    with pytest.raises(BpfError, match="cannot call GPL-restricted function from non-GPL compatible program"):
        load_program(bpf.settings(Forward.DNAT), path=refused)
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(BpfError, match="cannot call GPL-restricted function"):
        load_program(bpf.settings(Forward.DNAT), path=refused, statistics=True)


def test_an_object_that_is_none(loaded: Loaded, tmp_path: Path) -> None:
    loaded(Forward.L2)
    broken = tmp_path / "broken.bpf.o"
    for octets in (b"", b"\x7fELF", OBJECT.read_bytes()[:5000]):
        broken.write_bytes(octets)
        with pytest.raises(BpfError, match=re.escape(str(broken))):
            load_program(bpf.settings(Forward.L2), path=broken)
