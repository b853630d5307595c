"""Quantizing and dequantizing a weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import peers
from .cases import DTYPES, SHAPES, Cell, weight_bytes


def cells(level: str, dtype: str) -> list[Cell]:
    """Every cell of this file at a level ("quick", "standard", "full")."""
    return [
        _cell(way, fmt, k, n, dtype)
        for way in ("quantize", "dequantize")
        for fmt in ("nf4", "int8")
        for k, n in SHAPES[level]
    ]


def _cell(way: str, fmt: str, k: int, n: int, dtype: str) -> Cell:
    kind = DTYPES[dtype]
    build = peers.quantize if way == "quantize" else peers.dequantize
    return Cell(
        name=f"{way}_{fmt}-{k}x{n}-{dtype}",
        family=way,
        rows=0,
        contenders=("peftkern", "bitsandbytes"),
        traffic=k * n * kind.itemsize + weight_bytes(fmt, k, n, kind.itemsize),
        flops=0,
        build=partial(build, fmt, k, n, kind),
    )


def test_quantize(compare: Callable[..., None], cell: Cell, caches: str, contender: str) -> None:
    """One row: a contender's time for a format conversion."""
    compare(cell, caches, contender)
