"""A LoRA layer's forward and backward over dense, NF4 and INT8 bases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import peers
from .cases import DTYPES, LORA_RANKS, LORA_ROWS, SHAPES, Cell, weight_bytes


def cells(level: str, dtype: str) -> list[Cell]:
    """Every cell of this file at a level ("quick", "standard", "full")."""
    return [
        _cell(fmt, r, m, k, n, dtype)
        for fmt in ("dense", "nf4", "int8")
        for r in LORA_RANKS[level]
        for k, n in SHAPES[level]
        for m in LORA_ROWS[level]
    ]


def _cell(fmt: str, r: int, m: int, k: int, n: int, dtype: str) -> Cell:
    kind = DTYPES[dtype]
    io = m * (3 * k + 2 * n) * kind.itemsize  # x twice and dx; y and dy
    return Cell(
        name=f"lora_{fmt}-m{m}-{k}x{n}-r{r}-{dtype}",
        family="lora",
        rows=m,
        contenders=("peftkern", "hf-peft", "torch-frozen"),
        traffic=2 * weight_bytes(fmt, k, n, kind.itemsize) + io,
        flops=2 * m * (2 * k * n + 3 * r * (k + n)),
        build=partial(peers.lora, fmt, r, m, k, n, kind),
    )


def test_lora(compare: Callable[..., None], cell: Cell, caches: str, contender: str) -> None:
    """One row: a contender's time for a LoRA layer, forward and backward."""
    compare(cell, caches, contender)
