"""The passes of the low-rank term: S, dS with dB, dA. Long sums are cut into parts of fixed order.

With ``x̂ = dropout(x)``: ``S = x̂ A^T``, ``dS = s dy B``, ``dB = s dy^T S``, ``dA = dS^T x̂``. No
atomics: each part is written by one program, and ``_sum_kernel`` adds the parts in fixed order.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.device import keep_tile, operand, round_to, to_fp32


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a b; "native" multiplies 16-bit operands, else they are fp32 split as it says."""
    if PRECISION == "native":
        return tl.dot(operand(a, INTERPRET), operand(b, INTERPRET), acc)
    else:
        return tl.dot(to_fp32(a, INTERPRET), to_fp32(b, INTERPRET), acc, input_precision=PRECISION)


@triton.jit
def _dropped(
    x,
    m_0,
    c_0,
    C,
    seed_ptr,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A tile of dropout(x), rounded to x's dtype as ``philox_dropout`` does."""
    if DROPOUT:
        keep = keep_tile(m_0, c_0, C, seed_ptr, threshold, BLOCK_M, BLOCK_C, QUADS)
        scaled = round_to(to_fp32(x, INTERPRET) * keep_scale, x.dtype, INTERPRET)
        return tl.where(keep, scaled, tl.zeros([1, 1], x.dtype))
    else:
        return x


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    seed_ptr,
    parts_ptr,
    M,
    C,
    R,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """parts[p, m, r] = sum over range p of the columns of x̂[m, c] A[r, c]."""
    pid = tl.program_id(0)
    tiles_m, tiles_r = tl.cdiv(M, BLOCK_M), tl.cdiv(R, BLOCK_R)
    part = pid // (tiles_m * tiles_r)
    m_0 = ((pid // tiles_r) % tiles_m) * BLOCK_M
    offs_r = (pid % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    mask_m, mask_r = offs_m < M, offs_r < R
    steps = tl.cdiv(tl.cdiv(C, BLOCK_C), SPLIT)
    begin = part * steps * BLOCK_C
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    rows_x = x_ptr + offs_m.to(tl.int64)[:, None] * C
    rows_a = a_ptr + offs_r.to(tl.int64)[None, :] * C
    for c_0 in range(begin, tl.minimum(begin + steps * BLOCK_C, C), BLOCK_C):
        offs_c = c_0 + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        x = tl.load(rows_x + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        a = tl.load(rows_a + offs_c[:, None], mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        x = _dropped(
            x,
            m_0,
            c_0,
            C,
            seed_ptr,
            threshold,
            keep_scale,
            DROPOUT,
            QUADS,
            BLOCK_M,
            BLOCK_C,
            INTERPRET,
        )
        acc = dot(x, a, acc, PRECISION, INTERPRET)
    rows_out = parts_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * R
    tl.store(rows_out + offs_r[None, :], acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _adapter_gradient_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_parts_ptr,
    db_parts_ptr,
    M,
    N,
    R,
    NEED_DB: tl.constexpr,
    DS_PRECISION: tl.constexpr,
    DB_PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One read of dy for ds_parts[n tile, m, r] = dy B and db_parts[range of m, n, r] = dy^T S."""
    pid = tl.program_id(0)
    tiles_n, tiles_r = tl.cdiv(N, BLOCK_N), tl.cdiv(R, BLOCK_R)
    part = pid // (tiles_n * tiles_r)
    tile_n = (pid // tiles_r) % tiles_n
    offs_r = (pid % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, mask_r = offs_n < N, offs_r < R
    mask_nr = mask_n[:, None] & mask_r[None, :]
    b = tl.load(b_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r[None, :], mask=mask_nr, other=0.0)
    db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    steps = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT)
    begin = part * steps * BLOCK_M
    for m_0 in range(begin, tl.minimum(begin + steps * BLOCK_M, M), BLOCK_M):
        offs_m = m_0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_mr = mask_m[:, None] & mask_r[None, :]
        rows_m = offs_m.to(tl.int64)[:, None]
        dy = tl.load(
            dy_ptr + rows_m * N + offs_n[None, :],
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        ds = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        ds = dot(dy, b, ds, DS_PRECISION, INTERPRET)
        rows_ds = ds_parts_ptr + (tile_n.to(tl.int64) * M + offs_m)[:, None] * R
        tl.store(rows_ds + offs_r[None, :], ds, mask=mask_mr)
        if NEED_DB:
            s = tl.load(s_ptr + rows_m * R + offs_r[None, :], mask=mask_mr, other=0.0)
            db = dot(tl.trans(dy), s, db, DB_PRECISION, INTERPRET)
    if NEED_DB:
        rows_db = db_parts_ptr + (part.to(tl.int64) * N + offs_n)[:, None] * R
        tl.store(rows_db + offs_r[None, :], db, mask=mask_nr)


@triton.jit
def _down_gradient_kernel(
    ds_ptr,
    x_ptr,
    seed_ptr,
    parts_ptr,
    M,
    C,
    R,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """parts[p, r, c] = sum over range p of the rows of dS[m, r] x̂[m, c]."""
    pid = tl.program_id(0)
    tiles_c, tiles_r = tl.cdiv(C, BLOCK_C), tl.cdiv(R, BLOCK_R)
    part = pid // (tiles_c * tiles_r)
    c_0 = ((pid // tiles_r) % tiles_c) * BLOCK_C
    offs_r = (pid % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = c_0 + tl.arange(0, BLOCK_C)
    mask_c, mask_r = offs_c < C, offs_r < R
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    steps = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT)
    begin = part * steps * BLOCK_M
    for m_0 in range(begin, tl.minimum(begin + steps * BLOCK_M, M), BLOCK_M):
        offs_m = m_0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows_m = offs_m.to(tl.int64)
        ds = tl.load(
            ds_ptr + rows_m[None, :] * R + offs_r[:, None],
            mask=mask_r[:, None] & mask_m[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + rows_m[:, None] * C + offs_c[None, :],
            mask=mask_m[:, None] & mask_c[None, :],
            other=0.0,
        )
        x = _dropped(
            x,
            m_0,
            c_0,
            C,
            seed_ptr,
            threshold,
            keep_scale,
            DROPOUT,
            QUADS,
            BLOCK_M,
            BLOCK_C,
            INTERPRET,
        )
        acc = dot(ds, x, acc, PRECISION, INTERPRET)
    rows_out = parts_ptr + (part.to(tl.int64) * R + offs_r)[:, None] * C
    tl.store(rows_out + offs_c[None, :], acc, mask=mask_r[:, None] & mask_c[None, :])


@triton.jit
def _sum_kernel(
    parts_ptr,
    out_ptr,
    numel,
    parts,
    scaling,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[i] = scaling * (parts[0, i] + parts[1, i] + ...): AHEAD interleaved sums, then those."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros([AHEAD, BLOCK], tl.float32)
    for first in range(0, parts, AHEAD):
        offs_p = first + tl.arange(0, AHEAD)
        pointers = parts_ptr + offs_p.to(tl.int64)[:, None] * numel + offs[None, :]
        acc += tl.load(pointers, mask=(offs_p < parts)[:, None] & mask[None, :], other=0.0)
    value = round_to(tl.sum(acc, axis=0) * scaling, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + offs, value, mask=mask)
