"""Gradients of the linear with a low-rank term."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only


class LoRALinear(torch.autograd.Function):
    """Saves x and S only: the base is frozen, and dropout is drawn again from its seed."""

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
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        statistics = (absmax, nested_absmax, nested_offset)
        y, s = torch.ops.peftkern.lora_linear(
            x,
            weight,
            *statistics,
            format,
            blocksize,
            out_features,
            bias,
            lora_A,
            lora_B,
            scaling,
            dropout_p,
            seed,
        )
        ctx.save_for_backward(x, s, weight, *statistics, bias, lora_A, lora_B, seed)
        ctx.format, ctx.blocksize = format, blocksize
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, *statistics, bias, lora_A, lora_B, seed = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_dx, need_dab = need[0], need[9] or need[10]
        dy = dy.contiguous()
        dx, da, db = torch.ops.peftkern.lora_linear_backward(
            dy,
            x,
            s,
            weight,
            *statistics,
            ctx.format,
            ctx.blocksize,
            lora_A,
            lora_B,
            ctx.scaling,
            ctx.dropout_p,
            seed,
            need_dx,
            need_dab,
        )
        dbias = bias_gradient(dy, bias) if bias is not None and need[8] else None
        dx, da, db, dbias = first_order_only(
            "lora_linear",
            dx if need_dx else None,
            da if need[9] else None,
            db if need[10] else None,
            dbias,
        )
        return dx, *(None,) * 7, dbias, da, db, None, None, None
