"""Pictures as inline SVG: no library, no external resource, colours from the page's own style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 42


@dataclass(frozen=True)
class Point:
    """One method in a scatter plot; `error` is half the length of its bar."""

    name: str
    x: float
    y: float
    error: float
    colour: int


@dataclass(frozen=True)
class Bar:
    """One method in a bar chart; `parts` are stacked, `text` stands at the end."""

    name: str
    parts: tuple[float, ...]
    text: str
    colour: int


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    colour: int


def scatter_log_x(
    points: Sequence[Point], rules: Sequence[tuple[str, float]], x_title: str, y_title: str
) -> str:
    """Points with error bars over a logarithmic x in per cent, and dashed lines to beat.

    Args:
        points: x in per cent (> 0), y and error in [0, 1].
        rules: (name, y) of horizontal lines.
        x_title, y_title: what the axes show.
    """
    height = 320
    low = math.floor(math.log10(min(p.x for p in points)) - 0.05)
    high = max(math.ceil(math.log10(max(p.x for p in points))), low + 1)
    values = [p.y + p.error for p in points] + [p.y - p.error for p in points]
    ticks = _ticks(min([*values, *(y for _, y in rules)]), max(values), 6)
    plot = _Frame(height, (low, high + 0.12), (ticks[0], ticks[-1]))
    parts = [plot.y_axis(ticks, y_title, lambda v: f"{100 * v:.0f} %")]
    decades = [float(d) for d in range(low, high + 1)]
    parts.append(plot.x_axis(decades, x_title, lambda d: f"{10**d:g} %"))
    places = _spread([plot.x(math.log10(p.x)) for p in points])
    for _, y in rules:
        at = plot.y(y)
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
    for point, x in zip(points, places, strict=True):
        top, bottom = plot.y(point.y + point.error), plot.y(point.y - point.error)
        parts.append(
            f'<g class="s{point.colour}"><title>{escape(point.name)}: {100 * point.y:.1f} % '
            f"± {100 * point.error:.1f}</title>"
            f'<path class="stroke" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {top:.1f}h8'
            f'M{x - 4:.1f} {bottom:.1f}h8"/>'
            f'<circle class="fill" cx="{x:.1f}" cy="{plot.y(point.y):.1f}" r="4.5"/></g>'
        )
    # Their names stand in the legend: beside the lines they would hide points.
    named = [f"{name} {100 * y:.1f} %" for name, y in rules]
    return _figure(height, "".join(parts), [(p.name, p.colour) for p in points], named)


def bars(rows: Sequence[Bar], part_names: Sequence[str] = ()) -> str:
    """Horizontal bars from zero, the name above and the value behind each.

    Args:
        rows: one bar each; their `parts` are drawn side by side, the first one paler.
        part_names: what the parts are, for the line below.
    """
    most = max(sum(row.parts) for row in rows) or 1.0
    room, pitch = WIDTH - 2 * 8, 46
    texts = max(len(row.text) for row in rows) * 7.2 + 10
    parts = []
    for index, row in enumerate(rows):
        top, x = index * pitch, 8.0
        parts.append(f'<text class="name" x="8" y="{top + 15}">{escape(row.name)}</text>')
        for place, value in enumerate(row.parts):
            width = max(value / most * (room - texts), 1.0 if value else 0.0)
            pale = " pale" if len(row.parts) > 1 and place == 0 else ""
            parts.append(
                f'<g class="s{row.colour}"><rect class="fill{pale}" x="{x:.1f}" y="{top + 21}" '
                f'width="{width:.1f}" height="15" rx="2"/></g>'
            )
            x += width
        parts.append(f'<text x="{x + 7:.1f}" y="{top + 33}">{escape(row.text)}</text>')
    height = len(rows) * pitch + (22 if part_names else 2)
    if part_names:
        parts.append(
            f'<text x="8" y="{height - 6}">{escape("pale: " + part_names[0])}'
            f"{escape('; full: ' + part_names[1])}</text>"
        )
    return _figure(height, "".join(parts), ())


def curves(lines: Sequence[Line], x_title: str, y_title: str, *, log_x: bool = False) -> str:
    """Curves over a common x: from zero, or logarithmic and then with a dot at each value.

    Args:
        lines: with `log_x`, all x > 0 and y in [0, 1].
        x_title, y_title: what the axes show.
        log_x: whether x is logarithmic and y a share.
    """
    height = 300
    highest = max(y for line in lines for y in line.ys)
    lowest = min(y for line in lines for y in line.ys)
    y_ticks = _ticks(lowest if log_x else min(0.0, lowest), highest, 5)
    if log_x:
        marks = sorted({x for line in lines for x in line.xs})
        x_range = (math.log10(marks[0]) - 0.1, math.log10(marks[-1]) + 0.1)
        x_ticks = [math.log10(mark) for mark in marks]
    else:
        last = max(line.xs[-1] for line in lines)
        x_range = (0.0, last)
        x_ticks = [tick for tick in _ticks(0.0, last, 5) if tick <= last]
    plot = _Frame(height, x_range, (y_ticks[0], y_ticks[-1]))
    parts = [
        plot.y_axis(y_ticks, y_title, lambda v: f"{100 * v:.0f} %" if log_x else f"{v:g}"),
        plot.x_axis(x_ticks, x_title, lambda v: f"{10**v:.0f}" if log_x else f"{v:g}"),
    ]
    for line in lines:
        xs = [math.log10(x) for x in line.xs] if log_x else line.xs
        places = [(plot.x(x), plot.y(y)) for x, y in zip(xs, line.ys, strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dots = "".join(
            f'<circle class="fill" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places if log_x
        )
        parts.append(
            f'<g class="s{line.colour}"><title>{escape(line.name)}</title>'
            f'<path class="stroke" d="M{path}"/>{dots}</g>'
        )
    return _figure(height, "".join(parts), [(line.name, line.colour) for line in lines])


def smooth(values: Sequence[float], window: int) -> tuple[float, ...]:
    """Mean of each value and up to `window - 1` before it."""
    made, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        made.append(total / min(index + 1, window))
    return tuple(made)


class _Frame:
    def __init__(
        self, height: int, x_range: tuple[float, float], y_range: tuple[float, float]
    ) -> None:
        self.height = height
        self._x, self._y = x_range, y_range

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        span = self.height - _TOP - _BOTTOM
        return _TOP + span - (value - low) / ((high - low) or 1.0) * span

    def y_axis(self, ticks: Sequence[float], title: str, text: object) -> str:
        assert callable(text)
        parts = [
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{self.y(v):.1f}" '
            f'y2="{self.y(v):.1f}"/><text x="{_LEFT - 6}" y="{self.y(v) + 4:.1f}" '
            f'text-anchor="end">{text(v)}</text>'
            for v in ticks
        ]
        middle = (_TOP + self.height - _BOTTOM) / 2
        parts.append(
            f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(title)}</text>"
        )
        return "".join(parts)

    def x_axis(self, ticks: Sequence[float], title: str, text: object) -> str:
        assert callable(text)
        base = self.height - _BOTTOM
        parts = [
            f'<line class="grid" x1="{self.x(v):.1f}" x2="{self.x(v):.1f}" y1="{_TOP}" '
            f'y2="{base}"/><text x="{self.x(v):.1f}" y="{base + 17}" '
            f'text-anchor="middle">{text(v)}</text>'
            for v in ticks
        ]
        parts.append(
            f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{self.height - 6}" '
            f'text-anchor="middle">{escape(title)}</text>'
        )
        return "".join(parts)


def _figure(
    height: int, body: str, legend: Sequence[tuple[str, int]], rules: Sequence[str] = ()
) -> str:
    keys = "".join(
        f'<span class="key s{colour}"><i></i>{escape(name)}</span>' for name, colour in legend
    )
    keys += "".join(f'<span class="key dash"><i></i>{escape(name)}</span>' for name in rules)
    keys = f'<div class="legend">{keys}</div>' if keys else ""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{body}</svg>{keys}'


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round values that enclose [low, high]."""
    span = (high - low) or 1.0
    raw = span / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _spread(places: Sequence[float], apart: float = 10.0) -> list[float]:
    """Move points that share a place a little aside, around their common middle."""
    made = list(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and places[order[end]] - places[order[end - 1]] < apart:
            end += 1
        run = order[start:end]
        middle = sum(places[index] for index in run) / len(run)
        for place, index in enumerate(run):
            if len(run) > 1:
                made[index] = middle + (place - (len(run) - 1) / 2) * apart
        start = end
    return made
