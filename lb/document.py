"""A YAML file as a tree of texts, lists and mappings, and the order in which they stand in it.

The only file that knows YAML. It keeps every scalar as it was written, because YAML 1.1 has ideas of its own about
plain ones (`00112233` is an octal number, `1:30` is ninety, `no` is false): what a text means is for the key's kind
to say (`schema.py`). What YAML allows and a configuration has no use for is refused: keys given twice,
aliases, tags, several documents.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import yaml

from lb.errors import ConfigError, ConfigErrors

MAX_FILE = 4 << 20  # octets; 4096 backends with 65 536 server IDs take about one million
MAX_DEPTH = 16
MAX_SHOWN = 60
MAX_SHOWN_FILE = 240
_HEX_KEY = re.compile(r"[0-9A-Fa-f]{32,}")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Scalar(NamedTuple):
    """One value as written. `tag` is what YAML 1.1 takes it for: `str`, `int`, `float`, `bool`, `null`, ..."""

    text: str
    tag: str


# None stands where a mistake was found already; whoever meets it says nothing more.
Node: TypeAlias = "Scalar | list[Node] | dict[str, Node] | None"


class Document:
    """The tree of one file (`root`), the mistakes found while it was read, and where each path stands in it."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigErrors, with the file's name for a path, if there is no tree at all to look at."""
        self.path = path
        self.mistakes: list[ConfigError] = []
        self._places: dict[str, int] = {}
        try:
            self.root = self._parse(_read(path))
        except _UnusableError as error:
            raise ConfigErrors(str(path), [ConfigError(shown_file(path), str(error))]) from None

    @classmethod
    def of_keys(cls, path: Path) -> Document:
        """A file that has keys at its top. Raises ConfigErrors, with the file's name for a path, for any other."""
        document = cls(path)
        root = document.root
        if root is not None and not isinstance(root, dict):
            found = "a list" if isinstance(root, list) else shown(root.text)
            message = f"{found}: expected a mapping of keys to values"
            raise ConfigErrors(str(path), [ConfigError(shown_file(path), message)])
        return document

    def raise_mistakes(self) -> None:
        """Raise ConfigErrors, in the order of the file, if there were any mistakes."""
        if self.mistakes:
            raise ConfigErrors(str(self.path), sorted(self.mistakes, key=lambda mistake: self._place(mistake.path)))

    def _place(self, path: str) -> int:
        """Where a path stands, or what it would stand in if it is not there."""
        while path and path not in self._places:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self._places.get(path, 0)

    def _parse(self, text: str) -> Node:
        events = yaml.parse(text, Loader=_LOADER)
        try:
            for event in events:
                if isinstance(event, yaml.DocumentStartEvent):
                    break
            else:
                raise _UnusableError("nothing in it: expected a mapping of keys to values")
            root = self._node(next(events), events, "", 1)
            if not isinstance(next(events), yaml.DocumentEndEvent) or not isinstance(next(events), yaml.StreamEndEvent):
                raise _UnusableError("a second document after `---`: expected one")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise _UnusableError(f"{where}not YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:  # a reader's error: characters that YAML does not allow
            raise _UnusableError(f"not YAML: {getattr(error, 'reason', 'unreadable')}") from None
        return root

    def _node(self, event: yaml.Event, events: Iterator[yaml.Event], path: str, depth: int) -> Node:
        self._places.setdefault(path, len(self._places))
        if depth > MAX_DEPTH:
            raise _UnusableError(f"line {_line(event)}: nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            self._mistake(path, f"{shown(f'*{event.anchor}')}: aliases are not used here; write the value out")
            return None

        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = []
            while not isinstance(event_in := next(events), yaml.SequenceEndEvent):
                node.append(self._node(event_in, events, f"{path}[{len(node)}]", depth + 1))
        else:
            node = self._mapping(events, path, depth)

        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            self._mistake(path, f"{shown(tag)}: tags are not used here; write the value alone")
            return None
        return node

    def _mapping(self, events: Iterator[yaml.Event], path: str, depth: int) -> Node:
        mapping: dict[str, Node] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._node(event, events, f"{path}.?", depth + 1)
                self._node(next(events), events, f"{path}.?", depth + 1)
                self._mistake(path, "a list, mapping or alias for a key: expected a word")
                continue
            inner = join(path, event.value)
            value = self._node(next(events), events, inner, depth + 1)
            if event.value in mapping:
                self._mistake(inner, f"given twice, again in line {_line(event)}: expected once")
            mapping.setdefault(event.value, value)
        return mapping

    def _mistake(self, path: str, message: str) -> None:
        self.mistakes.append(ConfigError(path, message))


def join(path: str, key: str) -> str:
    """The path of a key inside the mapping at `path`."""
    key = key if _PLAIN_KEY.fullmatch(key) and not _HEX_KEY.search(key) else shown(key)
    return f"{path}.{key}" if path else key


def shown(text: str) -> str:
    """A text as an error message quotes it: printable, not too long, and without anything that looks like a key."""
    text = _without_keys(text)
    text = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
    return text if text.isprintable() and text.strip() == text and text else json.dumps(text)


def shown_file(path: Path) -> str:
    """A file name as an error message quotes it: as `shown`, but long enough to find the file by its end."""
    text = _without_keys(str(path))
    text = text if len(text) <= MAX_SHOWN_FILE else "..." + text[3 - MAX_SHOWN_FILE :]
    return text if text.isprintable() else json.dumps(text)


class _UnusableError(Exception):
    """The file as a whole is no use; says why."""


# libyaml where PyYAML was built with it: ten times faster on a large fleet.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER = yaml.resolver.Resolver()


def _without_keys(text: str) -> str:
    return _HEX_KEY.sub(lambda run: f"<{len(run[0])} hex digits>", text)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _scalar(event: yaml.ScalarEvent) -> Scalar:
    if not event.implicit[0]:  # quoted
        return Scalar(event.value, "str")
    tag: str = _RESOLVER.resolve(yaml.ScalarNode, event.value, (True, False))  # type: ignore[no-untyped-call]
    return Scalar(event.value, tag.rpartition(":")[2])


def _read(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise _UnusableError("not a regular file")
        with path.open("rb") as file:
            octets = file.read(MAX_FILE + 1)
    except OSError as error:
        raise _UnusableError(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise _UnusableError("not a file name") from None
    if len(octets) > MAX_FILE:
        raise _UnusableError(f"more than {MAX_FILE >> 20} MiB: expected a configuration")
    try:
        return octets.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnusableError(f"not UTF-8 at octet {error.start}") from None
