"""Native counter-based dropout on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation


def _refusal(x: Tensor, p: float, seed: Tensor) -> str | None:
    return native.refusal(x, seed)


@implementation("philox_dropout", device="cpu", backend="native", can_use=_refusal)
def philox_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The mask is generated in vectors of counters and used at once."""
    parameters = native.dropout_parameters(p, seed, x.shape[-1] if x.dim() else 1)
    if parameters is None:
        return x.clone()
    out = torch.empty_like(x)
    native.kernels().dropout(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.numel(),
        parameters,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
