"""Dropout that is regenerated, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.arguments import real, require_float
from peftkern.functional.arguments import (
    needs_grad,
    seed_for,
)
from peftkern.ops.dropout.autograd import PhiloxDropout


def dropout(x: Tensor, p: float = 0.5, training: bool = True, seed: Tensor | None = None) -> Tensor:
    """Dropout whose mask is a pure function of (seed, element index): nothing is stored.

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        p: probability of zeroing an element, 0 <= p < 1.
        training: ``False`` returns x itself.
        seed: int64 [1]; default: drawn from torch's CPU generator.

    Returns:
        x with survivors scaled by ``1 / (1 - p)``. Philox-4x32-10, the same bits on every backend.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: p is out of range.
    """
    require_float("x", x)
    if not training:
        return x
    p = real("p", p)
    if p == 0.0:
        return x
    seed = seed_for(x, p, seed)
    if needs_grad(x):
        return PhiloxDropout.apply(x.contiguous(), p, seed)
    return torch.ops.peftkern.philox_dropout(x.contiguous(), p, seed)
