"""Gradients of the matmul with a row-wise INT8 weight; the weight itself is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only
from peftkern.ops.rows import as_rows, like_rows_of


def frozen_gradients(op: str, ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the bias, inputs 0 and 3 of a function that saved codes, scb, bias."""
    codes, scb, bias = ctx.saved_tensors
    whole = dy.contiguous()
    rows = as_rows(whole)
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = like_rows_of(whole, torch.ops.peftkern.linear_8bit_dx(rows, codes, scb))
    if bias is not None and ctx.needs_input_grad[3]:
        dbias = bias_gradient(rows, bias)
    dx, dbias = first_order_only(op, dx, dbias)
    return dx, dbias


class Linear8bit(torch.autograd.Function):
    """Saves nothing of the activation's size: dx needs the codes alone.

    x is [..., in] and contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scb, bias)
        return like_rows_of(x, torch.ops.peftkern.linear_8bit(as_rows(x), codes, scb, bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dbias = frozen_gradients("linear_8bit", ctx, dy)
        return dx, None, None, dbias
