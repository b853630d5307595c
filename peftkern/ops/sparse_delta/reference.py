"""Plain torch truth of a frozen linear with trainable entries. Never optimised.

``indices`` are sorted, unique, flat positions in W [N, K]; entry j stands at row
``indices[j] // K`` and column ``indices[j] % K``. With ``D = scatter(values)``::

    y = x (W + D)ᵀ + b      dx = dy (W + D)      dvalues[j] = sum_m dy[m, row_j] x[m, column_j]

W has the activation's dtype; W + D is summed wider and not rounded again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.lora.reference import base_weight

_SPAN = 1 << 22  # products held at a time


def check_indices(indices: Tensor, numel: int) -> None:
    """Raise ``ValueError`` unless the positions ascend strictly within ``[0, numel)``."""
    if indices.numel() == 0:
        return
    if int(indices[0]) < 0 or int(indices[-1]) >= numel:
        raise ValueError(
            f"indices: got {int(indices[0])} to {int(indices[-1])}, expected values in "
            f"[0, {numel}), the flat positions in the weight"
        )
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError("indices: expected sorted positions without repeats; sort and unique them")


def adapted_weight(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: list[int],
    indices: Tensor,
    values: Tensor,
    dtype: torch.dtype,
    wide: torch.dtype,
) -> Tensor:
    """``W + D`` as a matrix [N, K] of dtype ``wide``."""
    check_indices(indices, shape[0] * shape[1])
    statistics = (absmax, nested_absmax, nested_offset)
    w = base_weight(weight, *statistics, format, blocksize, shape, dtype).to(wide)
    return w.reshape(-1).index_add(0, indices, values.to(wide)).view(shape)


def sparse_delta_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``y = x (W + D)ᵀ + b``, summed wide, rounded once."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    shape = [out_features, x.shape[1]]
    y = x.to(wide) @ adapted_weight(*base, shape, indices, values, x.dtype, wide).T
    y = y if bias is None else y + bias.to(wide)
    return y if compute else y.to(x.dtype)


def sparse_delta_dx(
    dy: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
    indices: Tensor,
    values: Tensor,
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``dx = dy (W + D)``, summed wide, rounded once."""
    wide = compute or torch.promote_types(dy.dtype, torch.float32)
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    shape = [dy.shape[1], in_features]
    dx = dy.to(wide) @ adapted_weight(*base, shape, indices, values, dy.dtype, wide)
    return dx if compute else dx.to(dy.dtype)


def sampled_gradient(
    dy: Tensor, x: Tensor, indices: Tensor, *, compute: torch.dtype | None = None
) -> Tensor:
    """Entries ``indices`` of ``dyᵀ x`` in at least fp32; the matrix itself is never formed."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    check_indices(indices, dy.shape[1] * x.shape[1])
    out = torch.zeros(indices.numel(), dtype=wide, device=x.device)
    columns = x.shape[1]
    span = max(1, _SPAN // max(1, x.shape[0]))
    for first in range(0, indices.numel(), span):
        part = indices[first : first + span]
        left, right = dy[:, part // columns], x[:, part % columns]
        out[first : first + span] = (left.to(wide) * right.to(wide)).sum(0)
    return out
