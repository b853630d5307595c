"""How a base is multiplied with: by one fused kernel, or dequantized and by cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.triton_kernels.launch import interpreting, launch, table
from peftkern.tuning.configs import LinearConfig, linear_config
from peftkern.tuning.model import fused_low_rank_wins, fused_quantized_wins
from peftkern.tuning.tables import lookup

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Dropout:
    """Arguments of a kernel that draws a mask: keep where word >= threshold, times ``scale``."""

    seed: Tensor | None
    threshold: int
    scale: float

    @staticmethod
    def of(p: float, seed: Tensor | None) -> Dropout:
        """The arguments for probability ``p``; without a seed or with p = 0 there is no mask."""
        if seed is None or p == 0.0:
            return Dropout(None, 0, 1.0)
        return Dropout(seed, int(p * 2**32), 1.0 / (1.0 - p))


@dataclass(frozen=True)
class LowRank:
    """``scaling * mask(s uᵀ)``, added to a matmul's result.

    Args:
        s: fp32 [M, R].
        up: [O, R] by its strides, any float dtype.
        scaling: factor.
        dropout: mask over the result's elements.
    """

    s: Tensor
    up: Tensor
    scaling: float
    dropout: Dropout


def _fused_config(
    x: Tensor, base: Base, transposed: bool, low_rank: LowRank | None
) -> LinearConfig | None:
    """Tiles of the fused kernel where it can serve and is expected to win; else ``None``."""
    m = x.shape[0]
    # fp32 products belong to cuBLAS: there is no 16-bit operand to decode into.
    if x.dtype not in _HALVES or 0 in (m, base.rows, base.cols):
        return None
    measured = lookup(x.device, m, base.rows, base.cols, base.format, transposed)
    if measured is None:
        config = linear_config(m, base.rows, base.cols, base.format, base.blocksize, transposed)
    else:
        config = measured.config
    if config is None or (base.blocksize and config.group > base.blocksize):
        return None
    if (
        low_rank is not None
        and low_rank.up.dtype == torch.float32
        and (low_rank.s.shape[1] > 16 or low_rank.dropout.seed is not None)
    ):
        # Beside 128 rows, fp32 products in several blocks of ranks, or a mask, spill on 8.0.
        config = replace(config, block_m=min(config.block_m, 64))
    if measured is not None:
        return config
    if base.format == "dense":
        wins = low_rank is not None and fused_low_rank_wins(x.shape[1])
    else:
        wins = fused_quantized_wins(m, config.block_m, base.format)
    return config if wins else None


def matmul(
    x: Tensor,
    base: Base,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
) -> Tensor:
    """``x Wᵀ`` [M, rows], or ``x W`` [M, cols] if transposed, plus bias and low-rank term.

    Args:
        x: [M, cols], or [M, rows] if transposed; float16, bfloat16 or float32.
        base: W.
        transposed: contract over the rows of W.
        bias: of x's dtype, or ``None``.
        low_rank: a term of rank R, or ``None``.
    """
    config = _fused_config(x, base, transposed, low_rank)
    if config is None:
        return unfused(x, base, transposed, bias, low_rank)
    return fused(x, base, transposed, bias, low_rank, config)


def unfused(
    x: Tensor, base: Base, transposed: bool, bias: Tensor | None, low_rank: LowRank | None
) -> Tensor:
    """The base dequantized, torch's own product, and the low-rank term in one more pass."""
    w = base.dense(x.dtype)
    out = x @ w if transposed else torch.nn.functional.linear(x, w, bias)
    if low_rank is not None:
        finish(out[None], out, None, low_rank)
    return out


def fused(
    x: Tensor,
    base: Base,
    transposed: bool,
    bias: Tensor | None,
    low_rank: LowRank | None,
    config: LinearConfig,
) -> Tensor:
    """Tiles decoded in registers, bias and low-rank term in the epilogue; see :func:`matmul`."""
    from peftkern.triton_kernels import linear

    m, c = x.shape
    o = base.cols if transposed else base.rows
    out = x.new_empty((m, o))
    split = config.split > 1
    target = x.new_empty((config.split, m, o), dtype=torch.float32) if split else out
    nested = base.nested_absmax is not None
    term = _term_arguments(None if split else low_rank)
    stride_row, stride_col = base.weight.stride() if base.format in ("dense", "int8") else (0, 0)
    launch(
        linear._linear_kernel,
        -(-o // config.block_o) * -(-m // config.block_m) * config.split,
        x,
        x,
        base.weight,
        base.absmax,
        base.nested_absmax,
        base.nested_offset,
        table("dynamic_map", x.device) if nested else None,
        None if split else bias,
        *term.pointers,
        target,
        m,
        o,
        c,
        term.rank,
        stride_row,
        stride_col,
        *term.scalars,
        FORMAT=base.format,
        NESTED=nested,
        TRANSPOSED=transposed,
        LOG_BLOCKSIZE=max(base.blocksize, 1).bit_length() - 1,
        HAS_BIAS=bias is not None and not split,
        BLOCK_R=term.block_r,
        PRECISION=term.precision,
        DROPOUT=term.dropout,
        QUADS=o % 4 == 0,
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_O=config.block_o,
        BLOCK_C=config.block_c,
        GROUP=config.group,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    if split:
        finish(target, out, bias, low_rank)
    return out


@dataclass(frozen=True)
class _Term:
    pointers: tuple[Tensor | None, Tensor | None, Tensor | None]
    rank: int
    scalars: tuple[int, int, float, int, float]
    block_r: int
    precision: str
    dropout: bool


def _term_arguments(low_rank: LowRank | None) -> _Term:
    """A low-rank term as kernel arguments: s, up, seed; R; strides and scalars."""
    if low_rank is None:
        return _Term((None, None, None), 0, (0, 0, 0.0, 0, 0.0), 0, "tf32", False)
    rank, dropout = low_rank.s.shape[1], low_rank.dropout
    # More ranks at once cost registers: at 64 the epilogue spills on compute capability 8.0.
    block_r = 16
    precision = "tf32x3" if low_rank.up.dtype == torch.float32 else "tf32"
    stride_o, stride_r = low_rank.up.stride()
    scalars = (stride_o, stride_r, low_rank.scaling, dropout.threshold, dropout.scale)
    pointers = (low_rank.s, low_rank.up, dropout.seed)
    return _Term(pointers, rank, scalars, block_r, precision, dropout.seed is not None)


def finish(parts: Tensor, out: Tensor, bias: Tensor | None, low_rank: LowRank | None) -> None:
    """out = the sum of ``parts`` [P, M, O] in order, plus bias and low-rank term."""
    from peftkern.triton_kernels import linear

    m, o = out.shape
    term = _term_arguments(low_rank)
    block_m, block_o = (16 if m <= 16 else 32), 128
    launch(
        linear._finish_kernel,
        -(-o // block_o) * -(-m // block_m),
        out,
        parts,
        bias,
        *term.pointers,
        out,
        m,
        o,
        term.rank,
        *term.scalars,
        HAS_BIAS=bias is not None,
        BLOCK_R=term.block_r,
        PRECISION=term.precision,
        DROPOUT=term.dropout,
        QUADS=o % 4 == 0,
        PARTS=parts.shape[0],
        BLOCK_M=block_m,
        BLOCK_O=block_o,
        INTERPRET=interpreting(),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )
