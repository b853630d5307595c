"""4-bit quantization by Triton on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal, table

# Weights a program serves; 16 bytes of codes a thread at 128 threads.
_TILE = 4096


def _quantize_refusal(w: Tensor, quant_type: str, blocksize: int, check_finite: bool) -> str | None:
    return refusal(w, w.dtype)


@implementation("quantize_4bit", device="cuda", backend="triton", can_use=_quantize_refusal)
def quantize_4bit(
    w: Tensor, quant_type: str, blocksize: int, check_finite: bool
) -> tuple[Tensor, Tensor]:
    """One pass. The host waits for the device only for the check of finiteness, when asked for."""
    from peftkern.triton_kernels import quant

    numel = w.numel()
    packed = w.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(-(-numel // blocksize), dtype=torch.float32)
    groups = _TILE // blocksize
    launch(
        quant._quantize_4bit_kernel,
        -(-absmax.numel() // groups),
        w,
        w,
        packed,
        absmax,
        numel,
        QUANT=quant_type,
        BLOCKSIZE=blocksize,
        GROUPS=groups,
        INTERPRET=interpreting(),
        num_warps=8,
        enable_fp_fusion=False,
    )
    if check_finite and not bool((finite := torch.isfinite(absmax)).all()):
        bad = int((~finite).nonzero()[0])
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
    return refusal(packed, dtype)


@implementation("dequantize_4bit", device="cuda", backend="triton", can_use=_dequantize_refusal)
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
    from peftkern.triton_kernels import quant

    out = packed.new_empty(shape, dtype=dtype)
    groups = _TILE // blocksize
    nested = nested_absmax is not None
    launch(
        quant._dequantize_4bit_kernel,
        -(-absmax.numel() // groups),
        packed,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        table("dynamic_map", packed.device) if nested else None,
        out,
        out.numel(),
        QUANT=quant_type,
        NESTED=nested,
        BLOCKSIZE=blocksize,
        GROUPS=groups,
        INTERPRET=interpreting(),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def _absmax_refusal(absmax: Tensor) -> str | None:
    return refusal(absmax)


@implementation("quantize_absmax", device="cuda", backend="triton", can_use=_absmax_refusal)
def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean stays torch's own and on the device: the host waits for nothing."""
    from peftkern.triton_kernels import quant

    numel = absmax.numel()
    offset = absmax.mean().reshape(1) if numel else absmax.new_zeros(1)
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested = absmax.new_empty(-(-numel // 256))
    launch(
        quant._quantize_absmax_kernel,
        nested.numel(),
        absmax,
        absmax,
        offset,
        table("dynamic_thresholds", absmax.device),
        codes,
        nested,
        numel,
        BLOCK=256,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, nested, offset


def _dequantize_absmax_refusal(
    codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor
) -> str | None:
    return refusal(codes)


@implementation(
    "dequantize_absmax", device="cuda", backend="triton", can_use=_dequantize_absmax_refusal
)
def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """A rounded multiply, then a rounded add."""
    from peftkern.triton_kernels import quant

    out = torch.empty_like(codes, dtype=torch.float32)
    launch(
        quant._dequantize_absmax_kernel,
        -(-codes.numel() // 1024),
        codes,
        codes,
        nested_absmax,
        nested_offset,
        table("dynamic_map", codes.device),
        out,
        codes.numel(),
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
