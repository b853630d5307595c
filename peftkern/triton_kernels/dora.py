"""DoRA: row norms of ``W + s B A`` from the stored base, and the passes that scale its columns.

``u = v + s S B^T`` with ``v = dropout(x) W^T``; ``y = c u + b + (x W^T - v)``, where ``c`` is the
magnitude over the norm. Sums that may cancel are fp64; parts are added in fixed order.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.device import keep_tile, round_to, to_fp32, weight_tile
from peftkern.triton_kernels.low_rank import dot


@triton.jit
def _row_squares_kernel(
    weight_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    out_ptr,
    N,
    C,
    stride_row,
    stride_col,
    FORMAT: tl.constexpr,
    NESTED: tl.constexpr,
    LOG_BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[n] = sum over c of w[n, c]^2, fp64; w as stored, a quantized one decoded to fp32."""
    n_0 = tl.program_id(0) * BLOCK_N
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty if FORMAT == "dense" else tl.float32
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    for c_0 in range(0, C, BLOCK_C):
        w = weight_tile(
            weight_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, n_0, c_0, N, C, stride_row,
            stride_col, FORMAT, NESTED, LOG_BLOCKSIZE, GROUP, BLOCK_N, BLOCK_C, DTYPE, INTERPRET,
        )  # fmt: skip
        w = to_fp32(w, INTERPRET).to(tl.float64)
        acc += w * w
    offs_n = n_0 + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + offs_n, tl.sum(acc, axis=1), mask=offs_n < N)


