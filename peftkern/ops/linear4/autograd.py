"""Gradients of the matmul with a 4-bit weight; the weight itself is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only
from peftkern.ops.rows import as_rows, like_rows_of


class Linear4bit(torch.autograd.Function):
    """Saves nothing of the activation's size: dx needs the packed weight alone.

    x is [..., in] and contiguous; ``base`` holds packed, absmax, nested_absmax, nested_offset,
    quant_type, blocksize and out_features.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: tuple[Any, ...], bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(*base[:4], bias)
        ctx.plain = base[4], base[5], x.shape[-1]
        return like_rows_of(x, torch.ops.peftkern.linear_4bit(as_rows(x), *base, bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *stored, bias = ctx.saved_tensors
        need_dx, _, need_dbias = ctx.needs_input_grad
        whole = dy.contiguous()
        rows = as_rows(whole)
        dx = dbias = None
        if need_dx:
            dx = torch.ops.peftkern.linear_4bit_dx(rows, *stored, *ctx.plain)
            dx = like_rows_of(whole, dx)
        if bias is not None and need_dbias:
            dbias = bias_gradient(rows, bias)
        dx, dbias = first_order_only("linear_4bit", dx, dbias)
        return dx, None, dbias
