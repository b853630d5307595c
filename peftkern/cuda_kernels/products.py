"""``x Wᵀ`` and ``dy W`` with a frozen base, plus bias and low-rank term, by the CUDA kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.cuda_kernels import choices
from peftkern.native import DTYPES, QUANT_TYPES
from peftkern.ops.bases import Base

_FORMATS = {"dense": 0, "nf4": 1, "fp4": 1, "int8": 2}


class LowRank(NamedTuple):
    """A low-rank term ``scaling * low upᵀ`` of a product's result.

    Args:
        low: [M, r] float32: dropout(x) Aᵀ, or dS.
        up: B [outputs, r] of float32 or x's dtype; for ``dy W``: A [r, outputs].
        scaling: its factor.
        u: [M, c] bf16, v: [outputs, c] (or [c, outputs]): the term as ``u vᵀ``, in parts that
            add up to float32 factors; see csrc/cuda/shrink.cu. Made where the way needs them.
    """

    low: Tensor
    up: Tensor
    scaling: float
    u: Tensor | None = None
    v: Tensor | None = None


def needs_parts(way: str) -> bool:
    """Whether a way takes the low-rank term as ``u vᵀ`` instead of low and up."""
    return way in ("wgmma", "library")


@functools.lru_cache(maxsize=4096)
def _way(device: choices.Device, *facts: Any) -> str:
    return choices.way(choices.Product(*facts), device)


def way_of(x: Tensor, base: Base, across: bool) -> str:
    """Which way of :mod:`peftkern.cuda_kernels.choices` the product takes."""
    weight, _, _, _, format, blocksize, rows, cols = base
    aligned = not (x.data_ptr() | weight.data_ptr()) & 15
    facts = (x.shape[0], rows, cols, format, blocksize, across, x.dtype, aligned)
    return _way(cuda_native.device_facts(x.device), *facts)


def product(
    x: Tensor,
    base: Base,
    across: bool,
    bias: Tensor | None = None,
    term: LowRank | None = None,
    *,
    way: str | None = None,
    onto: Tensor | None = None,
    cut: tuple[int, int] | None = None,
) -> Tensor:
    """``x Wᵀ`` [M, rows], or across ``x W`` [M, cols], plus bias and term.

    Args:
        x: [M, cols], or [M, rows] if across; contiguous.
        base: W.
        across: contract over the rows of W.
        bias: of x's dtype, or ``None``; not across.
        term: with u and v where ``needs_parts(way)``.
        way: how; by default the fastest.
        onto: [M, outputs] contiguous, overwritten: the product is added to it and it is returned
            (ways that take parts only).
        cut: rows of a tile (64, 128, 256) and parts of the depth for ``"wgmma"``; by default those
            of :func:`wgmma_cut`.
    """
    way = way_of(x, base, across) if way is None else way
    if way == "library":
        return _library(x, base, across, bias, term, onto)
    if way == "wgmma":
        return _wgmma(x, base, across, bias, term, onto, cut)
    return _small(way, x, base, bias, term)


def _library(
    x: Tensor,
    base: Base,
    across: bool,
    bias: Tensor | None,
    term: LowRank | None,
    onto: Tensor | None,
) -> Tensor:
    """cuBLAS; the low-rank term is what its result is added to, so that one pass is saved."""
    w = base.dense(x.dtype)
    right = w if across else w.t()
    if term is not None:
        low = low_rank(x, across, term)
        onto = low if onto is None else onto.add_(low)
    if onto is None:
        return x @ w if across else torch.nn.functional.linear(x, w, bias)
    out = onto.addmm_(x, right)
    return out if bias is None else out.add_(bias)


def low_rank(x: Tensor, across: bool, term: LowRank) -> Tensor:
    """The term alone, of x's dtype."""
    if x.dtype == torch.float16:  # bf16 parts would lose three of its bits
        low = (term.low * term.scaling).to(x.dtype)
        return low @ (term.up if across else term.up.t())
    if term.u is None or term.v is None:
        raise ValueError("term: got no u and v, expected them for this way")
    return term.u @ (term.v if across else term.v.t())


@functools.lru_cache(maxsize=4096)
def wgmma_cut(m: int, outputs: int, depth: int, kind: int) -> tuple[int, int]:
    """Rows of a tile and parts of the depth, by the model in csrc/cuda/linear_wgmma.cu."""
    cut = cuda_native.library().ask("linear_wgmma_cut", m, outputs, depth, kind)
    return cut // 1000, cut % 1000


def _wgmma(
    x: Tensor,
    base: Base,
    across: bool,
    bias: Tensor | None,
    term: LowRank | None,
    onto: Tensor | None,
    cut: tuple[int, int] | None = None,
) -> Tensor:
    m, depth = x.shape
    rows, cols, weight = base.rows, base.cols, base.weight
    if base.format == "dense" and not weight.is_contiguous():  # stored transposed
        weight, rows, cols, across = weight.t(), cols, rows, not across
        if term is not None and term.v is not None:
            raise ValueError("term: a transposed dense base takes none here")
    outputs = cols if across else rows
    out = x.new_empty(m, outputs) if onto is None else onto
    kind = _FORMATS[base.format]
    rows_of_tile, parts = cut or wgmma_cut(m, outputs, depth, kind)
    size = parts * m * outputs if parts > 1 else 0
    workspace = x.new_empty(size, dtype=torch.float32) if size else None
    u, v = (None, None) if term is None else (term.u, term.v)
    cuda_native.launch(
        "linear_wgmma",
        x.device,
        x,
        DTYPES[x.dtype],
        m,
        rows,
        cols,
        int(across),
        kind,
        weight,
        *base.statistics,
        QUANT_TYPES.get(base.format, 0),
        max(base.blocksize, 1).bit_length() - 1,
        bias,
        u,
        v,
        0 if u is None else u.shape[1],
        rows_of_tile,
        parts,
        workspace,
        int(onto is not None),
        out,
    )
    return out


def _small(way: str, x: Tensor, base: Base, bias: Tensor | None, term: LowRank | None) -> Tensor:
    """Few rows: the term is summed in the epilogue."""
    m, k = x.shape
    out = x.new_empty(m, base.rows)
    shape = (m, base.rows, k)
    last: tuple[object, ...] = (None, None, 0, 0, 0.0)
    if term is not None:
        rank = term.up.shape[1]
        last = (term.low, term.up, DTYPES[term.up.dtype], rank, term.scaling)
    if base.format == "int8":
        name, weight = "linear_rows_8bit", (base.weight, base.absmax)
        quantization: tuple[int, ...] = ()
    else:
        name = {"few": "linear_4bit_few", "mma": "linear_4bit_mma", "rows": "linear_rows_4bit"}[way]
        weight = (base.weight, *base.statistics)  # type: ignore[assignment]
        quantization = (QUANT_TYPES[base.format], base.blocksize.bit_length() - 1)
    workspace: tuple[Tensor | None, ...] = ()
    if way == "mma":
        size = cuda_native.library().ask("linear_4bit_workspace", *shape)
        workspace = (x.new_empty(size // 4, dtype=torch.float32) if size else None,)
    cuda_native.launch(
        name,
        x.device,
        x,
        DTYPES[x.dtype],
        *shape,
        *weight,
        *quantization,
        bias,
        *last,
        *workspace,
        out,
    )
    return out
