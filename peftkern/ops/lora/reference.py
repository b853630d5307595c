"""Plain torch truth of the linear with a low-rank term. Never optimised.

LoRA: Hu et al. 2021 (arXiv 2106.09685). With ``x̂ = dropout(x)`` and ``S = x̂ Aᵀ``::

    y  = x Wᵀ + b + s S Bᵀ
    dS = s dy B        dx = dy W + mask(dS A)        dA = dSᵀ x̂        dB = s dyᵀ S
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.dropout.reference import keep_mask, philox_dropout
from peftkern.ops.quant4.reference import dequantize_4bit
from peftkern.ops.quant8.reference import dequantize_8bit


def base_weight(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The base as a matrix [N, K] of the activation's dtype, whatever its storage."""
    if format == "dense" or absmax is None:
        return weight.to(dtype)
    if format == "int8":
        return dequantize_8bit(weight, absmax, dtype)
    statistics = (absmax, nested_absmax, nested_offset)
    return dequantize_4bit(weight, *statistics, format, blocksize, shape, dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, S)``; S stays wide for the backward pass."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    statistics = (absmax, nested_absmax, nested_offset)
    shape = [out_features, x.shape[1]]
    w = base_weight(weight, *statistics, format, blocksize, shape, x.dtype)
    dropped = x if seed is None or dropout_p == 0 else philox_dropout(x, dropout_p, seed)
    s = dropped.to(wide) @ lora_A.to(wide).T
    y = x.to(wide) @ w.to(wide).T + scaling * (s @ lora_B.to(wide).T)
    y = y if bias is None else y + bias.to(wide)
    return (y, s) if compute else (y.to(x.dtype), s)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dA, dB)``; what is not needed comes back as an empty tensor."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    ds = scaling * (dy.to(wide) @ lora_B.to(wide))
    dx, da, db = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if need_dx:
        statistics = (absmax, nested_absmax, nested_offset)
        shape = [dy.shape[1], x.shape[1]]
        w = base_weight(weight, *statistics, format, blocksize, shape, x.dtype)
        low_rank = ds @ lora_A.to(wide)
        if seed is not None and dropout_p > 0:
            scale = torch.tensor(1.0 / (1.0 - dropout_p), dtype=torch.float32, device=x.device)
            keep = keep_mask(x.shape, dropout_p, seed)
            low_rank = torch.where(keep, low_rank * scale.to(wide), 0.0)
        dx = dy.to(wide) @ w.to(wide) + low_rank
        dx = dx if compute else dx.to(x.dtype)
    if need_dab:
        dropped = x if seed is None or dropout_p == 0 else philox_dropout(x, dropout_p, seed)
        da = ds.T @ dropped.to(wide)
        db = scaling * (dy.to(wide).T @ s.to(wide))
        da = da if compute else da.to(lora_A.dtype)
        db = db if compute else db.to(lora_B.dtype)
    return dx, da, db
