"""4-bit quantization on CUDA devices: csrc/cuda/quant4.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES, QUANT_TYPES
from peftkern.registry import implementation


def _quantize_refusal(w: Tensor, *rest: Any) -> str | None:
    return cuda_native.refusal(w)


@implementation("quantize_4bit", device="cuda", backend="cuda", can_use=_quantize_refusal)
def quantize_4bit(
    w: Tensor, quant_type: str, blocksize: int, check_finite: bool
) -> tuple[Tensor, Tensor]:
    """One launch; only ``check_finite`` waits for the device, to raise here and not later."""
    numel = w.numel()
    packed = w.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(-(-numel // blocksize), dtype=torch.float32)
    first_bad = w.new_full((1,), -1, dtype=torch.int64)  # the largest unsigned number
    cuda_native.launch(
        "quantize_4bit",
        w.device,
        w,
        DTYPES[w.dtype],
        numel,
        QUANT_TYPES[quant_type],
        blocksize.bit_length() - 1,
        packed,
        absmax,
        first_bad,
    )
    if check_finite and (bad := int(first_bad)) >= 0:
        raise ValueError(
            f"w: block {bad} (elements from {bad * blocksize}) holds NaN or Inf, expected finite "
            "weights; pass allow_nonfinite=True to quantize the other blocks anyway"
        )
    return packed, absmax


def _dequantize_refusal(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> str | None:
    return cuda_native.refusal(dtype)


@implementation("dequantize_4bit", device="cuda", backend="cuda", can_use=_dequantize_refusal)
def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """One launch, nested statistics included."""
    out = packed.new_empty(shape, dtype=dtype)
    cuda_native.launch(
        "dequantize_4bit",
        packed.device,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        QUANT_TYPES[quant_type],
        blocksize.bit_length() - 1,
        out.numel(),
        DTYPES[dtype],
        out,
    )
    return out


def _absmax_refusal(*args: Tensor) -> str | None:
    return cuda_native.refusal(*args)


@implementation("quantize_absmax", device="cuda", backend="cuda", can_use=_absmax_refusal)
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean is torch's own and stays on the device: nothing waits."""
    numel = absmax.numel()
    offset = absmax.mean().reshape(1) if numel else absmax.new_zeros(1)
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested = absmax.new_empty(-(-numel // 256))
    cuda_native.launch("quantize_absmax", absmax.device, absmax, numel, offset, codes, nested)
    return codes, nested, offset


@implementation("dequantize_absmax", device="cuda", backend="cuda", can_use=_absmax_refusal)
def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """A rounded multiply, then a rounded add."""
    out = torch.empty_like(codes, dtype=torch.float32)
    cuda_native.launch(
        "dequantize_absmax",
        codes.device,
        codes,
        codes.numel(),
        nested_absmax,
        nested_offset,
        out,
    )
    return out
