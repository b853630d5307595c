"""Native gated activations on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation

_ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # enum Activation of kernels.h


def _refusal(*args: Tensor | str) -> str | None:
    return native.refusal(*args)


@implementation("gated_activation", device="cpu", backend="native", can_use=_refusal)
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """One pass: both inputs once, h once, everything between in fp32."""
    h = torch.empty(gate.shape, dtype=gate.dtype)
    native.kernels().gated(
        0,
        gate.data_ptr(),
        up.data_ptr(),
        native.DTYPES[gate.dtype],
        gate.numel(),
        _ACTIVATIONS[activation],
        h.data_ptr(),
        0,
        0,
        torch.get_num_threads(),
    )
    return h


@implementation("gated_activation_backward", device="cpu", backend="native", can_use=_refusal)
def gated_activation_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Three inputs and three outputs in one pass; the activation is evaluated once for all."""
    h, dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(3))
    native.kernels().gated(
        dh.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        native.DTYPES[gate.dtype],
        gate.numel(),
        _ACTIVATIONS[activation],
        h.data_ptr(),
        dgate.data_ptr(),
        dup.data_ptr(),
        torch.get_num_threads(),
    )
    return dgate, dup, h
