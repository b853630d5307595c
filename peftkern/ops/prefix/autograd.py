"""Gradients of attention with a trainable prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import first_order_only


class PrefixAttention(torch.autograd.Function):
    """Saves its inputs, the output and one fp32 number a row: no probabilities, no joined keys."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        out, lse = torch.ops.peftkern.prefix_attention(
            q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale, dropout_p, seed
        )
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse, attn_mask, seed)
        ctx.is_causal, ctx.scale, ctx.dropout_p = is_causal, scale, dropout_p
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *saved, attn_mask, seed = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_dqkv, need_dprefix = any(need[:3]), need[3] or need[4]
        # A gradient of stride 0 (from a sum) has no rows to read.
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        gradients = torch.ops.peftkern.prefix_attention_backward(
            dout,
            *saved,
            attn_mask,
            ctx.is_causal,
            ctx.scale,
            ctx.dropout_p,
            seed,
            need_dqkv,
            need_dprefix,
        )
        wanted = [g if wish else None for g, wish in zip(gradients, need, strict=False)]
        return *first_order_only("prefix_attention", *wanted), *(None,) * 5
