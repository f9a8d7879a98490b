"""What is different between two configurations, in lines that people read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = ("name", "config-id")  # what the elements of a list are known by
_DERIVED = ("ring-share", "advice", "aes-blocks-per-packet", "cid-length")  # they change because something else does


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """What changes from one description (`lb.describe`) to another: `services.web.backends.b.weight: 1 -> 2`."""
    return tuple(_changes("", before, after))


def _changes(path: str, before: Any, after: Any) -> Iterator[str]:
    if before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = [*before, *(name for name in after if name not in before)]
        for name in names:
            if name in _DERIVED:
                continue
            where = f"{path}.{name}" if path else name
            if name not in after:
                yield f"{where}: removed"
            elif name not in before:
                yield f"{where}: added{_essence(after[name])}"
            else:
                yield from _changes(where, before[name], after[name])
    elif _is_named(before) and _is_named(after):
        yield from _changes(path, _by_name(before), _by_name(after))
    else:
        yield f"{path}: {_shown(before)} -> {_shown(after)}"


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, Mapping) for element in value)


def _by_name(elements: list[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {str(next(e[name] for name in _NAMES if name in e)): e for e in elements}


def _essence(value: Any) -> str:
    """What is said of a thing that is new: its single values."""
    if not isinstance(value, Mapping):
        return f" ({_shown(value)})"
    said = [
        f"{name} {_shown(inner)}"
        for name, inner in value.items()
        if not isinstance(inner, Mapping | list) and name not in (*_NAMES, *_DERIVED)
    ]
    return f" ({', '.join(said)})" if said else ""


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_shown(element) for element in value) + "]"
    return str(value)
