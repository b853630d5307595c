"""Quantized matmul forward and backward to the input, over rows and shapes.

``python -m pytest bench -k "nf4 and m1-" --benchmark-only`` prints NF4 at one row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import peers
from .cases import DTYPES, ROWS, SHAPES, Cell, linear_traffic


def cells(level: str, dtype: str) -> list[Cell]:
    """Every cell of this file at a level ("quick", "standard", "full")."""
    found = []
    for fmt in ("nf4", "fp4", "int8") if level == "full" else ("nf4", "int8"):
        for way in ("fwd", "dx"):
            for k, n in SHAPES[level]:
                for m in ROWS[level]:
                    found.append(_cell(fmt, way, m, k, n, dtype))
    found += [_llm_int8(m, k, n, dtype) for k, n in SHAPES[level] for m in ROWS[level]]
    return found


def _llm_int8(m: int, k: int, n: int, dtype: str) -> Cell:
    kind = DTYPES[dtype]
    return Cell(
        name=f"llm_int8_fwd-m{m}-{k}x{n}-{dtype}",
        family="llm_int8",
        rows=m,
        contenders=("peftkern", "peftkern-exact", "bitsandbytes", "torch"),
        traffic=linear_traffic("int8", m, k, n, kind.itemsize),
        flops=2 * m * k * n,
        build=partial(peers.llm_int8, m, k, n, kind),
    )


def _cell(fmt: str, way: str, m: int, k: int, n: int, dtype: str) -> Cell:
    kind = DTYPES[dtype]
    evaluation = ("bitsandbytes-eval",) if way == "fwd" and fmt != "int8" else ()
    return Cell(
        name=f"{fmt}_{way}-m{m}-{k}x{n}-{dtype}",
        family="linear",
        rows=m,
        contenders=("peftkern", "bitsandbytes", *evaluation, "torch"),
        traffic=linear_traffic(fmt, m, k, n, kind.itemsize),
        flops=2 * m * k * n,
        build=partial(peers.linear, fmt, way, m, k, n, kind),
    )


def test_linear(compare: Callable[..., None], cell: Cell, caches: str, contender: str) -> None:
    """One row: a contender's time for a quantized matmul."""
    compare(cell, caches, contender)