@triton.jit
def _cross_kernel(
    weight_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    a_ptr,
    parts_ptr,
    N,
    C,
    R,
    stride_row,
    stride_col,
    FORMAT: tl.constexpr,
    NESTED: tl.constexpr,
    LOG_BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """parts[p, n, r] = sum over range p of the columns of w[n, c] A[r, c], fp32."""
    pid = tl.program_id(0)
    tiles_n, tiles_r = tl.cdiv(N, BLOCK_M), tl.cdiv(R, BLOCK_R)
    part = pid // (tiles_n * tiles_r)
    n_0 = ((pid // tiles_r) % tiles_n) * BLOCK_M
    offs_r = (pid % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty if FORMAT == "dense" else tl.float32
    steps = tl.cdiv(tl.cdiv(C, BLOCK_C), SPLIT)
    begin = part * steps * BLOCK_C
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    rows_a = a_ptr + offs_r.to(tl.int64)[None, :] * C
    for c_0 in range(begin, tl.minimum(begin + steps * BLOCK_C, C), BLOCK_C):
        offs_c = c_0 + tl.arange(0, BLOCK_C)
        w = weight_tile(
            weight_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, n_0, c_0, N, C, stride_row,
            stride_col, FORMAT, NESTED, LOG_BLOCKSIZE, GROUP, BLOCK_M, BLOCK_C, DTYPE, INTERPRET,
        )  # fmt: skip
        mask = (offs_c < C)[:, None] & mask_r[None, :]
        a = tl.load(rows_a + offs_c[:, None], mask=mask, other=0.0)
        acc = dot(w, a, acc, PRECISION, INTERPRET)
    offs_n = n_0 + tl.arange(0, BLOCK_M)
    rows_out = parts_ptr + (part.to(tl.int64) * N + offs_n)[:, None] * R
    tl.store(rows_out + offs_r[None, :], acc, mask=(offs_n < N)[:, None] & mask_r[None, :])


@triton.jit
def _norm_kernel(
    norm_sq_ptr,
    parts_ptr,
    b_ptr,
    gram_ptr,
    scaling_ptr,
    out_ptr,
    N,
    R,
    parts,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out = sqrt(norm_sq + 2 s (W A^T).B + s^2 (B A A^T).B) for each row, summed in fp64."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = offs_n.to(tl.int64) * R
    total = tl.zeros([BLOCK_N], tl.float64)
    factor = tl.load(scaling_ptr)
    for r_0 in range(0, R, BLOCK_R):
        offs_r = r_0 + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        mask = mask_n[:, None] & mask_r[None, :]
        offsets = rows[:, None] + offs_r[None, :]
        cross = tl.zeros([BLOCK_N, BLOCK_R], tl.float64)
        pointers = parts_ptr + offsets
        for _ in range(parts):
            cross += tl.load(pointers, mask=mask, other=0.0).to(tl.float64)
            pointers += tl.cast(N, tl.int64) * R
        square = tl.zeros([BLOCK_N, BLOCK_R], tl.float64)
        for q in range(R):
            own = tl.load(b_ptr + rows + q, mask=mask_n, other=0.0)
            g = tl.load(gram_ptr + q * R + offs_r, mask=mask_r, other=0.0)
            square += to_fp32(own, INTERPRET).to(tl.float64)[:, None] * g[None, :]
        b = to_fp32(tl.load(b_ptr + offsets, mask=mask, other=0.0), INTERPRET).to(tl.float64)
        total += tl.sum(b * factor * (2.0 * cross + factor * square), axis=1)
    total += tl.load(norm_sq_ptr + offs_n, mask=mask_n, other=0.0)
    norm = tl.sqrt(tl.maximum(total, 0.0))
    tl.store(out_ptr + offs_n, norm.to(tl.float32), mask=mask_n)


@triton.jit
def _low_rank_tile(
    s_ptr,
    b_ptr,
    offs_m,
    offs_n,
    M,
    N,
    R,
    stride_bn,
    stride_br,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """S B^T, fp32 [BLOCK_M, BLOCK_N]; S fp32 [M, R], B [N, R] by its strides."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r_0 in range(0, R, BLOCK_R):
        offs_r = r_0 + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        s = tl.load(
            s_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :],
            mask=(offs_m < M)[:, None] & mask_r[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + offs_n.to(tl.int64)[None, :] * stride_bn + offs_r[:, None] * stride_br,
            mask=mask_r[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )
        acc = dot(s, b, acc, PRECISION, INTERPRET)
    return acc


@triton.jit
def _scale_kernel(
    v_ptr,
    plain_ptr,
    s_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    u_ptr,
    y_ptr,
    M,
    N,
    R,
    scaling,
    NEED_U: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """u = v + s S B^T and y = c u + bias (+ plain - v under dropout); u or y may lie over v."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    v = to_fp32(tl.load(v_ptr + offsets, mask=mask, other=0.0), INTERPRET)
    low = _low_rank_tile(
        s_ptr, b_ptr, offs_m, offs_n, M, N, R, R, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, INTERPRET
    )
    u = v + scaling * low
    y = u * tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        y += to_fp32(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0), INTERPRET)[None, :]
    if DROPOUT:
        y += to_fp32(tl.load(plain_ptr + offsets, mask=mask, other=0.0), INTERPRET) - v
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    if NEED_U:
        tl.store(u_ptr + offsets, round_to(u, DTYPE, INTERPRET), mask=mask)
    tl.store(y_ptr + offsets, round_to(y, DTYPE, INTERPRET), mask=mask)


@triton.jit
def _dora_gradient_kernel(
    dy_ptr,
    u_ptr,
    scale_ptr,
    b_ptr,
    s_ptr,
    g_ptr,
    ds_parts_ptr,
    db_parts_ptr,
    dc_parts_ptr,
    M,
    N,
    R,
    less,
    NEED_G: tl.constexpr,
    NEED_DS: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DC: tl.constexpr,
    DS_PRECISION: tl.constexpr,
    DB_PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One read of dy (and u) for g = (c - less) dy and parts of three sums.

    ds_parts[n tile, m, r] = (c dy) B; db_parts[range of m, n, r] = (c dy)^T S; dc_parts: dy u.
    """
    pid = tl.program_id(0)
    tiles_n, tiles_r = tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_R)
    part = pid // (tiles_n * tiles_r)
    tile_n = (pid // tiles_r) % tiles_n
    first_ranks = pid % tiles_r == 0
    offs_r = (pid % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, mask_r = offs_n < N, offs_r < R
    mask_nr = mask_n[:, None] & mask_r[None, :]
    scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    if NEED_DS:
        rows_b = b_ptr + offs_n.to(tl.int64)[:, None] * R
        b = tl.load(rows_b + offs_r[None, :], mask=mask_nr, other=0.0)
    db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    dc = tl.zeros([BLOCK_N], tl.float32)
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    steps = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT)
    begin = part * steps * BLOCK_M
    for m_0 in range(begin, tl.minimum(begin + steps * BLOCK_M, M), BLOCK_M):
        offs_m = m_0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        mask_mr = mask_m[:, None] & mask_r[None, :]
        rows_m = offs_m.to(tl.int64)[:, None]
        offsets = rows_m * N + offs_n[None, :]
        dy = to_fp32(tl.load(dy_ptr + offsets, mask=mask, other=0.0), INTERPRET)
        if NEED_DC:
            u = to_fp32(tl.load(u_ptr + offsets, mask=mask, other=0.0), INTERPRET)
            dc += tl.sum(dy * u, axis=0)
        if NEED_G:
            g = round_to(dy * (scale - less)[None, :], DTYPE, INTERPRET)
            tl.store(g_ptr + offsets, g, mask=mask & first_ranks)
        scaled = dy * scale[None, :]
        if NEED_DS:
            if DS_PRECISION == "native":
                left = round_to(scaled, DTYPE, INTERPRET)
            else:
                left = scaled
            ds = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            ds = dot(left, b, ds, DS_PRECISION, INTERPRET)
            rows_ds = ds_parts_ptr + (tile_n.to(tl.int64) * M + offs_m)[:, None] * R
            tl.store(rows_ds + offs_r[None, :], ds, mask=mask_mr)
        if NEED_DB:
            s = tl.load(s_ptr + rows_m * R + offs_r[None, :], mask=mask_mr, other=0.0)
            db = dot(tl.trans(scaled), s, db, DB_PRECISION, INTERPRET)
    if NEED_DB:
        rows_db = db_parts_ptr + (part.to(tl.int64) * N + offs_n)[:, None] * R
        tl.store(rows_db + offs_r[None, :], db, mask=mask_nr)
    if NEED_DC:
        tl.store(dc_parts_ptr + part.to(tl.int64) * N + offs_n, dc, mask=mask_n & first_ranks)


@triton.jit
def _masked_gradient_kernel(
    plain_ptr,
    dropped_ptr,
    ds_ptr,
    a_ptr,
    seed_ptr,
    out_ptr,
    M,
    C,
    R,
    threshold,
    keep_scale,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out = plain + mask(dropped + dS A); A [R, C]; ``out`` may lie over ``plain``."""
    tiles_c = tl.cdiv(C, BLOCK_N)
    m_0 = (tl.program_id(0) // tiles_c) * BLOCK_M
    c_0 = (tl.program_id(0) % tiles_c) * BLOCK_N
    offs_m, offs_c = m_0 + tl.arange(0, BLOCK_M), c_0 + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    low = _low_rank_tile(
        ds_ptr, a_ptr, offs_m, offs_c, M, C, R, 1, C, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        INTERPRET,
    )  # fmt: skip
    low += to_fp32(tl.load(dropped_ptr + offsets, mask=mask, other=0.0), INTERPRET)
    keep = keep_tile(m_0, c_0, C, seed_ptr, threshold, BLOCK_M, BLOCK_N, QUADS)
    out = tl.where(keep, low * keep_scale, 0.0)
    out += to_fp32(tl.load(plain_ptr + offsets, mask=mask, other=0.0), INTERPRET)
    tl.store(out_ptr + offsets, round_to(out, out_ptr.dtype.element_ty, INTERPRET), mask=mask)
