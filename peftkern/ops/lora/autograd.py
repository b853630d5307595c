"""Gradients of the linear with a low-rank term."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only
from peftkern.ops.rows import as_rows, like_rows_of


class LoRALinear(torch.autograd.Function):
    """Saves x and S only: the base is frozen, and dropout is drawn again from its seed.

    x is [..., in] and contiguous; ``base`` holds weight, absmax, nested_absmax, nested_offset,
    format, blocksize and out_features. Reshaping happens in here: as nodes of the graph it would
    cost a third of the call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: tuple[Any, ...],
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        y, s = torch.ops.peftkern.lora_linear(
            as_rows(x), *base, bias, lora_A, lora_B, scaling, dropout_p, seed
        )
        ctx.save_for_backward(x, s, *base[:4], bias, lora_A, lora_B, seed)
        ctx.plain = base[4], base[5], scaling, dropout_p
        return like_rows_of(x, y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, *stored, bias, lora_A, lora_B, seed = ctx.saved_tensors
        format, blocksize, scaling, dropout_p = ctx.plain
        need_dx, _, need_dbias, need_da, need_db, *_ = ctx.needs_input_grad
        dy = as_rows(dy.contiguous())
        dx, da, db = torch.ops.peftkern.lora_linear_backward(
            dy,
            as_rows(x),
            s,
            *stored,
            format,
            blocksize,
            lora_A,
            lora_B,
            scaling,
            dropout_p,
            seed,
            need_dx,
            need_da or need_db,
        )
        dx, da, db, dbias = first_order_only(
            "lora_linear",
            like_rows_of(x, dx) if need_dx else None,
            da if need_da else None,
            db if need_db else None,
            bias_gradient(dy, bias) if need_dbias and bias is not None else None,
        )
        return dx, None, dbias, da, db, None, None, None
