"""Plain torch truth of the matmul with a 4-bit weight. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.quant4.reference import dequantize_4bit


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``y = x Wᵀ + b`` with W rounded to x.dtype, summed wider, rounded once."""
    shape = [out_features, x.shape[1]]
    statistics = (absmax, nested_absmax, nested_offset)
    w = dequantize_4bit(packed, *statistics, quant_type, blocksize, shape, x.dtype)
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ w.to(wide).T
    y = y if bias is None else y + bias.to(wide)
    return y if compute else y.to(x.dtype)


def linear_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``dx = dy W`` with W rounded to dy.dtype, summed wider, rounded once."""
    shape = [dy.shape[1], in_features]
    statistics = (absmax, nested_absmax, nested_offset)
    w = dequantize_4bit(packed, *statistics, quant_type, blocksize, shape, dy.dtype)
    wide = compute or torch.promote_types(dy.dtype, torch.float32)
    dx = dy.to(wide) @ w.to(wide)
    return dx if compute else dx.to(dy.dtype)
