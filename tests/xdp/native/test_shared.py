"""xdp/bpf/shared.h, as a compiler sees it, against lb/xdp/layout.py and the enumerations and constants of the core."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from enum import IntEnum

import pytest

from lb import cid, reset, reset_scheme, routing
from lb.engine import Drop
from lb.forward import Forward
from lb.router import Verdict
from lb.routing import Action, Unroutable
from lb.xdp import layout
from tests.xdp.native.program import HEADERS, compile_c

SHARED = re.sub(r"/\*.*?\*/", "", (HEADERS / "shared.h").read_text(), flags=re.DOTALL)
STRUCTS = {
    name: re.findall(r"(\w+)(?:\[\w+\])?;", body)
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", SHARED, re.MULTILINE | re.DOTALL)
}
CONSTANTS = re.findall(r"^#define (\w+) ", SHARED, re.MULTILINE)
ENUMERATORS = [
    name
    for body in re.findall(r"^enum \w+ \{(.*?)\};", SHARED, re.MULTILINE | re.DOTALL)
    for name in re.findall(r"\w+", body)
]


@pytest.fixture(scope="module")
def numbers(gcc: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Values of expressions about shared.h, by their text."""
    expressions = [*CONSTANTS, *ENUMERATORS]
    for struct_name, fields in STRUCTS.items():
        expressions.append(f"sizeof(struct {struct_name})")
        expressions += (f"__builtin_offsetof(struct {struct_name}, {field})" for field in fields)
    build = tmp_path_factory.mktemp("shared")
    source = build / "numbers.c"
    prints = "".join(f'\tprintf("%llu\\n", (unsigned long long)({expression}));\n' for expression in expressions)
    source.write_text(f'#include <stdio.h>\n#include "shared.h"\n\nint main(void)\n{{\n{prints}\treturn 0;\n}}\n')
    printed = subprocess.run([compile_c(source, build / "numbers")], capture_output=True, text=True, check=True).stdout
    return dict(zip(expressions, map(int, printed.split()), strict=True))


def numbered(prefix: str, names: Iterable[str]) -> dict[str, int]:
    return {f"{prefix}_{name}": number for number, name in enumerate(names)}


def members(prefix: str, enumeration: type[IntEnum]) -> dict[str, int]:
    return {f"{prefix}_{member.name}": member.value for member in enumeration}


def test_python_and_c_have_the_same_structs_and_fields() -> None:
    assert {each.c_name: list(each.offsets) for each in layout.LAYOUTS} == STRUCTS


@pytest.mark.parametrize("each", layout.LAYOUTS, ids=lambda each: each.c_name)
def test_a_struct_lies_in_memory_as_in_c(numbers: dict[str, int], each: layout.Layout[object]) -> None:
    assert each.size == numbers[f"sizeof(struct {each.c_name})"]
    assert each.offsets == {
        field: numbers[f"__builtin_offsetof(struct {each.c_name}, {field})"] for field in STRUCTS[each.c_name]
    }


def test_enumerators_are_the_numbers_of_the_core(numbers: dict[str, int]) -> None:
    assert {name: numbers[name] for name in ENUMERATORS} == {
        **members("FORWARD", Forward),
        **members("VERDICT", Verdict),
        "VERDICTS": len(Verdict),
        **members("UNROUTABLE", Unroutable),
        "UNROUTABLES": len(Unroutable),
        **members("ACTION", Action),
        **numbered("FAILURE", (name.upper().replace("-", "_") for name in Drop.ALL)),
        "FAILURES": len(Drop.ALL),
        **members("ALGORITHM", layout.Algorithm),
        **members("TOKEN", reset_scheme.Arithmetic),
    }


def test_constants_are_those_of_the_core(numbers: dict[str, int]) -> None:
    assert {name: numbers[name] for name in CONSTANTS} == {
        "CONFIG_IDS": len(cid.CONFIG_IDS),
        "CONFIG_SLOTS": layout.CONFIG_SLOTS,
        "UNROUTABLE_CONFIG_ID": cid.UNROUTABLE,
        "LENGTH_BITS": cid.LENGTH_BITS,
        "MAX_CID": cid.MAX_CID_LENGTH_V1,
        "AES_BLOCK": cid.AES_BLOCK,
        "RESET_TOKEN": reset.TOKEN_LENGTH,
        "RESET_KEY": reset_scheme.MAX_KEY + 1,
        "RESET_SUFFIX": reset_scheme.MAX_SUFFIX,
        "RING_SLOTS": routing.RING_SLOTS,
        "HASH_MULTIPLIER": routing._MULTIPLIER,
        "MAX_SERVICES": layout.MAX_SERVICES,
        "NO_BACKEND_SLOT": layout.NO_BACKEND_SLOT,
        "SAMPLE_OCTETS": layout.SAMPLE_OCTETS,
        "SLOT_NAME": layout.SLOT_NAME,
    }
