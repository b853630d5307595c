"""A frozen linear with a low-rank term."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.arguments import real
from peftkern.functional.arguments import (
    FrozenBase,
    activations,
    adapter_for,
    bias_for,
    frozen_base,
    needs_grad,
    seed_for,
)
from peftkern.ops.lora.autograd import LoRALinear
from peftkern.ops.rows import as_rows, like_rows_of
from peftkern.quant import QuantizedTensor


def lora_linear(
    x: Tensor,
    base: Tensor | QuantizedTensor | FrozenBase,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """A frozen linear with a low-rank term: ``x Wᵀ + bias + scaling (dropout(x) Aᵀ) Bᵀ``.

    Saves x and ``dropout(x) Aᵀ`` for the backward pass and nothing else: no mask, no dropped copy
    of x, no dequantized weight. Source: LoRA (arXiv 2106.09685); semantics of HF PEFT.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        base: frozen weight [out, in], dense (a transposed view is fine, as Conv1D needs) or NF4,
            FP4 or INT8.
        lora_A: [r, in], of x's dtype or float32 (master weights are read as they are; x is never
            cast up to them).
        lora_B: [out, r], of lora_A's dtype.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        bias: [out], or ``None``.
        dropout_p: probability of zeroing an element of x on its way into A.
        training: ``False`` switches dropout off.
        seed: int64 [1] that fixes the dropout mask; default: drawn from torch's CPU generator, so
            ``torch.manual_seed`` and checkpoint recomputation behave as with torch's dropout.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype).

    Raises:
        TypeError: an argument is not a float tensor or has a dtype that does not fit.
        ValueError: shapes or devices do not fit, or the base requires a gradient.

    Example:
        >>> import torch, peftkern as pk
        >>> x, w = torch.randn(4, 64), torch.randn(32, 64)
        >>> a, b = torch.randn(8, 64, requires_grad=True), torch.zeros(32, 8, requires_grad=True)
        >>> y = pk.functional.lora_linear(x, w, a, b, scaling=2.0)
        >>> torch.allclose(y, x @ w.T, atol=1e-4)
        True
    """
    frozen = frozen_base(base)
    x = activations(x, frozen.in_features)
    stored = frozen.for_input(x).stored()
    bias = bias_for(x, bias)
    lora_A, lora_B = adapter_for(x, lora_A, "lora_A"), adapter_for(x, lora_B, "lora_B")
    p = real("dropout_p", dropout_p) if training else 0.0
    adapter = (bias, lora_A, lora_B, real("scaling", scaling), p, seed_for(x, p, seed))
    if needs_grad(x, bias, lora_A, lora_B):
        y: Tensor = LoRALinear.apply(x, stored, *adapter)
        return y
    y, _ = torch.ops.peftkern.lora_linear(as_rows(x), *stored, *adapter)
    return like_rows_of(x, y)
