"""Matmul with a row-wise INT8 weight by Triton on an NVIDIA GPU."""

from __future__ import annotations

from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import refusal
from peftkern.triton_kernels.matmul import matmul


def _forward_refusal(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> str | None:
    return refusal(x, x.dtype)


@implementation("linear_8bit", device="cuda", backend="triton", can_use=_forward_refusal)
def linear_8bit(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b``: decoded in registers for few rows, else dequantized for cuBLAS."""
    return matmul(x, Base(codes, scb, None, None, "int8", 0, *codes.shape), bias=bias)


def _dx_refusal(dy: Tensor, codes: Tensor, scb: Tensor) -> str | None:
    return refusal(dy, dy.dtype)


@implementation("linear_8bit_dx", device="cuda", backend="triton", can_use=_dx_refusal)
def linear_8bit_dx(dy: Tensor, codes: Tensor, scb: Tensor) -> Tensor:
    """``dx = dy W`` from the same storage, by the same rule."""
    return matmul(dy, Base(codes, scb, None, None, "int8", 0, *codes.shape), transposed=True)
