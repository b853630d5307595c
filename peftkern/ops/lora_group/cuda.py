"""Linears with low-rank terms that share their input, on CUDA devices.

Each member's passes read x again: behind the first they find it in L2, and masks of their own and
mixed ranks cost nothing extra. dx is summed in place, member by member.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.cuda_kernels import products, thin
from peftkern.cuda_kernels.products import LowRank, product
from peftkern.cuda_kernels.thin import Dropout
from peftkern.ops.bases import Base
from peftkern.ops.lora.cuda import input_gradient
from peftkern.ops.lora_group.reference import columns_of
from peftkern.registry import implementation


def _why_not(x: Tensor, lora_A: list[Tensor], lora_B: list[Tensor]) -> str | None:
    why = cuda_native.refusal(x)
    return thin.refusal(x, x.shape[1], *lora_A, *lora_B) if why is None else why


def _forward_refusal(
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
) -> str | None:
    return _why_not(x, lora_A, lora_B)


@implementation("lora_linear_group", device="cuda", backend="cuda", can_use=_forward_refusal)
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
    """Two launches a member; S is written where it belongs in the wide one."""
    columns = columns_of(lora_A)
    wide = x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_A), dtype=torch.float32)
    ys = []
    for i, weight in enumerate(weights):
        statistics = (absmax[i], nested_absmax[i], nested_offset[i])
        base = Base(weight, *statistics, formats[i], blocksizes[i], out_features[i], x.shape[1])
        way = products.way_of(x, base, False)
        parts = (lora_B[i], float(scalings[i]), False) if products.needs_parts(way) else None
        dropout = Dropout(dropout_p[i], seeds[i])
        own = wide[:, columns[i]]
        _, u, v = thin.shrink(x, lora_A[i], dropout=dropout, out=own, parts=parts)
        low = own if parts is not None else own.contiguous()
        term = LowRank(low, lora_B[i], float(scalings[i]), u, v)
        ys.append(product(x, base, False, biases[i], term, way=way))
    return ys, wide


def _backward_refusal(
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
) -> str | None:
    why = _why_not(x, lora_A, lora_B)
    for dy in dys:
        why = thin.refusal(dy, dy.shape[1]) if why is None else why
    return why


@implementation(
    "lora_linear_group_backward", device="cuda", backend="cuda", can_use=_backward_refusal
)
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
    """Four launches a member."""
    dx: Tensor | None = None
    das = [a.new_empty(0) for a in lora_A]
    dbs = [b.new_empty(0) for b in lora_B]
    if not (need_dx or need_dab):
        return x.new_empty(0), das, dbs
    columns = columns_of(lora_A)
    for i, dy in enumerate(dys):
        a, b, scaling = lora_A[i], lora_B[i], float(scalings[i])
        statistics = (absmax[i], nested_absmax[i], nested_offset[i])
        base = Base(weights[i], *statistics, formats[i], blocksizes[i], dy.shape[1], x.shape[1])
        dropout = Dropout(dropout_p[i], seeds[i])
        own_dx, ds = input_gradient(dy, x, base, a, b, scaling, dropout, need_dx, dx)
        dx = own_dx if need_dx else dx
        if need_dab:
            dbs[i] = thin.outer(dy, s[:, columns[i]], b, transposed=True, scale=scaling)
            das[i] = thin.outer(x, ds, a, dropout=dropout)
    return x.new_empty(0) if dx is None else dx, das, dbs
