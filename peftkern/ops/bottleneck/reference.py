"""Plain torch truth of the bottleneck adapter. Never optimised.

Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2020 (arXiv 2005.00247), He et al. 2021
(arXiv 2110.04366), Steitz and Roth 2024 (arXiv 2406.06820). With ``z = x Dᵀ + b_d`` and
``h = act(z)``::

    y  = mask(s ⊙ (h Uᵀ + b_u)) + residual

    g  = mask(dy)           P = gᵀ h                  q = sum over rows of g
    dU = s ⊙ P              db_u = s ⊙ q              ds = rowsum(U ⊙ P) + b_u ⊙ q
    dz = ((s ⊙ g) U) ⊙ act'(z)
    dD = dzᵀ x              db_d = sum over rows      dx = dz D  (+ dy where x is the residual too)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from peftkern.ops.dropout.reference import keep_mask

LEAKY_SLOPE = 0.01
_CUBIC = 0.044715


def _inner(z: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (z + _CUBIC * z**3)


def _gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    t = torch.tanh(_inner(z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * _CUBIC * z * z)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _sigmoid_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


# name -> the function and its derivative
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (lambda z: z, torch.ones_like),
    "relu": (torch.relu, lambda z: (z > 0).to(z.dtype)),
    "gelu": (lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))), _gelu_slope),
    "gelu_tanh": (lambda z: 0.5 * z * (1 + torch.tanh(_inner(z))), _gelu_tanh_slope),
    "silu": (lambda z: z * torch.sigmoid(z), _silu_slope),
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z) ** 2),
    "sigmoid": (torch.sigmoid, _sigmoid_slope),
    "leaky_relu": (
        lambda z: torch.where(z > 0, z, LEAKY_SLOPE * z),
        lambda z: torch.where(z > 0, 1.0, LEAKY_SLOPE).to(z.dtype),
    ),
}


def _masked(value: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None or p == 0:
        return value
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32, device=value.device)
    return torch.where(keep_mask(value.shape, p, seed), value * scale.to(value.dtype), 0.0)


def _bottleneck(x: Tensor, down_w: Tensor, down_b: Tensor | None, wide: torch.dtype) -> Tensor:
    z = x.to(wide) @ down_w.to(wide).T
    return z if down_b is None else z + down_b.to(wide)


def bottleneck_adapter(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, z)``; everything between x and y stays wide, z is empty unless it is kept."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    z = _bottleneck(x, down_w, down_b, wide)
    y = ACTIVATIONS[activation][0](z) @ up_w.to(wide).T
    y = y if up_b is None else y + up_b.to(wide)
    y = y if scale is None else y * scale.to(wide)
    y = _masked(y, dropout_p, seed)
    y = y if residual is None else y + residual.to(wide)
    z = z if keep else z.new_empty(0)
    return (y, z) if compute else (y.to(x.dtype), z.to(down_w.dtype))


def bottleneck_adapter_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dD, db_d, dU, db_u, ds)``; what is absent or not needed comes back empty."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    function, slope = ACTIVATIONS[activation]
    z = _bottleneck(x, down_w, down_b, wide) if z is None else z.to(wide)
    s = torch.ones(1, dtype=wide, device=x.device) if scale is None else scale.to(wide)
    g = _masked(dy.to(wide), dropout_p, seed)
    dz = ((s * g) @ up_w.to(wide)) * slope(z)
    dx = x.new_empty(0)
    if need_dx:
        dx = dz @ down_w.to(wide)
        dx = dx + dy.to(wide) if add_dy else dx
        dx = dx if compute else dx.to(x.dtype)
    results = [dx]
    p, q = g.T @ function(z), g.sum(0)
    ds = (up_w.to(wide) * p).sum(1) + (0 if up_b is None else up_b.to(wide) * q)
    if scale is not None and scale.numel() != ds.numel():
        ds = ds.sum(0, keepdim=True)
    gradients = (dz.T @ x.to(wide), dz.sum(0), s.view(-1, 1) * p, s * q, ds)
    for value, like in zip(gradients, (down_w, down_b, up_w, up_b, scale), strict=True):
        if like is None or not need_dw:
            results.append(down_w.new_empty(0))
        else:
            results.append(value if compute else value.to(like.dtype))
    return tuple(results)  # type: ignore[return-value]
