"""Gradients of LLM.int8(): those of the exact product, as in bitsandbytes; rounding has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only
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
        codes, scb, bias = ctx.saved_tensors
        whole = dy.contiguous()
        rows = as_rows(whole)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = like_rows_of(whole, torch.ops.peftkern.linear_8bit_dx(rows, codes, scb))
        if bias is not None and ctx.needs_input_grad[3]:
            dbias = bias_gradient(rows, bias)
        dx, dbias = first_order_only("llm_int8", dx, dbias)
        return dx, None, None, dbias, None
