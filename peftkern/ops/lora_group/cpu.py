"""Native linears with low-rank terms that share their input, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import native
from peftkern.ops.lora.cpu import base_by_torch, native_base
from peftkern.registry import implementation


def _refusal(*args: Any) -> str | None:
    return native.refusal(*args)


@implementation("lora_linear_group", device="cpu", backend="native", can_use=_refusal)
def lora_linear_group(
    x: Tensor,
    weights: list[Tensor],
    absmax: list[Tensor | None],
    nested_absmax: list[Tensor | None],
    nested_offset: list[Tensor | None],
    formats: list[str],
    blocksizes: list[int],
    out_features: list[int],
    biases: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seeds: list[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """All S into one tensor; each low-rank term is the last steps of its base product's sum."""
    m, k = x.shape
    ranks = sum(a.shape[0] for a in lora_A)
    s = torch.empty(m, ranks, dtype=torch.float32)
    ys, members = [], []
    for i, n in enumerate(out_features):
        base, bias = None, biases[i]
        if formats[i] == "dense" and base_by_torch(x.dtype):
            y = torch.nn.functional.linear(x, weights[i], bias)
            bias = None
        else:
            y = torch.empty(m, n, dtype=x.dtype)
            statistics = (absmax[i], nested_absmax[i], nested_offset[i])
            stored = (weights[i], *statistics, formats[i], blocksizes[i])
            base = native_base(*stored, (n, k), x.dtype)
        ys.append(y)
        members.append(
            (
                base,
                n,
                0 if bias is None else bias.data_ptr(),
                lora_A[i].data_ptr(),
                lora_B[i].data_ptr(),
                native.DTYPES[lora_A[i].dtype],
                lora_A[i].shape[0],
                scalings[i],
                native.dropout_parameters(dropout_p[i], seeds[i], k),
                y.data_ptr(),
                0,
                0,
            )
        )
    native.kernels().group_forward(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        k,
        members,
        s.data_ptr(),
        ranks,
        torch.get_num_threads(),
    )
    return ys, s


@implementation("lora_linear_group_backward", device="cpu", backend="native", can_use=_refusal)
def lora_linear_group_backward(
    dys: list[Tensor],
    x: Tensor,
    s: Tensor,
    weights: list[Tensor],
    absmax: list[Tensor | None],
    nested_absmax: list[Tensor | None],
    nested_offset: list[Tensor | None],
    formats: list[str],
    blocksizes: list[int],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seeds: list[Tensor | None],
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx is one product over all members: it is written once, whatever their number."""
    m, k = x.shape
    ranks = s.shape[1]
    ds = torch.empty(m, ranks, dtype=torch.float32)
    dx = torch.empty((m, k) if need_dx else 0, dtype=x.dtype)
    das = [torch.empty(a.shape if need_dab else 0, dtype=a.dtype) for a in lora_A]
    dbs = [torch.empty(b.shape if need_dab else 0, dtype=b.dtype) for b in lora_B]
    dense: Tensor | None = None  # what torch's own products give, in fp32
    members = []
    for i, dy in enumerate(dys):
        base, n = None, dy.shape[1]
        if need_dx and formats[i] == "dense" and base_by_torch(x.dtype):
            part = torch.matmul(dy, weights[i])
            dense = part.float() if dense is None else dense.add_(part)
        elif need_dx:
            statistics = (absmax[i], nested_absmax[i], nested_offset[i])
            stored = (weights[i], *statistics, formats[i], blocksizes[i])
            base = native_base(*stored, (n, k), x.dtype)
        members.append(
            (
                base,
                n,
                0,
                lora_A[i].data_ptr(),
                lora_B[i].data_ptr(),
                native.DTYPES[lora_A[i].dtype],
                lora_A[i].shape[0],
                scalings[i],
                native.dropout_parameters(dropout_p[i], seeds[i], k),
                dy.data_ptr(),
                das[i].data_ptr() if need_dab else 0,
                dbs[i].data_ptr() if need_dab else 0,
            )
        )
    native.kernels().group_backward(
        x.data_ptr(),
        s.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        k,
        members,
        ranks,
        ds.data_ptr(),
        0 if dense is None else dense.data_ptr(),
        dx.data_ptr() if need_dx else 0,
        torch.get_num_threads(),
    )
    return dx, das, dbs
