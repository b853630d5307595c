"""Passes of the bottleneck adapter and its gradient; ``bottleneck_rows`` has those for many rows.

``y = mask(scale (act(x D^T + b_d) U^T + b_u)) + residual``. The backward recomputes the bottleneck.
Long sums are cut into parts that are added in fixed order; there are no atomics.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.activations import activate, slope
from peftkern.triton_kernels.device import keep_tile, round_to, to_fp32
from peftkern.triton_kernels.low_rank import dot
from peftkern.triton_kernels.parts import store_parts


@triton.jit
def _as_operand(value, like_ptr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 values as the products take them: rounded where the other operand has 16 bits."""
    if PRECISION == "native":
        return round_to(value, like_ptr.dtype.element_ty, INTERPRET)
    else:
        return value


@triton.jit
def _residual_tile(
    residual_ptr,
    m_0,
    n_0,
    M,
    N,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the residual, zero outside; one zero where there is none."""
    if HAS_RESIDUAL:
        offs_m, offs_n = m_0 + tl.arange(0, BLOCK_M), n_0 + tl.arange(0, BLOCK_N)
        offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        return tl.load(residual_ptr + offsets, mask=mask, other=0.0)
    else:
        return tl.zeros([1, 1], tl.float32)


@triton.jit
def _output_tile(
    acc,
    residual,
    m_0,
    n_0,
    M,
    N,
    up_b_ptr,
    scale_ptr,
    seed_ptr,
    out_ptr,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    SCALES: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Bias, scale, mask and residual on a tile [BLOCK_M, BLOCK_N] of ``h U^T``; then stored."""
    offs_m, offs_n = m_0 + tl.arange(0, BLOCK_M), n_0 + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    if HAS_BIAS:
        acc += to_fp32(tl.load(up_b_ptr + offs_n, mask=mask_n, other=0.0), INTERPRET)[None, :]
    if SCALES == 1:
        acc *= to_fp32(tl.load(scale_ptr), INTERPRET)
    if SCALES > 1:
        acc *= to_fp32(tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0), INTERPRET)[None, :]
    if DROPOUT:
        keep = keep_tile(m_0, n_0, N, seed_ptr, threshold, BLOCK_M, BLOCK_N, QUADS)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    acc += to_fp32(residual, INTERPRET)
    tl.store(out_ptr + offsets, round_to(acc, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def _expand_kernel(
    parts_ptr,
    down_b_ptr,
    w_ptr,
    up_b_ptr,
    scale_ptr,
    residual_ptr,
    seed_ptr,
    out_ptr,
    M,
    N,
    R,
    stride_part,
    stride_row,
    stride_n,
    stride_r,
    threshold,
    keep_scale,
    ACT: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of out from the sum of PARTS [M, R]: the second half of an adapter.

    With W = D^T and no activation it is ``dx = dz D + residual``.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    m_0 = (tl.program_id(0) // tiles_n) * BLOCK_M
    n_0 = (tl.program_id(0) % tiles_n) * BLOCK_N
    offs_m, offs_n = m_0 + tl.arange(0, BLOCK_M), n_0 + tl.arange(0, BLOCK_N)
    residual = _residual_tile(residual_ptr, m_0, n_0, M, N, HAS_RESIDUAL, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r_0 in range(0, R, BLOCK_R):
        offs_r = r_0 + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        mask_mr = (offs_m < M)[:, None] & mask_r[None, :]
        z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for part in tl.static_range(PARTS):
            rows = parts_ptr + part * stride_part + offs_m.to(tl.int64)[:, None] * stride_row
            z += to_fp32(tl.load(rows + offs_r[None, :], mask=mask_mr, other=0.0), INTERPRET)
        if HAS_DOWN_BIAS:
            z += to_fp32(tl.load(down_b_ptr + offs_r, mask=mask_r, other=0.0), INTERPRET)[None, :]
        w = tl.load(
            w_ptr + offs_n.to(tl.int64)[None, :] * stride_n + offs_r[:, None] * stride_r,
            mask=mask_r[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )
        h = _as_operand(activate(z, ACT, PRECISION != "native"), w_ptr, PRECISION, INTERPRET)
        acc = dot(h, w, acc, PRECISION, INTERPRET)
    _output_tile(
        acc, residual, m_0, n_0, M, N, up_b_ptr, scale_ptr, seed_ptr, out_ptr, threshold,
        keep_scale, HAS_BIAS, SCALES, DROPOUT, QUADS, BLOCK_M, BLOCK_N, INTERPRET,
    )  # fmt: skip


@triton.jit
def _hidden_kernel(
    parts_ptr,
    down_b_ptr,
    z_ptr,
    h_ptr,
    numel,
    R,
    stride_part,
    stride_row,
    ACT: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    NEED_H: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """z [M, R], the sum of its parts and the bias, and where needed h = act(z)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    z = tl.zeros([BLOCK], tl.float32)
    pointers = parts_ptr + offs // R * stride_row + offs % R
    for part in tl.static_range(PARTS):
        z += to_fp32(tl.load(pointers + part * stride_part, mask=mask, other=0.0), INTERPRET)
    if HAS_DOWN_BIAS:
        z += to_fp32(tl.load(down_b_ptr + offs % R, mask=mask, other=0.0), INTERPRET)
    z = round_to(z, z_ptr.dtype.element_ty, INTERPRET)
    tl.store(z_ptr + offs, z, mask=mask)
    if NEED_H:
        h = activate(to_fp32(z, INTERPRET), ACT, True)
        tl.store(h_ptr + offs, round_to(h, h_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def _kept_tile(
    dy_ptr,
    offs_m,
    offs_n,
    m_0,
    n_0,
    M,
    N,
    seed_ptr,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """g = mask(dy): a tile [BLOCK_M, BLOCK_N] as the products take it."""
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    g = tl.load(dy_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    if DROPOUT:
        keep = keep_tile(m_0, n_0, N, seed_ptr, threshold, BLOCK_M, BLOCK_N, QUADS)
        kept = tl.where(keep, to_fp32(g, INTERPRET) * keep_scale, 0.0)
        g = _as_operand(kept, dy_ptr, PRECISION, INTERPRET)
    return g


@triton.jit
def _scaled_rows(
    up_w_ptr,
    scale_ptr,
    offs_n,
    offs_r,
    N,
    R,
    SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """scale U: rows ``offs_n`` of [N, R]."""
    mask_n = offs_n < N
    u = tl.load(
        up_w_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :],
        mask=mask_n[:, None] & (offs_r < R)[None, :],
        other=0.0,
    )
    if SCALES == 1:
        u = _scaled(u, to_fp32(tl.load(scale_ptr), INTERPRET), PRECISION, INTERPRET)
    if SCALES > 1:
        factor = to_fp32(tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0), INTERPRET)
        u = _scaled(u, factor[:, None], PRECISION, INTERPRET)
    return u


@triton.jit
def _hidden_gradient_kernel(
    dy_ptr,
    up_w_ptr,
    scale_ptr,
    seed_ptr,
    parts_ptr,
    M,
    N,
    R,
    threshold,
    keep_scale,
    SCALES: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """parts[p, m, r] = (scale g) U over range p of the output features."""
    pid = tl.program_id(0)
    tiles_m, tiles_r = tl.cdiv(M, BLOCK_M), tl.cdiv(R, BLOCK_R)
    part = pid // (tiles_m * tiles_r)
    m_0 = ((pid // tiles_r) % tiles_m) * BLOCK_M
    offs_r = (pid % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    steps = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLIT)
    begin = part * steps * BLOCK_N
    dh = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n_0 in range(begin, tl.minimum(begin + steps * BLOCK_N, N), BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        g = _kept_tile(
            dy_ptr, offs_m, offs_n, m_0, n_0, M, N, seed_ptr, threshold, keep_scale, DROPOUT, QUADS,
            PRECISION, BLOCK_M, BLOCK_N, INTERPRET,
        )  # fmt: skip
        u = _scaled_rows(up_w_ptr, scale_ptr, offs_n, offs_r, N, R, SCALES, PRECISION, INTERPRET)
        dh = dot(g, u, dh, PRECISION, INTERPRET)
    rows = parts_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * R
    tl.store(rows + offs_r[None, :], dh, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


@triton.jit
def _up_gradient_kernel(
    dy_ptr,
    h_ptr,
    seed_ptr,
    p_parts_ptr,
    q_parts_ptr,
    M,
    N,
    R,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """p_parts[range of m, n, r] = g^T h and q_parts[range of m, n] = g summed over the rows."""
    pid = tl.program_id(0)
    tiles_n, tiles_r = tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_R)
    part = pid // (tiles_n * tiles_r)
    n_0 = ((pid // tiles_r) % tiles_n) * BLOCK_N
    tile_r = pid % tiles_r
    offs_r, offs_n = tile_r * BLOCK_R + tl.arange(0, BLOCK_R), n_0 + tl.arange(0, BLOCK_N)
    mask_n, mask_r = offs_n < N, offs_r < R
    p = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    q = tl.zeros([BLOCK_N], tl.float32)
    steps = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT)
    begin = part * steps * BLOCK_M
    for m_0 in range(begin, tl.minimum(begin + steps * BLOCK_M, M), BLOCK_M):
        offs_m = m_0 + tl.arange(0, BLOCK_M)
        g = _kept_tile(
            dy_ptr, offs_m, offs_n, m_0, n_0, M, N, seed_ptr, threshold, keep_scale, DROPOUT, QUADS,
            PRECISION, BLOCK_M, BLOCK_N, INTERPRET,
        )  # fmt: skip
        h = tl.load(
            h_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :],
            mask=(offs_m < M)[:, None] & mask_r[None, :],
            other=0.0,
        )
        p = dot(tl.trans(g), h, p, PRECISION, INTERPRET)
        q += tl.sum(to_fp32(g, INTERPRET), axis=0)
    rows = part.to(tl.int64) * N + offs_n
    tl.store(
        p_parts_ptr + rows[:, None] * R + offs_r[None, :],
        p,
        mask=mask_n[:, None] & mask_r[None, :],
    )
    tl.store(q_parts_ptr + rows, q, mask=mask_n & (tile_r == 0))


@triton.jit
def _scaled(u, factor, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """u times scale; rounded back where the products take 16 bits."""
    value = to_fp32(u, INTERPRET) * factor
    if PRECISION == "native":
        return round_to(value, u.dtype, INTERPRET)
    else:
        return value


@triton.jit
def _middle_kernel(
    dh_parts_ptr,
    z_ptr,
    dz_ptr,
    numel,
    parts,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dz = act'(z) times the sum of the parts of dh, in order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    dh = tl.zeros([BLOCK], tl.float32)
    pointers = dh_parts_ptr + offs
    for _ in range(parts):
        dh += tl.load(pointers, mask=mask, other=0.0)
        pointers += numel
    z = to_fp32(tl.load(z_ptr + offs, mask=mask, other=0.0), INTERPRET)
    tl.store(dz_ptr + offs, dh * slope(z, ACT, True), mask=mask)


@triton.jit
def _turn_kernel(
    dh_ptr,
    z_ptr,
    h_ptr,
    dz_ptr,
    M,
    R,
    COLUMNS,
    ACT: tl.constexpr,
    PARTS: tl.constexpr,
    NEED_H: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """What products by a library take: h = act(z) [M, PARTS R + 8] and dz [M, PARTS R], in parts.

    dh [M, PARTS R] is to be added up. The columns behind h are 1, 0, ...: with them a product with
    h sums its other operand as well.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows, cols = offs // COLUMNS, offs % COLUMNS  # COLUMNS: R and the eight behind
    inside = rows < M
    mask = inside & (cols < R)
    z = to_fp32(tl.load(z_ptr + rows * R + cols, mask=mask, other=0.0), INTERPRET)
    dh = tl.zeros([BLOCK], tl.float32)
    wide = rows * (PARTS * R) + cols
    for part in tl.static_range(PARTS):
        dh += to_fp32(tl.load(dh_ptr + wide + part * R, mask=mask, other=0.0), INTERPRET)
    store_parts(dz_ptr + wide, dh * slope(z, ACT, True), mask, R, PARTS, INTERPRET)
    if NEED_H:
        h_ptr += rows * (PARTS * R + 8) + cols
        store_parts(h_ptr, activate(z, ACT, True), mask, R, PARTS, INTERPRET)
        one = round_to(tl.where(cols == R, 1.0, 0.0), h_ptr.dtype.element_ty, INTERPRET)
        tl.store(h_ptr + (PARTS - 1) * R, one, mask=inside & (cols >= R))


@triton.jit
def _up_finish_kernel(
    p_parts_ptr,
    q_parts_ptr,
    up_w_ptr,
    up_b_ptr,
    scale_ptr,
    dup_w_ptr,
    dup_b_ptr,
    dscale_ptr,
    N,
    R,
    parts,
    stride_part,
    stride_row,
    q_parts,
    stride_q_part,
    stride_q_row,
    HAS_BIAS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dU = scale p, db_u = scale q, and per output feature dscale = sum(U p) + b_u q."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    q = tl.zeros([BLOCK_N], tl.float32)
    rows_q = q_parts_ptr + offs_n.to(tl.int64) * stride_q_row
    for part in range(q_parts):
        q += tl.load(rows_q + part * stride_q_part, mask=mask_n, other=0.0)
    factor = tl.full([BLOCK_N], 1.0, tl.float32)
    if SCALES == 1:
        factor *= to_fp32(tl.load(scale_ptr), INTERPRET)
    if SCALES > 1:
        factor *= to_fp32(tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0), INTERPRET)
    dscale = tl.zeros([BLOCK_N], tl.float32)
    rows = offs_n.to(tl.int64)[:, None] * R
    for r_0 in range(0, R, BLOCK_R):
        offs_r = r_0 + tl.arange(0, BLOCK_R)
        mask = mask_n[:, None] & (offs_r < R)[None, :]
        p = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        pointers = p_parts_ptr + offs_n.to(tl.int64)[:, None] * stride_row + offs_r[None, :]
        for _ in range(parts):
            p += tl.load(pointers, mask=mask, other=0.0)
            pointers += stride_part
        value = round_to(p * factor[:, None], dup_w_ptr.dtype.element_ty, INTERPRET)
        tl.store(dup_w_ptr + rows + offs_r[None, :], value, mask=mask)
        if SCALES > 0:
            u = tl.load(up_w_ptr + rows + offs_r[None, :], mask=mask, other=0.0)
            dscale += tl.sum(p * to_fp32(u, INTERPRET), axis=1)
    if HAS_BIAS:
        value = round_to(q * factor, dup_b_ptr.dtype.element_ty, INTERPRET)
        tl.store(dup_b_ptr + offs_n, value, mask=mask_n)
        if SCALES > 0:
            dscale += q * to_fp32(tl.load(up_b_ptr + offs_n, mask=mask_n, other=0.0), INTERPRET)
    if SCALES > 0:
        tl.store(dscale_ptr + offs_n, dscale, mask=mask_n)


@triton.jit
def _column_sum_kernel(
    x_ptr,
    out_ptr,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[n] = sum over m of fp32 x[m, n]: BLOCK_M interleaved sums, then those."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m_0 in range(0, M, BLOCK_M):
        offs_m = m_0 + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        rows = x_ptr + offs_m.to(tl.int64)[:, None] * N
        acc += tl.load(rows + offs_n[None, :], mask=mask, other=0.0)
    value = round_to(tl.sum(acc, axis=0), out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + offs_n, value, mask=offs_n < N)
