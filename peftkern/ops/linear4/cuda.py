"""Matmul with a 4-bit weight on CUDA devices: the kernels of peftkern/cuda_kernels/choices.py."""

from __future__ import annotations

from torch import Tensor

from peftkern import cuda_native
from peftkern.cuda_kernels.products import product
from peftkern.ops.bases import Base
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
    return cuda_native.refusal(x)


@implementation("linear_4bit", device="cuda", backend="cuda", can_use=_forward_refusal)
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
    """``y = x W^T + b``: decoded inside the product, or dequantized for cuBLAS."""
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(packed, *statistics, quant_type, blocksize, out_features, x.shape[1])
    return product(x, base, False, bias)


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
    return cuda_native.refusal(dy)


@implementation("linear_4bit_dx", device="cuda", backend="cuda", can_use=_dx_refusal)
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
    return product(dy, base, True)
