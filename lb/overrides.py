"""What the operator said about backends while the balancer runs: stronger than the file, until it is taken back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

MAX_WEIGHT = 1000


class Change(TypedDict, total=False):
    """A change of one backend. None gives a key back to the file; a key that is not there stays as it is."""

    drain: bool | None
    weight: int | None
    fence: bool


@dataclass(frozen=True, slots=True)
class Override:
    """What was said about one backend. None: what the file says. Whoever is fenced is declared dead, by word."""

    drain: bool | None = None
    weight: int | None = None
    fence: bool = False

    def changed(self, change: Change) -> Override:
        """What is said after a change."""
        return replace(self, **change)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that something is said about."""
        said = (("drain", self.drain is not None), ("weight", self.weight is not None), ("fence", self.fence))
        return tuple(name for name, is_said in said if is_said)


NOTHING = Override()


class Overrides(Mapping[tuple[str, str], Override]):
    """All overrides, by service and backend; NOTHING for everybody who is not in it. Immutable."""

    def __init__(self, said: Mapping[tuple[str, str], Override] | None = None) -> None:
        self._said = {who: override for who, override in (said or {}).items() if override != NOTHING}

    def __getitem__(self, who: tuple[str, str]) -> Override:
        return self._said[who]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._said)

    def __len__(self) -> int:
        return len(self._said)

    def of(self, service: str, backend: str) -> Override:
        """What is said about one backend."""
        return self._said.get((service, backend), NOTHING)

    def changed(self, service: str, backend: str, change: Change) -> Overrides:
        """These, with one backend's changed."""
        return Overrides(self._said | {(service, backend): self.of(service, backend).changed(change)})

    def only(self, known: Iterable[tuple[str, str]]) -> Overrides:
        """Those of backends that there are."""
        there = set(known)
        return Overrides({who: override for who, override in self._said.items() if who in there})

    def to_json(self) -> list[dict[str, Any]]:
        """As a list of objects that JSON has."""
        return [
            {"service": service, "backend": backend} | asdict(override)
            for (service, backend), override in sorted(self._said.items())
        ]

    @classmethod
    def from_json(cls, value: Any) -> Overrides:
        """What `to_json` gave. Raises ValueError for anything else."""
        said = {}
        if not isinstance(value, list):
            raise ValueError("not a list")  # noqa: TRY004 - it is a file's content that is wrong
        for entry in value:
            match entry:
                case {
                    "service": str(service),
                    "backend": str(backend),
                    "drain": (bool() | None) as drain,
                    "weight": (int() | None) as weight,
                    "fence": bool(fence),
                } if not isinstance(weight, bool) and (weight is None or 0 <= weight <= MAX_WEIGHT):
                    said[service, backend] = Override(drain, weight, fence)
                case _:
                    raise ValueError("not an override")
        return cls(said)
