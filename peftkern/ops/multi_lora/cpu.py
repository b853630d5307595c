"""Native linear with a different low-rank term for each row, on the CPU.

Rows are listed by adapter, in stable order; nothing is gathered: the products rename their rows.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from peftkern import native
from peftkern.ops.lora.cpu import base_by_torch, native_base
from peftkern.ops.multi_lora.reference import check_ids
from peftkern.registry import implementation


def _refusal(*args: Any) -> str | None:
    return native.refusal(*args)


def _rows_by_adapter(adapter_ids: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """All rows in the order of their adapters, and where those of each adapter begin and end."""
    check_ids(adapter_ids, count)
    order = torch.argsort(adapter_ids, stable=True)
    sizes = torch.bincount(adapter_ids + 1, minlength=count + 1).tolist()
    return order, list(accumulate(sizes))


def _adapters(
    k: int,
    bounds: list[int],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    das: list[Tensor] | None,
    dbs: list[Tensor] | None,
) -> list[tuple[Any, ...]]:
    return [
        (
            a.data_ptr(),
            b.data_ptr(),
            native.DTYPES[a.dtype],
            a.shape[0],
            bounds[i],
            bounds[i + 1],
            scalings[i],
            native.dropout_parameters(dropout_p[i], seed, k),
            0 if das is None else das[i].data_ptr(),
            0 if dbs is None else dbs[i].data_ptr(),
        )
        for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True))
    ]


@implementation("multi_lora_linear", device="cpu", backend="native", can_use=_refusal)
def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    adapter_ids: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One product for the base and all low-rank terms: the base is read once for all adapters."""
    m, k = x.shape
    order, bounds = _rows_by_adapter(adapter_ids, len(lora_A))
    rank = max((a.shape[0] for a in lora_A), default=0)
    s = torch.zeros((m, rank), dtype=torch.float32)
    base: native.NativeWeight | None = None
    if format == "dense" and base_by_torch(x.dtype):
        y = torch.nn.functional.linear(x, weight, bias)
        bias = None
    else:
        y = torch.empty((m, out_features), dtype=x.dtype)
        statistics = (absmax, nested_absmax, nested_offset)
        stored = (weight, *statistics, format, blocksize)
        base = native_base(*stored, (out_features, k), x.dtype)
    adapters = (bounds, lora_A, lora_B, scalings, dropout_p, seed)
    native.kernels().multi_forward(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        k,
        out_features,
        base,
        0 if bias is None else bias.data_ptr(),
        order.data_ptr(),
        _adapters(k, *adapters, None, None),
        s.data_ptr(),
        rank,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y, s


@implementation("multi_lora_linear_backward", device="cpu", backend="native", can_use=_refusal)
def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    adapter_ids: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx in one product; dA and dB sum over the rows of their adapter, in their order in x."""
    m, k = x.shape
    n = dy.shape[1]
    order, bounds = _rows_by_adapter(adapter_ids, len(lora_A))
    ds = torch.empty(s.shape, dtype=torch.float32)
    base: native.NativeWeight | None = None
    dx = torch.empty(0, dtype=x.dtype)
    if need_dx and format == "dense" and base_by_torch(x.dtype):
        dx = torch.matmul(dy, weight)
    elif need_dx:
        dx = torch.empty((m, k), dtype=x.dtype)
        statistics = (absmax, nested_absmax, nested_offset)
        stored = (weight, *statistics, format, blocksize)
        base = native_base(*stored, (n, k), x.dtype)
    das = [torch.empty(a.shape if need_dab else 0, dtype=a.dtype) for a in lora_A]
    dbs = [torch.empty(b.shape if need_dab else 0, dtype=b.dtype) for b in lora_B]
    adapters = (bounds, lora_A, lora_B, scalings, dropout_p, seed)
    results = (das, dbs) if need_dab else (None, None)
    native.kernels().multi_backward(
        dy.data_ptr(),
        x.data_ptr(),
        s.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        k,
        n,
        base,
        order.data_ptr(),
        _adapters(k, *adapters, *results),
        s.shape[1],
        ds.data_ptr(),
        dx.data_ptr() if need_dx else 0,
        torch.get_num_threads(),
    )
    return dx, das, dbs
