"""Matmul with a row-wise INT8 weight on CUDA devices: csrc/cuda/linear_rows.cu, cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES
from peftkern.ops.linear4.cuda import LowRank, low_rank_arguments
from peftkern.ops.quant8.cuda import dequantize_8bit
from peftkern.registry import implementation

# Every four rows of x cost another pass over the codes (8 instructions a weight); dequantizing
# costs 3 bytes a weight and cuBLAS reads 2: even at about 8 rows. Model only, not measured yet.
ROWS_ROWS = 8


def fused(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, term: LowRank | None = None
) -> Tensor:
    """``y = x W^T + b + scaling * low up^T`` for few rows."""
    m, k = x.shape
    n = codes.shape[0]
    out = x.new_empty((m, n))
    rest = (codes, scb, bias, *low_rank_arguments(term))
    cuda_native.launch("linear_rows_8bit", x.device, x, DTYPES[x.dtype], m, n, k, *rest, out)
    return out


def _forward_refusal(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> str | None:
    return cuda_native.refusal(x)


@implementation("linear_8bit", device="cuda", backend="cuda", can_use=_forward_refusal)
def linear_8bit(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x W^T + b``: fused for few rows, else dequantized for cuBLAS."""
    if x.shape[0] <= ROWS_ROWS:
        return fused(x, codes, scb, bias)
    return torch.nn.functional.linear(x, dequantize_8bit(codes, scb, x.dtype), bias)


def _dx_refusal(dy: Tensor, codes: Tensor, scb: Tensor) -> str | None:
    return cuda_native.refusal(dy)


@implementation("linear_8bit_dx", device="cuda", backend="cuda", can_use=_dx_refusal)
def linear_8bit_dx(dy: Tensor, codes: Tensor, scb: Tensor) -> Tensor:
    """``dx = dy W``, dequantized in one launch for cuBLAS."""
    return dy @ dequantize_8bit(codes, scb, dy.dtype)
