"""A frozen linear of which some entries train."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.arguments import require_tensor
from peftkern.functional.arguments import (
    adapter_for,
    as_matrix,
    bias_for,
    frozen_base,
    needs_grad,
)
from peftkern.ops.sparse_delta.autograd import SparseDeltaLinear
from peftkern.quant import QuantizedTensor


def sparse_delta_linear(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """A frozen linear of which k entries train: ``x (W + scatter(values))ᵀ + bias``.

    Saves x for the backward pass. The gradient of the entries,
    ``dvalues[j] = sum_m dy[m, row_j] x[m, column_j]``, is sampled: the dense gradient of W is never
    formed, nor is a dense copy of a quantized W. The same idea: SHiRA (arXiv 2406.13175).

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        base: frozen weight [out, in], dense (a transposed view is fine, as Conv1D needs) or NF4,
            FP4 or INT8.
        indices: int64 [k], sorted and unique flat positions ``row * in + column``.
        values: [k], what is added at these positions, of x's dtype or float32. Weight and value are
            summed in float32; on a GPU the sum is rounded once to x's dtype for products with many
            rows, as a weight under autocast is.
        bias: [out], or ``None``.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype).

    Raises:
        TypeError: an argument is not a float tensor or has a dtype that does not fit.
        ValueError: shapes or devices do not fit, indices are out of range, unsorted or repeated (on
            a GPU looked at once for each tensor), or the base requires a gradient.

    Example:
        >>> import torch, peftkern as pk
        >>> x, w = torch.randn(4, 64), torch.randn(32, 64)
        >>> at, values = torch.tensor([3, 70]), torch.ones(2, requires_grad=True)
        >>> y = pk.functional.sparse_delta_linear(x, w, at, values)
        >>> y.sum().backward()
        >>> torch.allclose(values.grad, torch.stack([x[:, 3].sum(), x[:, 6].sum()]), atol=1e-5)
        True
    """
    frozen = frozen_base(base)
    x, lead = as_matrix(x, frozen.in_features)
    frozen = frozen.for_input(x)
    bias = bias_for(x, bias)
    require_tensor("indices", indices)
    values = adapter_for(x, values, "values")
    arguments = (x, *frozen.stored(), bias, indices.contiguous(), values)
    if needs_grad(x, bias, values):
        y = SparseDeltaLinear.apply(*arguments)
    else:
        y = torch.ops.peftkern.sparse_delta_linear(*arguments)
    return y.view(*lead, frozen.out_features)
