"""Native linear with trainable entries on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import native
from peftkern.ops.lora.cpu import base_by_torch, native_base
from peftkern.ops.sparse_delta.reference import check_indices
from peftkern.registry import implementation

_TILE = 64  # kernels take rows in tiles of a divisor of this


def _refusal(*args: Any) -> str | None:
    return native.refusal(*(arg for arg in args if isinstance(arg, Tensor)))


def _tiles(like: Tensor) -> Tensor:
    rows = -(-like.shape[0] // _TILE) * _TILE
    return torch.empty(rows * like.shape[1], dtype=like.dtype)


def _entries(
    indices: Tensor, values: Tensor | None, rows: int
) -> tuple[tuple[int, int, int, int, int], Tensor]:
    starts = torch.empty(rows + 1, dtype=torch.int64)
    dtype = torch.float32 if values is None else values.dtype
    address = 0 if values is None else values.data_ptr()
    row = (indices.data_ptr(), indices.numel(), address, native.DTYPES[dtype], starts.data_ptr())
    return row, starts


def _product(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: tuple[int, int],
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
    transpose: bool,
) -> Tensor:
    """Entries join the weight where our kernel decodes it in their order; else a term of its own.

    Joined, they cost an addition each time the weight is decoded, and no pass over the result.
    """
    m = x.shape[0]
    base: native.NativeWeight | None = None
    own_term = format == "dense" and (base_by_torch(x.dtype) or not weight.is_contiguous())
    if format == "dense" and base_by_torch(x.dtype):
        out = x @ weight if transpose else torch.nn.functional.linear(x, weight, bias)
        bias = None
    else:
        out = torch.empty((m, shape[transpose]), dtype=x.dtype)
        statistics = (absmax, nested_absmax, nested_offset)
        base = native_base(weight, *statistics, format, blocksize, shape, x.dtype)
    tiles = _tiles(x) if own_term else None
    positions, starts = _entries(indices, values, shape[0])
    bad = native.kernels().sparse_linear(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        *shape,
        base,
        positions,
        transpose,
        0 if bias is None else bias.data_ptr(),
        0 if tiles is None else tiles.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    del starts  # alive until here: the kernel reads it
    if bad >= 0:
        check_indices(indices, shape[0] * shape[1])
    return out


@implementation("sparse_delta_linear", device="cpu", backend="native", can_use=_refusal)
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
    """``y = x (W + D)^T + b``."""
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    return _product(x, *base, (out_features, x.shape[1]), bias, indices, values, False)


@implementation("sparse_delta_dx", device="cpu", backend="native", can_use=_refusal)
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
    """``dx = dy (W + D)``."""
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    return _product(dy, *base, (dy.shape[1], in_features), None, indices, values, True)


@implementation("sampled_gradient", device="cpu", backend="native", can_use=_refusal)
def sampled_gradient(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Entries of ``dy^T x``, each a dot product of two rows of transposed tiles."""
    shape = (dy.shape[1], x.shape[1])
    out = torch.zeros(indices.numel(), dtype=torch.float32)
    dy_tiles, x_tiles = _tiles(dy), _tiles(x)
    positions, starts = _entries(indices, None, shape[0])
    bad = native.kernels().sampled_gradient(
        dy.data_ptr(),
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.shape[0],
        *shape,
        positions,
        dy_tiles.data_ptr(),
        x_tiles.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    del starts
    if bad >= 0:
        check_indices(indices, shape[0] * shape[1])
    return out
