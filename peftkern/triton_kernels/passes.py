"""Launches of the passes that contract with a thin matrix; what several op families share."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.triton_kernels.launch import interpreting, launch
from peftkern.triton_kernels.matmul import Dropout
from peftkern.tuning.configs import adapter_gradient_config, down_gradient_config, shrink_config


def add_parts(parts: Tensor, out: Tensor, scaling: float) -> Tensor:
    """``out = scaling * (parts[0] + parts[1] + ...)`` in a fixed order."""
    from peftkern.triton_kernels import low_rank

    launch(
        low_rank._sum_kernel,
        -(-out.numel() // 256),
        out,
        parts,
        out,
        out.numel(),
        parts.shape[0],
        float(scaling),
        BLOCK=256,
        AHEAD=8,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return out


def precision(x: Tensor, adapter: Tensor) -> str:
    """How the rank products multiply: 16-bit operands as they are, fp32 ones split in three."""
    return "native" if adapter.dtype == x.dtype != torch.float32 else "tf32x3"


def gradient_precision(adapter: Tensor) -> str:
    """The same where one operand is an fp32 S or dS and the result has the adapter's dtype."""
    return "tf32x3" if adapter.dtype == torch.float32 else "tf32"


def shrink_parts(x: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """dropout(x) Aᵀ, fp32 [P, M, R]: long rows in P parts that are still to be added in order."""
    from peftkern.triton_kernels import low_rank

    (m, c), r = x.shape, lora_A.shape[0]
    config = shrink_config(m, c, r)
    parts = x.new_empty((config.split, m, r), dtype=torch.float32)
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
        PRECISION=precision(x, lora_A),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return parts


def shrink(x: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """S = dropout(x) Aᵀ, fp32 [M, R]."""
    parts = shrink_parts(x, lora_A, dropout)
    if parts.shape[0] == 1:
        return parts[0]
    return add_parts(parts, parts.new_empty(parts.shape[1:]), 1.0)


def adapter_gradient(
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
    ds = add_parts(ds_parts, s.new_empty((m, r)), scaling)
    if db_parts is None:
        return ds, lora_B.new_empty(0)
    return ds, add_parts(db_parts, torch.empty_like(lora_B), scaling)


def down_gradient(ds: Tensor, x: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
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
        PRECISION=gradient_precision(lora_A),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return add_parts(parts, torch.empty_like(lora_A), 1.0)
