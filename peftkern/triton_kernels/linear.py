"""Matmul with a base in its own storage, and the epilogue with bias and low-rank term.

Everything is computed transposed, ``out^T [N, M] = W [N, C] x^T [C, M]``: the decoded weights are
the first operand, which Hopper's wgmma takes from registers, and a tile of 16 rows of x is still
large enough for it.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.device import keep_tile, operand, round_to, to_fp32, weight_tile


@triton.jit
def _finished(
    acc,
    m_0,
    o_0,
    M,
    N,
    R,
    bias_ptr,
    s_ptr,
    b_ptr,
    stride_bo,
    stride_br,
    seed_ptr,
    scaling,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """acc [N, M] + bias + scaling * (B S^T), the low-rank term under the dropout mask if asked."""
    offs_o = o_0 + tl.arange(0, BLOCK_O)
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    mask_o, mask_m = offs_o < N, offs_m < M
    if HAS_BIAS:
        acc += to_fp32(tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0), INTERPRET)[:, None]
    if BLOCK_R > 0:
        # Without a mask the product goes straight into acc: a second accumulator costs registers.
        low = tl.zeros([BLOCK_O, BLOCK_M], tl.float32) if DROPOUT else acc
        for r_0 in range(0, R, BLOCK_R):
            offs_r = r_0 + tl.arange(0, BLOCK_R)
            mask_r = offs_r < R
            b = tl.load(
                b_ptr + offs_o.to(tl.int64)[:, None] * stride_bo + offs_r[None, :] * stride_br,
                mask=mask_o[:, None] & mask_r[None, :],
                other=0.0,
            )
            s = tl.load(
                s_ptr + offs_m.to(tl.int64)[None, :] * R + offs_r[:, None],
                mask=mask_r[:, None] & mask_m[None, :],
                other=0.0,
            )
            low = tl.dot(to_fp32(b, INTERPRET), s * scaling, low, input_precision=PRECISION)
        if DROPOUT:
            keep = keep_tile(m_0, o_0, N, seed_ptr, threshold, BLOCK_M, BLOCK_O, QUADS)
            acc += tl.where(tl.trans(keep), low * keep_scale, 0.0)
        else:
            acc = low
    return acc


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    seed_ptr,
    out_ptr,
    M,
    N,
    C,
    R,
    stride_row,
    stride_col,
    stride_bo,
    stride_br,
    scaling,
    threshold,
    keep_scale,
    FORMAT: tl.constexpr,
    NESTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LOG_BLOCKSIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of ``x W^T`` (or ``x W`` if TRANSPOSED), or its part over one of SPLIT ranges of C.

    The whole tile goes through the epilogue; a part is left as fp32 for ``_finish_kernel``.
    """
    pid = tl.program_id(0)
    tiles_o, tiles_m = tl.cdiv(N, BLOCK_O), tl.cdiv(M, BLOCK_M)
    part = pid // (tiles_o * tiles_m)
    tile = pid % (tiles_o * tiles_m)
    # Eight rows of tiles at a time, so that neighbours in time share weights and rows of x in L2.
    per_band = 8 * tiles_o
    first_m = (tile // per_band) * 8
    band = tl.minimum(tiles_m - first_m, 8)
    m_0 = (first_m + (tile % per_band) % band) * BLOCK_M
    o_0 = ((tile % per_band) // band) * BLOCK_O

    offs_m = m_0 + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    steps = tl.cdiv(tl.cdiv(C, BLOCK_C), SPLIT)
    begin = part * steps * BLOCK_C
    end = tl.minimum(begin + steps * BLOCK_C, C)
    acc = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    rows_x = x_ptr + offs_m.to(tl.int64)[:, None] * C
    for c_0 in range(begin, end, BLOCK_C):
        offs_c = c_0 + tl.arange(0, BLOCK_C)
        x = tl.load(
            rows_x + offs_c[None, :], mask=mask_m[:, None] & (offs_c < C)[None, :], other=0.0
        )
        if TRANSPOSED:
            w = tl.trans(
                weight_tile(
                    weight_ptr,
                    absmax_ptr,
                    nested_ptr,
                    offset_ptr,
                    map_ptr,
                    c_0,
                    o_0,
                    C,
                    N,
                    stride_row,
                    stride_col,
                    FORMAT,
                    NESTED,
                    LOG_BLOCKSIZE,
                    GROUP,
                    BLOCK_C,
                    BLOCK_O,
                    x_ptr.dtype.element_ty,
                    INTERPRET,
                )
            )
        else:
            w = weight_tile(
                weight_ptr,
                absmax_ptr,
                nested_ptr,
                offset_ptr,
                map_ptr,
                o_0,
                c_0,
                N,
                C,
                stride_row,
                stride_col,
                FORMAT,
                NESTED,
                LOG_BLOCKSIZE,
                GROUP,
                BLOCK_O,
                BLOCK_C,
                x_ptr.dtype.element_ty,
                INTERPRET,
            )
        acc = tl.dot(operand(w, INTERPRET), operand(tl.trans(x), INTERPRET), acc)

    offs_o = o_0 + tl.arange(0, BLOCK_O)
    mask = (offs_o < N)[:, None] & mask_m[None, :]
    if SPLIT > 1:
        rows_out = out_ptr + (part.to(tl.int64) * M + offs_m)[None, :] * N
        tl.store(rows_out + offs_o[:, None], acc, mask=mask)
    else:
        acc = _finished(
            acc,
            m_0,
            o_0,
            M,
            N,
            R,
            bias_ptr,
            s_ptr,
            b_ptr,
            stride_bo,
            stride_br,
            seed_ptr,
            scaling,
            threshold,
            keep_scale,
            HAS_BIAS,
            BLOCK_R,
            PRECISION,
            DROPOUT,
            QUADS,
            BLOCK_M,
            BLOCK_O,
            INTERPRET,
        )
        rows_out = out_ptr + offs_m.to(tl.int64)[None, :] * N
        acc = round_to(acc, out_ptr.dtype.element_ty, INTERPRET)
        tl.store(rows_out + offs_o[:, None], acc, mask=mask)


@triton.jit
def _finish_kernel(
    parts_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    seed_ptr,
    out_ptr,
    M,
    N,
    R,
    stride_bo,
    stride_br,
    scaling,
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The sum of PARTS [M, N] in order, through the epilogue; ``out`` may be the only part."""
    tiles_o = tl.cdiv(N, BLOCK_O)
    m_0 = (tl.program_id(0) // tiles_o) * BLOCK_M
    o_0 = (tl.program_id(0) % tiles_o) * BLOCK_O
    offs_m = (m_0 + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_o = o_0 + tl.arange(0, BLOCK_O)
    mask = (offs_o < N)[:, None] & (offs_m < M)[None, :]
    acc = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    for part in tl.static_range(PARTS):
        rows_in = parts_ptr + (part * M + offs_m)[None, :] * N
        acc += to_fp32(tl.load(rows_in + offs_o[:, None], mask=mask, other=0.0), INTERPRET)
    acc = _finished(
        acc,
        m_0,
        o_0,
        M,
        N,
        R,
        bias_ptr,
        s_ptr,
        b_ptr,
        stride_bo,
        stride_br,
        seed_ptr,
        scaling,
        threshold,
        keep_scale,
        HAS_BIAS,
        BLOCK_R,
        PRECISION,
        DROPOUT,
        QUADS,
        BLOCK_M,
        BLOCK_O,
        INTERPRET,
    )
    rows_out = out_ptr + offs_m[None, :] * N
    acc = round_to(acc, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(rows_out + offs_o[:, None], acc, mask=mask)
