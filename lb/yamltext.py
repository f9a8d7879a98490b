"""The text of a YAML file, and small changes to it: everything else stays as it was written, comments and all.

What a change has made of the file is for its reader to check: this knows how YAML is laid out, and no key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import yaml

Value: TypeAlias = "str | int | bool | Sequence[str] | Mapping[int, Sequence[str]]"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = re.compile(r"[A-Za-z./][A-Za-z0-9_./-]*")
_WORDS = re.compile(r"(?i)y|n|yes|no|on|off|true|false|null")  # which YAML 1.1 takes for something else


class YamlText:
    """A text, and the changes to it so far. Nodes are those of the text as it was; no two changes may overlap.

    Raises yaml.YAMLError for a text that is not YAML.
    """

    def __init__(self, text: str) -> None:
        self.root = yaml.compose(text, Loader=_LOADER)
        self._text = text
        self._changes: list[tuple[int, int, str]] = []

    def changed(self) -> str:
        """The text with all changes made."""
        newline = "\r\n" if "\r\n" in self._text else "\n"
        pieces: list[str] = []
        at = 0
        for start, end, new in sorted(self._changes, key=lambda change: change[:2]):
            pieces += (self._text[at:start], new.replace("\n", newline))
            at = end
        return "".join((*pieces, self._text[at:]))

    def replace(self, node: yaml.Node, value: Value) -> None:
        """Write another value in the place of one."""
        is_quoted = isinstance(node, yaml.ScalarNode) and node.style == '"'
        self._changes.append((node.start_mark.index, self._end(node), _written(value, is_quoted=is_quoted)))

    def add_pair(self, mapping: yaml.MappingNode, name: str | int, value: Value, *, after: str | None = None) -> None:
        """Add a key to a mapping that has one already, behind another or as the last one."""
        pairs = mapping.value
        key, neighbour = next((pair for pair in pairs if pair[0].value == after), pairs[-1])
        pair = _pair(name, value, is_quoted=key.style == '"')
        if mapping.flow_style:
            self._insert(self._end(neighbour), f", {pair}")
        else:
            self._insert(self._line_end(self._end(neighbour)), f"\n{' ' * pairs[0][0].start_mark.column}{pair}")

    def remove_pair(self, mapping: yaml.MappingNode, name: str) -> None:
        """Take a key and its value out of a mapping."""
        spans = [(key.start_mark.index, self._end(value)) for key, value in mapping.value]
        position = next(i for i, (key, _) in enumerate(mapping.value) if key.value == name)
        start, end = spans[position]
        begins_line = not self._text[self._line_start(start) : start].strip()
        if not mapping.flow_style and begins_line:
            self._remove_lines(start, end)
        else:
            self._remove_listed(spans, position)

    def add_item(self, sequence: yaml.SequenceNode, pairs: Mapping[str, Value]) -> None:
        """Add a mapping to the end of a sequence of mappings that has one already, written as that is."""
        last = sequence.value[-1]
        is_quoted = last.value[0][0].style == '"'
        written = [_pair(name, value, is_quoted=is_quoted) for name, value in pairs.items()]
        flow = "{" + ", ".join(written) + "}"
        if sequence.flow_style:
            self._insert(self._end(last), f", {flow}")
            return
        dash = self._dash(sequence, last)
        margin = "\n" + " " * (dash - self._line_start(dash))
        item = flow if last.flow_style else f"{margin}  ".join(written)
        self._insert(self._line_end(self._end(last)), f"{margin}- {item}")

    def remove_item(self, sequence: yaml.SequenceNode, position: int) -> None:
        """Take one of several items out of a sequence."""
        if sequence.flow_style:
            self._remove_listed([(item.start_mark.index, self._end(item)) for item in sequence.value], position)
        else:
            item = sequence.value[position]
            self._remove_lines(self._dash(sequence, item), self._end(item))

    def add_list_before(self, mapping: yaml.MappingNode, before: str, name: str, pairs: Mapping[str, Value]) -> None:
        """Add a key to a mapping, in front of another; its value is a list of one mapping."""
        key = next(key for key, _ in mapping.value if key.value == before)
        is_quoted = key.style == '"'
        written = [_pair(name, value, is_quoted=is_quoted) for name, value in pairs.items()]
        label = _key(name, is_quoted=is_quoted)
        if mapping.flow_style:
            self._insert(key.start_mark.index, f"{label}: [{{{', '.join(written)}}}], ")
            return
        margin = "\n" + " " * key.start_mark.column
        self._insert(key.start_mark.index, f"{label}:{margin}  - " + f"{margin}    ".join(written) + margin)

    def _insert(self, at: int, new: str) -> None:
        self._changes.append((at, at, new))

    def _remove_lines(self, start: int, end: int) -> None:
        newline = self._text.find("\n", end)
        self._changes.append((self._line_start(start), newline + 1 if newline >= 0 else len(self._text), ""))

    def _remove_listed(self, spans: Sequence[tuple[int, int]], position: int) -> None:
        """Remove one of several things with commas between them."""
        start, end = spans[position]
        if position + 1 < len(spans):
            end = spans[position + 1][0]
        elif position:
            start = spans[position - 1][1]
        self._changes.append((start, end, ""))

    def _dash(self, sequence: yaml.SequenceNode, item: yaml.Node) -> int:
        """Where the dash of a block's item is: all are in one column, and comments may stand behind them."""
        column = sequence.start_mark.column
        start = self._line_start(item.start_mark.index)
        while self._text[start : start + column + 1] != " " * column + "-":
            start = self._line_start(start - 1)
        return start + column

    def _line_start(self, index: int) -> int:
        return self._text.rfind("\n", 0, index) + 1

    def _line_end(self, index: int) -> int:
        end = self._text.find("\n", index)
        end = len(self._text) if end < 0 else end
        return end - 1 if self._text[index:end].endswith("\r") else end

    def _end(self, node: yaml.Node) -> int:
        """Where a node really ends: YAML lets a block reach to the next token, over comments and blank lines."""
        if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
            last = node.value[-1]
            return self._end(last[1] if isinstance(last, tuple) else last)
        end: int = node.end_mark.index
        return end


def get(node: yaml.Node, *path: str | int) -> yaml.Node | None:
    """What is at a path of keys and positions, None if there is no such key."""
    found: yaml.Node | None = node
    for step in path:
        if isinstance(step, int):
            found = found.value[step] if isinstance(found, yaml.SequenceNode) else None
        elif isinstance(found, yaml.MappingNode):
            found = next((value for key, value in found.value if key.value == step), None)
        else:
            return None
    return found


def _pair(name: str | int, value: Value, *, is_quoted: bool) -> str:
    return f"{_key(name, is_quoted=is_quoted)}: {_written(value, is_quoted=is_quoted)}"


def _key(name: str | int, *, is_quoted: bool) -> str:
    return json.dumps(str(name)) if is_quoted else str(name)


def _written(value: Value, *, is_quoted: bool) -> str:
    if isinstance(value, str):
        is_plain = not is_quoted and _PLAIN.fullmatch(value) and not _WORDS.fullmatch(value)
        return value if is_plain else json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(_pair(name, inner, is_quoted=is_quoted) for name, inner in value.items()) + "}"
    return json.dumps(value if isinstance(value, int) else list(value))
