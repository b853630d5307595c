"""Gradients of the linear with a different low-rank term for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only


class MultiLoRALinear(torch.autograd.Function):
    """Saves x, S and the adapter of each row.

    ``base`` holds (weight, absmax, nested_absmax, nested_offset, format, blocksize, out_features).
    All A, then all B come last and as single arguments, so that autograd sees them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: tuple[Any, ...],
        bias: Tensor | None,
        adapter_ids: Tensor,
        scalings: list[float],
        dropout_p: list[float],
        seed: Tensor | None,
        *adapters: Tensor,
    ) -> Tensor:
        count = len(scalings)
        lora_A, lora_B = list(adapters[:count]), list(adapters[count:])
        y, s = torch.ops.peftkern.multi_lora_linear(
            x, *base, bias, adapter_ids, lora_A, lora_B, scalings, dropout_p, seed
        )
        ctx.save_for_backward(x, s, *base[:4], bias, adapter_ids, seed, *adapters)
        ctx.format, ctx.blocksize = base[4:6]
        ctx.scalings, ctx.dropout_p = scalings, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, s, *rest = ctx.saved_tensors
        stored, (bias, adapter_ids, seed), adapters = rest[:4], rest[4:7], rest[7:]
        count = len(ctx.scalings)
        need = ctx.needs_input_grad
        dy = dy.contiguous()
        dx, das, dbs = torch.ops.peftkern.multi_lora_linear_backward(
            dy,
            x,
            s,
            *stored,
            ctx.format,
            ctx.blocksize,
            adapter_ids,
            list(adapters[:count]),
            list(adapters[count:]),
            ctx.scalings,
            ctx.dropout_p,
            seed,
            need[0],
            any(need[7:]),
        )
        dbias = bias_gradient(dy, bias) if bias is not None and need[2] else None
        dx, dbias, *grads = first_order_only(
            "multi_lora_linear",
            dx if need[0] else None,
            dbias,
            *(d if wanted else None for d, wanted in zip((*das, *dbs), need[7:], strict=True)),
        )
        return dx, None, dbias, None, None, None, None, *grads
