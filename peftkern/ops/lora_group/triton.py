"""Linears with low-rank terms that share their input, by Triton on an NVIDIA GPU.

x is read once for the S of all members, and once for all dA, where none of them drops anything;
members with masks of their own need a pass each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.ops.lora_group.reference import columns_of
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import refusal
from peftkern.triton_kernels.matmul import Dropout, LowRank, matmul
from peftkern.triton_kernels.passes import adapter_gradient, down_gradient, shrink


def _why_not(x: Tensor, lora_A: list[Tensor]) -> str | None:
    return refusal(x, x.dtype, *(a.dtype for a in lora_A))


def _shared(lora_A: list[Tensor], drops: list[Dropout]) -> bool:
    """Whether one pass over x serves all members."""
    alike = len({a.dtype for a in lora_A}) == 1
    return alike and len(lora_A) > 1 and all(drop.seed is None for drop in drops)


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
    return _why_not(x, lora_A)


@implementation("lora_linear_group", device="cuda", backend="triton", can_use=_forward_refusal)
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
    """One pass over x for all S; then each member's matmul with its term in the epilogue."""
    drops = [Dropout.of(p, seed) for p, seed in zip(dropout_p, seeds, strict=True)]
    if _shared(lora_A, drops):
        s = shrink(x, torch.cat(lora_A), Dropout.of(0.0, None))
        own = [s[:, columns].contiguous() for columns in columns_of(lora_A)]
    else:
        own = [shrink(x, a, drop) for a, drop in zip(lora_A, drops, strict=True)]
        s = torch.cat(own, dim=1)
    ys = []
    for i, weight in enumerate(weights):
        statistics = (absmax[i], nested_absmax[i], nested_offset[i])
        base = Base(weight, *statistics, formats[i], blocksizes[i], out_features[i], x.shape[1])
        term = LowRank(own[i], lora_B[i], float(scalings[i]), Dropout.of(0.0, None))
        ys.append(matmul(x, base, bias=biases[i], low_rank=term))
    return ys, s


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
    return _why_not(x, lora_A)


@implementation(
    "lora_linear_group_backward", device="cuda", backend="triton", can_use=_backward_refusal
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
    """dS and dB of each member in one pass over its dy; one pass over x for all dA."""
    dx = x.new_empty(0)
    das = [a.new_empty(0) for a in lora_A]
    dbs = [b.new_empty(0) for b in lora_B]
    if not (need_dx or need_dab):
        return dx, das, dbs
    drops = [Dropout.of(p, seed) for p, seed in zip(dropout_p, seeds, strict=True)]
    columns = columns_of(lora_A)
    dss: list[Tensor] = []
    total: Tensor | None = None
    for i, dy in enumerate(dys):
        own = s[:, columns[i]].contiguous()
        ds, dbs[i] = adapter_gradient(dy, own, lora_B[i], float(scalings[i]), need_dab)
        dss.append(ds)
        if need_dx:
            statistics = (absmax[i], nested_absmax[i], nested_offset[i])
            base = Base(weights[i], *statistics, formats[i], blocksizes[i], dy.shape[1], x.shape[1])
            term = LowRank(ds, lora_A[i].t(), 1.0, drops[i])
            part = matmul(dy, base, transposed=True, low_rank=term)
            # The members' sum stays fp32 until the last one is in.
            total = part if total is None else total.float().add_(part)
    if total is not None:
        dx = total.to(x.dtype)
    if need_dab and _shared(lora_A, drops):
        whole = down_gradient(torch.cat(dss, dim=1), x, torch.cat(lora_A), drops[0])
        das = [whole[place].clone() for place in columns]
    elif need_dab:
        das = [
            down_gradient(ds, x, a, drop) for ds, a, drop in zip(dss, lora_A, drops, strict=True)
        ]
    return dx, das, dbs
