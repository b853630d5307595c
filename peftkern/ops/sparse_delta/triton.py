"""A linear with trainable entries by Triton on an NVIDIA GPU.

What serves which call is decided here by ``peftkern.tuning.sparse``: entries joined to a 16-bit
copy of the weight, for torch's own product, or a term of their own after the product with the
stored base; dW at the entries by gathered rows, or picked from tiles that tensor cores make.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.ops.sparse_delta.checked import check_once
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal
from peftkern.triton_kernels.matmul import matmul, unfused
from peftkern.triton_kernels.passes import add_parts
from peftkern.tuning.sparse import (
    own_term_wins,
    rows_config,
    rows_win,
    term_config,
    tiles_config,
)


def _forward_refusal(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
) -> str | None:
    return refusal(x, x.dtype, values.dtype)


@implementation("sparse_delta_linear", device="cuda", backend="triton", can_use=_forward_refusal)
def sparse_delta_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
) -> Tensor:
    """``x (W + D)ᵀ + b``."""
    check_once(indices, out_features * x.shape[1])
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, out_features, x.shape[1])
    if own_term_wins(x.shape[0], base.rows, base.cols, indices.numel(), format != "dense"):
        return _add_term(matmul(x, base, bias=bias), x, indices, values)
    return unfused(x, _joined(base, indices, values, x.dtype), False, bias, None)


def _joined(base: Base, indices: Tensor, values: Tensor, dtype: torch.dtype) -> Base:
    """W + D as a matrix of its own, summed in fp32 and rounded once."""
    from peftkern.triton_kernels import sparse

    dense = base.dense(dtype)
    if dense is base.weight:
        dense = dense.clone()
    launch(
        sparse._scatter_add_kernel,
        -(-indices.numel() // 512),
        dense,
        dense,
        indices,
        values,
        indices.numel(),
        base.rows,
        base.cols,
        *dense.stride(),
        BLOCK=512,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return Base(dense, None, None, None, "dense", 0, base.rows, base.cols)


def _bounds(indices: Tensor, rows: int, cols: int, width: int) -> Tensor:
    """Where in the list each row's entries begin, and those of each ``width`` columns of it."""
    from peftkern.triton_kernels import sparse

    columns = -(-cols // width) + 1
    bounds = indices.new_empty((rows, columns))
    launch(
        sparse._bounds_kernel,
        -(-bounds.numel() // 256),
        indices,
        indices,
        bounds,
        indices.numel(),
        rows,
        cols,
        columns,
        width,
        indices.numel().bit_length(),
        BLOCK=256,
        num_warps=4,
    )
    return bounds


def _transposed(x: Tensor, multiple: int) -> Tensor:
    """x [M, C] as [C, S], S a multiple that holds M; zeros behind M."""
    from peftkern.triton_kernels import sparse

    m, c = x.shape
    stride = -(-m // multiple) * multiple
    out = x.new_empty((c, stride))
    launch(
        sparse._transpose_kernel,
        -(-stride // 64) * -(-c // 64),
        x,
        x,
        out,
        m,
        c,
        stride,
        BLOCK_M=64,
        BLOCK_C=64,
        num_warps=4,
    )
    return out


def _add_term(y: Tensor, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """``y += x Dᵀ`` in place."""
    from peftkern.triton_kernels import sparse

    (m, n), k = y.shape, x.shape[1]
    if 0 in (m, n, indices.numel()):
        return y
    config = term_config(m)
    # Columns of x are gathered: as rows of the transposed x, or from the one row there is.
    columns = _transposed(x, 16) if m > 1 else x
    steps = (columns.stride(0), 1) if m > 1 else (1, k)
    launch(
        sparse._sparse_term_kernel,
        -(-n // config.block_r) * -(-m // config.block_m),
        y,
        y,
        columns,
        indices,
        values,
        _bounds(indices, n, k, k),
        m,
        n,
        k,
        *steps,
        PRECISION="tf32x3",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_r,
        BLOCK_E=config.block_c,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def _dx_refusal(
    dy: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
    indices: Tensor,
    values: Tensor,
) -> str | None:
    return refusal(dy, dy.dtype, values.dtype)


@implementation("sparse_delta_dx", device="cuda", backend="triton", can_use=_dx_refusal)
def sparse_delta_dx(
    dy: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
    indices: Tensor,
    values: Tensor,
) -> Tensor:
    """``dy (W + D)``, joined: a term of its own would need the entries sorted by columns."""
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, dy.shape[1], in_features)
    return unfused(dy, _joined(base, indices, values, dy.dtype), True, None, None)


def _sampled_refusal(dy: Tensor, x: Tensor, indices: Tensor) -> str | None:
    return refusal(x, x.dtype)


@implementation("sampled_gradient", device="cuda", backend="triton", can_use=_sampled_refusal)
def sampled_gradient(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Entries of ``dyᵀ x``; the matrix is never in memory as a whole."""
    (m, n), k, entries = dy.shape, x.shape[1], indices.numel()
    if 0 in (m, entries):
        return x.new_zeros(entries, dtype=torch.float32)
    if rows_win(m, n, k, entries, x.dtype == torch.float32):
        return sampled_by_rows(dy, x, indices)
    return sampled_by_tiles(dy, x, indices)


def sampled_by_rows(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Each entry as a dot product of two rows of the transposed dy and x."""
    from peftkern.triton_kernels import sparse

    entries = indices.numel()
    config = rows_config(dy.shape[0], entries)
    dy_rows, x_rows = _transposed(dy, config.block_m), _transposed(x, config.block_m)
    parts = x.new_empty((config.split, entries), dtype=torch.float32)
    launch(
        sparse._sampled_rows_kernel,
        -(-entries // config.block_c) * config.split,
        x,
        dy_rows,
        x_rows,
        indices,
        parts,
        entries,
        dy.shape[1],
        x.shape[1],
        dy_rows.stride(0),
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_E=config.block_c,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return _summed(parts)


def sampled_by_tiles(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Tiles of ``dyᵀ x`` by tensor cores, one at a time in each program's scratch."""
    from peftkern.triton_kernels import sparse

    (m, n), k, entries = dy.shape, x.shape[1], indices.numel()
    fp32 = x.dtype == torch.float32
    config = tiles_config(m, n, k, fp32)
    block_n = config.block_r
    items = -(-n // block_n) * -(-k // config.block_c) * config.split
    programs = min(items, config.programs)
    parts = x.new_empty((config.split, entries), dtype=torch.float32)
    launch(
        sparse._sampled_tiles_kernel,
        programs,
        x,
        dy,
        x,
        indices,
        _bounds(indices, n, k, config.block_c),
        parts.new_empty((programs, block_n, config.block_c)),
        parts,
        entries,
        m,
        n,
        k,
        PRECISION="tf32x3" if fp32 else "native",
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.block_c,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return _summed(parts)


def _summed(parts: Tensor) -> Tensor:
    if parts.shape[0] == 1:
        return parts[0]
    return add_parts(parts, parts.new_empty(parts.shape[1:]), 1.0)
