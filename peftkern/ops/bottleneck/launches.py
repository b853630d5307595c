"""Launches that several ways of the bottleneck adapter share."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.triton_kernels.launch import interpreting, launch
from peftkern.triton_kernels.matmul import Dropout
from peftkern.triton_kernels.passes import precision
from peftkern.tuning.bottleneck import expand_config


def entries(scale: Tensor | None) -> int:
    """How a kernel takes the scale: 0 none, 1 one number, 2 one for each output feature."""
    return 0 if scale is None else 1 if scale.numel() == 1 else 2


def operand_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which products take h: the weights' own where they are 16-bit ones."""
    return x.dtype if precision(x, weight) == "native" else torch.float32


def expand(
    like: Tensor,
    parts: Tensor,
    down_b: Tensor | None,
    w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout: Dropout,
    strides: tuple[int, ...],
) -> Tensor:
    """Output features from a hidden [P, M, R] with rows of stride 1; w is [N, R] by ``strides``."""
    from peftkern.triton_kernels import bottleneck

    count, m, r = parts.shape
    n = w.numel() // r
    config = expand_config(m, n, r, w.dtype == torch.float32)
    out = like.new_empty((m, n))
    launch(
        bottleneck._expand_kernel,
        -(-m // config.block_m) * -(-n // config.block_c),
        like,
        parts,
        down_b,
        w,
        up_b,
        scale,
        residual,
        dropout.seed,
        out,
        m,
        n,
        r,
        parts.stride(0),
        parts.stride(1),
        *strides,
        dropout.threshold,
        dropout.scale,
        ACT=activation,
        HAS_DOWN_BIAS=down_b is not None,
        HAS_BIAS=up_b is not None,
        SCALES=entries(scale),
        HAS_RESIDUAL=residual is not None,
        DROPOUT=dropout.seed is not None,
        QUADS=n % 4 == 0,
        PRECISION=precision(like, w),
        PARTS=count,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_c,
        BLOCK_R=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def hidden(
    parts: Tensor,
    down_b: Tensor | None,
    activation: str,
    z_dtype: torch.dtype,
    h_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """z and, where a dtype is given, act(z), [M, R], from the parts [P, M, R] of ``x Dᵀ``."""
    from peftkern.triton_kernels import bottleneck

    count, m, r = parts.shape
    z = parts.new_empty((m, r), dtype=z_dtype)
    h = None if h_dtype is None else parts.new_empty((m, r), dtype=h_dtype)
    launch(
        bottleneck._hidden_kernel,
        -(-m * r // 1024),
        parts,
        parts,
        down_b,
        z,
        h,
        m * r,
        r,
        parts.stride(0),
        parts.stride(1),
        ACT=activation,
        HAS_DOWN_BIAS=down_b is not None,
        PARTS=count,
        NEED_H=h is not None,
        BLOCK=1024,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return z, h


def column_sum(x: Tensor, like: Tensor) -> Tensor:
    """The sums of the columns of fp32 x [M, N] in ``like``'s dtype."""
    from peftkern.triton_kernels import bottleneck

    out = torch.empty_like(like)
    launch(
        bottleneck._column_sum_kernel,
        -(-x.shape[1] // 16),
        x,
        x,
        out,
        *x.shape,
        BLOCK_M=128,
        BLOCK_N=16,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return out


def finish(
    p_parts: Tensor, q_parts: Tensor, up_w: Tensor, up_b: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dU, db_u and dscale from parts [S, N, R] and [S, N]; empty for what is absent."""
    from peftkern.triton_kernels import bottleneck

    (n, r), empty = up_w.shape, up_w.new_empty(0)
    dup_w = torch.empty_like(up_w)
    dup_b = empty if up_b is None else torch.empty_like(up_b)
    by_feature = p_parts.new_empty((n, 1)) if scale is not None else None
    launch(
        bottleneck._up_finish_kernel,
        -(-n // 32),
        up_w,
        p_parts,
        q_parts,
        up_w,
        up_b,
        scale,
        dup_w,
        dup_b,
        by_feature,
        n,
        r,
        p_parts.shape[0],
        *p_parts.stride()[:2],
        q_parts.shape[0],
        *q_parts.stride(),
        HAS_BIAS=up_b is not None,
        SCALES=entries(scale),
        BLOCK_N=32,
        BLOCK_R=32,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    if scale is None or by_feature is None:
        return dup_w, dup_b, empty
    if scale.numel() == 1:
        return dup_w, dup_b, column_sum(by_feature, scale)
    return dup_w, dup_b, by_feature.view(n).to(scale.dtype)
