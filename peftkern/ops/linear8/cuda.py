"""Matmul with a row-wise INT8 weight on CUDA devices: peftkern/cuda_kernels/choices.py."""

from __future__ import annotations

from torch import Tensor

from peftkern import cuda_native
from peftkern.cuda_kernels.products import product
from peftkern.ops.bases import Base
from peftkern.registry import implementation


def _forward_refusal(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> str | None:
    return cuda_native.refusal(x)


@implementation("linear_8bit", device="cuda", backend="cuda", can_use=_forward_refusal)
def linear_8bit(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b``: decoded inside the product, or dequantized for cuBLAS."""
    return product(x, Base(codes, scb, None, None, "int8", 0, *codes.shape), False, bias)


def _dx_refusal(dy: Tensor, codes: Tensor, scb: Tensor) -> str | None:
    return cuda_native.refusal(dy)


@implementation("linear_8bit_dx", device="cuda", backend="cuda", can_use=_dx_refusal)
def linear_8bit_dx(dy: Tensor, codes: Tensor, scb: Tensor) -> Tensor:
    """``dx = dy W`` from the same storage, by the same rule."""
    return product(dy, Base(codes, scb, None, None, "int8", 0, *codes.shape), True)
