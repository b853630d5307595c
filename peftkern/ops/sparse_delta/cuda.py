"""A linear with trainable entries on CUDA devices: csrc/cuda/sparse.cu.

What this serves, and what is left to Triton, stands in ``peftkern/tuning/sparse.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES
from peftkern.ops.linear4.cuda import linear_4bit
from peftkern.ops.linear8.cuda import linear_8bit
from peftkern.ops.quant4.cuda import dequantize_4bit
from peftkern.ops.quant8.cuda import dequantize_8bit
from peftkern.ops.sparse_delta.checked import check_once
from peftkern.registry import implementation
from peftkern.tuning.sparse import CUDA_TERM_ROWS, own_term_wins, rows_win

_Base = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, int]


def _product(x: Tensor, base: _Base, out_features: int, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` by whatever serves the plain linear."""
    weight, absmax, *nested, format, blocksize = base
    if absmax is None:
        return torch.nn.functional.linear(x, weight, bias)
    if format == "int8":
        return linear_8bit(x, weight, absmax, bias)
    return linear_4bit(x, weight, absmax, *nested, format, blocksize, out_features, bias)


def _joined(
    base: _Base, shape: tuple[int, int], indices: Tensor, values: Tensor, dtype: torch.dtype
) -> Tensor:
    """W + D [N, K], summed in fp32 and rounded once."""
    weight, absmax, *nested, format, blocksize = base
    if absmax is None:
        dense = weight.clone()
    elif format == "int8":
        dense = dequantize_8bit(weight, absmax, dtype)
    else:
        dense = dequantize_4bit(weight, absmax, *nested, format, blocksize, list(shape), dtype)
    cuda_native.launch(
        "scatter_add",
        dense.device,
        dense,
        DTYPES[dtype],
        *shape,
        *dense.stride(),
        indices,
        values,
        DTYPES[values.dtype],
        indices.numel(),
    )
    return dense


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
    why = cuda_native.refusal(x, values)
    rows = x.shape[0]
    sizes = (rows, out_features, x.shape[1], indices.numel())
    if why is None and rows > CUDA_TERM_ROWS and own_term_wins(*sizes, format != "dense"):
        return f"{rows} rows, its term of their own takes up to {CUDA_TERM_ROWS}"
    return why


@implementation("sparse_delta_linear", device="cuda", backend="cuda", can_use=_forward_refusal)
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
    """``x (W + D)ᵀ + b``: D as a term of its own for few rows, else joined to W."""
    (m, k), entries = x.shape, indices.numel()
    check_once(indices, out_features * k)
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    if not own_term_wins(m, out_features, k, entries, format != "dense"):
        joined = _joined(base, (out_features, k), indices, values, x.dtype)
        return torch.nn.functional.linear(x, joined, bias)
    y = _product(x, base, out_features, bias)
    cuda_native.launch(
        "sparse_term",
        x.device,
        y,
        x,
        DTYPES[x.dtype],
        m,
        out_features,
        k,
        indices,
        values,
        DTYPES[values.dtype],
        entries,
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
    return cuda_native.refusal(dy, values)


@implementation("sparse_delta_dx", device="cuda", backend="cuda", can_use=_dx_refusal)
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
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    return dy @ _joined(base, (dy.shape[1], in_features), indices, values, dy.dtype)


def _sampled_refusal(dy: Tensor, x: Tensor, indices: Tensor) -> str | None:
    why = cuda_native.refusal(x)
    (m, n), k, entries = dy.shape, x.shape[1], indices.numel()
    fp32 = x.dtype == torch.float32
    if why is None and 0 not in (m, entries) and not rows_win(m, n, k, entries, fp32):
        return f"{entries} entries, which tensor cores make faster from tiles"
    return why


def _transposed(x: Tensor) -> Tensor:
    """x [M, C] as [C, S], S a multiple of 8 that holds M; zeros behind M."""
    m, c = x.shape
    out = x.new_empty((c, -(-m // 8) * 8))
    args = (x, x.element_size(), m, c, out.shape[1], out)
    cuda_native.launch("transpose", x.device, *args)
    return out


@implementation("sampled_gradient", device="cuda", backend="cuda", can_use=_sampled_refusal)
def sampled_gradient(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Each entry as a dot product of two rows of the transposed dy and x."""
    (m, n), k, entries = dy.shape, x.shape[1], indices.numel()
    if 0 in (m, entries):
        return x.new_zeros(entries, dtype=torch.float32)
    dy_rows, x_rows = _transposed(dy), _transposed(x)
    out = x.new_empty(entries, dtype=torch.float32)
    shape = (n, k, dy_rows.shape[1])
    args = (dy_rows, x_rows, DTYPES[x.dtype], *shape, indices, entries, out)
    cuda_native.launch("sampled_rows", x.device, *args)
    return out
