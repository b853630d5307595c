"""Argument checks shared by the op contracts: plain ``if``/``raise``, the argument named first."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.codebooks import BLOCKSIZES, NESTED_BLOCKSIZE

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BASE_FORMATS = ("dense", "nf4", "fp4", "int8")


# What sums are kept in: torch.promote_types(dtype, torch.float32).
WIDE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in FLOATS}
_INT8 = (torch.int8,)
_FP32 = (torch.float32,)


def dtype_in(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise ``TypeError`` unless ``value`` has one of the dtypes."""
    if value.dtype not in allowed:
        want = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {want}")


def ndim(name: str, value: Tensor, want: int) -> None:
    """Raise ``ValueError`` unless ``value`` has ``want`` dimensions."""
    if value.dim() != want:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {want} dimensions")


def shape_is(name: str, value: Tensor, want: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` has exactly this shape."""
    if value.shape != want:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {want}")


def contiguous(name: str, value: Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` is contiguous."""
    if not value.is_contiguous():
        raise ValueError(f"{name}: got strides {value.stride()}, expected a contiguous tensor")


def same_device(first: str, reference: Tensor, **others: Tensor | None) -> None:
    """Raise ``ValueError`` unless all tensors are on the device of ``reference``."""
    device = reference.device
    for name, value in others.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name}: is on {value.device}, expected {device} like {first}")


def float_matrix(name: str, value: Tensor) -> None:
    """A contiguous float matrix: what activations look like inside an op."""
    if value.dtype in FLOATS and value.dim() == 2 and value.is_contiguous():
        return
    dtype_in(name, value, FLOATS)
    ndim(name, value, 2)
    contiguous(name, value)


def quant_type_4bit(quant_type: str, blocksize: int) -> None:
    """Raise ``ValueError`` for an unknown 4-bit type or block size."""
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type: got {quant_type!r}, expected 'nf4' or 'fp4'")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: got {blocksize}, expected one of {BLOCKSIZES}")


def statistics_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    numel: int,
) -> None:
    """Packed codes and block statistics of a 4-bit tensor with ``numel`` elements."""
    # Here and in check_adapter a condition stands before the function that explains it: as calls
    # they would cost as much as a small kernel.
    if packed.dtype != torch.uint8:
        dtype_in("packed", packed, (torch.uint8,))
    contiguous("packed", packed)
    contiguous("absmax", absmax)
    device = packed.device
    if absmax.device != device:
        same_device("packed", packed, absmax=absmax)
    if packed.numel() != (numel + 1) // 2:
        raise ValueError(
            f"packed: got {packed.numel()} bytes, expected {(numel + 1) // 2} for {numel} weights"
        )
    blocks = -(-numel // blocksize)
    if absmax.numel() != blocks:
        raise ValueError(
            f"absmax: got {absmax.numel()} entries, expected {blocks} "
            f"for {numel} weights in blocks of {blocksize}"
        )
    if (nested_absmax is None) != (nested_offset is None):
        raise ValueError("nested_absmax and nested_offset: expected both or neither")
    if nested_absmax is None or nested_offset is None:
        dtype_in("absmax", absmax, _FP32)
        return
    if nested_absmax.device != device or nested_offset.device != device:
        nested = {"nested_absmax": nested_absmax, "nested_offset": nested_offset}
        same_device("packed", packed, **nested)
    if absmax.dtype != torch.uint8:
        dtype_in("absmax", absmax, (torch.uint8,))
    if nested_absmax.dtype != torch.float32 or nested_offset.dtype != torch.float32:
        dtype_in("nested_absmax", nested_absmax, _FP32)
        dtype_in("nested_offset", nested_offset, _FP32)
    contiguous("nested_absmax", nested_absmax)
    shape_is("nested_absmax", nested_absmax, (-(-blocks // NESTED_BLOCKSIZE),))
    shape_is("nested_offset", nested_offset, (1,))


def statistics_8bit(codes: Tensor, scb: Tensor) -> None:
    """Row-wise INT8 codes [N, K] with their row absmax [N]."""
    dtype_in("codes", codes, _INT8)
    ndim("codes", codes, 2)
    contiguous("codes", codes)
    dtype_in("scb", scb, _FP32)
    contiguous("scb", scb)
    shape_is("scb", scb, (codes.shape[0],))
    same_device("codes", codes, scb=scb)


def bias_like(x: Tensor, bias: Tensor | None, out_features: int) -> None:
    """An optional bias [N] of the activation's dtype."""
    if bias is None:
        return
    dtype_in("bias", bias, (x.dtype,))
    shape_is("bias", bias, (out_features,))
    contiguous("bias", bias)
    same_device("x", x, bias=bias)


def dropout_arguments(x: Tensor, p: float, seed: Tensor | None) -> None:
    """A dropout probability and, where it is not zero, its seed (int64 [1])."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: got {p}, expected 0 <= p < 1")
    if p == 0.0:
        return
    if seed is None:
        raise ValueError("seed: got None, expected int64 of shape (1,) when dropout_p > 0")
    dtype_in("seed", seed, (torch.int64,))
    shape_is("seed", seed, (1,))
    same_device("x", x, seed=seed)
