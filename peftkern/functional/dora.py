"""A frozen linear with a low-rank term and learned row magnitudes (DoRA)."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.arguments import real, require_float
from peftkern.functional.arguments import (
    adapter_for,
    as_matrix,
    bias_for,
    frozen_base,
    needs_grad,
    seed_for,
)
from peftkern.ops.checks import FLOATS
from peftkern.ops.dora.autograd import DoRALinear, column_scale
from peftkern.quant import QuantizedTensor


def weight_norm_sq(base: Tensor | QuantizedTensor) -> Tensor:
    """Sum of squares of each row of a weight, in fp64; of a quantized one without dequantizing it.

    Args:
        base: weight [out, in], dense or quantized.

    Returns:
        fp64 [out]. It does not change while the base is frozen: keep it for
        :func:`dora_weight_norm`.

    Raises:
        TypeError: not a float tensor or a quantized one.
        ValueError: not a matrix.

    Example:
        >>> import torch, peftkern as pk
        >>> pk.functional.weight_norm_sq(torch.ones(2, 64))
        tensor([64., 64.], dtype=torch.float64)
    """
    with torch.no_grad():
        frozen = frozen_base(base)
        weight, *rest = frozen.bundle()
        if frozen.format == "dense":
            require_float("base", weight)
            if not (weight.is_contiguous() or weight.t().is_contiguous()):
                weight = weight.contiguous()
        sizes = (frozen.out_features, frozen.in_features)
        return torch.ops.peftkern.weight_norm_sq(weight, *rest, *sizes)


def _check_norm(
    name: str, value: Tensor, base: Tensor | QuantizedTensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    require_float(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {dtypes[0]}")
    rows = frozen_base(base).out_features
    if value.shape != (rows,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({rows},)")
    if value.device != base.device:
        raise ValueError(f"{name}: is on {value.device}, expected {base.device} like base")


def dora_weight_norm(
    base: Tensor | QuantizedTensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    base_norm_sq: Tensor | None = None,
) -> Tensor:
    """Norm of each row of ``W + scaling B A`` without forming B A, and W where it is quantized.

    ``|w|² + 2 s (W Aᵀ)·B + s² (B A Aᵀ)·B`` for each row, with sums in fp64 where terms may cancel.
    No gradient flows through it (DoRA, arXiv 2402.09353, section 4.3).

    Args:
        base: weight [out, in], dense or quantized.
        lora_A: [r, in], a float dtype.
        lora_B: [out, r], of lora_A's dtype.
        scaling: factor of the low-rank term.
        base_norm_sq: fp64 [out] from :func:`weight_norm_sq`; default: computed.

    Returns:
        fp32 [out] (fp64 for adapters in fp64).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or device does not fit.

    Example:
        >>> import torch, peftkern as pk
        >>> w, a, b = torch.randn(32, 64), torch.randn(4, 64), torch.randn(32, 4)
        >>> norm = pk.functional.dora_weight_norm(w, a, b, 0.5)
        >>> torch.allclose(norm, (w + 0.5 * b @ a).norm(dim=1), rtol=1e-5)
        True
    """
    require_float("lora_A", lora_A)
    require_float("lora_B", lora_B)
    if base_norm_sq is None:
        base_norm_sq = weight_norm_sq(base)
    else:
        _check_norm("base_norm_sq", base_norm_sq, base, (torch.float64,))
    with torch.no_grad():
        frozen = frozen_base(base)
        if frozen.format == "dense":
            require_float("base", frozen.weight)
        factor = real("scaling", scaling)
        weight, *rest = frozen.bundle()
        if frozen.format == "dense" and not (weight.is_contiguous() or weight.t().is_contiguous()):
            weight = weight.contiguous()
        adapter = (lora_A.detach().contiguous(), lora_B.detach().contiguous(), factor)
        return torch.ops.peftkern.dora_weight_norm(
            weight, *rest, frozen.out_features, *adapter, base_norm_sq
        )


def dora_linear(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    weight_norm: Tensor | None = None,
) -> Tensor:
    """DoRA: ``m / ‖W + sBA‖ ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + bias`` with row norms taken as constants.

    With active dropout, ``x̂ = dropout(x)`` and ``c = m / norm`` the result is that of HF PEFT:
    ``x Wᵀ + (c - 1) x̂ Wᵀ + c s x̂ Aᵀ Bᵀ + bias``. Source: DoRA (arXiv 2402.09353).

    Saves x, ``x̂ Aᵀ``, and one tensor like the result where the magnitude needs a gradient.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        base: frozen weight [out, in], dense or quantized.
        lora_A: [r, in], of x's dtype or float32.
        lora_B: [out, r], of lora_A's dtype.
        magnitude: [out], a float dtype.
        scaling: factor of the low-rank term.
        bias: [out], or ``None``; not scaled.
        dropout_p: probability of zeroing an element of x on its way into A.
        training: ``False`` switches dropout off.
        seed: int64 [1] that fixes the mask; default: drawn from torch's CPU generator.
        weight_norm: [out], the norms of the rows of ``W + sBA``, if they are known to be current;
            default: :func:`dora_weight_norm`.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype). Differentiable in x,
        lora_A, lora_B, magnitude and bias.

    Raises:
        TypeError: an argument is not a float tensor or has a dtype that does not fit.
        ValueError: shapes or devices do not fit, or the base requires a gradient.

    Example:
        >>> import torch, peftkern as pk
        >>> x, w = torch.randn(4, 64), torch.randn(32, 64)
        >>> a, b = torch.randn(8, 64), torch.zeros(32, 8)
        >>> y = pk.functional.dora_linear(x, w, a, b, w.norm(dim=1), scaling=2.0)
        >>> torch.allclose(y, x @ w.T, atol=1e-4)  # B is zero and m the norm: nothing changes
        True
    """
    frozen = frozen_base(base)
    x, lead = as_matrix(x, frozen.in_features)
    _check_norm("magnitude", magnitude, base, FLOATS)
    if weight_norm is not None:
        _check_norm("weight_norm", weight_norm, base, FLOATS)
    if weight_norm is None:
        weight_norm = dora_weight_norm(base, lora_A, lora_B, scaling)
    frozen = frozen.for_input(x)
    bias = bias_for(x, bias)
    lora_A, lora_B = adapter_for(x, lora_A, "lora_A"), adapter_for(x, lora_B, "lora_B")
    p = real("dropout_p", dropout_p) if training else 0.0
    factor = real("scaling", scaling)
    seed = seed_for(x, p, seed)
    stored = frozen.stored()
    weight_norm = weight_norm.detach()
    if needs_grad(x, bias, lora_A, lora_B, magnitude):
        low_rank = (lora_A, lora_B, magnitude, weight_norm, factor, p, seed)
        y = DoRALinear.apply(x, stored, bias, *low_rank)
    else:
        scale = column_scale(x, magnitude, weight_norm)
        y, _, _ = torch.ops.peftkern.dora_linear(
            x, *stored, bias, lora_A, lora_B, scale, factor, p, seed, False
        )
    return y.view(*lead, frozen.out_features)
