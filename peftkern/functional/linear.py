"""Linear layers over quantized weights."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.functional.arguments import (
    FrozenBase,
    activations,
    bias_for,
    needs_grad,
    quantized_base,
)
from peftkern.ops.linear4.autograd import Linear4bit
from peftkern.ops.linear8.autograd import Linear8bit
from peftkern.ops.llm_int8.autograd import LLMInt8
from peftkern.ops.llm_int8.contract import usable_threshold
from peftkern.ops.rows import as_rows, like_rows_of
from peftkern.quant import QuantizedTensor


def linear_4bit(x: Tensor, q: QuantizedTensor | FrozenBase, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with an NF4 or FP4 weight that stays packed, forward and backward.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        q: the weight [out, in] from :func:`peftkern.quantize_4bit`.
        bias: [out], or ``None``.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype). The weight is rounded to
        that dtype, sums are fp32, and the result is rounded once.

    Raises:
        TypeError: x is not a float tensor, or q is not a 4-bit :class:`QuantizedTensor`.
        ValueError: shapes or devices do not fit; the message names the argument.

    Example:
        >>> import torch, peftkern as pk
        >>> q = pk.quantize_4bit(torch.randn(32, 64))
        >>> pk.functional.linear_4bit(torch.randn(2, 5, 64), q).shape
        torch.Size([2, 5, 32])
    """
    base = quantized_base(q, ("nf4", "fp4"))
    x = activations(x, base.in_features)
    bias = bias_for(x, bias)
    if needs_grad(x, bias):
        y: Tensor = Linear4bit.apply(x, base.stored(), bias)
        return y
    return like_rows_of(x, torch.ops.peftkern.linear_4bit(as_rows(x), *base.stored(), bias))


def linear_8bit(
    x: Tensor,
    q: QuantizedTensor | FrozenBase,
    bias: Tensor | None = None,
    *,
    threshold: float | None = None,
) -> Tensor:
    """``x @ W.T + bias`` with a row-wise INT8 weight, forward and backward.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        q: the weight [out, in] from :func:`peftkern.quantize_8bit`.
        bias: [out], or ``None``.
        threshold: ``None``: the exactly dequantized weight multiplies. A number: LLM.int8()
            (Dettmers 2022, arXiv 2208.07339) with bitsandbytes' numbers: each row of x is rounded
            to 8 bits against the largest value in it, integers are multiplied exactly, and columns
            of x that hold a magnitude of at least the threshold (6.0 is usual; 0: none) are
            multiplied as they are. Faster where integers are, and rougher: the result of normal
            values is off by 0.7 to 0.95 % of its norm (128 to 11008 input features). Which columns
            are apart depends on all rows of the call. The gradient of x is that of the exact
            product.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype). With a threshold, rows that
        hold NaN, or Inf that is no outlier, are NaN.

    Raises:
        TypeError: x is not a float tensor, q is not an INT8 :class:`QuantizedTensor`, or threshold
            is no number.
        ValueError: shapes or devices do not fit, threshold is negative or not finite, or more than
            131072 input features with one; the message names the argument.

    Example:
        >>> import torch, peftkern as pk
        >>> w, x = torch.randn(32, 64), torch.randn(4, 64)
        >>> y = pk.functional.linear_8bit(x, pk.quantize_8bit(w), threshold=6.0)
        >>> bool((y - x @ w.T).norm() < 0.03 * (x @ w.T).norm())
        True
    """
    base = quantized_base(q, ("int8",))
    x = activations(x, base.in_features)
    bias = bias_for(x, bias)
    if threshold is not None:
        return _llm_int8(x, base, bias, threshold)
    if needs_grad(x, bias):
        y: Tensor = Linear8bit.apply(x, base.weight, base.absmax, bias)
        return y
    y = torch.ops.peftkern.linear_8bit(as_rows(x), base.weight, base.absmax, bias)
    return like_rows_of(x, y)


def checked_threshold(threshold: float) -> float:
    """The threshold of LLM.int8() as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or fp32 does not hold it.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(f"threshold: expected a number or None, got {type(threshold).__name__}")
    usable_threshold(float(threshold))
    return float(threshold)


def _llm_int8(x: Tensor, base: FrozenBase, bias: Tensor | None, threshold: float) -> Tensor:
    args = (base.weight, base.absmax, bias, checked_threshold(threshold))
    if needs_grad(x, bias):
        y: Tensor = LLMInt8.apply(x, *args)
        return y
    return like_rows_of(x, torch.ops.peftkern.llm_int8(as_rows(x), *args))
