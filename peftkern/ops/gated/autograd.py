"""Gradients of gated activations, and of the feed-forward layer around one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import bias_gradient, first_order_only
from peftkern.ops.rows import as_rows, like_rows_of


class GatedActivation(torch.autograd.Function):
    """Saves the two inputs; h is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.ops.peftkern.gated_activation(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup, _ = torch.ops.peftkern.gated_activation_backward(
            dh.contiguous(), gate, up, ctx.activation
        )
        need = ctx.needs_input_grad
        dgate, dup = first_order_only(
            "gated_activation", dgate if need[0] else None, dup if need[1] else None
        )
        return dgate, dup, None


class LoRAMLP(torch.autograd.Function):
    """``down(a(gate(x)) up(x))`` with a low-rank term in each of the three linears.

    Saves x, the outputs of gate and up, and the three S. h is computed again in the backward
    pass, by the kernel that turns its gradient into those of gate and up.

    The tensors of the three linears come as one flat list, so that autograd sees them: biases,
    then A and B of gate, up and down. x is [..., in] and contiguous.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: str, bases: tuple[Any, ...], drops: Any, *flat: Any
    ) -> Tensor:
        biases, lora_A, lora_B = list(flat[:3]), list(flat[3:6]), list(flat[6:9])
        columns = [list(values) for values in zip(*bases, strict=True)]
        scalings, p, seeds = drops
        ops = torch.ops.peftkern
        (gate, up), s = ops.lora_linear_group(
            as_rows(x),
            *(values[:2] for values in columns),
            biases[:2],
            lora_A[:2],
            lora_B[:2],
            scalings[:2],
            p[:2],
            seeds[:2],
        )
        h = ops.gated_activation(gate, up, activation)
        adapter = (lora_A[2], lora_B[2], scalings[2], p[2], seeds[2])
        y, s_down = ops.lora_linear(h, *bases[2], biases[2], *adapter)
        statistics = [tensor for base in bases for tensor in base[:4]]
        ctx.save_for_backward(x, gate, up, s, s_down, *statistics, *flat, *seeds)
        ctx.activation, ctx.scalings, ctx.p = activation, scalings, p
        ctx.formats = [base[4:6] for base in bases]
        return like_rows_of(x, y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gate, up, s, s_down, *rest = ctx.saved_tensors
        statistics = [rest[4 * i : 4 * i + 4] for i in range(3)]
        biases, lora_A, lora_B, seeds = rest[12:15], rest[15:18], rest[18:21], rest[21:24]
        bases = [(*t, *format) for t, format in zip(statistics, ctx.formats, strict=True)]
        need = ctx.needs_input_grad
        need_bias, need_a, need_b = need[4:7], need[7:10], need[10:13]
        ops = torch.ops.peftkern
        dy = as_rows(dy.contiguous())
        down = (*bases[2], lora_A[2], lora_B[2], ctx.scalings[2], ctx.p[2], seeds[2])
        grads: list[Tensor | None] = [None] * 9
        need_down = need_a[2] or need_b[2]
        need_inner = need[0] or any((*need_bias[:2], *need_a[:2], *need_b[:2]))
        dx = None
        if need_inner:
            # Of x, this call reads no value: gate has h's shape and dtype.
            dh, _, _ = ops.lora_linear_backward(dy, gate, s_down, *down, True, False)
            dgate, dup, h = ops.gated_activation_backward(dh, gate, up, ctx.activation)
            columns = [list(values) for values in zip(*bases[:2], strict=True)]
            inner_dx, das, dbs = ops.lora_linear_group_backward(
                [dgate, dup],
                as_rows(x),
                s,
                *columns,
                lora_A[:2],
                lora_B[:2],
                ctx.scalings[:2],
                ctx.p[:2],
                seeds[:2],
                need[0],
                any((*need_a[:2], *need_b[:2])),
            )
            dx = like_rows_of(x, inner_dx) if need[0] else None
            for i, d in enumerate((dgate, dup)):
                grads[i] = bias_gradient(d, biases[i]) if need_bias[i] else None
                grads[3 + i] = das[i] if need_a[i] else None
                grads[6 + i] = dbs[i] if need_b[i] else None
        else:
            h = ops.gated_activation(gate, up, ctx.activation) if need_down else gate
        if need_down:
            _, da, db = ops.lora_linear_backward(dy, h, s_down, *down, False, True)
            grads[5], grads[8] = da if need_a[2] else None, db if need_b[2] else None
        grads[2] = bias_gradient(dy, biases[2]) if need_bias[2] else None
        dx, *guarded = first_order_only("lora_mlp", dx, *grads)
        return dx, None, None, None, *guarded
