"""Row-wise INT8 quantization by Triton on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal

_BLOCK = 2048


def _quantize_refusal(w: Tensor, check_finite: bool) -> str | None:
    return refusal(w, w.dtype)


@implementation("quantize_8bit", device="cuda", backend="triton", can_use=_quantize_refusal)
def quantize_8bit(w: Tensor, check_finite: bool) -> tuple[Tensor, Tensor]:
    """A program a row. The host waits only for the check of finiteness, when asked for."""
    from peftkern.triton_kernels import quant

    rows, cols = w.shape
    codes = torch.empty_like(w, dtype=torch.int8)
    scb = w.new_empty(rows, dtype=torch.float32)
    launch(
        quant._quantize_8bit_kernel,
        rows,
        w,
        w,
        codes,
        scb,
        cols,
        BLOCK=_BLOCK,
        INTERPRET=interpreting(),
        num_warps=8,
        enable_fp_fusion=False,
    )
    if check_finite and not bool((finite := torch.isfinite(scb)).all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(
            f"w: row {bad} holds NaN or Inf, expected finite weights; "
            "pass allow_nonfinite=True to quantize the other rows anyway"
        )
    return codes, scb


def _dequantize_refusal(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> str | None:
    return refusal(codes, dtype)


@implementation("dequantize_8bit", device="cuda", backend="triton", can_use=_dequantize_refusal)
def dequantize_8bit(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """(code * row absmax) * (1/127), each product rounded."""
    from peftkern.triton_kernels import quant

    out = torch.empty_like(codes, dtype=dtype)
    rows, cols = codes.shape
    col_tiles = -(-cols // _BLOCK)
    launch(
        quant._dequantize_8bit_kernel,
        rows * col_tiles,
        codes,
        codes,
        scb,
        out,
        cols,
        col_tiles,
        BLOCK=_BLOCK,
        INTERPRET=interpreting(),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
