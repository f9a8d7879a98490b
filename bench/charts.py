"""Panels over time as SVG: lines, stacked areas, and timelines of words, with marks where something was done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

# Pixels. The picture brings its own paper: pages are shown on white and on black.
_WIDTH, _COLUMNS, _GUTTER, _HEIGHT, _TOP = 1120, 2, 16, 240, 78
_LEFT, _RIGHT, _HEAD, _FOOT = 58, 14, 48, 46  # of a panel
_ROW = 22  # of a timeline
_PAPER, _PANEL, _INK, _FAINT, _MARK = "#f4f5f5", "#ffffff", "#1f2328", "#d5d8dc", "#8a6d00"
_COLOURS = ("#1f6fb2", "#c9731f", "#2f8f4e", "#a23b72", "#6b5bb3", "#b5a20f", "#4a4f57", "#1aa0a0")
WORDS = {
    "green": "#3f9a4f",
    "blue": "#3b7dc4",
    "orange": "#dd8a2a",
    "red": "#c8423b",
    "purple": "#8a56b0",
    "transparent": "#e3e6e8",
}
_TICKS = 4  # at most

Point = tuple[float, float]  # seconds since the beginning, value


class Series(NamedTuple):
    name: str
    points: Sequence[Point]


class Panel(NamedTuple):
    """One panel. With `words` (number to word and colour) it is a timeline; `step` is seconds between points."""

    title: str
    unit: str
    series: Sequence[Series]
    step: float
    is_stacked: bool = False
    words: Mapping[int, tuple[str, str]] | None = None


class Mark(NamedTuple):
    """What was done, and when, in seconds since the beginning."""

    at: float
    text: str


def picture(title: str, panels: Sequence[Panel], marks: Sequence[Mark], seconds: float) -> str:
    """The whole SVG document."""
    legend = "   ".join(f"{number} {mark.text}" for number, mark in enumerate(marks, 1))
    width = (_WIDTH - (_COLUMNS + 1) * _GUTTER) / _COLUMNS
    out, x, y, row = [], float(_GUTTER), float(_TOP), 0.0
    for panel in panels:
        wide = panel.words is not None
        height = float(_HEAD + _FOOT + _ROW * len(panel.series) if wide else _HEIGHT)
        if x > _GUTTER and wide:
            x, y, row = _GUTTER, y + row + _GUTTER, 0.0
        size = _WIDTH - 2 * _GUTTER if wide else width
        out.append(_panel(panel, x, y, size, height, marks, seconds))
        row = max(row, height)
        x += size + _GUTTER
        if x + width > _WIDTH:
            x, y, row = _GUTTER, y + row + _GUTTER, 0.0
    height = y + (row + _GUTTER if row else 0)
    body = "\n".join([_text(_GUTTER, 32, title, size=18, bold=True), _text(_GUTTER, 58, legend, colour=_MARK), *out])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{escape(title)}">\n'
        f'<rect width="{_WIDTH}" height="{height:.0f}" rx="8" fill="{_PAPER}"/>\n{body}\n</svg>\n'
    )


def _panel(panel: Panel, x: float, y: float, width: float, height: float, marks: Sequence[Mark], seconds: float) -> str:
    left, right = x + (_LEFT if panel.words is None else 130), x + width - _RIGHT
    top, bottom = y + _HEAD, y + height - _FOOT

    def across(at: float) -> float:
        return left + (right - left) * at / seconds

    out = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" fill="{_PANEL}" '
        f'stroke="{_FAINT}"/>',
        _text(x + 12, y + 22, panel.title, size=13, bold=True),
    ]
    ticks = range(0, int(seconds) + 1, _step(seconds, 6))
    out += [_text(across(tick), bottom + 15, f"{tick} s", size=10, anchor="middle") for tick in ticks]
    if panel.words is not None:
        out += _timeline(panel, across, x, top, seconds)
        out += _legend([(word, WORDS[colour]) for word, colour in panel.words.values()], x + 12, y + height - 12)
    else:
        out += _curves(panel, across, left, right, top, bottom)
        names = [(series.name, _COLOURS[n % len(_COLOURS)]) for n, series in enumerate(panel.series)]
        out += _legend(names, x + 12, y + height - 12)
    for number, mark in enumerate(marks, 1):
        at = across(mark.at)
        out += [
            f'<line x1="{at:.1f}" y1="{top - 4:.1f}" x2="{at:.1f}" y2="{bottom:.1f}" stroke="{_MARK}" '
            'stroke-dasharray="3 3"/>',
            _text(at, top - 7, str(number), size=10, anchor="middle", colour=_MARK),
        ]
    return "\n".join(out)


def _timeline(panel: Panel, across: Callable[[float], float], x: float, top: float, seconds: float) -> list[str]:
    out = []
    for row, series in enumerate(panel.series):
        y = top + row * _ROW
        out.append(_text(x + 12, y + 14, series.name))
        for at, value in series.points:
            _, colour = (panel.words or {})[int(value)]
            begin = across(at)
            width = across(min(at + panel.step, seconds)) - begin
            out.append(
                f'<rect x="{begin:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_ROW - 5}" '
                f'fill="{WORDS[colour]}" shape-rendering="crispEdges"/>'
            )
    return out


def _curves(
    panel: Panel, across: Callable[[float], float], left: float, right: float, top: float, bottom: float
) -> list[str]:
    base: dict[float, float] = {}
    drawn: list[tuple[str, list[tuple[float, float, float]]]] = []  # colour; time, lower and upper edge
    times = sorted({at for series in panel.series for at, _ in series.points})
    for number, series in enumerate(panel.series):
        edges = []
        points = series.points
        if panel.is_stacked:  # what is not there adds nothing
            known = dict(points)
            points = [(at, known.get(at, 0.0)) for at in times]
        for at, value in points:
            if math.isfinite(value):
                low = base.get(at, 0.0) if panel.is_stacked else 0.0
                edges.append((at, low, low + value))
                base[at] = low + value
        drawn.append((_COLOURS[number % len(_COLOURS)], edges))
    highest = max((high for _, edges in drawn for _, _, high in edges), default=0.0)
    step, limit = _axis(highest)

    def up(value: float) -> float:
        return bottom - (bottom - top) * value / limit

    out = []
    for tick in range(round(limit / step) + 1):
        y = up(tick * step)
        out += [
            f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" stroke="{_FAINT}"/>',
            _text(left - 6, y + 4, _spelled(tick * step, panel.unit), size=10, anchor="end"),
        ]
    for colour, edges in drawn:
        for run in _unbroken(edges, panel.step):
            above = " ".join(f"{across(at):.1f},{up(high):.1f}" for at, _, high in run)
            below = " ".join(f"{across(at):.1f},{up(low):.1f}" for at, low, _ in reversed(run))
            if panel.is_stacked:
                out.append(f'<polygon points="{above} {below}" fill="{colour}" fill-opacity="0.3"/>')
            out.append(f'<polyline points="{above}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return out


def _unbroken(edges: Sequence[tuple[float, float, float]], step: float) -> list[list[tuple[float, float, float]]]:
    runs: list[list[tuple[float, float, float]]] = []
    for edge in edges:
        if not runs or edge[0] - runs[-1][-1][0] > 1.5 * step:
            runs.append([])
        runs[-1].append(edge)
    return runs


def _legend(names: Sequence[tuple[str, str]], x: float, y: float) -> list[str]:
    out = []
    for name, colour in names:
        out += [
            f'<rect x="{x:.1f}" y="{y - 8:.1f}" width="10" height="10" rx="2" fill="{colour}"/>',
            _text(x + 14, y + 1, name, size=11),
        ]
        x += 30 + 6.3 * len(name)
    return out


def _spelled(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    return f"{value:g}{' s' if unit == 's' else ''}"


def _axis(highest: float) -> tuple[float, float]:
    """The distance of the ticks, a round number, and the last of them."""
    highest = highest or 1.0
    step = next(n * 10.0**e for e in range(-4, 12) for n in (1, 2, 5) if n * 10.0**e * _TICKS >= highest)
    return step, step * max(1, math.ceil(highest / step - 1e-9))


def _step(seconds: float, ticks: int) -> int:
    return next(n for n in (5, 10, 20, 30, 60, 120, 300, 600, 3600) if n * ticks >= seconds)


def _text(
    x: float, y: float, text: str, *, size: int = 12, bold: bool = False, anchor: str = "start", colour: str = _INK
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight} '
        f'xml:space="preserve">{escape(text)}</text>'
    )
