"""The bottleneck adapter by whole rows: one launch from x to y, one from x and dy to dx.

A program keeps the bottlenecks of its rows in registers and walks the weights, which all programs
read and the L2 serves. See ``bottleneck.py`` for the formulas.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.activations import activate, slope
from peftkern.triton_kernels.bottleneck import (
    _as_operand,
    _kept_tile,
    _output_tile,
    _residual_tile,
    _scaled_rows,
)
from peftkern.triton_kernels.device import round_to, to_fp32
from peftkern.triton_kernels.low_rank import dot


@triton.jit
def _down(
    x_ptr,
    down_w_ptr,
    down_b_ptr,
    offs_m,
    offs_r,
    M,
    C,
    R,
    HAS_DOWN_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """z = x D^T + b_d, fp32 [BLOCK_M, BLOCK_R]."""
    mask_m, mask_r = offs_m < M, offs_r < R
    z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    rows_x = x_ptr + offs_m.to(tl.int64)[:, None] * C
    for c_0 in range(0, C, BLOCK_C):
        offs_c = c_0 + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        x = tl.load(rows_x + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        d = tl.load(
            down_w_ptr + offs_r.to(tl.int64)[None, :] * C + offs_c[:, None],
            mask=mask_c[:, None] & mask_r[None, :],
            other=0.0,
        )
        z = dot(x, d, z, PRECISION, INTERPRET)
    if HAS_DOWN_BIAS:
        z += to_fp32(tl.load(down_b_ptr + offs_r, mask=mask_r, other=0.0), INTERPRET)[None, :]
    return z


@triton.jit
def _bottleneck_kernel(
    x_ptr,
    down_w_ptr,
    down_b_ptr,
    up_w_ptr,
    up_b_ptr,
    scale_ptr,
    residual_ptr,
    seed_ptr,
    z_ptr,
    out_ptr,
    M,
    N,
    C,
    R,
    threshold,
    keep_scale,
    ACT: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BLOCK_M rows from x to y; R fits into BLOCK_R. A residual that is x comes from the L2."""
    m_0 = tl.program_id(0) * BLOCK_M
    offs_m, offs_r = m_0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    z = _down(
        x_ptr, down_w_ptr, down_b_ptr, offs_m, offs_r, M, C, R, HAS_DOWN_BIAS, PRECISION, BLOCK_M,
        BLOCK_C, BLOCK_R, INTERPRET,
    )  # fmt: skip
    if KEEP:
        small = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        kept = round_to(z, z_ptr.dtype.element_ty, INTERPRET)
        tl.store(z_ptr + small, kept, mask=(offs_m < M)[:, None] & mask_r[None, :])
    h = _as_operand(activate(z, ACT, PRECISION != "native"), up_w_ptr, PRECISION, INTERPRET)
    # Loaded a turn ahead: the sum does not wait for it.
    residual = _residual_tile(residual_ptr, m_0, 0, M, N, HAS_RESIDUAL, BLOCK_M, BLOCK_N)
    for n_0 in range(0, N, BLOCK_N):
        ahead = n_0 + BLOCK_N
        later = _residual_tile(residual_ptr, m_0, ahead, M, N, HAS_RESIDUAL, BLOCK_M, BLOCK_N)
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        u = tl.load(
            up_w_ptr + offs_n.to(tl.int64)[None, :] * R + offs_r[:, None],
            mask=mask_r[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = dot(h, u, acc, PRECISION, INTERPRET)
        _output_tile(
            acc, residual, m_0, n_0, M, N, up_b_ptr, scale_ptr, seed_ptr, out_ptr, threshold,
            keep_scale, HAS_BIAS, SCALES, DROPOUT, QUADS, BLOCK_M, BLOCK_N, INTERPRET,
        )  # fmt: skip
        residual = later


@triton.jit
def _bottleneck_backward_kernel(
    x_ptr,
    z_ptr,
    dy_ptr,
    down_w_ptr,
    down_b_ptr,
    up_w_ptr,
    scale_ptr,
    seed_ptr,
    h_ptr,
    dz_ptr,
    dx_ptr,
    M,
    N,
    C,
    R,
    threshold,
    keep_scale,
    ACT: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_Z: tl.constexpr,
    ADD_DY: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BLOCK_M rows: the bottleneck (again from x), its gradient from dy, then dx = dz D (+ dy).

    h and dz [M, R] are left for the gradients of the weights.
    """
    m_0 = tl.program_id(0) * BLOCK_M
    offs_m, offs_r = m_0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    small = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    mask = (offs_m < M)[:, None] & mask_r[None, :]
    if HAS_Z:
        z = to_fp32(tl.load(z_ptr + small, mask=mask, other=0.0), INTERPRET)
    else:
        z = _down(
            x_ptr, down_w_ptr, down_b_ptr, offs_m, offs_r, M, C, R, HAS_DOWN_BIAS, PRECISION,
            BLOCK_M, BLOCK_C, BLOCK_R, INTERPRET,
        )  # fmt: skip
    dh = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n_0 in range(0, N, BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        g = _kept_tile(
            dy_ptr, offs_m, offs_n, m_0, n_0, M, N, seed_ptr, threshold, keep_scale, DROPOUT, QUADS,
            PRECISION, BLOCK_M, BLOCK_N, INTERPRET,
        )  # fmt: skip
        u = _scaled_rows(up_w_ptr, scale_ptr, offs_n, offs_r, N, R, SCALES, PRECISION, INTERPRET)
        dh = dot(g, u, dh, PRECISION, INTERPRET)
    dz = dh * slope(z, ACT, PRECISION != "native")
    if NEED_DW:
        h = round_to(activate(z, ACT, PRECISION != "native"), h_ptr.dtype.element_ty, INTERPRET)
        tl.store(h_ptr + small, h, mask=mask)
        tl.store(dz_ptr + small, dz, mask=mask)
    if NEED_DX:
        left = _as_operand(dz, down_w_ptr, PRECISION, INTERPRET)
        residual = _residual_tile(dy_ptr, m_0, 0, M, C, ADD_DY, BLOCK_M, BLOCK_N)
        for c_0 in range(0, C, BLOCK_N):
            later = _residual_tile(dy_ptr, m_0, c_0 + BLOCK_N, M, C, ADD_DY, BLOCK_M, BLOCK_N)
            offs_c = c_0 + tl.arange(0, BLOCK_N)
            d = tl.load(
                down_w_ptr + offs_r.to(tl.int64)[:, None] * C + offs_c[None, :],
                mask=mask_r[:, None] & (offs_c < C)[None, :],
                other=0.0,
            )
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            acc = dot(left, d, acc, PRECISION, INTERPRET)
            _output_tile(
                acc, residual, m_0, c_0, M, C, down_w_ptr, down_w_ptr, seed_ptr, dx_ptr, threshold,
                keep_scale, False, 0, False, False, BLOCK_M, BLOCK_N, INTERPRET,
            )  # fmt: skip
            residual = later
