"""Row-wise INT8 quantization on CUDA devices: csrc/cuda/quant8.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES
from peftkern.registry import implementation


def _quantize_refusal(w: Tensor, check_finite: bool) -> str | None:
    return cuda_native.refusal(w)


@implementation("quantize_8bit", device="cuda", backend="cuda", can_use=_quantize_refusal)
def quantize_8bit(w: Tensor, check_finite: bool) -> tuple[Tensor, Tensor]:
    """One launch; only ``check_finite`` waits for the device, to raise here and not later."""
    rows, cols = w.shape
    codes = torch.empty_like(w, dtype=torch.int8)
    scb = w.new_empty(rows, dtype=torch.float32)
    first_bad = w.new_full((1,), -1, dtype=torch.int64)  # the largest unsigned number
    cuda_native.launch(
        "quantize_8bit", w.device, w, DTYPES[w.dtype], rows, cols, codes, scb, first_bad
    )
    if check_finite and (bad := int(first_bad)) >= 0:
        raise ValueError(
            f"w: row {bad} holds NaN or Inf, expected finite weights; "
            "pass allow_nonfinite=True to quantize the other rows anyway"
        )
    return codes, scb


def _dequantize_refusal(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> str | None:
    return cuda_native.refusal(dtype)


@implementation("dequantize_8bit", device="cuda", backend="cuda", can_use=_dequantize_refusal)
def dequantize_8bit(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """(code * row absmax) * (1/127), each product rounded."""
    rows, cols = codes.shape
    out = torch.empty_like(codes, dtype=dtype)
    cuda_native.launch("dequantize_8bit", codes.device, codes, scb, rows, cols, DTYPES[dtype], out)
    return out
