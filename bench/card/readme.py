"""The README's table of measured figures: every pair with a peer, lost ones too."""

from __future__ import annotations

from collections.abc import Sequence

from bench.card.page import against_peers
from bench.card.picture import PEERS
from bench.card.read import US, Run

BEGIN, END = "<!-- measured: written by make report -->", "<!-- /measured -->"


def table(runs: Sequence[Run]) -> str:
    """Markdown, a part a machine; our time, the peer's, and how many times faster we are."""
    parts = []
    for run in runs:
        rows = sorted(against_peers(run, PEERS), key=lambda row: -row[2])
        if not rows:
            continue
        cells = {cell.name: cell for cell in run.cells}
        lost = sum(1 for row in rows if row[2] < 1)
        versions = {k: v for k, v in run.facts.items() if k not in ("threads", "isa")}
        told = ", ".join(f"{k} {v}" for k, v in versions.items())
        lines = [
            f"**{run.machine}**, {run.date}, commit {run.commit} ({told}). Of {len(rows)} pairs "
            f"{len(rows) - lost} are faster here and {lost} slower.",
            "",
            "| case | peftkern | other | faster |",
            "|---|---|---|---|",
        ]
        for name, peer, ratio in rows:
            ours, theirs = (f"{cells[name].seconds[who] * 1e6:.1f} µs" for who in (US, peer))
            shown = f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x**"
            lines.append(f"| {name} | {ours} | {peer} {theirs} | {shown} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def written(text: str, runs: Sequence[Run]) -> str:
    """The README's text with the table between its marks replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(runs)}\n\n{END}{rest.split(END, 1)[1]}"
