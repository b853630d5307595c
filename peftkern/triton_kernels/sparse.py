"""A linear of which some entries train: W + D joined, D as a term of its own, and dW at entries.

Entries are sorted flat positions in W [N, K], so those of some rows are neighbours in the list. No
atomics: entries are unique, and each sum is made by one program or from parts in fixed order.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.device import round_to, to_fp32
from peftkern.triton_kernels.low_rank import dot


@triton.jit
def _scatter_add_kernel(
    weight_ptr,
    indices_ptr,
    values_ptr,
    entries,
    N,
    K,
    stride_row,
    stride_col,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """weight[row, col] += value at each entry, rounded once."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < entries
    index = tl.load(indices_ptr + offs, mask=mask, other=0)
    value = to_fp32(tl.load(values_ptr + offs, mask=mask, other=0.0), INTERPRET)
    row = index // K
    mask = mask & (index >= 0) & (row < N)
    pointers = weight_ptr + row * stride_row + (index - row * K) * stride_col
    value += to_fp32(tl.load(pointers, mask=mask, other=0.0), INTERPRET)
    tl.store(pointers, round_to(value, weight_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def _transpose_kernel(
    x_ptr,
    out_ptr,
    M,
    C,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[c, m] = x[m, c]; rows of out are ``stride_out`` long, zero behind M."""
    tiles_m = tl.cdiv(stride_out, BLOCK_M)
    offs_m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = (tl.program_id(0) // tiles_m) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows_x = x_ptr + offs_m.to(tl.int64)[:, None] * C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    tile = tl.trans(tl.load(rows_x + offs_c[None, :], mask=mask, other=0.0))
    rows_out = out_ptr + offs_c.to(tl.int64)[:, None] * stride_out
    mask_out = mask_c[:, None] & (offs_m < stride_out)[None, :]
    tl.store(rows_out + offs_m[None, :], tile, mask=mask_out)


@triton.jit
def _bounds_kernel(
    indices_ptr,
    out_ptr,
    entries,
    N,
    K,
    columns,
    width,
    steps,
    BLOCK: tl.constexpr,
):
    """out[n, t] = how many entries stand before row n, column min(t width, K); t < columns."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N * columns
    row = offs // columns
    want = row * K + tl.minimum((offs - row * columns) * width, K)
    low = tl.zeros([BLOCK], tl.int64)
    high = low + entries
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        found = tl.load(indices_ptr + middle, mask=mask & open_, other=0)
        less = open_ & (found < want)
        low = tl.where(less, middle + 1, low)
        high = tl.where(open_ & (found >= want), middle, high)
    tl.store(out_ptr + offs, low, mask=mask)


@triton.jit
def _sparse_term_kernel(
    y_ptr,
    x_ptr,
    indices_ptr,
    values_ptr,
    bounds_ptr,
    M,
    N,
    K,
    stride_c,
    stride_m,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """y[m, n] += sum over the entries of row n of value x[m, column], in place.

    BLOCK_E entries at a time, as a product of values spread over their rows with gathered columns.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    n_0 = (tl.program_id(0) // tiles_m) * BLOCK_N
    offs_m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = n_0 + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    begin = tl.load(bounds_ptr + n_0 * 2)
    end = tl.load(bounds_ptr + (tl.minimum(n_0 + BLOCK_N, N) - 1) * 2 + 1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for e_0 in range(begin, end, BLOCK_E):
        offs_e = e_0 + tl.arange(0, BLOCK_E)
        mask_e = offs_e < end
        index = tl.load(indices_ptr + offs_e, mask=mask_e, other=-1)
        value = to_fp32(tl.load(values_ptr + offs_e, mask=mask_e, other=0.0), INTERPRET)
        row = index // K
        own = mask_e[None, :] & (offs_n.to(tl.int64)[:, None] == row[None, :])
        spread = tl.where(own, value[None, :], 0.0)
        inside = mask_e & (index >= 0)
        columns = tl.where(inside, index - row * K, 0)
        gathered = tl.load(
            x_ptr + columns[:, None] * stride_c + offs_m[None, :] * stride_m,
            mask=inside[:, None] & mask_m[None, :],
            other=0.0,
        )
        acc = dot(spread, gathered, acc, PRECISION, INTERPRET)
    offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    y = to_fp32(tl.load(y_ptr + offsets, mask=mask, other=0.0), INTERPRET) + tl.trans(acc)
    tl.store(y_ptr + offsets, round_to(y, y_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def _sampled_rows_kernel(
    dy_ptr,
    x_ptr,
    indices_ptr,
    parts_ptr,
    entries,
    N,
    K,
    stride,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """parts[p, e] = sum over range p of m of dy[row, m] x[column, m]: rows of length ``stride``.

    Neighbours in the list share a row of dy, which the L1 then serves.
    """
    tiles_e = tl.cdiv(entries, BLOCK_E)
    part = tl.program_id(0) // tiles_e
    offs_e = (tl.program_id(0) % tiles_e).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < entries
    index = tl.load(indices_ptr + offs_e, mask=mask_e, other=0)
    row = index // K
    inside = mask_e & (index >= 0) & (row < N)
    row = tl.where(inside, row, 0)
    column = tl.where(inside, index - row * K, 0)
    left, right = dy_ptr + row[:, None] * stride, x_ptr + column[:, None] * stride
    steps = tl.cdiv(stride // BLOCK_M, SPLIT)
    begin = part * steps * BLOCK_M
    acc = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    for m_0 in range(begin, tl.minimum(begin + steps * BLOCK_M, stride), BLOCK_M):
        offs_m = m_0 + tl.arange(0, BLOCK_M)[None, :]
        dy = to_fp32(tl.load(left + offs_m), INTERPRET)
        acc += dy * to_fp32(tl.load(right + offs_m), INTERPRET)
    tl.store(parts_ptr + part.to(tl.int64) * entries + offs_e, tl.sum(acc, axis=1), mask=mask_e)


@triton.jit
def _sampled_tiles_kernel(
    dy_ptr,
    x_ptr,
    indices_ptr,
    bounds_ptr,
    scratch_ptr,
    parts_ptr,
    entries,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """parts[p, e] = sum over range p of m of dy[m, row] x[m, column], by tiles of dy^T x.

    A tile that holds entries is made by tensor cores and laid into this program's scratch, a few
    KB that stay in the L2, from where its entries are picked. Tiles without entries are skipped.
    """
    pid = tl.program_id(0)
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT)
    local_n, local_k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    scratch_ptr += pid.to(tl.int64) * BLOCK_N * BLOCK_K
    for item in range(pid, tiles_n * tiles_k * SPLIT, tl.num_programs(0)):
        part = item // (tiles_n * tiles_k)
        n_0 = ((item // tiles_k) % tiles_n) * BLOCK_N
        tile_k = item % tiles_k
        k_0 = tile_k * BLOCK_K
        offs_n, offs_k = n_0 + local_n, k_0 + local_k
        mask_n, mask_k = offs_n < N, offs_k < K
        bounds = bounds_ptr + offs_n.to(tl.int64) * (tiles_k + 1) + tile_k
        first = tl.load(bounds, mask=mask_n, other=0)
        last = tl.load(bounds + 1, mask=mask_n, other=0)
        most = tl.max(last - first, axis=0)
        if most > 0:
            begin = part * steps * BLOCK_M
            acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for m_0 in range(begin, tl.minimum(begin + steps * BLOCK_M, M), BLOCK_M):
                offs_m = m_0 + tl.arange(0, BLOCK_M)
                mask_m = (offs_m < M)[:, None]
                rows = offs_m.to(tl.int64)[:, None]
                dy = tl.load(
                    dy_ptr + rows * N + offs_n[None, :], mask=mask_m & mask_n[None, :], other=0.0
                )
                x = tl.load(
                    x_ptr + rows * K + offs_k[None, :], mask=mask_m & mask_k[None, :], other=0.0
                )
                acc = dot(tl.trans(dy), x, acc, PRECISION, INTERPRET)
            tl.debug_barrier()  # the entries of the tile before have been read
            tl.store(scratch_ptr + local_n[:, None] * BLOCK_K + local_k[None, :], acc)
            tl.debug_barrier()
            for j in range(most):
                entry = first + j
                mask = entry < last
                index = tl.load(indices_ptr + entry, mask=mask, other=0)
                column = index - offs_n.to(tl.int64) * K - k_0
                mask_in = mask & (column >= 0) & (column < BLOCK_K)
                value = tl.load(
                    scratch_ptr + local_n * BLOCK_K + column,
                    mask=mask_in,
                    other=0.0,
                    cache_modifier=".cg",
                )
                tl.store(parts_ptr + part.to(tl.int64) * entries + entry, value, mask=mask)
