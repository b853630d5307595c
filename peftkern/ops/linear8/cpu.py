"""Native matmul with a row-wise INT8 weight on the CPU: decoded in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation


def _forward_refusal(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> str | None:
    return native.refusal(x, codes, scb, bias)


@implementation("linear_8bit", device="cpu", backend="native", can_use=_forward_refusal)
def linear_8bit(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b``."""
    out = torch.empty(x.shape[0], codes.shape[0], dtype=x.dtype)
    native.kernels().linear(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.shape[0],
        native.weight_8bit(codes, scb, x.dtype),
        False,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _dx_refusal(dy: Tensor, codes: Tensor, scb: Tensor) -> str | None:
    return native.refusal(dy, codes, scb)


@implementation("linear_8bit_dx", device="cpu", backend="native", can_use=_dx_refusal)
def linear_8bit_dx(dy: Tensor, codes: Tensor, scb: Tensor) -> Tensor:
    """``dx = dy W`` from the same storage."""
    out = torch.empty(dy.shape[0], codes.shape[1], dtype=dy.dtype)
    native.kernels().linear(
        dy.data_ptr(),
        native.DTYPES[dy.dtype],
        dy.shape[0],
        native.weight_8bit(codes, scb, dy.dtype),
        True,
        0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
