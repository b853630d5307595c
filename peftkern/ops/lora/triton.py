"""Linear with a low-rank term by Triton on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal
from peftkern.triton_kernels.matmul import Base, Dropout, LowRank, matmul
from peftkern.tuning.configs import adapter_gradient_config, down_gradient_config, shrink_config


def _sum(parts: Tensor, out: Tensor, scaling: float) -> Tensor:
    """``out = scaling * (parts[0] + parts[1] + ...)`` in this order."""
    from peftkern.triton_kernels import low_rank

    launch(
        low_rank._sum_kernel,
        -(-out.numel() // 1024),
        out,
        parts,
        out,
        out.numel(),
        parts.shape[0],
        float(scaling),
        BLOCK=1024,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return out


def _precision(x: Tensor, adapter: Tensor) -> str:
    """How the rank products multiply: 16-bit operands as they are, fp32 ones split in three."""
    return "native" if adapter.dtype == x.dtype != torch.float32 else "tf32x3"


def _gradient_precision(adapter: Tensor) -> str:
    """The same where one operand is an fp32 S or dS and the result has the adapter's dtype."""
    return "tf32x3" if adapter.dtype == torch.float32 else "tf32"


def _shrink(x: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """S = dropout(x) Aᵀ, fp32 [M, R]; long rows in parts, summed in fixed order."""
    from peftkern.triton_kernels import low_rank

    (m, c), r = x.shape, lora_A.shape[0]
    config = shrink_config(m, c, r)
    s = x.new_empty((m, r), dtype=torch.float32)
    parts = s[None] if config.split == 1 else s.new_empty((config.split, m, r))
    launch(
        low_rank._shrink_kernel,
        -(-m // config.block_m) * -(-r // config.block_r) * config.split,
        x,
        x,
        lora_A,
        dropout.seed,
        parts,
        m,
        c,
        r,
        dropout.threshold,
        dropout.scale,
        DROPOUT=dropout.seed is not None,
        QUADS=c % 4 == 0,
        PRECISION=_precision(x, lora_A),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return s if config.split == 1 else _sum(parts, s, 1.0)


def _adapter_gradient(
    dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float, need_db: bool
) -> tuple[Tensor, Tensor]:
    """dS = scaling dy B, fp32 [M, R], and dB = scaling dyᵀ S [N, R], in one pass over dy."""
    from peftkern.triton_kernels import low_rank

    (m, n), r = dy.shape, lora_B.shape[1]
    config = adapter_gradient_config(m, n, r)
    tiles_n = -(-n // config.block_c)
    ds_parts = s.new_empty((tiles_n, m, r))
    db_parts = s.new_empty((config.split, n, r)) if need_db else None
    launch(
        low_rank._adapter_gradient_kernel,
        tiles_n * -(-r // config.block_r) * config.split,
        dy,
        dy,
        lora_B,
        s,
        ds_parts,
        db_parts,
        m,
        n,
        r,
        NEED_DB=need_db,
        DS_PRECISION=_precision(dy, lora_B),
        DB_PRECISION=_gradient_precision(lora_B),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    ds = _sum(ds_parts, s.new_empty((m, r)), scaling)
    if db_parts is None:
        return ds, lora_B.new_empty(0)
    return ds, _sum(db_parts, torch.empty_like(lora_B), scaling)


def _down_gradient(ds: Tensor, x: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """dA = dSᵀ dropout(x), [R, K]; many rows in parts, summed in fixed order."""
    from peftkern.triton_kernels import low_rank

    (m, c), r = x.shape, lora_A.shape[0]
    config = down_gradient_config(m, c, r)
    parts = ds.new_empty((config.split, r, c))
    launch(
        low_rank._down_gradient_kernel,
        -(-c // config.block_c) * -(-r // config.block_r) * config.split,
        x,
        ds,
        x,
        dropout.seed,
        parts,
        m,
        c,
        r,
        dropout.threshold,
        dropout.scale,
        DROPOUT=dropout.seed is not None,
        QUADS=c % 4 == 0,
        PRECISION=_gradient_precision(lora_A),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return _sum(parts, torch.empty_like(lora_A), 1.0)


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
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> str | None:
    return refusal(x, x.dtype, lora_A.dtype)


@implementation("lora_linear", device="cuda", backend="triton", can_use=_forward_refusal)
def lora_linear(
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
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S in a pass of its own; S Bᵀ in the epilogue of the base matmul, or one pass after cuBLAS."""
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, out_features, x.shape[1])
    s = _shrink(x, lora_A, Dropout.of(dropout_p, seed))
    term = LowRank(s, lora_B, float(scaling), Dropout.of(0.0, None))
    return matmul(x, base, bias=bias, low_rank=term), s


def _backward_refusal(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> str | None:
    return refusal(x, x.dtype, lora_A.dtype)


@implementation("lora_linear_backward", device="cuda", backend="triton", can_use=_backward_refusal)
def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS and dB in one pass over dy; mask(dS A) in the epilogue of dx; the mask is drawn again."""
    dx, da, db = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if not (need_dx or need_dab):
        return dx, da, db
    dropout = Dropout.of(dropout_p, seed)
    ds, db = _adapter_gradient(dy, s, lora_B, scaling, need_dab)
    if need_dx:
        statistics = (absmax, nested_absmax, nested_offset)
        base = Base(weight, *statistics, format, blocksize, dy.shape[1], x.shape[1])
        dx = matmul(dy, base, transposed=True, low_rank=LowRank(ds, lora_A.t(), 1.0, dropout))
    if need_dab:
        da = _down_gradient(ds, x, lora_A, dropout)
    return dx, da, db
