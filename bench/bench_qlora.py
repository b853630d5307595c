"""A QLoRA layer's forward and backward against HF PEFT over bitsandbytes: time and peak memory.

``python -m peftkern bench --op qlora_layer`` runs this file alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import peers
from .cases import DTYPES, LORA_RANKS, Cell, weight_bytes

_SHAPES = {
    "quick": ((2048, 2048),),
    "standard": ((4096, 4096),),
    "full": ((2048, 2048), (4096, 4096), (4096, 14336)),
}
_ROWS = (32, 512)


def cells(level: str, dtype: str) -> list[Cell]:
    """Every cell of this file at a level ("quick", "standard", "full")."""
    return [
        _cell(r, m, k, n, dtype)
        for r in LORA_RANKS[level]
        for k, n in _SHAPES[level]
        for m in _ROWS
    ]


def _cell(r: int, m: int, k: int, n: int, dtype: str) -> Cell:
    kind = DTYPES[dtype]
    io = m * (3 * k + 2 * n) * kind.itemsize  # x twice and dx; y and dy
    return Cell(
        name=f"qlora_layer-m{m}-{k}x{n}-r{r}-{dtype}",
        family="qlora_layer",
        rows=m,
        contenders=("peftkern", "hf-peft+bitsandbytes"),
        traffic=2 * weight_bytes("nf4", k, n, kind.itemsize) + io,
        flops=2 * m * (2 * k * n + 3 * r * (k + n)),
        build=partial(peers.qlora_layer, r, m, k, n, kind),
        memory=True,
    )


def test_qlora_layer(compare: Callable[..., None], cell: Cell, caches: str, contender: str) -> None:
    """One row: a contender's time for a QLoRA layer, forward and backward, and its peak memory."""
    compare(cell, caches, contender)
