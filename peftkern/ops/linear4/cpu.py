"""Native matmul with a 4-bit weight on the CPU: decoded in cache, never written to memory."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation


def _forward_refusal(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> str | None:
    return native.refusal(x, packed, absmax, nested_absmax, nested_offset, bias)


@implementation("linear_4bit", device="cpu", backend="native", can_use=_forward_refusal)
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """``y = x W^T + b``."""
    m, k = x.shape
    out = torch.empty(m, out_features, dtype=x.dtype)
    statistics = (absmax, nested_absmax, nested_offset)
    shape = (out_features, k)
    weight = native.weight_4bit(packed, *statistics, quant_type, blocksize, shape, x.dtype)
    native.kernels().linear(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        weight,
        False,
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _dx_refusal(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> str | None:
    return native.refusal(dy, packed, absmax, nested_absmax, nested_offset)


@implementation("linear_4bit_dx", device="cpu", backend="native", can_use=_dx_refusal)
def linear_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> Tensor:
    """``dx = dy W`` from the same storage: no transposed copy, no dense weight."""
    m, n = dy.shape
    out = torch.empty(m, in_features, dtype=dy.dtype)
    statistics = (absmax, nested_absmax, nested_offset)
    shape = (n, in_features)
    weight = native.weight_4bit(packed, *statistics, quant_type, blocksize, shape, dy.dtype)
    native.kernels().linear(
        dy.data_ptr(),
        native.DTYPES[dy.dtype],
        m,
        weight,
        True,
        0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
