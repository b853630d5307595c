"""Gradient of the prompt in front of looked-up embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.ops.gradients import first_order_only


class PromptEmbedding(torch.autograd.Function):
    """Saves nothing: the gradient is the first rows of the result's."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, prompt: Tensor) -> Tensor:
        ctx.length, ctx.per_row = prompt.shape[-2], prompt.dim() == 3
        ctx.kind = prompt.dtype
        return torch.ops.peftkern.prompt_embedding(ids, table, prompt)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradient = torch.ops.peftkern.prompt_gradient(dy.contiguous(), ctx.length, ctx.per_row)
        (dprompt,) = first_order_only("prompt_embedding", gradient.to(ctx.kind))
        return None, None, dprompt
