"""Layers of several LoRA projections, mixed adapters and DoRA, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import lora_layers
from .cases import DTYPES, LORA_RANKS, LORA_ROWS, Cell, weight_bytes

_WIDTHS = {"quick": (1024,), "standard": (2048,), "full": (2048, 4096)}
_FORMATS = ("dense", "nf4")
_ADAPTERS = 8


def cells(level: str, dtype: str) -> list[Cell]:
    """Every cell of this file at a level ("quick", "standard", "full")."""
    kinds: tuple[Callable[[str, int, int, int, str], Cell], ...] = (_group, _mlp, _multi, _dora)
    return [
        kind(fmt, r, m, k, dtype)
        for kind in kinds
        for fmt in _FORMATS
        for r in LORA_RANKS[level]
        for k in _WIDTHS[level]
        for m in LORA_ROWS[level]
    ]


def _group(fmt: str, r: int, m: int, k: int, dtype: str) -> Cell:
    """q, k, v with a quarter of the heads for k and v."""
    kind, sizes = DTYPES[dtype], (k, k // 4, k // 4)
    n = sum(sizes)
    weight = sum(weight_bytes(fmt, k, size, kind.itemsize) for size in sizes)
    traffic = 2 * weight + m * (3 * k + 2 * n) * kind.itemsize
    flops = 2 * m * (2 * k * n + 3 * r * (3 * k + n))
    build = partial(lora_layers.group, fmt, r, m, k, sizes, kind, traffic)
    return _cell("lora_group", f"qkv_{fmt}-m{m}-{k}-r{r}-{dtype}", m, traffic, flops, build)


def _mlp(fmt: str, r: int, m: int, k: int, dtype: str) -> Cell:
    kind, f = DTYPES[dtype], 11 * k // 4 // 64 * 64
    weight = 3 * weight_bytes(fmt, k, f, kind.itemsize)
    # x twice, dx, y, dy; gate, up and h out and in again; dh in and out, dgate, dup and h likewise
    traffic = 2 * weight + m * (5 * k + 14 * f) * kind.itemsize
    flops = 2 * m * 3 * (2 * k * f + 3 * r * (k + f))
    build = partial(lora_layers.mlp, fmt, r, m, k, f, kind, traffic)
    return _cell("lora_mlp", f"mlp_{fmt}-m{m}-{k}x{f}-r{r}-{dtype}", m, traffic, flops, build)


def _multi(fmt: str, r: int, m: int, k: int, dtype: str) -> Cell:
    kind = DTYPES[dtype]
    traffic = 2 * weight_bytes(fmt, k, k, kind.itemsize) + m * 5 * k * kind.itemsize
    flops = 2 * m * (2 * k * k + 6 * r * k)
    build = partial(lora_layers.multi, fmt, r, _ADAPTERS, m, k, k, kind, traffic)
    name = f"multi{_ADAPTERS}_{fmt}-m{m}-{k}x{k}-r{r}-{dtype}"
    return _cell("multi_lora", name, m, traffic, flops, build)


def _dora(fmt: str, r: int, m: int, k: int, dtype: str) -> Cell:
    kind = DTYPES[dtype]
    # As LoRA, the weight once more for the norm, and u out and in again.
    traffic = 3 * weight_bytes(fmt, k, k, kind.itemsize) + m * 7 * k * kind.itemsize
    flops = 2 * m * (2 * k * k + 6 * r * k) + 2 * r * k * k
    build = partial(lora_layers.dora, fmt, r, m, k, k, kind, traffic)
    return _cell("dora", f"dora_{fmt}-m{m}-{k}x{k}-r{r}-{dtype}", m, traffic, flops, build)


def _cell(
    family: str,
    name: str,
    rows: int,
    traffic: int,
    flops: int,
    build: Callable[[], lora_layers.Built],
) -> Cell:
    return Cell(name, family, rows, ("peftkern", "eager"), traffic, flops, build)


def test_lora_layers(compare: Callable[..., None], cell: Cell, caches: str, contender: str) -> None:
    """One row: a contender's time for a layer, forward and backward."""
    compare(cell, caches, contender)
