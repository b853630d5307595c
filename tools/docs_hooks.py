"""Fills the pages' tables of measured figures from ``bench/results`` while the site is built.

``<!-- measured: PATTERN -->`` becomes, for each run, the cases whose names match; ``<!-- targets
-->`` the targets met and missed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.card.read import US, Run, newest, runs  # noqa: E402


def on_config(config: Any) -> Any:
    """Called by mkdocs once: pages that nobody has put into mkdocs.yml stand at the end."""
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    if more := [page for page in pages if f" {page}\n" not in listed]:
        config["nav"].append({"More": more})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    found = newest(runs(sorted((ROOT / "bench" / "results").glob("*.json"))))
    markdown = re.sub(
        r"<!-- measured: (.*?) -->",
        lambda match: "\n\n".join(filter(None, (_measured(run, match[1]) for run in found))),
        markdown,
    )
    return markdown.replace("<!-- targets -->", "\n\n".join(_targets(run) for run in found))


def _head(run: Run) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in run.facts.items())
    return f"*{run.machine}, {run.date}, commit {run.commit}* ({versions})"


def _measured(run: Run, pattern: str) -> str:
    lines = []
    for _, cell in run.named(pattern):
        ours = cell.seconds.get(US)
        share = f"{cell.shares[US]:.0%}" if US in cell.shares else ""
        peers = "; ".join(
            f"{peer} {taken * 1e6:.1f} µs ({taken / ours:.2f}x)"
            for peer, taken in cell.seconds.items()
            if peer != US and ours
        )
        taken = f"{ours * 1e6:.1f} µs" if ours else ""
        lines.append(f"| {cell.name} | {taken} | {share} | {peers} |")
    if not lines:
        return ""
    head = [
        "| case | peftkern | of the floor | others (how many times our time) |",
        "|---|---|---|---|",
    ]
    return "\n".join([_head(run), "", *head, *lines])


def _targets(run: Run) -> str:
    lines = [_head(run), "", "| target | promised | measured | |", "|---|---|---|---|"]
    for v in run.verdicts:
        said = "" if v.met is None else "met" if v.met else "**missed**"
        lines.append(f"| {v.what} | {v.promised} | {v.measured} | {said} |")
    return "\n".join(lines)
