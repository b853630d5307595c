"""One optimizer step over a LoRA-like list of parameters, in memory and paged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from peftkern import optim

from . import peers
from .cases import DTYPES, Cell
from .measure import Contender, copies_for

# Parameters of a cell: pairs of A and B matrices of rank 16 at width 4096, 131,072 together.
_PAIR = 16 * (4096 + 4096)
SIZES = {"quick": (8,), "standard": (32, 128), "full": (8, 128, 320)}
# Bytes a parameter: what is read and written at the least besides parameter and gradient.
STATE_BYTES = {"adamw": 16.0, "adamw8bit": 4.0 + 16.0 / 256}


def cells(level: str, dtype: str) -> list[Cell]:
    """Every cell of this file at a level ("quick", "standard", "full")."""
    return [_cell(kind, pairs, dtype) for kind in STATE_BYTES for pairs in SIZES[level]]


def _traffic(kind: str, numel: int, itemsize: int) -> int:
    return int(numel * (3 * itemsize + STATE_BYTES[kind]))


def _cell(kind: str, pairs: int, dtype: str) -> Cell:
    numel = pairs * _PAIR
    return Cell(
        name=f"{kind}-{numel / 1e6:.1f}M-{dtype}",
        family="optimizer",
        rows=0,
        contenders=("peftkern", "peftkern-paged", "bitsandbytes", "torch"),
        traffic=_traffic(kind, numel, DTYPES[dtype].itemsize),
        flops=0,
        build=partial(_build, kind, pairs, DTYPES[dtype]),
    )


def _parameters(pairs: int, dtype: torch.dtype) -> list[nn.Parameter]:
    shapes = ((16, 4096), (4096, 16)) * pairs
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def _contender(name: str, make: Callable[[Any], Any], pairs: int, dtype: torch.dtype) -> Contender:
    numel = pairs * _PAIR
    kind = "adamw" if name == "torch" else name.split("/")[-1]
    traffic = _traffic(kind, numel, dtype.itemsize)
    copies = copies_for(traffic)
    optimizers = [make(_parameters(pairs, dtype)) for _ in range(copies)]

    def prepare(rows: int) -> Callable[[int], object]:
        return lambda i: optimizers[i].step()

    return Contender(name.split("/")[0], prepare, copies, traffic)


def _build(kind: str, pairs: int, dtype: torch.dtype) -> tuple[list[Contender], dict[str, str]]:
    eight = kind == "adamw8bit"
    ours: Any = optim.AdamW8bit if eight else optim.AdamW
    paged: Any = optim.PagedAdamW8bit if eight else optim.PagedAdamW
    absent: dict[str, str] = {}
    rows = [
        _contender(f"peftkern/{kind}", lambda p: ours(p, lr=1e-4), pairs, dtype),
        # The whole state fits the budget: what the pager itself costs.
        _contender(
            f"peftkern-paged/{kind}",
            lambda p: paged(p, lr=1e-4, ram_budget=1 << 40),
            pairs,
            dtype,
        ),
    ]
    try:
        bnb = peers.bitsandbytes_module()
    except ImportError as error:
        absent["bitsandbytes"] = f"not installed: {error}"
    else:
        theirs = bnb.optim.AdamW8bit if eight else bnb.optim.AdamW
        rows.append(_contender(f"bitsandbytes/{kind}", lambda p: theirs(p, lr=1e-4), pairs, dtype))
    fused = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    rows.append(_contender("torch", fused, pairs, dtype))
    return rows, absent


def test_optimizer(compare: Callable[..., None], cell: Cell, caches: str, contender: str) -> None:
    """One row: a contender's time for a step."""
    compare(cell, caches, contender)
