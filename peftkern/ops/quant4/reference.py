"""Plain torch truth of 4-bit quantization. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.codebooks import (
    NESTED_BLOCKSIZE,
    ZERO_CODE,
    dynamic_map,
    dynamic_thresholds,
    ladder_4bit,
    table_4bit,
)

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def _blocks(flat: Tensor, blocksize: int) -> Tensor:
    """fp32 [blocks, blocksize], the last block filled up with zeros."""
    pad = -flat.numel() % blocksize
    return torch.nn.functional.pad(flat.float(), (0, pad)).view(-1, blocksize)


def _scaled(blocks: Tensor, absmax: Tensor) -> Tensor:
    """``x * (1 / absmax)`` in fp32; 0 where absmax is 0.

    A denormal absmax has no finite reciprocal: there both are first scaled by 2^64, exactly.
    """
    lift = torch.where(absmax < _SMALLEST_NORMAL, 2.0**64, 1.0)
    scaled = (blocks * lift[:, None]) * (1.0 / (absmax * lift))[:, None]
    return torch.where(absmax[:, None] == 0, 0.0, scaled)


def quantize_4bit(
    w: Tensor, quant_type: str, blocksize: int, check_finite: bool
) -> tuple[Tensor, Tensor]:
    """Nearest code of ``x / absmax``, block by block; a tie takes the lower rung."""
    flat = w.reshape(-1)
    blocks = _blocks(flat, blocksize)
    absmax = blocks.abs().amax(1)
    if check_finite and not bool(torch.isfinite(absmax).all()):
        bad = int((~torch.isfinite(absmax)).nonzero()[0])
        raise ValueError(
            f"w: block {bad} (elements from {bad * blocksize}) holds NaN or Inf, expected finite "
            "weights; pass allow_nonfinite=True to quantize the other blocks anyway"
        )
    thresholds, order = (table.to(w.device) for table in ladder_4bit(quant_type))
    t = _scaled(blocks, absmax)
    # NaN passes no threshold of a kernel's comparison; bucketize would put it last.
    if quant_type == "nf4":
        codes = order[torch.bucketize(torch.nan_to_num(t, nan=-2.0), thresholds)]
    else:
        magnitude = order[torch.bucketize(torch.nan_to_num(t, nan=0.0).abs(), thresholds)]
        codes = torch.where(t < 0, magnitude + 8, magnitude)
    codes = codes.view(-1)[: flat.numel()]
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), ZERO_CODE[quant_type])])
    codes = codes.to(torch.uint8)
    return (codes[0::2] << 4) | codes[1::2], absmax


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """A rounded multiply, then a rounded add, fp32; the shape of ``codes``."""
    flat = codes.reshape(-1)
    values = dynamic_map().to(codes.device)[flat.int()]
    scales = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: flat.numel()]
    return (values * scales + nested_offset).view(codes.shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: the centred statistics as 8-bit codes in blocks of 256."""
    flat = absmax.reshape(-1)
    offset = flat.mean().reshape(1) if flat.numel() else flat.new_zeros(1)
    blocks = _blocks(flat - offset, NESTED_BLOCKSIZE)
    nested = blocks.abs().amax(1)
    t = torch.nan_to_num(_scaled(blocks, nested), nan=-2.0)
    codes = torch.bucketize(t, dynamic_thresholds().to(absmax.device)).to(torch.uint8)
    return codes.view(-1)[: flat.numel()].clone().view(absmax.shape), nested, offset


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
    """fp32 code times fp32 absmax, rounded once to ``dtype``."""
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    numel = torch.Size(shape).numel()
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:numel]
    values = table_4bit(quant_type).to(packed.device)[codes.int()]
    scales = absmax.reshape(-1).repeat_interleave(blocksize)[:numel]
    return (values * scales).to(dtype).view(shape)
