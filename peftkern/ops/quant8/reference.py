"""Plain torch truth of row-wise INT8 quantization. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.codebooks import INT8_STEP

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def quantize_8bit(w: Tensor, check_finite: bool) -> tuple[Tensor, Tensor]:
    """``rint(w * (127 / absmax))`` row by row, fp32, ties to even; a zero row gives zeros."""
    rows = w.float()
    scb = rows.abs().amax(1) if w.shape[1] else rows.new_zeros(w.shape[0])
    if check_finite and not bool(torch.isfinite(scb).all()):
        bad = int((~torch.isfinite(scb)).nonzero()[0])
        raise ValueError(
            f"w: row {bad} holds NaN or Inf, expected finite weights; "
            "pass allow_nonfinite=True to quantize the other rows anyway"
        )
    # As for 4 bits: a denormal absmax has no finite reciprocal, so both are lifted exactly.
    lift = torch.where(scb < _SMALLEST_NORMAL, 2.0**64, 1.0)
    scaled = (rows * lift[:, None]) * (127.0 / (scb * lift))[:, None]
    scaled = torch.where((scb == 0)[:, None], 0.0, torch.nan_to_num(scaled, nan=0.0))
    return scaled.round().clamp(-127, 127).to(torch.int8), scb


def dequantize_8bit(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """``(code * scb) * (1/127)``, two fp32 roundings, then one to ``dtype``."""
    return ((codes.float() * scb[:, None]) * INT8_STEP).to(dtype)
