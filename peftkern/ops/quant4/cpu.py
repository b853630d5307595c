"""Native 4-bit quantization on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation


def _quantize_refusal(w: Tensor, *rest: Any) -> str | None:
    return native.refusal(w)


@implementation("quantize_4bit", device="cpu", backend="native", can_use=_quantize_refusal)
def quantize_4bit(
    w: Tensor, quant_type: str, blocksize: int, check_finite: bool
) -> tuple[Tensor, Tensor]:
    """One pass over the weights: absmax, then codes, while a block is in the cache."""
    numel = w.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32)
    bad = native.kernels().quantize_4bit(
        w.data_ptr(),
        native.DTYPES[w.dtype],
        numel,
        native.QUANT_TYPES[quant_type],
        blocksize.bit_length() - 1,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    if check_finite and bad >= 0:
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
    if dtype not in native.DTYPES:
        return f"native kernels have no {dtype}"
    return native.refusal(packed, absmax, nested_absmax, nested_offset)


@implementation("dequantize_4bit", device="cpu", backend="native", can_use=_dequantize_refusal)
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
    """Table look-ups; nested statistics are read directly."""
    out = torch.empty(shape, dtype=dtype)
    statistics = (absmax, nested_absmax, nested_offset)
    flat = (1, out.numel())
    weight = native.weight_4bit(packed, *statistics, quant_type, blocksize, flat, dtype)
    native.kernels().dequantize(weight, out.data_ptr(), torch.get_num_threads())
    return out


def _absmax_refusal(absmax: Tensor) -> str | None:
    return native.refusal(absmax)


@implementation("quantize_absmax", device="cpu", backend="native", can_use=_absmax_refusal)
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean stays torch's own, so that the stored offset is the same on every backend."""
    numel = absmax.numel()
    offset = absmax.mean().reshape(1) if numel else absmax.new_zeros(1)
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested = torch.empty(-(-numel // 256), dtype=torch.float32)
    centred = absmax.reshape(-1) - offset
    native.kernels().quantize_absmax(
        centred.data_ptr(), numel, codes.data_ptr(), nested.data_ptr(), torch.get_num_threads()
    )
    return codes, nested, offset


def _dequantize_absmax_refusal(
    codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor
) -> str | None:
    return native.refusal(codes, nested_absmax, nested_offset)


@implementation(
    "dequantize_absmax", device="cpu", backend="native", can_use=_dequantize_absmax_refusal
)
def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """A rounded multiply, then a rounded add."""
    out = torch.empty_like(codes, dtype=torch.float32)
    native.kernels().dequantize_absmax(
        codes.data_ptr(),
        codes.numel(),
        nested_absmax.data_ptr(),
        nested_offset.item(),
        out.data_ptr(),
    )
    return out
