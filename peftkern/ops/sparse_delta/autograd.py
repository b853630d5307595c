"""Gradients of the linear with trainable entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only


class SparseDeltaLinear(torch.autograd.Function):
    """Saves x only; the gradient of the entries is sampled, not cut out of a dense one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        absmax: Tensor | None,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        format: str,
        blocksize: int,
        out_features: int,
        bias: Tensor | None,
        indices: Tensor,
        values: Tensor,
    ) -> Tensor:
        base = (weight, absmax, nested_absmax, nested_offset)
        kept = x if ctx.needs_input_grad[10] else None
        ctx.save_for_backward(kept, *base, bias, indices, values)
        ctx.format, ctx.blocksize, ctx.in_features = format, blocksize, x.shape[1]
        return torch.ops.peftkern.sparse_delta_linear(
            x, *base, format, blocksize, out_features, bias, indices, values
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *base, bias, indices, values = ctx.saved_tensors
        need = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = dbias = dvalues = None
        if need[0]:
            dx = torch.ops.peftkern.sparse_delta_dx(
                dy, *base, ctx.format, ctx.blocksize, ctx.in_features, indices, values
            )
        if bias is not None and need[8]:
            dbias = bias_gradient(dy, bias)
        if need[10]:
            dvalues = torch.ops.peftkern.sampled_gradient(dy, x, indices).to(values.dtype)
        dx, dbias, dvalues = first_order_only("sparse_delta_linear", dx, dbias, dvalues)
        return dx, *(None,) * 7, dbias, None, dvalues
