"""Gradients of DoRA; the row norm is a constant in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only


class DoRALinear(torch.autograd.Function):
    """Saves x, S, the column scale and, where the magnitude is trained, the unscaled output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: tuple[Any, ...],
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        scale = column_scale(x, magnitude, norm)
        y, s, u = torch.ops.peftkern.dora_linear(
            x,
            *base,
            bias,
            lora_A,
            lora_B,
            scale,
            scaling,
            dropout_p,
            seed,
            ctx.needs_input_grad[5],
        )
        ctx.save_for_backward(x, s, u, *base[:4], bias, lora_A, lora_B, scale, norm, seed)
        ctx.format, ctx.blocksize = base[4:6]
        ctx.scaling, ctx.dropout_p, ctx.kind = scaling, dropout_p, magnitude.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, s, u, *stored, bias, lora_A, lora_B, scale, norm, seed = ctx.saved_tensors
        need = ctx.needs_input_grad
        dy = dy.contiguous()
        dx, da, db, dscale = torch.ops.peftkern.dora_linear_backward(
            dy,
            x,
            s,
            u,
            *stored,
            ctx.format,
            ctx.blocksize,
            lora_A,
            lora_B,
            scale,
            ctx.scaling,
            ctx.dropout_p,
            seed,
            need[0],
            need[3] or need[4],
            need[5],
        )
        dx, dbias, da, db, dm = first_order_only(
            "dora_linear",
            dx if need[0] else None,
            bias_gradient(dy, bias) if bias is not None and need[2] else None,
            da if need[3] else None,
            db if need[4] else None,
            (dscale / norm.to(dscale.dtype)).to(ctx.kind) if need[5] else None,
        )
        return dx, None, dbias, da, db, dm, None, None, None, None


def column_scale(x: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """``magnitude / norm`` in fp32, or fp64 for activations in fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return magnitude.detach().to(wide) / norm.to(wide)
