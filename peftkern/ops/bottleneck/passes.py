"""The bottleneck adapter pass by pass, for weights of any dtype and few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.bottleneck.launches import entries, expand, hidden, operand_dtype
from peftkern.triton_kernels.launch import interpreting, launch
from peftkern.triton_kernels.matmul import Dropout
from peftkern.triton_kernels.passes import add_parts, precision, shrink_parts
from peftkern.tuning.bottleneck import hidden_gradient_config, up_gradient_config


def forward(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout: Dropout,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The bottleneck in parts, then y."""
    parts, z = shrink_parts(x, down_w, Dropout.of(0.0, None)), down_w.new_empty(0)
    if keep:
        z, _ = hidden(parts, down_b, activation, down_w.dtype, None)
        parts, down_b = z[None], None
    else:
        parts = _few(parts, x.shape[0])
    weights = (down_b, up_w, up_b, scale)
    return expand(x, parts, *weights, residual, activation, dropout, up_w.stride()), z


def _few(parts: Tensor, m: int) -> Tensor:
    """Parts that many programs will read, added up once; few rows leave that to the reader."""
    if parts.shape[0] == 1 or m <= 64:
        return parts
    return add_parts(parts, parts.new_empty(parts.shape[1:]), 1.0)[None]


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    scale: Tensor | None,
    activation: str,
    dropout: Dropout,
    add_dy: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """h, dz and dx; each pass is cut so that few rows fill a GPU."""
    from peftkern.triton_kernels import bottleneck

    (m, n), r = dy.shape, down_w.shape[0]
    nothing = Dropout.of(0.0, None)
    parts = shrink_parts(x, down_w, nothing) if z is None else z[None]
    down_b = down_b if z is None else None
    z, h = hidden(parts, down_b, activation, torch.float32, operand_dtype(x, up_w))
    assert h is not None
    config = hidden_gradient_config(m, n, r, up_w.dtype == torch.float32)
    parts = z.new_empty((config.split, m, r))
    launch(
        bottleneck._hidden_gradient_kernel,
        -(-m // config.block_m) * -(-r // config.block_r) * config.split,
        dy,
        dy,
        up_w,
        scale,
        dropout.seed,
        parts,
        m,
        n,
        r,
        dropout.threshold,
        dropout.scale,
        SCALES=entries(scale),
        DROPOUT=dropout.seed is not None,
        QUADS=n % 4 == 0,
        PRECISION=precision(dy, up_w),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    dz = torch.empty_like(z)
    launch(
        bottleneck._middle_kernel,
        -(-m * r // 1024),
        dy,
        parts,
        z,
        dz,
        m * r,
        parts.shape[0],
        ACT=activation,
        BLOCK=1024,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    dx = x.new_empty(0)
    if need_dx:
        residual = dy if add_dy else None
        strides = (1, down_w.shape[1])  # D [R, K] seen as [K, R]
        dx = expand(x, dz[None], None, down_w, None, None, residual, "identity", nothing, strides)
    return h, dz, dx


def up_gradient(dy: Tensor, h: Tensor, up_w: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """Parts of ``gᵀ h`` [S, N, R] and of g's column sums [S, N], in one pass over dy."""
    from peftkern.triton_kernels import bottleneck

    (m, n), r = dy.shape, h.shape[1]
    config = up_gradient_config(m, n, r, up_w.dtype == torch.float32)
    p_parts = dy.new_empty((config.split, n, r), dtype=torch.float32)
    q_parts = p_parts.new_empty((config.split, n))
    launch(
        bottleneck._up_gradient_kernel,
        -(-n // config.block_c) * -(-r // config.block_r) * config.split,
        dy,
        dy,
        h,
        dropout.seed,
        p_parts,
        q_parts,
        m,
        n,
        r,
        dropout.threshold,
        dropout.scale,
        DROPOUT=dropout.seed is not None,
        QUADS=n % 4 == 0,
        PRECISION=precision(dy, up_w),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return p_parts, q_parts
