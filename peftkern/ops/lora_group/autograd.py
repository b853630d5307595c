"""Gradients of linears with low-rank terms that share their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only
from peftkern.ops.rows import as_rows, like_rows_of


class LoRALinearGroup(torch.autograd.Function):
    """Saves x once and the S of all members side by side; masks are drawn again from their seeds.

    ``bases`` holds (weight, absmax, nested_absmax, nested_offset, format, blocksize,
    out_features) of each member and ``drops`` their scalings, dropout probabilities and seeds.
    Biases, then all A, then all B follow as single arguments, so that autograd sees them. x is
    [..., in] and contiguous.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: tuple[Any, ...], drops: Any, *flat: Any
    ) -> tuple[Tensor, ...]:
        count = len(bases)
        columns = [list(values) for values in zip(*bases, strict=True)]
        adapters = [list(flat[i * count : (i + 1) * count]) for i in range(3)]
        ys, s = torch.ops.peftkern.lora_linear_group(as_rows(x), *columns, *adapters, *drops)
        scalings, p, seeds = drops
        ctx.save_for_backward(x, s, *(t for base in bases for t in base[:4]), *flat, *seeds)
        ctx.formats = [base[4:6] for base in bases]
        ctx.scalings, ctx.p = scalings, p
        return tuple(like_rows_of(x, y) for y in ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        count = len(ctx.formats)
        x, s, *rest = ctx.saved_tensors
        stored, rest = rest[: 4 * count], rest[4 * count :]
        biases, lora_A, lora_B, seeds = (rest[i * count : (i + 1) * count] for i in range(4))
        bases = [(*stored[4 * i : 4 * i + 4], *format) for i, format in enumerate(ctx.formats)]
        need = ctx.needs_input_grad
        need_bias, need_a, need_b = (need[3 + i * count : 3 + (i + 1) * count] for i in range(3))
        whole = [as_rows(dy.contiguous()) for dy in dys]
        dx, das, dbs = torch.ops.peftkern.lora_linear_group_backward(
            whole,
            as_rows(x),
            s,
            *(list(values) for values in zip(*bases, strict=True)),
            lora_A,
            lora_B,
            ctx.scalings,
            ctx.p,
            seeds,
            need[0],
            any((*need_a, *need_b)),
        )
        dx, *grads = first_order_only(
            "lora_linear_group",
            like_rows_of(x, dx) if need[0] else None,
            *(
                bias_gradient(dy, bias) if wanted and bias is not None else None
                for dy, bias, wanted in zip(whole, biases, need_bias, strict=True)
            ),
            *(da if wanted else None for da, wanted in zip(das, need_a, strict=True)),
            *(db if wanted else None for db, wanted in zip(dbs, need_b, strict=True)),
        )
        return dx, None, None, *grads
