"""Gradients of the matmul with a 4-bit weight; the weight itself is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only


class Linear4bit(torch.autograd.Function):
    """Saves nothing of the activation's size: dx needs the packed weight alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        quant_type: str,
        blocksize: int,
        out_features: int,
        bias: Tensor | None,
    ) -> Tensor:
        base = (packed, absmax, nested_absmax, nested_offset)
        ctx.save_for_backward(*base, bias)
        ctx.quant_type, ctx.blocksize, ctx.in_features = quant_type, blocksize, x.shape[1]
        return torch.ops.peftkern.linear_4bit(x, *base, quant_type, blocksize, out_features, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *base, bias = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.peftkern.linear_4bit_dx(
                dy, *base, ctx.quant_type, ctx.blocksize, ctx.in_features
            )
        if bias is not None and ctx.needs_input_grad[8]:
            dbias = bias_gradient(dy, bias)
        dx, dbias = first_order_only("linear_4bit", dx, dbias)
        return dx, *(None,) * 7, dbias
