"""Gradients of LLM.int8(): those of the exact product, as in bitsandbytes; rounding has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.linear8.autograd import frozen_gradients
from peftkern.ops.rows import as_rows, like_rows_of


class LLMInt8(torch.autograd.Function):
    """Saves nothing of the activation's size: dx needs the codes alone.

    x is [..., in] and contiguous.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        ctx.save_for_backward(codes, scb, bias)
        y = torch.ops.peftkern.llm_int8(as_rows(x), codes, scb, bias, threshold)
        return like_rows_of(x, y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dbias = frozen_gradients("llm_int8", ctx, dy)
        return dx, None, None, dbias, None
