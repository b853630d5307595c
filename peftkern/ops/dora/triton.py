"""DoRA by Triton on an NVIDIA GPU.

The base product is torch's or the fused kernel's, whichever serves the same shape without DoRA; one
pass after it adds the low-rank term, scales the columns and leaves what the backward needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import constant, interpreting, launch, refusal, table
from peftkern.triton_kernels.matmul import Dropout, LowRank, matmul
from peftkern.triton_kernels.passes import (
    add_parts,
    down_gradient,
    gradient_precision,
    precision,
    shrink,
)
from peftkern.tuning.configs import column_config, dora_gradient_config, norm_config

ONE_PASS_RANK = 16  # up to here one pass over dy makes dS and dB
_ONCE_FROM = 64  # rows from which a quantized base that is needed twice is dequantized once


def _forward_refusal(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_u: bool,
) -> str | None:
    return refusal(x, x.dtype, lora_A.dtype)


def _shared(base: Base, rows: int, dtype: torch.dtype) -> Base:
    """The base for two products with ``rows`` rows each."""
    if base.absmax is None or rows < _ONCE_FROM:
        return base
    return Base(base.dense(dtype), None, None, None, "dense", 0, base.rows, base.cols)


@implementation("dora_linear", device="cuda", backend="triton", can_use=_forward_refusal)
def dora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_u: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The base product, then one pass that reads it once and writes y, and u over it if needed."""
    from peftkern.ops.dropout.triton import philox_dropout
    from peftkern.triton_kernels import dora

    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, out_features, x.shape[1])
    dropout = Dropout.of(dropout_p, seed)
    s = shrink(x, lora_A, dropout)
    plain: Tensor | None = None
    if dropout.seed is None:
        v = matmul(x, base)
    else:
        base = _shared(base, x.shape[0], x.dtype)
        plain = matmul(x, base)
        v = matmul(philox_dropout(x, dropout_p, dropout.seed), base)
    m, r = s.shape
    u = v if need_u else x.new_empty(0)
    y = torch.empty_like(v) if need_u else v
    config = column_config(m, lora_B.dtype == torch.float32)
    launch(
        dora._scale_kernel,
        -(-m // config.block_m) * -(-out_features // config.block_c),
        x,
        v,
        plain,
        s,
        lora_B,
        column_scale,
        bias,
        u if need_u else None,
        y,
        m,
        out_features,
        r,
        float(scaling),
        NEED_U=need_u,
        DROPOUT=plain is not None,
        HAS_BIAS=bias is not None,
        PRECISION=gradient_precision(lora_B),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, s, u


def _backward_refusal(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
    need_dscale: bool,
) -> str | None:
    return refusal(x, x.dtype, lora_A.dtype)


@implementation("dora_linear_backward", device="cuda", backend="triton", can_use=_backward_refusal)
def dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
    need_dscale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over dy and u for the scaled dy, dS, dB and dc; then dx, and dA from x."""
    dx, da = x.new_empty(0), lora_A.new_empty(0)
    db, dscale = lora_B.new_empty(0), column_scale.new_empty(0)
    if not (need_dx or need_dab or need_dscale):
        return dx, da, db, dscale
    dropout = Dropout.of(dropout_p, seed)
    less = 0.0 if dropout.seed is None else 1.0
    narrow = lora_B.shape[1] <= ONE_PASS_RANK
    need_ds = need_dx or need_dab
    here = (narrow and need_ds, narrow and need_dab)
    passed = (dy, u, s, lora_B, column_scale, float(scaling), less, need_dx, *here, need_dscale)
    g, ds, db, dscale = _pass_over_dy(*passed)
    if need_ds and not narrow:
        ds, db = _wide_gradients(dy, s, lora_B, column_scale, float(scaling), need_dab)
    if need_dx:
        statistics = (absmax, nested_absmax, nested_offset)
        base = Base(weight, *statistics, format, blocksize, dy.shape[1], x.shape[1])
        if dropout.seed is None:
            term = LowRank(ds, lora_A.t(), 1.0, dropout)
            dx = matmul(g, base, transposed=True, low_rank=term)
        else:
            base = _shared(base, dy.shape[0], dy.dtype)
            plain = matmul(dy, base, transposed=True)
            dx = _masked(plain, matmul(g, base, transposed=True), ds, lora_A, dropout)
    if need_dab:
        da = down_gradient(ds, x, lora_A, dropout)
    return dx, da, db, dscale


def _pass_over_dy(
    dy: Tensor,
    u: Tensor,
    s: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    less: float,
    need_dx: bool,
    need_ds: bool,
    need_db: bool,
    need_dscale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(c - less) dy``, dS fp32 [M, R], dB [N, R] and dc [N]; empty where not needed."""
    from peftkern.triton_kernels import dora

    (m, n), r = dy.shape, lora_B.shape[1]
    if not (need_dx or need_ds or need_db or need_dscale):
        return dy, s.new_empty(0), lora_B.new_empty(0), column_scale.new_empty(0)
    thin = need_ds or need_db
    config = dora_gradient_config(m, n, r if thin else 1, thin and lora_B.dtype == torch.float32)
    tiles_n = -(-n // config.block_c)
    g = torch.empty_like(dy) if need_dx else None
    ds_parts = s.new_empty((tiles_n, m, r)) if need_ds else None
    db_parts = s.new_empty((config.split, n, r)) if need_db else None
    dc_parts = s.new_empty((config.split, n)) if need_dscale else None
    launch(
        dora._dora_gradient_kernel,
        tiles_n * (max(1, -(-r // config.block_r)) if thin else 1) * config.split,
        dy,
        dy,
        u if need_dscale else None,
        column_scale,
        lora_B,
        s,
        g,
        ds_parts,
        db_parts,
        dc_parts,
        m,
        n,
        r if thin else 1,
        less,
        NEED_G=need_dx,
        NEED_DS=need_ds,
        NEED_DB=need_db,
        NEED_DC=need_dscale,
        DS_PRECISION=precision(dy, lora_B),
        DB_PRECISION=gradient_precision(lora_B),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    ds, db = s.new_empty(0), lora_B.new_empty(0)
    dscale = column_scale.new_empty(0)
    if ds_parts is not None:
        ds = add_parts(ds_parts, s.new_empty((m, r)), scaling)
    if db_parts is not None:
        db = add_parts(db_parts, torch.empty_like(lora_B), scaling)
    if dc_parts is not None:
        dscale = add_parts(dc_parts, torch.empty_like(column_scale), 1.0)
    return (dy if g is None else g), ds, db, dscale


def _wide_gradients(
    dy: Tensor, s: Tensor, lora_B: Tensor, column_scale: Tensor, scaling: float, need_db: bool
) -> tuple[Tensor, Tensor]:
    """dS and dB where parts of dS for each tile of dy would be more than dy: dy is read again.

    Columns are scaled in B and in dB, both thin: ``dS = s dy (c B)``, ``dB = s c (dyᵀ S)``.
    """
    nothing = Dropout.of(0.0, None)
    scaled = lora_B * (scaling * column_scale)[:, None]
    ds = shrink(dy, scaled.t().to(lora_B.dtype).contiguous(), nothing)
    if not need_db:
        return ds, lora_B.new_empty(0)
    like = column_scale.new_empty((lora_B.shape[1], lora_B.shape[0]))
    db = down_gradient(s, dy, like, nothing).t() * (scaling * column_scale)[:, None]
    return ds, db.to(lora_B.dtype).contiguous()


def _masked(plain: Tensor, dropped: Tensor, ds: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """``plain + mask(dropped + dS A)``, over ``plain``."""
    from peftkern.triton_kernels import dora

    (m, c), r = plain.shape, lora_A.shape[0]
    config = column_config(m, lora_A.dtype == torch.float32)
    launch(
        dora._masked_gradient_kernel,
        -(-m // config.block_m) * -(-c // config.block_c),
        plain,
        plain,
        dropped,
        ds,
        lora_A,
        dropout.seed,
        plain,
        m,
        c,
        r,
        dropout.threshold,
        dropout.scale,
        QUADS=c % 4 == 0,
        PRECISION=gradient_precision(lora_A),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return plain


def _norm_sq_refusal(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    in_features: int,
) -> str | None:
    return refusal(weight, *([weight.dtype] if format == "dense" else []))


def _stored(base: Base) -> Base:
    """The base as kernels can walk it by rows: 4-bit rows that end inside a run are decoded."""
    if base.format in ("nf4", "fp4") and base.cols % 32:
        dense = base.dense(torch.float32)
        return Base(dense, None, None, None, "dense", 0, base.rows, base.cols)
    return base


def _walk(
    base: Base, block_c: int
) -> tuple[tuple[object, ...], tuple[int, int], dict[str, object]]:
    """Pointers, strides and constants of a kernel that reads the stored base by tiles."""
    nested = base.nested_absmax is not None
    maps = table("dynamic_map", base.weight.device) if nested else None
    pointers = (base.weight, base.absmax, base.nested_absmax, base.nested_offset, maps)
    row, column = base.weight.stride() if base.format in ("dense", "int8") else (0, 0)
    constants: dict[str, object] = {
        "FORMAT": base.format,
        "NESTED": nested,
        "LOG_BLOCKSIZE": max(base.blocksize, 1).bit_length() - 1,
        "GROUP": min(block_c, base.blocksize) if base.blocksize else 0,
        "INTERPRET": interpreting(),
        "enable_fp_fusion": False,  # nested statistics: a rounded multiply, then a rounded add
    }
    return pointers, (row, column), constants


@implementation("weight_norm_sq", device="cuda", backend="triton", can_use=_norm_sq_refusal)
def weight_norm_sq(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """One pass over the stored weight; no dense copy."""
    from peftkern.triton_kernels import dora

    statistics = (absmax, nested_absmax, nested_offset)
    base = _stored(Base(weight, *statistics, format, blocksize, out_features, in_features))
    out = weight.new_empty((out_features,), dtype=torch.float64)
    config = norm_config(out_features, in_features, 16, base.format)
    pointers, strides, constants = _walk(base, config.block_c)
    launch(
        dora._row_squares_kernel,
        -(-out_features // 16),
        weight,
        *pointers,
        out,
        out_features,
        in_features,
        *strides,
        BLOCK_N=16,
        BLOCK_C=config.block_c,
        num_warps=4,
        num_stages=3,
        **constants,
    )
    return out


def _norm_refusal(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    norm_sq: Tensor,
) -> str | None:
    return refusal(weight, lora_A.dtype, *([weight.dtype] if format == "dense" else []))


@implementation("dora_weight_norm", device="cuda", backend="triton", can_use=_norm_refusal)
def dora_weight_norm(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    norm_sq: Tensor,
) -> Tensor:
    """W Aᵀ in one pass over the stored weight; A Aᵀ by torch; three terms in fp64 for each row."""
    from peftkern.triton_kernels import dora

    (r, c), n = lora_A.shape, out_features
    statistics = (absmax, nested_absmax, nested_offset)
    base = _stored(Base(weight, *statistics, format, blocksize, n, c))
    config = norm_config(n, c, r, base.format)
    pointers, strides, constants = _walk(base, config.block_c)
    parts = lora_A.new_empty((config.split, n, r), dtype=torch.float32)
    launch(
        dora._cross_kernel,
        -(-n // config.block_m) * -(-r // config.block_r) * config.split,
        weight,
        *pointers,
        lora_A,
        parts,
        n,
        c,
        r,
        *strides,
        PRECISION=precision(base.weight, lora_A) if base.format == "dense" else "tf32x3",
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **constants,
    )
    wide = lora_A.double()
    gram = wide @ wide.t()
    norm = lora_A.new_empty((n,), dtype=torch.float32)
    launch(
        dora._norm_kernel,
        -(-n // 16),
        weight,
        norm_sq,
        parts,
        lora_B,
        gram,
        constant([float(scaling)], torch.float64, weight.device),
        norm,
        n,
        r,
        config.split,
        BLOCK_N=16,
        BLOCK_R=16 if r <= 16 else 64,
        INTERPRET=interpreting(),
        num_warps=4,
        num_stages=1,
    )
    return norm
