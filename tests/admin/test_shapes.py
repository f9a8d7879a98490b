"""lb/admin/shapes.py: types as JSON Schema, and what is wrong with a value, in words that help."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.admin.openapi import REQUESTS, SCHEMAS
from lb.admin.shapes import MAX_DEPTH, Held, Schema, mistakes, parse, schema_of


class Inner(TypedDict):
    deep: NotRequired[int | None]


class Left(TypedDict):
    do: Literal["left"]
    inner: NotRequired[Inner]


class Right(TypedDict):
    do: Literal["right"]
    many: Annotated[list[int], Held(at_most=2)]


class Shape(TypedDict, total=False):
    flag: bool | None
    number: Annotated[float, Held(0, 10)]
    integer: Annotated[Annotated[int, Held(0, 10)] | None, "How many."]
    text: Annotated[str, Held(pattern="^[a-z]*$", words="small letters")]
    side: Left | Right
    counts: dict[str, int]


KNOWN: dict[str, Schema] = {}
SHAPE = schema_of(Shape, KNOWN)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({}, []),
        ({"flag": None, "number": 0.5, "integer": 10, "text": "abc", "counts": {"x": 1}}, []),
        ({"integer": None}, []),
        ({"side": {"do": "left", "inner": {"deep": None}}}, []),
        ({"side": {"do": "right", "many": [1, 2]}}, []),
        (7, ["7: expected an object"]),
        (None, ["null: expected an object"]),
        ([], ["a list: expected an object"]),
        ({"flag": 1}, ["flag: 1: expected true or false or null"]),
        ({"integer": True}, ["integer: true: expected an integer, 0 to 10 or null"]),
        ({"integer": 11}, ["integer: 11: expected an integer, 0 to 10 or null"]),
        ({"integer": 1.5}, ["integer: 1.5: expected an integer, 0 to 10 or null"]),
        ({"number": -0.1}, ["number: -0.1: expected a number, 0 to 10"]),
        ({"number": "1"}, ['number: "1": expected a number, 0 to 10']),
        ({"text": "ABC"}, ['text: "ABC": expected small letters']),
        ({"text": "abc\n"}, ['text: "abc\\n": expected small letters']),
        ({"counts": {"x": "y"}}, ['counts.x: "y": expected an integer']),
        ({"weigth": 1}, ["weigth: unknown; there is flag, number, integer, text, side, counts"]),
        ({"side": {"do": "up"}}, ['side.do: "up": expected "left" or "right"']),
        ({"side": {}}, ['side.do: null: expected "left" or "right"']),
        ({"side": {"do": "right"}}, ["side.many: missing: expected a list of 0 to 2"]),
        ({"side": {"do": "right", "many": [1, 2, 3]}}, ["side.many: a list: expected a list of 0 to 2"]),
        ({"side": {"do": "right", "many": [1, "x"]}}, ['side.many[1]: "x": expected an integer']),
        ({"side": 5}, ["side: 5: expected an object"]),
        ({"flag": 2, "text": 3}, ["flag: 2: expected true or false or null", "text: 3: expected small letters"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place(value: Any, wrong: list[str]) -> None:
    found = list(mistakes(value, SHAPE, KNOWN))

    assert found == wrong


def test_nothing_that_looks_like_a_key_is_repeated() -> None:
    key = "8f95f09245765f80256934e50c66207f"
    told = "\n".join(mistakes({key: 1, "text": key, "flag": key}, SHAPE, KNOWN))

    assert told.count("\n") == 2
    assert key not in told


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 1100)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "left", "prepare", "activate", "retire", "00", "0x00ff", "127.0.0.1:1", "x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["do", "flag", "side", "many", "inner", "drain", "weight", "fence", "config-id", "cid", "datagram", "force",
             "datagrams", "client", "at", "length", "x"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip


@given(JSON, st.sampled_from(["Shape", *REQUESTS]))
def test_it_agrees_with_a_real_validator(value: Any, which: str) -> None:
    """Schemas are what others will hold us to: a library that knows all of JSON Schema has the same opinion."""
    schemas = KNOWN if which == "Shape" else SCHEMAS
    schema = SHAPE if which == "Shape" else REQUESTS[which]
    whole = {"components": {"schemas": schemas}, **schema}
    is_valid = jsonschema.Draft202012Validator(whole).is_valid(value)

    assert (not list(mistakes(parse(json.dumps(value).encode()), schema, schemas))) is is_valid


@pytest.mark.parametrize(
    ("octets", "value"),
    [
        (b"{}", {}),
        (b' {"a": [1, 2.5, -3e2, true, null, "\xc3\xbc"]} ', {"a": [1, 2.5, -300, True, None, "\u00fc"]}),
        (b"3.0", 3),
    ],
)
def test_json_is_read(octets: bytes, value: Any) -> None:
    assert parse(octets) == value


@pytest.mark.parametrize(
    ("octets", "wrong"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": 1, "a": 1}', "given twice"),
        (b"NaN", "not a number that JSON has"),
        (b"[-Infinity]", "not a number that JSON has"),
        (b"1e999", "not a number that JSON has"),
        (b"1" * 60_000, "60000 characters"),
        (b"[" * 60_000, "within each other"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "within each other"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "within each other"),
    ],
)
def test_what_readers_could_read_differently_is_refused(octets: bytes, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        parse(octets)


@given(st.binary(max_size=200))
def test_octets_are_json_or_a_value_error(octets: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse(octets)
