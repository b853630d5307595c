"""Gradients of the bottleneck adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import first_order_only


class BottleneckAdapter(torch.autograd.Function):
    """Saves x; dropout is drawn again from its seed.

    On a GPU the bottleneck z [M, r] is saved as well, which spares a pass over x. On a CPU it is
    computed again, where that pass finds x in cache.

    ``residual_is_x`` says that the residual is x itself; its gradient is then added inside the
    kernel, and ``residual`` is None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down_w: Tensor,
        down_b: Tensor | None,
        up_w: Tensor,
        up_b: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        residual_is_x: bool,
        activation: str,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        weights = (down_w, down_b, up_w, up_b, scale)
        residual = x if residual_is_x else residual
        keep = x.device.type != "cpu"
        y, z = torch.ops.peftkern.bottleneck_adapter(
            x, *weights, residual, activation, dropout_p, seed, keep
        )
        ctx.save_for_backward(x, z if keep else None, *weights, seed)
        ctx.residual_is_x, ctx.activation, ctx.dropout_p = residual_is_x, activation, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, *weights, seed = ctx.saved_tensors
        need = ctx.needs_input_grad
        dy = dy.contiguous()
        gradients: list[Tensor | None] = [None] * 6
        if any(need[:6]):
            gradients = list(
                torch.ops.peftkern.bottleneck_adapter_backward(
                    dy,
                    x,
                    z,
                    *weights,
                    ctx.activation,
                    ctx.dropout_p,
                    seed,
                    ctx.residual_is_x,
                    need[0],
                    any(need[1:6]),
                )
            )
        wanted = [g if needed else None for g, needed in zip(gradients, need[:6], strict=True)]
        wanted = list(first_order_only("bottleneck_adapter", *wanted, dy if need[6] else None))
        return *wanted, None, None, None, None
