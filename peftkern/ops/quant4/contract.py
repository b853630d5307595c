"""Contracts of 4-bit quantization."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.codebooks import NESTED_BLOCKSIZE
from peftkern.ops import checks
from peftkern.ops.quant4 import reference
from peftkern.registry import OpSpec, Sample, define_op

_SHAPES = ((64, 64), (0, 8), (1, 1), (7, 31), (4, 96), (3, 1000), (2, 4096), (5, 130))


def _weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def _check_quantize(w: Tensor, quant_type: str, blocksize: int, check_finite: bool) -> None:
    checks.dtype_in("w", w, checks.FLOATS)
    checks.contiguous("w", w)
    checks.quant_type_4bit(quant_type, blocksize)


def _fake_quantize(
    w: Tensor, quant_type: str, blocksize: int, check_finite: bool
) -> tuple[Tensor, Tensor]:
    packed = w.new_empty(((w.numel() + 1) // 2,), dtype=torch.uint8)
    return packed, w.new_empty((-(-w.numel() // blocksize),), dtype=torch.float32)


def _samples_quantize(dtype: torch.dtype) -> Iterator[Sample]:
    for i, shape in enumerate(_SHAPES):
        blocksize = (64, 32, 128, 4096)[i % 4]
        w = _weights(shape, dtype, i)
        for kind in ("nf4", "fp4"):
            name = f"{kind}-{'x'.join(map(str, shape))}-b{blocksize}"
            yield Sample(name, (w, kind, blocksize, True))
    zeros = torch.zeros(3, 64, dtype=dtype)
    zeros[1] = 1e-39 if dtype != torch.float16 else 6e-8
    yield Sample("nf4-zeros-denormals", (zeros, "nf4", 64, True))
    yield Sample("fp4-zeros-denormals", (zeros, "fp4", 64, True))
    poisoned = _weights((4, 64), dtype)
    poisoned[1, 3], poisoned[2, 5] = float("nan"), float("inf")
    yield Sample("nf4-nonfinite-allowed", (poisoned, "nf4", 64, False))


define_op(
    OpSpec(
        name="quantize_4bit",
        schema="(Tensor w, str quant_type, int blocksize, bool check_finite) -> (Tensor, Tensor)",
        check=_check_quantize,
        fake=_fake_quantize,
        reference=reference.quantize_4bit,
        samples=_samples_quantize,
        bench=("quantize",),
    )
)


def _check_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> None:
    checks.quant_type_4bit(quant_type, blocksize)
    numel = 1
    for size in shape:
        numel *= size
    checks.statistics_4bit(packed, absmax, nested_absmax, nested_offset, blocksize, numel)
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected a floating dtype")


def _fake_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def bundles_4bit(
    shape: tuple[int, ...], quant_type: str, blocksize: int, nested: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(packed, absmax, nested_absmax, nested_offset)`` of random weights, for samples."""
    packed, absmax = reference.quantize_4bit(
        _weights(shape, torch.float32, seed) * 0.1, quant_type, blocksize, True
    )
    if not nested:
        return packed, absmax, None, None
    return packed, *reference.quantize_absmax(absmax)


def _samples_dequantize(dtype: torch.dtype) -> Iterator[Sample]:
    for i, shape in enumerate(_SHAPES):
        blocksize = (64, 32, 128, 4096)[i % 4]
        for kind, nested in (("nf4", False), ("nf4", True), ("fp4", i % 2 == 0)):
            name = f"{kind}-{'x'.join(map(str, shape))}-b{blocksize}{'-nested' if nested else ''}"
            base = bundles_4bit(shape, kind, blocksize, nested, i)
            yield Sample(name, (*base, kind, blocksize, list(shape), dtype))
    packed, absmax, _, _ = bundles_4bit((4, 64), "nf4", 64, False)
    absmax = torch.tensor([float("nan"), float("inf"), 0.0, 1e-39])
    yield Sample("nf4-odd-absmax", (packed, absmax, None, None, "nf4", 64, [4, 64], dtype))


define_op(
    OpSpec(
        name="dequantize_4bit",
        schema="(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
        "str quant_type, int blocksize, SymInt[] shape, ScalarType dtype) -> Tensor",
        check=_check_dequantize,
        fake=_fake_dequantize,
        reference=reference.dequantize_4bit,
        samples=_samples_dequantize,
        bench=("dequantize",),
    )
)


def _check_quantize_absmax(absmax: Tensor) -> None:
    checks.dtype_in("absmax", absmax, (torch.float32,))
    checks.contiguous("absmax", absmax)


def _fake_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested = absmax.new_empty((-(-absmax.numel() // NESTED_BLOCKSIZE),))
    return torch.empty_like(absmax, dtype=torch.uint8), nested, absmax.new_empty((1,))


def _samples_absmax(dtype: torch.dtype) -> Iterator[Sample]:
    for n in (0, 1, 255, 256, 257, 5000):
        yield Sample(f"n{n}", (_weights((n,), dtype).abs(),))
    yield Sample("rows", (_weights((7, 60), dtype).abs(),))
    yield Sample("equal", (torch.full((300,), 0.25, dtype=dtype),))


define_op(
    OpSpec(
        name="quantize_absmax",
        schema="(Tensor absmax) -> (Tensor, Tensor, Tensor)",
        check=_check_quantize_absmax,
        fake=_fake_quantize_absmax,
        reference=reference.quantize_absmax,
        samples=_samples_absmax,
        dtypes=(torch.float32,),
    )
)


def _check_dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> None:
    checks.dtype_in("codes", codes, (torch.uint8,))
    checks.contiguous("codes", codes)
    checks.dtype_in("nested_absmax", nested_absmax, (torch.float32,))
    checks.contiguous("nested_absmax", nested_absmax)
    checks.shape_is("nested_absmax", nested_absmax, (-(-codes.numel() // NESTED_BLOCKSIZE),))
    checks.dtype_in("nested_offset", nested_offset, (torch.float32,))
    checks.shape_is("nested_offset", nested_offset, (1,))
    checks.same_device("codes", codes, nested_absmax=nested_absmax, nested_offset=nested_offset)


def _fake_dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _samples_dequantize_absmax(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in _samples_absmax(dtype):
        yield Sample(sample.name, reference.quantize_absmax(*sample.args))


define_op(
    OpSpec(
        name="dequantize_absmax",
        schema="(Tensor codes, Tensor nested_absmax, Tensor nested_offset) -> Tensor",
        check=_check_dequantize_absmax,
        fake=_fake_dequantize_absmax,
        reference=reference.dequantize_absmax,
        samples=_samples_dequantize_absmax,
        dtypes=(torch.float32,),
    )
)
