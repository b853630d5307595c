"""Plots as inline SVG whose colours come from classes of the page or of the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 12, 44
# One colour a contender on every plot: c0 is ours.
_COLOURS = {
    "peftkern": 0,
    "bitsandbytes": 1,
    "hf-peft": 2,
    "hf-peft+bitsandbytes": 2,
    "dense": 3,
    "torch": 3,
    "torch-fused": 3,
    "frozen": 4,
    "liger": 5,
    "bitsandbytes-eval": 6,
}


def colour(contender: str) -> int:
    """The colour class of a contender."""
    return _COLOURS.get(contender, 7)


@dataclass(frozen=True)
class Series:
    """Points of one contender."""

    name: str
    points: tuple[tuple[float, float, str], ...]  # x, y, what it is


def human(value: float) -> str:
    """1.2 k, 3.4 M, 5 G, 700 T."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def log_plot(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    joined: bool,
    roof: Callable[[float], float] | None = None,
    x_ticks: Sequence[float] | None = None,
    height: int = 320,
) -> str:
    """Both axes logarithmic: points or curves, under a roof or not."""
    xs = [x for s in series for x, _, _ in s.points]
    ys = [y for s in series for _, y, _ in s.points]
    if roof is not None:
        ys += [roof(min(xs)), roof(max(xs))]
    x_low, x_high = math.log10(min(xs)) - 0.12, math.log10(max(xs)) + 0.12
    y_low, y_high = math.log10(min(ys)) - 0.08, math.log10(max(ys)) + 0.08

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(y) - y_low) / (y_high - y_low)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            height - _BOTTOM - up * (height - _TOP - _BOTTOM),
        )

    parts = []
    for tick in _log_ticks(10**y_low, 10**y_high):
        y = at(10**x_low, tick)[1]
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{human(tick)}</text>'
        )
    for tick in x_ticks if x_ticks is not None else _log_ticks(10**x_low, 10**x_high):
        x = at(tick, 10**y_low)[0]
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
            f'<text x="{x:.1f}" y="{height - _BOTTOM + 17}" text-anchor="middle">{human(tick)}'
            "</text>"
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{height - 8}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text transform="translate(13 {(height - _BOTTOM + _TOP) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_title)}</text>'
    )
    if roof is not None:
        steps = [10 ** (x_low + (x_high - x_low) * i / 60) for i in range(61)]
        path = "L".join("{:.1f} {:.1f}".format(*at(x, roof(x))) for x in steps)
        parts.append(f'<path class="rule" d="M{path}"/>')
    for s in series:
        places = [(*at(x, y), what) for x, y, what in s.points]
        marks = "".join(
            f'<circle class="fill" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(s.name)}: '
            f"{escape(what)}</title></circle>"
            for x, y, what in places
        )
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        path = f'<path class="stroke" d="M{line}"/>' if joined and len(places) > 1 else ""
        parts.append(f'<g class="s{colour(s.name)}">{path}{marks}</g>')
    return _svg(height, parts) + legend([s.name for s in series])


def ratios(rows: Sequence[tuple[str, str, float]]) -> str:
    """How many times faster: bars from 1 to the right where we win, to the left where we lose.

    Args:
        rows: what was measured, against whom, how many times faster.
    """
    reach = max(1.0, *(abs(math.log2(ratio)) for _, _, ratio in rows))
    pitch, room = 38, WIDTH - 16 - 2 * 52
    centre_share = max(0.12, min(0.5, _lost(rows) / (reach + _lost(rows))))
    centre = 8 + 52 + room * centre_share
    unit = min(room * (1 - centre_share) / reach, room * centre_share / max(_lost(rows), 1e-6))
    parts = []
    height = len(rows) * pitch + 6
    for index, (what, peer, ratio) in enumerate(rows):
        top, length = index * pitch, math.log2(ratio) * unit
        kind = "win" if ratio >= 1 else "loss"
        x = centre if length >= 0 else centre + length
        end = centre + length + (6 if length >= 0 else -6)
        anchor = "start" if length >= 0 else "end"
        parts.append(
            f'<text class="name" x="8" y="{top + 13}">{escape(what)} '
            f'<tspan class="dim">against {escape(peer)}</tspan></text>'
            f'<rect class="{kind}" x="{x:.1f}" y="{top + 18}" width="{max(abs(length), 1):.1f}" '
            f'height="13" rx="2"/>'
            f'<text x="{end:.1f}" y="{top + 29}" text-anchor="{anchor}">{ratio:.2f}x</text>'
            f'<line class="axis" x1="{centre:.1f}" x2="{centre:.1f}" y1="{top + 16}" '
            f'y2="{top + 33}"/>'
        )
    return _svg(height, parts)


def _lost(rows: Sequence[tuple[str, str, float]]) -> float:
    return max(0.0, *(-math.log2(ratio) for _, _, ratio in rows))


def bars(rows: Sequence[tuple[str, str, float, str]], whole: float | None = None) -> str:
    """Bars from zero.

    Args:
        rows: what, which contender, the length, the text at its end.
        whole: draw a line at this value, for shares of a floor.
    """
    most = max([value for _, _, value, _ in rows] + ([whole] if whole else []))
    pitch, room = 38, WIDTH - 16 - 96
    parts = []
    height = len(rows) * pitch + 6
    for index, (what, who, value, text) in enumerate(rows):
        top, width = index * pitch, max(value / most * room, 1)
        parts.append(
            f'<text class="name" x="8" y="{top + 13}">{escape(what)} '
            f'<tspan class="dim">{escape(who)}</tspan></text>'
            f'<g class="s{colour(who)}"><rect class="fill" x="8" y="{top + 18}" '
            f'width="{width:.1f}" height="13" rx="2"/></g>'
            f'<text x="{8 + width + 6:.1f}" y="{top + 29}">{escape(text)}</text>'
        )
    if whole:
        x = 8 + whole / most * room
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    return _svg(height, parts)


def legend(names: Sequence[str]) -> str:
    """Which colour is whose, as HTML under a plot."""
    keys = "".join(f'<span class="key s{colour(n)}"><i></i>{escape(n)}</span>' for n in names)
    return f'<div class="legend">{keys}</div>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; with 2 and 5 between where there are few of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 4 else (1, 2, 5)
    made = [f * 10.0**d for d in range(first, last + 1) for f in factors]
    return [tick for tick in made if low <= tick <= high]
