"""Plain torch truth of a linear with a different low-rank term for each row. Never optimised.

Row m uses adapter ``i = ids[m]`` (-1: none). With ``x̂ = dropout_i(x)`` of the whole x::

    y[m] = x[m] Wᵀ + b + s_i (x̂[m] A_iᵀ) B_iᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.dropout.reference import keep_mask, philox_dropout
from peftkern.ops.lora.reference import base_weight


def check_ids(adapter_ids: Tensor, count: int) -> None:
    """Raise ``ValueError`` unless every id is -1 or the number of an adapter."""
    if adapter_ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(adapter_ids))
    if low < -1 or high >= count:
        raise ValueError(
            f"adapter_ids: got values from {low} to {high}, expected -1 (base only) to {count - 1}"
        )


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
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, S)``; row m of S holds the columns of its adapter, then zeros."""
    check_ids(adapter_ids, len(lora_A))
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    shape = [out_features, x.shape[1]]
    statistics = (absmax, nested_absmax, nested_offset)
    w = base_weight(weight, *statistics, format, blocksize, shape, x.dtype).to(wide)
    y = x.to(wide) @ w.T
    s = y.new_zeros((x.shape[0], max((a.shape[0] for a in lora_A), default=0)))
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = (adapter_ids == i).nonzero().squeeze(1)
        p = dropout_p[i]
        dropped = x if seed is None or p == 0 else philox_dropout(x, p, seed)
        part = dropped[rows].to(wide) @ a.to(wide).T
        s[rows, : a.shape[0]] = part
        y[rows] += scalings[i] * (part @ b.to(wide).T)
    y = y if bias is None else y + bias.to(wide)
    return (y, s) if compute else (y.to(x.dtype), s)


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
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``(dx, dAs, dBs)``; an adapter without rows gets zeros."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(0)
    if need_dx:
        shape = [dy.shape[1], x.shape[1]]
        statistics = (absmax, nested_absmax, nested_offset)
        w = base_weight(weight, *statistics, format, blocksize, shape, x.dtype)
        dx = dy.to(wide) @ w.to(wide)
    das, dbs = [], []
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = (adapter_ids == i).nonzero().squeeze(1)
        p = dropout_p[i] if seed is not None else 0.0
        ds = scalings[i] * (dy[rows].to(wide) @ b.to(wide))
        if need_dx:
            low_rank = ds @ a.to(wide)
            if seed is not None and p > 0:
                scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32, device=x.device)
                keep = keep_mask(x.shape, p, seed)[rows]
                low_rank = torch.where(keep, low_rank * scale.to(wide), 0.0)
            dx[rows] += low_rank
        if need_dab:
            dropped = x if seed is None or p == 0 else philox_dropout(x, p, seed)
            da = ds.T @ dropped[rows].to(wide)
            db = scalings[i] * (dy[rows].to(wide).T @ s[rows, : a.shape[0]].to(wide))
            das.append(da if compute else da.to(a.dtype))
            dbs.append(db if compute else db.to(b.dtype))
        else:
            das.append(a.new_empty(0))
            dbs.append(b.new_empty(0))
    return dx if compute or not need_dx else dx.to(x.dtype), das, dbs
