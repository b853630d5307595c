"""The bottleneck adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.arguments import real, require_float
from peftkern.functional.arguments import (
    adapter_for,
    as_matrix,
    autocasts,
    needs_grad,
    seed_for,
)
from peftkern.ops.bottleneck.autograd import BottleneckAdapter
from peftkern.ops.bottleneck.reference import ACTIVATIONS

# Other names of the same functions, as transformers and AdapterHub write them.
_SYNONYMS = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "leakyrelu": "leaky_relu",
    "linear": "identity",
}


def activation_name(activation: str, argument: str = "activation") -> str:
    """The name by which ops know an activation.

    Args:
        activation: ``relu``, ``gelu``, ``gelu_tanh``, ``silu``, ``tanh``, ``sigmoid``,
            ``leaky_relu``, ``identity``, or another name of one of them (``swish``, ``gelu_new``,
            ``leakyrelu``, ...) in any case.
        argument: what the argument is called where it comes from.

    Raises:
        TypeError: not a string.
        ValueError: there is no kernel for it.
    """
    if not isinstance(activation, str):
        raise TypeError(f"{argument}: expected a name, got {type(activation).__name__}")
    name = activation.lower()
    name = _SYNONYMS.get(name, name)
    if name not in ACTIVATIONS:
        known = ", ".join((*ACTIVATIONS, *_SYNONYMS))
        raise ValueError(f"{argument}: got {activation!r}, expected one of {known}")
    return name


def bottleneck_adapter(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    activation: str = "relu",
    scaling: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``residual + dropout(scaling (act(x Dᵀ + b_d) Uᵀ + b_u))`` in one pass over x and y.

    Saves x for the backward pass, and on a GPU the bottleneck [..., r]. Sources: Houlsby et al.
    2019 (arXiv 1902.00751), He et al. 2021 (arXiv 2110.04366); the order of the operations is that
    of AdapterHub's ``adapters``.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        down_w: D [r, in], of x's dtype or float32 (master weights are read as they are).
        down_b: [r], or ``None``.
        up_w: U [out, r].
        up_b: [out], or ``None``.
        activation: ``relu``, ``gelu`` (exact), ``gelu_tanh``, ``silu``, ``tanh``, ``sigmoid``,
            ``leaky_relu`` or ``identity``; the names of transformers and AdapterHub work too.
        scaling: a number, or a tensor [1] or [out] that may require a gradient.
        residual: [..., out] of x's dtype, or ``None``. Passing x itself costs nothing.
        dropout_p: probability of zeroing an element of the scaled output.
        training: ``False`` switches dropout off.
        seed: int64 [1] that fixes the dropout mask; default: drawn from torch's CPU generator.

    Returns:
        [..., out] of x's dtype (under autocast: of the autocast dtype).

    Raises:
        TypeError: an argument is not a float tensor or has a dtype that does not fit.
        ValueError: shapes or devices do not fit, or the activation is not known.

    Example:
        >>> import torch, peftkern as pk
        >>> x = torch.randn(2, 5, 64)
        >>> d, u = torch.randn(8, 64, requires_grad=True), torch.zeros(64, 8, requires_grad=True)
        >>> y = pk.functional.bottleneck_adapter(x, d, None, u, None, "gelu", residual=x)
        >>> torch.equal(y, x)
        True
    """
    for name, value in (("down_w", down_w), ("up_w", up_w)):
        require_float(name, value)
        if value.dim() != 2:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected 2 dimensions")
    given = x
    x, lead = as_matrix(x, down_w.shape[1])
    weights = [
        None if value is None else adapter_for(x, value, name)
        for name, value in (
            ("down_w", down_w),
            ("down_b", down_b),
            ("up_w", up_w),
            ("up_b", up_b),
            ("scaling", _scale(scaling, down_w)),
        )
    ]
    out = up_w.shape[0]
    same = residual is given
    flat = x if same else _residual(residual, x, lead, out)
    p = real("dropout_p", dropout_p) if training else 0.0
    seed = seed_for(x, p, seed)
    name = activation_name(activation)
    if needs_grad(x, flat, *weights):
        y = BottleneckAdapter.apply(x, *weights, None if same else flat, same, name, p, seed)
    else:
        y, _ = torch.ops.peftkern.bottleneck_adapter(x, *weights, flat, name, p, seed, False)
    return y.view(*lead, out)


def _scale(scaling: float | Tensor, like: Tensor) -> Tensor | None:
    if isinstance(scaling, Tensor):
        return scaling.view(1) if scaling.dim() == 0 else scaling
    factor = real("scaling", scaling)
    return None if factor == 1.0 else like.new_full((1,), factor)


def _residual(
    residual: Tensor | None, x: Tensor, lead: torch.Size, out_features: int
) -> Tensor | None:
    if residual is None:
        return None
    require_float("residual", residual)
    if residual.shape != (*lead, out_features):
        raise ValueError(
            f"residual: got shape {tuple(residual.shape)}, expected {(*lead, out_features)}"
        )
    if residual.dtype != x.dtype:
        if not autocasts(x):
            raise TypeError(f"residual: got dtype {residual.dtype}, expected {x.dtype} like x")
        residual = residual.to(x.dtype)
    return residual.reshape(x.shape[0], out_features).contiguous()
