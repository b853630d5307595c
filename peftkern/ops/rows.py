"""Activations with any leading dimensions as the matrices that ops take, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x [..., C], contiguous, as [M, C]."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def like_rows_of(x: Tensor, y: Tensor) -> Tensor:
    """y [M, C], which nobody else holds, as [..., C] with the leading dimensions of x.

    Not a view to autograd: what a Function returns could not be changed in place otherwise.
    """
    if x.dim() == 2:
        return y
    shape = (*x.shape[:-1], y.shape[-1])
    if torch.compiler.is_compiling():
        whole: Tensor = torch.ops.aten._unsafe_view(y, shape)
        return whole
    return y.resize_(shape)  # the same elements; a third of the cost
