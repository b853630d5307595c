"""The README's picture: of each machine's newest run, the crossover and the peers, as one SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from bench.card import draw
from bench.card.page import COLOURS, DARK, PLOT_STYLE, against_peers, crossovers
from bench.card.read import Run

_TITLE, _GAP = 58, 24
_ROWS = 10
# Whoever computes the same; bounds such as the frozen layer alone are no peers.
PEERS = (
    *("bitsandbytes", "bitsandbytes-eval", "hf-peft", "hf-peft+bitsandbytes", "unsloth", "liger"),
    *("dense", "eager", "torch", "torch-fused", "concatenated"),
)


def picture(runs: Sequence[Run]) -> str:
    """A standalone SVG; wins and losses alike, in the order of the file."""
    blocks, y = [], 0.0
    for run in runs:
        block, height = _block(run, y)
        if block:
            blocks.append(block)
            y += height + _GAP
    width = 2 * draw.WIDTH + _GAP + 24
    style = f"svg{{{COLOURS}}}@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}{PLOT_STYLE}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y:.0f}" '
        f'font-family="system-ui,sans-serif" font-size="13"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="var(--bg)"/>{"".join(blocks)}</svg>\n'
    )


def _block(run: Run, y: float) -> tuple[str, float]:
    rows = _selected(run)
    curves = [(title, series) for title, series in crossovers(run) if title.startswith("nf4 ")]
    if not rows:
        return "", 0.0
    parts = [
        f'<text class="name" x="12" y="{y + 24:.0f}" font-size="17" font-weight="600">'
        f"{escape(run.machine)}</text>"
        f'<text x="12" y="{y + 44:.0f}">{escape(run.date)}, commit {escape(run.commit)}; medians '
        f"of interleaved calls. Right: times faster than the peer; {len(rows)} of "
        f"{len(against_peers(run, PEERS))} pairs, evenly through their ranking.</text>"
    ]
    height = 0.0
    if curves:
        title, series = curves[-1]
        ticks = [x for i, (x, _, _) in enumerate(series[0].points) if i % 2 == 0]
        plot = draw.log_plot(series, "rows of x", "µs", joined=True, x_ticks=ticks, height=380)
        svg, keys = plot.split('<div class="legend">')
        names = re.findall(r"</i>([^<]*)</span>", keys)
        parts.append(_placed(svg, 12, y + _TITLE, 380))
        x = 74.0
        for name in names:
            parts.append(
                f'<g class="s{draw.colour(name)}"><circle class="fill" cx="{x:.0f}" '
                f'cy="{y + _TITLE + 394:.0f}" r="5"/></g><text x="{x + 9:.0f}" '
                f'y="{y + _TITLE + 398:.0f}">{escape(name)}</text>'
            )
            x += 30 + 7.4 * len(name)
        parts.append(
            f'<text x="{x:.0f}" y="{y + _TITLE + 398:.0f}">{escape(title)}: time of x Wᵀ</text>'
        )
        height = 406.0
    svg = draw.ratios(rows)
    size = float(re.search(r'viewBox="0 0 \d+ (\d+)"', svg)[1])  # type: ignore[index]
    parts.append(_placed(svg, 12 + draw.WIDTH + _GAP if curves else 12, y + _TITLE, size))
    return "".join(parts), _TITLE + max(height, size)


def _selected(run: Run) -> list[tuple[str, str, float]]:
    """Rows against peers, best first: all of them, or some evenly through the ranking."""
    ranked = sorted(against_peers(run, PEERS), key=lambda row: -row[2])
    if len(ranked) <= _ROWS:
        return ranked
    # Ends included: neither the best row nor the worst is left out.
    return [ranked[round(i * (len(ranked) - 1) / (_ROWS - 1))] for i in range(_ROWS)]


def _placed(svg: str, x: float, y: float, height: float) -> str:
    return svg.replace(
        "<svg ", f'<svg x="{x:.0f}" y="{y:.0f}" width="{draw.WIDTH}" height="{height:.0f}" ', 1
    )
