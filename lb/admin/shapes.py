"""Shapes of JSON: TypedDicts as JSON Schema, and what is wrong with a value by such a schema.

What the description shows is so what requests are held to. A subset: what `schema_of` makes, `mistakes` understands.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from lb.document import shown

Schema = dict[str, Any]

MAX_DEPTH = 32  # of lists and objects within each other
MAX_DIGITS = 20
MAX_EXACT = 1 << 53  # floating point has all integers up to there
_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null"}
_WORDS = {
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "string": "a text",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


@dataclass(frozen=True, slots=True)
class Held:
    """What `Annotated` may say about a value beside its type. `words` is what a pattern wants, for people."""

    minimum: float | None = None
    maximum: float | None = None
    pattern: str | None = None
    words: str | None = None
    at_most: int | None = None  # elements of a list

    def schema(self) -> Schema:
        found = {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "pattern": self.pattern,
            "description": self.words,
            "maxItems": self.at_most,
        }
        return {name: value for name, value in found.items() if value is not None}


def schema_of(shape: Any, schemas: dict[str, Schema]) -> Schema:
    """The schema of a type. TypedDicts go to `schemas` by their names, and are referred to.

    `Annotated` adds a description, if it is a text, or what else a value is held to.
    """
    origin, args = get_origin(shape), get_args(shape)
    if origin in (Required, NotRequired):
        return schema_of(args[0], schemas)
    if origin is Annotated:
        schema = schema_of(args[0], schemas)
        for said in args[1:]:
            schema = schema | (said.schema() if isinstance(said, Held) else {"description": said})
        return schema
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return _union([schema_of(one, schemas) for one in args])
    if origin is list:
        return {"type": "array", "items": schema_of(args[0], schemas)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(args[1], schemas)}
    if is_typeddict(shape):
        if shape.__name__ not in schemas:
            schemas[shape.__name__] = {}  # it may refer to itself
            hints = get_type_hints(shape, include_extras=True)
            schemas[shape.__name__].update(
                type="object",
                properties={name: schema_of(hint, schemas) for name, hint in hints.items()},
                required=[name for name, hint in hints.items() if _is_required(hint, shape)],
                additionalProperties=False,
            )
        return {"$ref": f"#/components/schemas/{shape.__name__}"}
    return {} if shape is Any else {"type": _TYPES[shape]}


def _is_required(hint: Any, shape: Any) -> bool:
    origin = get_origin(hint)  # shape.__required_keys__ is wrong where annotations are postponed
    return origin is Required or (bool(shape.__total__) and origin is not NotRequired)


def _union(schemas: list[Schema]) -> Schema:
    """`number or null` in one word; what has more to say for itself stays apart."""
    if all(schema.keys() == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def mistakes(value: Any, schema: Schema, schemas: Mapping[str, Schema], path: str = "") -> Iterator[str]:
    """What is wrong with a value, a line each: `drain: 3: expected true or false`."""
    schema = _resolved(schema, schemas)
    where = f"{path}: " if path else ""
    if "anyOf" in schema:
        yield from _mistakes_of_any(value, schema["anyOf"], schemas, path)
    elif not _fits(value, schema):
        yield f"{where}{_quoted(value)}: expected {_words(schema)}"
    elif isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", False)
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{_join(path, name)}: missing: expected {_words(_resolved(properties[name], schemas))}"
        for name, inner in value.items():
            known = properties.get(name, others)
            if known is False:
                yield f"{_join(path, shown(name))}: unknown; there is {', '.join(properties) or 'nothing to say'}"
            else:
                yield from mistakes(inner, known, schemas, _join(path, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from mistakes(inner, schema["items"], schemas, f"{path}[{i}]")


def _mistakes_of_any(value: Any, choices: list[Schema], schemas: Mapping[str, Schema], path: str) -> Iterator[str]:
    """Those by the choice that the value is meant to be: what it says it is, or the one with the fewest mistakes."""
    choices = [_resolved(choice, schemas) for choice in choices]
    if not isinstance(value, dict):
        if not any(_fits(value, choice) for choice in choices):
            words = " or ".join(dict.fromkeys(_words(choice) for choice in choices))
            yield f"{path and path + ': '}{_quoted(value)}: expected {words}"
        return
    for tag in _tags(choices):
        known = {"enum": [word for choice in choices for word in choice["properties"][tag]["enum"]]}
        if not _fits(value.get(tag), known):
            yield f"{_join(path, tag)}: {_quoted(value.get(tag))}: expected {_words(known)}"
            return
        choices = [choice for choice in choices if _fits(value[tag], choice["properties"][tag])]
    yield from min((list(mistakes(value, choice, schemas, path)) for choice in choices), key=len)


def _tags(choices: list[Schema]) -> list[str]:
    """The properties by which objects say which of the choices they are."""
    first, *others = (
        {name for name, inner in choice.get("properties", {}).items() if "enum" in inner} for choice in choices
    )
    return sorted(first.intersection(*others))


def _fits(value: Any, schema: Schema) -> bool:
    """All but what is inside of it."""
    if "enum" in schema:
        return any(type(value) is type(choice) and value == choice for choice in schema["enum"])
    types_ = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(_is(value, name) for name in types_):
        return False
    if isinstance(value, str):
        return bool(re.fullmatch(schema.get("pattern", "(?s:.*)"), value))
    if isinstance(value, list):
        return bool(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True


def _is(value: Any, name: str) -> bool:
    match name:
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "null":
            return value is None
        case "array":
            return isinstance(value, list)
        case _:
            return isinstance(value, dict)


def _words(schema: Schema) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(choice) for choice in schema["anyOf"] if "$ref" not in choice) or "an object"
    if "enum" in schema:
        return " or ".join(json.dumps(choice) for choice in schema["enum"])
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    words = [_WORDS[name] for name in names]
    if "minimum" in schema and "maximum" in schema:
        words[0] += f", {schema['minimum']} to {schema['maximum']}"
    if "pattern" in schema:
        words[0] = schema.get("description", f"a text of the form {schema['pattern']}")
    if "maxItems" in schema:
        words[0] += f" of {schema.get('minItems', 0)} to {schema['maxItems']}"
    return " or ".join(words)


def _resolved(schema: Schema, schemas: Mapping[str, Schema]) -> Schema:
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _quoted(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return shown(json.dumps(value))


def parse(octets: bytes) -> Any:
    """JSON, in UTF-8 and without what different readers read differently. Raises ValueError with what is wrong."""
    try:
        value = json.loads(
            octets.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_number,
        )
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(_TOO_DEEP)
    return value


_TOO_DEEP = f"more than {MAX_DEPTH} lists and objects within each other"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is given twice")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters")
    return int(digits)


def _number(text: str) -> float:
    """To JSON Schema 3.0 is an integer too."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)}: not a number that JSON has")
    return int(number) if number.is_integer() and abs(number) < MAX_EXACT else number


def _is_deeper(value: Any, depth: int) -> bool:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return depth == 0 or any(_is_deeper(one, depth - 1) for one in inner)
    return False
