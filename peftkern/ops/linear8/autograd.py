"""Gradients of the matmul with a row-wise INT8 weight; the weight itself is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only


class Linear8bit(torch.autograd.Function):
    """Saves nothing of the activation's size: dx needs the codes alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scb, bias)
        return torch.ops.peftkern.linear_8bit(x, codes, scb, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, scb, bias = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.peftkern.linear_8bit_dx(dy, codes, scb)
        if bias is not None and ctx.needs_input_grad[3]:
            dbias = bias_gradient(dy, bias)
        dx, dbias = first_order_only("linear_8bit", dx, dbias)
        return dx, None, None, dbias
