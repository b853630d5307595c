"""Gradient of counter-based dropout: the same mask, drawn again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PhiloxDropout(torch.autograd.Function):
    """Dropout that stores its seed and no mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return torch.ops.peftkern.philox_dropout(x, p, seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        # Linear in dy, so it is its own derivative: higher orders work too.
        return PhiloxDropout.apply(dy.contiguous(), ctx.p, seed), None, None
