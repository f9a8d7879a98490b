"""A bar chart as SVG: one row per path, one bar per program, nanoseconds to the right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Pixels. The picture brings its own paper: pages are shown on white and on black.
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 290, 60, 64, 46
_BAR, _GAP, _GROUP_GAP = 9, 8, 26
_PAPER, _INK, _FAINT = "#fdfdfc", "#1f2328", "#d5d8dc"
_COLOURS = ("#1f6fb2", "#c9a227")
_TICKS = 8  # at most


class Row(NamedTuple):
    """One path's figures, one per series; None where there is none."""

    label: str
    values: Sequence[float | None]


def bars(title: str, unit: str, series: Sequence[str], groups: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """The whole SVG document. `series` names the bars of each row, two at most; a group has a heading."""
    values = [value for _, rows in groups for row in rows for value in row.values if value is not None]
    step, limit = _axis(max(values, default=1.0))
    scale = (_WIDTH - _LEFT - _RIGHT) / limit
    height = _TOP + _BOTTOM + sum(_GROUP_GAP + sum(map(_height, rows)) for _, rows in groups)

    out = [_text(16, 26, title, size=16, bold=True)]
    at = _WIDTH - _RIGHT
    for name, colour in reversed(list(zip(series, _COLOURS, strict=False))):
        at -= 7 * len(name) + 26
        out += [_box(at, 37, 10, 10, colour), _text(at + 15, 46, name)]
    out += _grid(step, limit, scale, height, unit)
    y = _TOP
    for heading, rows in groups:
        y += _GROUP_GAP
        out.append(_text(16, y - 8, heading, bold=True))
        for row in rows:
            out += _row(row, y, scale)
            y += _height(row)
    body = "\n".join(out)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="{escape(title)}">\n'
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="{_PAPER}"/>\n{body}\n</svg>\n'
    )


def _height(row: Row) -> int:
    return _BAR * len(row.values) + _GAP


def _row(row: Row, y: int, scale: float) -> list[str]:
    out = [_text(_LEFT - 10, y + _BAR * len(row.values) / 2 + 4, row.label, anchor="end")]
    for value, colour in zip(row.values, _COLOURS, strict=False):
        if value is not None:
            width = max(value, 0) * scale
            out += [
                _box(_LEFT, y, width, _BAR - 1, colour),
                _text(_LEFT + width + 5, y + _BAR - 1, f"{value:.0f}", size=10),
            ]
        y += _BAR
    return out


def _grid(step: int, limit: int, scale: float, height: int, unit: str) -> list[str]:
    bottom = height - _BOTTOM + 6
    out = []
    for tick in range(0, limit + 1, step):
        x = _LEFT + tick * scale
        out += [
            f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" stroke="{_FAINT}"/>',
            _text(x, bottom + 16, str(tick), anchor="middle"),
        ]
    return [*out, _text(_LEFT, bottom + 32, unit)]


def _axis(highest: float) -> tuple[int, int]:
    """The distance of the ticks, a round number, and the last of them."""
    step = next(n * 10**e for e in range(12) for n in (1, 2, 5) if n * 10**e * _TICKS >= highest)
    return step, step * max(1, -int(-highest // step))


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, size: int = 12, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{_INK}"{weight}>'
        f"{escape(text)}</text>"
    )
