"""What the autograd functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RefuseSecond(torch.autograd.Function):
    """Passes first-order gradients on; differentiating them again is an error that says why."""

    @staticmethod
    def forward(ctx: Any, op: str, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(gradient.detach() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> Any:
        raise RuntimeError(
            f"peftkern: second-order gradients through {ctx.op} are not supported; "
            "write the term that needs them in plain torch"
        )


def first_order_only(op: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients as they are; under ``create_graph=True`` differentiating them again raises.

    Args:
        op: name of the function, for the error text.
        gradients: results of a backward pass, ``None`` where none is needed.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    present = [g.detach().requires_grad_() for g in gradients if g is not None]
    guarded = iter(_RefuseSecond.apply(op, *present)) if present else iter(())
    return tuple(None if g is None else next(guarded) for g in gradients)


def bias_gradient(dy: Tensor, bias: Tensor) -> Tensor:
    """Column sums of ``dy`` [M, N], in fp32, rounded to the bias's dtype."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.sum(0, dtype=wide).to(bias.dtype)
