"""The bottleneck adapter by Triton on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal
from peftkern.triton_kernels.matmul import Dropout
from peftkern.triton_kernels.passes import add_parts, down_gradient, precision, shrink_parts
from peftkern.tuning.bottleneck import (
    BottleneckConfig,
    bottleneck_config,
    expand_config,
    hidden_gradient_config,
    up_gradient_config,
)


def _entries(scale: Tensor | None) -> int:
    """How a kernel takes the scale: 0 none, 1 one number, 2 one for each output feature."""
    return 0 if scale is None else 1 if scale.numel() == 1 else 2


def _forward_refusal(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
) -> str | None:
    return refusal(x, x.dtype, down_w.dtype)


@implementation("bottleneck_adapter", device="cuda", backend="triton", can_use=_forward_refusal)
def bottleneck_adapter(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """One launch from x to y where the rows fill the GPU; else the bottleneck in parts, then y."""
    from peftkern.triton_kernels import bottleneck_rows

    (m, c), r, n = x.shape, down_w.shape[0], up_w.shape[0]
    dropout = Dropout.of(dropout_p, seed)
    config = bottleneck_config(m, c, n, r, down_w.dtype == torch.float32, False)
    if config is None or 0 in (m, n):
        parts = _few(shrink_parts(x, down_w, Dropout.of(0.0, None)), m)
        weights = (down_b, up_w, up_b, scale)
        return _expand(x, parts, *weights, residual, activation, dropout, up_w.stride())
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
        SCALES=_entries(scale),
        HAS_RESIDUAL=residual is not None,
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
    return out


def _few(parts: Tensor, m: int) -> Tensor:
    """Parts that many programs will read, added up once; few rows leave that to the reader."""
    if parts.shape[0] == 1 or m <= 64:
        return parts
    return add_parts(parts, parts.new_empty(parts.shape[1:]), 1.0)[None]


def _expand(
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
    """Output features from a hidden [P, M, R]; w is [N, R] by ``strides``."""
    from peftkern.triton_kernels import bottleneck

    count, m, r = parts.shape
    n = w.numel() // r
    config = expand_config(m, r, w.dtype == torch.float32)
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
        *strides,
        dropout.threshold,
        dropout.scale,
        ACT=activation,
        HAS_DOWN_BIAS=down_b is not None,
        HAS_BIAS=up_b is not None,
        SCALES=_entries(scale),
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


def _hidden(
    parts: Tensor, down_b: Tensor | None, activation: str, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """z, fp32, and act(z) of dtype ``kind``, [M, R], from the parts of ``x Dᵀ``."""
    from peftkern.triton_kernels import bottleneck

    count, m, r = parts.shape
    z, h = parts.new_empty((m, r)), parts.new_empty((m, r), dtype=kind)
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
        ACT=activation,
        HAS_DOWN_BIAS=down_b is not None,
        PARTS=count,
        BLOCK=1024,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return z, h


def _backward_refusal(
    dy: Tensor,
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
) -> str | None:
    return refusal(x, x.dtype, down_w.dtype)


@implementation(
    "bottleneck_adapter_backward", device="cuda", backend="triton", can_use=_backward_refusal
)
def bottleneck_adapter_backward(
    dy: Tensor,
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """By whole rows where that is faster, else pass by pass; dU and dD in passes of their own."""
    empty = down_w.new_empty(0)
    if not (need_dx or need_dw):
        return x.new_empty(0), empty, empty, empty, empty, empty
    dropout = Dropout.of(dropout_p, seed)
    weights = (down_w, down_b, up_w, scale)
    (m, c), r, n = x.shape, down_w.shape[0], up_w.shape[0]
    config = bottleneck_config(m, c, n, r, down_w.dtype == torch.float32, True)
    if config is None or 0 in (m, n, c):
        h, dz, dx = _by_passes(dy, x, *weights, activation, dropout, add_dy, need_dx)
    else:
        h, dz, dx = _by_rows(dy, x, *weights, activation, dropout, add_dy, need_dx, need_dw, config)
    if not need_dw:
        return dx, empty, empty, empty, empty, empty
    ddown_w = down_gradient(dz, x, down_w, Dropout.of(0.0, None))
    ddown_b = empty if down_b is None else _column_sum(dz, down_b)
    p_parts, q_parts = _up_gradient(dy, h, up_w, dropout)
    dup_w, dup_b, dscale = _finish(p_parts, q_parts, up_w, up_b, scale)
    return dx, ddown_w, ddown_b, dup_w, dup_b, dscale


def _operand_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which products take h: the weights' own where they are 16-bit ones."""
    return x.dtype if precision(x, weight) == "native" else torch.float32


def _by_rows(
    dy: Tensor,
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    scale: Tensor | None,
    activation: str,
    dropout: Dropout,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
    config: BottleneckConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """h, dz and dx in one launch that reads x and dy once from memory."""
    from peftkern.triton_kernels import bottleneck_rows

    (m, c), r, n = x.shape, down_w.shape[0], up_w.shape[0]
    small = (m, r) if need_dw else (0,)
    h = x.new_empty(small, dtype=_operand_dtype(x, up_w))
    dz = x.new_empty(small, dtype=torch.float32)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    launch(
        bottleneck_rows._bottleneck_backward_kernel,
        -(-m // config.block_m),
        x,
        x,
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
        SCALES=_entries(scale),
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


def _by_passes(
    dy: Tensor,
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    scale: Tensor | None,
    activation: str,
    dropout: Dropout,
    add_dy: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, each pass cut so that few rows fill a GPU."""
    from peftkern.triton_kernels import bottleneck

    (m, n), r = dy.shape, down_w.shape[0]
    nothing = Dropout.of(0.0, None)
    z, h = _hidden(shrink_parts(x, down_w, nothing), down_b, activation, _operand_dtype(x, up_w))
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
        SCALES=_entries(scale),
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
        num_warps=4,
    )
    dx = x.new_empty(0)
    if need_dx:
        residual = dy if add_dy else None
        strides = (1, down_w.shape[1])  # D [R, K] seen as [K, R]
        dx = _expand(x, dz[None], None, down_w, None, None, residual, "identity", nothing, strides)
    return h, dz, dx


def _up_gradient(dy: Tensor, h: Tensor, up_w: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
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


def _column_sum(x: Tensor, like: Tensor) -> Tensor:
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


def _finish(
    p_parts: Tensor, q_parts: Tensor, up_w: Tensor, up_b: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dU, db_u and dscale from the parts; empty for what is absent."""
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
        HAS_BIAS=up_b is not None,
        SCALES=_entries(scale),
        BLOCK_N=32,
        BLOCK_R=32,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    if scale is None or by_feature is None:
        return dup_w, dup_b, empty
    if scale.numel() == 1:
        return dup_w, dup_b, _column_sum(by_feature, scale)
    return dup_w, dup_b, by_feature.view(n).to(scale.dtype)
