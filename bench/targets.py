"""The targets of the CPU kernels, and which of them a results file meets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FLOOR = "floor"
EVERY_ROW = ("torch", 0.75), ("bitsandbytes", 0.95)


@dataclass(frozen=True)
class Target:
    """At least ``least``, of the floor or as a multiple of a contender's speed.

    Args:
        cells: pattern of cell names, matched from their beginning.
        against: a contender, or ``FLOOR``.
        least: share of the floor, or how many times faster than the contender.
        caches: "cold" or "warm".
    """

    cells: str
    against: str
    least: float
    caches: str = "cold"


def _linear() -> list[Target]:
    found = [
        Target(r"nf4_fwd-m1-", FLOOR, 0.9),
        Target(r"nf4_fwd-m1-", "bitsandbytes-eval", 1.0),
    ]
    for way in ("fwd", "dx"):
        dense = {1: 5.0, 4: 3.5, 8: 2.2, 32: 1.3, 128: 1.05, 512: 1.0}
        found += [Target(rf"nf4_{way}-m{m}-", "torch", least) for m, least in dense.items()]
        training = {1: 30.0, 32: 4.0, 512: 1.25}
        found += [Target(rf"nf4_{way}-m{m}-", "bitsandbytes", x) for m, x in training.items()]
        found.append(Target(rf"int8_{way}-m1-", "torch", 2.5))
        found.append(Target(rf"int8_{way}-m(128|512|2048)-", "torch", 0.95))
    return found


# On a machine without AVX-512 torch's dense bf16 and the floor are of other kinds: there the rows
# against bitsandbytes count.
TARGETS = (
    *_linear(),
    Target(r"llm_int8_fwd-m1-", "torch", 2.5),
    Target(r"llm_int8_fwd-m(128|512|2048)-", "torch", 1.3),
    Target(r"qlora_layer-m32-", "hf-peft+bitsandbytes", 2.0),
    Target(r"qlora_layer-m512-", "hf-peft+bitsandbytes", 1.2),
    Target(r"bottleneck_fwd-m[1-8]-", "eager", 3.0),
    Target(r"bottleneck_(fwd|step)-m(512|2048)-", "eager", 1.5),
    Target(r"quantize_nf4-", FLOOR, 0.6),
    Target(r"quantize_nf4-", "bitsandbytes", 50.0),
    Target(r"dequantize_nf4-", FLOOR, 0.8),
    Target(r"dequantize_nf4-", "bitsandbytes", 4.0),
    Target(r"adamw8bit-", FLOOR, 0.85),
    Target(r"adamw8bit-", "bitsandbytes", 4.0),
    Target(r"adamw8bit-", "torch", 1.6),
    *(Target(r"(nf4|fp4|int8)_(fwd|dx)-", who, least) for who, least in EVERY_ROW),
)


def judged(benchmarks: Sequence[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """Each target that a run measured: cell, against what, the least and the worst figure.

    Of several cells of one target the one that misses by the most stands for it.
    """
    found = []
    for target in TARGETS:
        name = (
            "share_of_floor" if target.against == FLOOR else f"times_faster_than_{target.against}"
        )
        figures = [
            (info[name], info["cell"])
            for info in (row["extra_info"] for row in benchmarks)
            if info["contender"] == "peftkern"
            and info["caches"] == target.caches
            and re.match(target.cells, info["cell"])
            and name in info
        ]
        if figures:
            figure, cell = min(figures)
            found.append((cell, target.against, target.least, figure))
    return found


def table(benchmarks: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table of :func:`judged`; empty where no target was measured."""
    rows = [("target", "against", "wanted", "measured", "")]
    for cell, against, least, figure in judged(benchmarks):
        shown = "{:.0%}" if against == FLOOR else "{:.2f}x"
        verdict = "pass" if figure >= least else "**miss**"
        rows.append((cell, against, shown.format(least), shown.format(figure), verdict))
    if len(rows) == 1:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    rows.insert(1, ("-" * widths[0], *("-" * max(width, 3) for width in widths[1:])))
    return [
        f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |"
        for row in rows
    ]
