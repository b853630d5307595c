"""A picture of what paging did: residency, traffic and stalls over the steps, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

_WIDTH, _PANEL, _GAP = 640, 120, 46
_LEFT, _RIGHT, _TOP = 70, 14, 26
_STYLE = (
    "<style>.pk-page text{font:14px system-ui,sans-serif;fill:currentColor}"
    ".pk-page .axis{stroke:currentColor;stroke-opacity:.35;fill:none}"
    ".pk-page .a{stroke:#0b6fb8;fill:none;stroke-width:1.5}"
    ".pk-page .b{stroke:#c4530c;fill:none;stroke-width:1.5}"
    ".pk-page .limit{stroke:currentColor;stroke-dasharray:4 3;fill:none;stroke-opacity:.6}</style>"
)


def paging_svg(report: dict[str, Any]) -> str:
    """Three panels over the steps: RAM that holds state, bytes moved, time that steps waited.

    Args:
        report: of ``optimizer.paging_report()``; its ``history`` is what is drawn.

    Returns:
        An ``<svg>`` element that needs nothing from outside and takes its text colour from the
        page; put it into HTML as it is, or write it to a ``.svg`` file.

    Raises:
        ValueError: no step was recorded yet.

    Example:
        >>> import torch
        >>> from peftkern.optim import PagedAdamW, paging_svg
        >>> w = torch.nn.Parameter(torch.zeros(300_000))
        >>> optimizer = PagedAdamW([w], ram_budget=1 << 20)
        >>> w.sum().backward(); optimizer.step()
        >>> paging_svg(optimizer.paging_report()).startswith("<svg")
        True
        >>> optimizer.close()
    """
    history = report["history"]
    if not history:
        raise ValueError("report: its history is empty; take a step first")
    steps = [entry["step"] for entry in history]
    mib = 1 / (1 << 20)

    def column(name: str, factor: float) -> list[float]:
        return [entry[name] * factor for entry in history]

    limits = [("whole state", report["total_bytes"] * mib)]
    if report["ram_budget"] is not None:
        limits.append(("budget", report["ram_budget"] * mib))
    panels = [
        _panel(0, "state in RAM, MiB", steps, [("a", column("resident_bytes", mib))], limits),
        _panel(
            1,
            "read (blue) and written (orange) in a step, MiB",
            steps,
            [("a", column("bytes_read", mib)), ("b", column("bytes_written", mib))],
            [],
        ),
        _panel(
            2,
            "step (blue) and what of it was spent waiting (orange), ms",
            steps,
            [("a", column("step_seconds", 1e3)), ("b", column("stall_seconds", 1e3))],
            [],
        ),
    ]
    height = _TOP + 3 * (_PANEL + _GAP)
    return (
        f'<svg class="pk-page" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="paging of optimizer state">{_STYLE}{"".join(panels)}</svg>'
    )


def _panel(
    number: int,
    title: str,
    steps: Sequence[int],
    curves: list[tuple[str, list[float]]],
    limits: list[tuple[str, float]],
) -> str:
    top = _TOP + number * (_PANEL + _GAP)
    largest = max([0.0, *(y for _, ys in curves for y in ys), *(y for _, y in limits)])
    ceiling = _round_up(largest)
    span = max(1, steps[-1] - steps[0])

    def x_of(step: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - steps[0]) / span

    def y_of(value: float) -> float:
        return top + _PANEL * (1 - value / ceiling)

    base = top + _PANEL
    parts = [
        f'<text x="{_LEFT}" y="{top - 8}">{title}</text>',
        f'<path class="axis" d="M{_LEFT} {top}V{base}H{_WIDTH - _RIGHT}"/>',
        _label(_LEFT - 6, y_of(ceiling) + 4, "end", f"{ceiling:g}"),
        _label(_LEFT - 6, base + 4, "end", "0"),
        _label(_LEFT, base + 16, "start", f"step {steps[0]}"),
        _label(_WIDTH - _RIGHT, base + 16, "end", f"step {steps[-1]}"),
    ]
    for name, value in limits:
        y = y_of(value)
        parts.append(f'<path class="limit" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_label(_WIDTH - _RIGHT - 4, y - 3, "end", name))
    for kind, ys in curves:
        parts.append(_curve(kind, steps, ys, x_of, y_of))
    return "".join(parts)


def _curve(
    kind: str,
    steps: Sequence[int],
    ys: list[float],
    x_of: Callable[[int], float],
    y_of: Callable[[float], float],
) -> str:
    points = [f"{x_of(step):.1f} {y_of(y):.1f}" for step, y in zip(steps, ys, strict=True)]
    if len(points) == 1:  # one step is a short dash
        points.append(f"{x_of(steps[0]) + 8:.1f} {y_of(ys[0]):.1f}")
    return f'<path class="{kind}" d="M{"L".join(points)}"/>'


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * 0.999999)
