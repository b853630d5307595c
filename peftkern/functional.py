"""Stateless differentiable functions: docs, defaults and shape handling; no maths.

Every function takes activations with any leading dimensions, honours autocast as
``torch.nn.functional.linear`` does, and is differentiable in the activations, the adapters and the
biases. Base weights are frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.dropout.autograd import PhiloxDropout
from peftkern.ops.linear4.autograd import Linear4bit
from peftkern.ops.linear8.autograd import Linear8bit
from peftkern.ops.lora.autograd import LoRALinear
from peftkern.quant import QuantizedTensor

__all__ = ["dropout", "linear_4bit", "linear_8bit", "lora_linear"]


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
    _require_quantized(q, ("nf4", "fp4"))
    x, lead = _as_matrix(x, _matrix_shape(q.shape)[1])
    bias = _bias_for(x, bias)
    arguments = (x, q.weight, *q.statistics(), q.quant_type, q.blocksize, q.shape[0], bias)
    if _needs_grad(x, bias):
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
    _require_quantized(q, ("int8",))
    x, lead = _as_matrix(x, _matrix_shape(q.shape)[1])
    bias = _bias_for(x, bias)
    arguments = (x, q.weight, q.absmax, bias)
    if _needs_grad(x, bias):
        y = Linear8bit.apply(*arguments)
    else:
        y = torch.ops.peftkern.linear_8bit(*arguments)
    return y.view(*lead, q.shape[0])


def lora_linear(
    x: Tensor,
    base: Tensor | QuantizedTensor,
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
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    format, blocksize = "dense", 0
    if isinstance(base, QuantizedTensor):
        out_features, in_features = _matrix_shape(base.shape)
        weight, statistics = base.weight, base.statistics()
        format, blocksize = base.quant_type, base.blocksize
    elif isinstance(base, Tensor):
        out_features, in_features = _matrix_shape(base.shape)
        weight = base
        if base.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "base: requires a gradient, but the base of a LoRA linear is frozen; "
                "call base.requires_grad_(False)"
            )
    else:
        raise TypeError(
            f"base: got {type(base).__name__}, expected a torch.Tensor or a QuantizedTensor"
        )
    x, lead = _as_matrix(x, in_features)
    if format == "dense":
        weight = _dense_for(x, weight)
    bias = _bias_for(x, bias)
    lora_A, lora_B = _adapter_for(x, lora_A, "lora_A"), _adapter_for(x, lora_B, "lora_B")
    p = dropout_p if training else 0.0
    seed = _seed_for(x, p, seed)
    arguments = (
        x,
        weight,
        *statistics,
        format,
        blocksize,
        out_features,
        bias,
        lora_A,
        lora_B,
        float(scaling),
        float(p),
        seed,
    )
    if _needs_grad(x, bias, lora_A, lora_B):
        y = LoRALinear.apply(*arguments)
    else:
        y, _ = torch.ops.peftkern.lora_linear(*arguments)
    return y.view(*lead, out_features)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, seed: Tensor | None = None) -> Tensor:
    """Dropout whose mask is a pure function of (seed, element index): nothing is stored.

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        p: probability of zeroing an element, 0 <= p < 1.
        training: ``False`` returns x itself.
        seed: int64 [1]; default: drawn from torch's CPU generator.

    Returns:
        x with survivors scaled by ``1 / (1 - p)``. Philox-4x32-10, the same bits on every backend.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: p is out of range.
    """
    _require_float("x", x)
    if not training or p == 0.0:
        return x
    seed = _seed_for(x, p, seed)
    if _needs_grad(x):
        return PhiloxDropout.apply(x.contiguous(), float(p), seed)
    return torch.ops.peftkern.philox_dropout(x.contiguous(), float(p), seed)


def _require_float(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating dtype")


def _require_quantized(q: QuantizedTensor, kinds: tuple[str, ...]) -> None:
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q: got {type(q).__name__}, expected a QuantizedTensor")
    if q.quant_type not in kinds:
        raise TypeError(f"q: got a {q.quant_type} weight, expected {' or '.join(kinds)}")


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"base: got shape {tuple(shape)}, expected [out, in]")
    return shape[0], shape[1]


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear computes in: x's own, or autocast's (which leaves fp64 alone)."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _as_matrix(x: Tensor, in_features: int) -> tuple[Tensor, torch.Size]:
    """x as a contiguous [M, in] of the compute dtype, and its leading dimensions."""
    _require_float("x", x)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {in_features}]")
    lead = x.shape[:-1]
    x = x.to(_autocast_dtype(x))
    return x.reshape(lead.numel(), in_features).contiguous(), lead


def _bias_for(x: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None or bias.dtype == x.dtype:
        return bias
    _require_float("bias", bias)
    if torch.is_autocast_enabled(x.device.type) or bias.dtype == torch.float32:
        return bias.to(x.dtype)
    raise TypeError(f"bias: got dtype {bias.dtype}, expected {x.dtype} like x, or float32")


def _dense_for(x: Tensor, weight: Tensor) -> Tensor:
    _require_float("base", weight)
    if weight.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"base: got dtype {weight.dtype}, expected {x.dtype} like x")
        weight = weight.to(x.dtype)
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return weight


def _adapter_for(x: Tensor, adapter: Tensor, name: str) -> Tensor:
    _require_float(name, adapter)
    wide = torch.promote_types(x.dtype, torch.float32)
    if adapter.dtype not in (x.dtype, wide):
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            raise TypeError(f"{name}: got dtype {adapter.dtype}, expected {x.dtype} or {wide}")
        adapter = adapter.to(wide)
    return adapter.contiguous()


def _seed_for(x: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    if p == 0.0:
        return None
    if seed is None:
        seed = torch.randint(2**62, (1,), dtype=torch.int64)
    return seed.to(x.device)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
