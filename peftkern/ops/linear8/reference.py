"""Plain torch truth of the matmul with a row-wise INT8 weight. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.quant8.reference import dequantize_8bit


def linear_8bit(
    x: Tensor,
    codes: Tensor,
    scb: Tensor,
    bias: Tensor | None,
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``y = x Wᵀ + b`` with W rounded to x.dtype, summed wider, rounded once."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantize_8bit(codes, scb, x.dtype).to(wide).T
    y = y if bias is None else y + bias.to(wide)
    return y if compute else y.to(x.dtype)


def linear_8bit_dx(
    dy: Tensor, codes: Tensor, scb: Tensor, *, compute: torch.dtype | None = None
) -> Tensor:
    """``dx = dy W`` with W rounded to dy.dtype, summed wider, rounded once."""
    wide = compute or torch.promote_types(dy.dtype, torch.float32)
    dx = dy.to(wide) @ dequantize_8bit(codes, scb, dy.dtype).to(wide)
    return dx if compute else dx.to(dy.dtype)
