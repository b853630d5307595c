"""Gated activations by Triton on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal

_BLOCK = 1024


def _forward_refusal(gate: Tensor, up: Tensor, activation: str) -> str | None:
    return refusal(gate, gate.dtype)


@implementation("gated_activation", device="cuda", backend="triton", can_use=_forward_refusal)
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Both halves read once, h written once."""
    from peftkern.triton_kernels import gated

    h = torch.empty_like(gate)
    launch(
        gated._gated_kernel,
        -(-gate.numel() // _BLOCK),
        gate,
        gate,
        up,
        h,
        gate.numel(),
        ACT=activation,
        BLOCK=_BLOCK,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return h


def _backward_refusal(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> str | None:
    return refusal(gate, gate.dtype)


@implementation(
    "gated_activation_backward", device="cuda", backend="triton", can_use=_backward_refusal
)
def gated_activation_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Three reads, three writes: both gradients, and h for who did not keep it."""
    from peftkern.triton_kernels import gated

    dgate, dup, h = (torch.empty_like(gate) for _ in range(3))
    launch(
        gated._gated_backward_kernel,
        -(-gate.numel() // _BLOCK),
        gate,
        dh,
        gate,
        up,
        dgate,
        dup,
        h,
        gate.numel(),
        ACT=activation,
        BLOCK=_BLOCK,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return dgate, dup, h
