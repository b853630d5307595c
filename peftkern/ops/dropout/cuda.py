"""Counter-based dropout on CUDA devices: csrc/cuda/dropout.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES
from peftkern.registry import implementation


def _refusal(x: Tensor, p: float, seed: Tensor) -> str | None:
    return cuda_native.refusal(x)


@implementation("philox_dropout", device="cuda", backend="cuda", can_use=_refusal)
def philox_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The kernel reads the seed on the device: nothing waits, and CUDA graphs see new seeds."""
    if p == 0.0:
        return x.clone()
    out = torch.empty_like(x)
    cuda_native.launch(
        "philox_dropout",
        x.device,
        x,
        DTYPES[x.dtype],
        x.numel(),
        seed,
        int(p * 2**32),
        1.0 / (1.0 - p),
        out,
    )
    return out
