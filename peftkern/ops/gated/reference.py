"""Plain torch truth of gated activations. Never optimised.

With the activation ``a`` (SwiGLU and GeGLU: Shazeer 2020, arXiv 2002.05202)::

    h = a(gate) up        dgate = dh up a'(gate)        dup = dh a(gate)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(x: Tensor, activation: str) -> Tensor:
    """``a(x)`` in x's dtype."""
    if activation == "silu":
        return torch.nn.functional.silu(x)
    if activation == "relu":
        return torch.relu(x)
    kind = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=kind)


def derivative(x: Tensor, activation: str) -> Tensor:
    """``a'(x)`` in x's dtype."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)


def gated_activation(
    gate: Tensor, up: Tensor, activation: str, *, compute: torch.dtype | None = None
) -> Tensor:
    """``h``; rounded once."""
    wide = compute or torch.promote_types(gate.dtype, torch.float32)
    h = activate(gate.to(wide), activation) * up.to(wide)
    return h if compute else h.to(gate.dtype)


def gated_activation_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, *, compute: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dgate, dup, h)``: the gradients, and h again for who did not keep it."""
    wide = compute or torch.promote_types(gate.dtype, torch.float32)
    dh, x, u = dh.to(wide), gate.to(wide), up.to(wide)
    a = activate(x, activation)
    results = (dh * u * derivative(x, activation), dh * a, a * u)
    return results if compute else tuple(r.to(gate.dtype) for r in results)  # type: ignore[return-value]
