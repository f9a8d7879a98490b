"""The table of keys that a configuration is made of: what each may hold, its default, and what it means.

A dataclass is the table: each field that `key()` makes is one key, named like the field but with hyphens. Reading a
file, the JSON Schema and the test of docs/configuration.md all go by it. `python -m lb.schema` prints the schema.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lb.document import Document, Node, Scalar, join, shown
from lb.errors import ConfigError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REQUIRED: Any = object()


class _Invalid(tuple[()]):
    """What stands for a value that was mistaken. There is nothing in it, whoever looks."""

    __slots__ = ()

    def items(self) -> tuple[()]:
        return ()


INVALID: Any = _Invalid()


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a mapping, as a field's metadata holds it. `restart`: a running process cannot change it."""

    kind: Kind
    doc: str
    default: Any = _REQUIRED
    restart: bool = False

    @property
    def is_required(self) -> bool:
        return self.default is _REQUIRED

    def json_default(self) -> Any:
        """The default as JSON has it; None where leaving the key out means something that no value says."""
        return None if self.default is None else self.kind.to_json(self.default)

    def json_schema(self) -> dict[str, Any]:
        schema = {"description": self.doc, **self.kind.json_schema()}
        if not self.is_required and self.default is not None:
            schema["default"] = self.json_default()
        return schema


def key(kind: Kind, doc: str, default: Any = _REQUIRED, *, restart: bool = False) -> Any:
    """A dataclass field that is a key of the file. Without a default the key must be there."""
    entry = Key(kind, doc, default, restart)
    if entry.is_required:
        return field(metadata={"key": entry})
    return field(default_factory=lambda: default, metadata={"key": entry})


def keys_of(cls: type[Any]) -> dict[str, tuple[str, Key]]:
    """The keys of a table, in their order: key name to field name and `Key`."""
    return {f.name.replace("_", "-"): (f.name, f.metadata["key"]) for f in dataclasses.fields(cls)}


def walk(cls: type[Any], path: str = "") -> Iterator[tuple[str, str, Key]]:
    """Every key of a table and of the tables in it: path of its table, name, `Key`.

    Paths are written for any element of a list: `services[].backends[]`.
    """
    for name, (_, entry) in keys_of(cls).items():
        yield path, name, entry
        inner, below = entry.kind, f"{path}.{name}" if path else name
        while isinstance(inner, ListOf):
            inner, below = inner.element, below + "[]"
        if isinstance(inner, Record):
            yield from walk(inner.table, below)


class Reading:
    """One file being read: where relative file names start, and what was wrong so far."""

    def __init__(self, document: Document) -> None:
        self.directory = document.path.parent
        self._mistakes = document.mistakes

    def mistake(self, path: str, message: str) -> Any:
        """Note a mistake. Returns INVALID, for the value that there is not."""
        self._mistakes.append(ConfigError(path, message))
        return INVALID


class Kind:
    """What a key may hold."""

    words = ""  # what is expected, as an error message and the documents say it

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        """The value of a node; INVALID, with the mistake noted, if it is none."""
        raise NotImplementedError

    def to_json(self, value: Any) -> Any:
        """A value as the file would have it."""
        return value

    def json_schema(self) -> dict[str, Any]:
        raise NotImplementedError


class ListOf(Kind):
    """A list. Elements that are mistaken stay in it as INVALID, so that the others keep their places."""

    def __init__(self, element: Kind, low: int, high: int) -> None:
        self.element, self.low, self.high = element, low, high
        self.words = f"a list, {low} to {high} elements"

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if node is None:
            return INVALID
        if not isinstance(node, list):
            return reading.mistake(path, f"{noun(node)}: expected a list")
        if not self.low <= len(node) <= self.high:
            reading.mistake(path, f"{len(node)} elements: expected {self.low} to {self.high}")
        return tuple(self.element.read(inner, f"{path}[{i}]", reading) for i, inner in enumerate(node))

    def to_json(self, value: tuple[Any, ...]) -> list[Any]:
        return [self.element.to_json(element) for element in value]

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "array",
            "items": self.element.json_schema(),
            "minItems": self.low,
            "maxItems": self.high,
        }


class MappingOf(Kind):
    """A mapping whose keys are small integers."""

    def __init__(self, high: int, noun: str, value: Kind) -> None:
        self.high, self.noun, self.value = high, noun, value
        self.words = f"a mapping of {noun} to {value.words}"

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if node is None:
            return INVALID
        if not isinstance(node, dict):
            return reading.mistake(path, f"{noun(node)}: expected {self.words}")
        values = {}
        for text, inner in node.items():
            if re.fullmatch("[0-9]", text) and int(text) <= self.high:
                values[int(text)] = self.value.read(inner, join(path, text), reading)
            else:
                reading.mistake(join(path, text), f"{shown(text)}: expected a {self.noun}, 0 to {self.high}")
        return values

    def to_json(self, value: Mapping[int, Any]) -> dict[str, Any]:
        return {str(number): self.value.to_json(inner) for number, inner in value.items()}

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "patternProperties": {f"^[0-{self.high}]$": self.value.json_schema()},
            "additionalProperties": False,
        }


class Record(Kind):
    """A mapping with the keys of a table. Fields that are mistaken are INVALID."""

    def __init__(self, table: type[Any], words: str = "a mapping") -> None:
        self.table, self.words = table, words

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        if node is None:
            return INVALID
        if not isinstance(node, dict):
            return reading.mistake(path, f"{noun(node)}: expected {self.words}")
        known = keys_of(self.table)
        for name in node:
            if name not in known:
                reading.mistake(join(path, name), f"unknown key{did_you_mean(name, known)}")
        values = {}
        for name, (field_name, entry) in known.items():
            if name in node:
                values[field_name] = entry.kind.read(node[name], join(path, name), reading)
            elif entry.is_required:
                values[field_name] = reading.mistake(join(path, name), f"missing: expected {entry.kind.words}")
        return self.table(**values)

    def to_json(self, value: Any) -> dict[str, Any]:
        return {
            name: None if (inner := getattr(value, field_name)) is None else entry.kind.to_json(inner)
            for name, (field_name, entry) in keys_of(self.table).items()
        }

    def json_schema(self) -> dict[str, Any]:
        known = keys_of(self.table)
        return {
            "type": "object",
            "properties": {name: entry.json_schema() for name, (_, entry) in known.items()},
            "required": [name for name, (_, entry) in known.items() if entry.is_required],
            "additionalProperties": False,
        }


def noun(node: Node) -> str:
    """What a node is, in the words of an error message."""
    if isinstance(node, Scalar):
        return "nothing" if node.tag == "null" else shown(node.text)
    return "a list" if isinstance(node, list) else "a mapping"


def did_you_mean(word: str, words: Mapping[str, object]) -> str:
    """A guess to append to an error message; nothing if no word is close."""
    close = difflib.get_close_matches(word[:64], words, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def json_schema(table: type[Any], title: str) -> str:
    """The JSON Schema (draft 2020-12) of a file that is one table, as text."""
    schema = {"$schema": DIALECT, "title": title, **Record(table).json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _main(out: Callable[[str], object]) -> None:
    from lb.config import schema  # noqa: PLC0415 - the table is made of this file's kinds

    out(schema())


if __name__ == "__main__":
    import sys

    _main(sys.stdout.write)
