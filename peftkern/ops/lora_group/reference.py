"""Plain torch truth of linears with low-rank terms that share their input. Never optimised.

Member i of the group has its own base, adapter, scaling, bias and dropout mask::

    y_i = x W_iᵀ + b_i + s_i S_i B_iᵀ        S_i = mask_i(x) A_iᵀ
    dx  = Σ_i dy_i W_i + mask_i(dS_i A_i)    dS_i = s_i dy_i B_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.lora import reference


def columns_of(lora_A: list[Tensor]) -> list[slice]:
    """Which columns of the shared S [M, sum of ranks] belong to each member."""
    columns, start = [], 0
    for a in lora_A:
        columns.append(slice(start, start + a.shape[0]))
        start += a.shape[0]
    return columns


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
    *,
    compute: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """``(ys, S)``; the columns of S are those of all members side by side."""
    ys, columns = [], []
    for i, weight in enumerate(weights):
        y, s = reference.lora_linear(
            x,
            weight,
            absmax[i],
            nested_absmax[i],
            nested_offset[i],
            formats[i],
            blocksizes[i],
            out_features[i],
            biases[i],
            lora_A[i],
            lora_B[i],
            scalings[i],
            dropout_p[i],
            seeds[i],
            compute=compute,
        )
        ys.append(y)
        columns.append(s)
    return ys, torch.cat(columns, 1)


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
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``(dx, dAs, dBs)``; dx is summed wide and rounded once."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros_like(x, dtype=wide) if need_dx else x.new_empty(0)
    das, dbs = [], []
    for i, columns in enumerate(columns_of(lora_A)):
        dx, da, db = reference.lora_linear_backward(
            dys[i],
            x,
            s[:, columns],
            weights[i],
            absmax[i],
            nested_absmax[i],
            nested_offset[i],
            formats[i],
            blocksizes[i],
            lora_A[i],
            lora_B[i],
            scalings[i],
            dropout_p[i],
            seeds[i],
            need_dx,
            need_dab,
            compute=wide,
        )
        if need_dx:
            total = total + dx
        das.append(da if compute else da.to(lora_A[i].dtype))
        dbs.append(db if compute else db.to(lora_B[i].dtype))
    return total if compute or not need_dx else total.to(x.dtype), das, dbs
