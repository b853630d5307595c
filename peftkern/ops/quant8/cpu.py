"""Native row-wise INT8 quantization on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation


def _quantize_refusal(w: Tensor, check_finite: bool) -> str | None:
    return native.refusal(w)


@implementation("quantize_8bit", device="cpu", backend="native", can_use=_quantize_refusal)
def quantize_8bit(w: Tensor, check_finite: bool) -> tuple[Tensor, Tensor]:
    """Row by row: absmax, then codes, while the row is in the cache."""
    rows, cols = w.shape
    codes = torch.empty((rows, cols), dtype=torch.int8)
    scb = torch.empty(rows, dtype=torch.float32)
    bad = native.kernels().quantize_8bit(
        w.data_ptr(),
        native.DTYPES[w.dtype],
        rows,
        cols,
        codes.data_ptr(),
        scb.data_ptr(),
        torch.get_num_threads(),
    )
    if check_finite and bad >= 0:
        raise ValueError(
            f"w: row {bad} holds NaN or Inf, expected finite weights; "
            "pass allow_nonfinite=True to quantize the other rows anyway"
        )
    return codes, scb


def _dequantize_refusal(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> str | None:
    if dtype not in native.DTYPES:
        return f"native kernels have no {dtype}"
    return native.refusal(codes, scb)


@implementation("dequantize_8bit", device="cpu", backend="native", can_use=_dequantize_refusal)
def dequantize_8bit(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """(code * row absmax) * (1/127), each product rounded."""
    out = torch.empty(codes.shape, dtype=dtype)
    weight = native.weight_8bit(codes, scb, dtype)
    native.kernels().dequantize(weight, out.data_ptr(), torch.get_num_threads())
    return out
