"""Linear layers over quantized weights."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.functional.arguments import (
    as_matrix,
    bias_for,
    matrix_shape,
    needs_grad,
    require_quantized,
)
from peftkern.ops.linear4.autograd import Linear4bit
from peftkern.ops.linear8.autograd import Linear8bit
from peftkern.quant import QuantizedTensor


def linear_4bit(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
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
    require_quantized(q, ("nf4", "fp4"))
    x, lead = as_matrix(x, matrix_shape(q.shape)[1])
    bias = bias_for(x, bias)
    arguments = (x, q.weight, *q.statistics(), q.quant_type, q.blocksize, q.shape[0], bias)
    if needs_grad(x, bias):
        y = Linear4bit.apply(*arguments)
    else:
        y = torch.ops.peftkern.linear_4bit(*arguments)
    return y.view(*lead, q.shape[0])


def linear_8bit(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with a row-wise INT8 weight, exactly dequantized, forward and backward.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        q: the weight [out, in] from :func:`peftkern.quantize_8bit`.
        bias: [out], or ``None``.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype).

    Raises:
        TypeError: x is not a float tensor, or q is not an INT8 :class:`QuantizedTensor`.
        ValueError: shapes or devices do not fit; the message names the argument.
    """
    require_quantized(q, ("int8",))
    x, lead = as_matrix(x, matrix_shape(q.shape)[1])
    bias = bias_for(x, bias)
    arguments = (x, q.weight, q.absmax, bias)
    if needs_grad(x, bias):
        y = Linear8bit.apply(*arguments)
    else:
        y = torch.ops.peftkern.linear_8bit(*arguments)
    return y.view(*lead, q.shape[0])
