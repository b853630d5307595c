"""Matmul with a 4-bit weight by Triton on an NVIDIA GPU."""

from __future__ import annotations

from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import refusal
from peftkern.triton_kernels.matmul import matmul


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
    return refusal(x, x.dtype)


@implementation("linear_4bit", device="cuda", backend="triton", can_use=_forward_refusal)
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
    """``y = x W^T + b``: decoded in registers for few rows, else dequantized for cuBLAS."""
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(packed, *statistics, quant_type, blocksize, out_features, x.shape[1])
    return matmul(x, base, bias=bias)


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
    return refusal(dy, dy.dtype)


@implementation("linear_4bit_dx", device="cuda", backend="triton", can_use=_dx_refusal)
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
    """``dx = dy W`` from the same storage, by the same rule."""
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(packed, *statistics, quant_type, blocksize, dy.shape[1], in_features)
    return matmul(dy, base, transposed=True)
