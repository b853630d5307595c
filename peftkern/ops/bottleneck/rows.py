"""The bottleneck adapter by whole rows: one launch from x to y, one from x and dy to dx."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.bottleneck.launches import entries, operand_dtype
from peftkern.triton_kernels.launch import interpreting, launch
from peftkern.triton_kernels.matmul import Dropout
from peftkern.triton_kernels.passes import precision
from peftkern.tuning.bottleneck import rows_config


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
    """One launch from x to y."""
    from peftkern.triton_kernels import bottleneck_rows

    (m, c), r, n = x.shape, down_w.shape[0], up_w.shape[0]
    config = rows_config(m, c, n, r, down_w.dtype == torch.float32, False)
    z = down_w.new_empty((m, r) if keep else (0,))
    out = x.new_empty((m, n))
    launch(
        bottleneck_rows._bottleneck_kernel,
        -(-m // config.block_m),
        x,
        x,
        down_w,
        down_b,
        up_w,
        up_b,
        scale,
        residual,
        dropout.seed,
        z,
        out,
        m,
        n,
        c,
        r,
        dropout.threshold,
        dropout.scale,
        ACT=activation,
        HAS_DOWN_BIAS=down_b is not None,
        HAS_BIAS=up_b is not None,
        SCALES=entries(scale),
        HAS_RESIDUAL=residual is not None,
        KEEP=keep,
        DROPOUT=dropout.seed is not None,
        QUADS=n % 4 == 0,
        PRECISION=precision(x, down_w),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, z


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
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """h, dz and dx in one launch that reads z or x, and dy, once from memory."""
    from peftkern.triton_kernels import bottleneck_rows

    (m, c), r, n = x.shape, down_w.shape[0], up_w.shape[0]
    config = rows_config(m, c, n, r, down_w.dtype == torch.float32, True)
    small = (m, r) if need_dw else (0,)
    h = x.new_empty(small, dtype=operand_dtype(x, up_w))
    dz = x.new_empty(small, dtype=torch.float32)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    launch(
        bottleneck_rows._bottleneck_backward_kernel,
        -(-m // config.block_m),
        x,
        x,
        z,
        dy,
        down_w,
        down_b,
        up_w,
        scale,
        dropout.seed,
        h,
        dz,
        dx,
        m,
        n,
        c,
        r,
        dropout.threshold,
        dropout.scale,
        ACT=activation,
        HAS_DOWN_BIAS=down_b is not None,
        SCALES=entries(scale),
        HAS_Z=z is not None,
        ADD_DY=add_dy,
        NEED_DX=need_dx,
        NEED_DW=need_dw,
        DROPOUT=dropout.seed is not None,
        QUADS=n % 4 == 0,
        PRECISION=precision(x, down_w),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return h, dz, dx
