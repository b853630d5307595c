"""Counter-based dropout by Triton on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal

_BLOCK = 2048


def _refusal(x: Tensor, p: float, seed: Tensor) -> str | None:
    return refusal(x, x.dtype)


@implementation("philox_dropout", device="cuda", backend="triton", can_use=_refusal)
def philox_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Four elements a counter; the seed is read on the device."""
    from peftkern.triton_kernels import quant

    if p == 0.0:
        return x.clone()
    out = torch.empty_like(x)
    launch(
        quant._dropout_kernel,
        -(-x.numel() // _BLOCK),
        x,
        x,
        seed,
        out,
        x.numel(),
        int(p * 2**32),
        1.0 / (1.0 - p),
        BLOCK=_BLOCK,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return out
