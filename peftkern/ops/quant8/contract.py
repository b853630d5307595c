"""Contracts of row-wise INT8 quantization."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.quant8 import reference
from peftkern.registry import OpSpec, Sample, define_op

_SHAPES = ((64, 64), (0, 8), (3, 0), (1, 1), (7, 31), (5, 1000), (3, 4097))


def _weights(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check_quantize(w: Tensor, check_finite: bool) -> None:
    checks.float_matrix("w", w)


def _fake_quantize(w: Tensor, check_finite: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w, dtype=torch.int8), w.new_empty((w.shape[0],), dtype=torch.float32)


def _samples_quantize(dtype: torch.dtype) -> Iterator[Sample]:
    for i, shape in enumerate(_SHAPES):
        yield Sample("x".join(map(str, shape)), (_weights(shape, dtype, i), True))
    zeros = torch.zeros(3, 64, dtype=dtype)
    zeros[1] = 1e-39 if dtype != torch.float16 else 6e-8
    yield Sample("zeros-denormals", (zeros, True))
    halves = torch.arange(-127, 128).div(2).to(dtype).reshape(1, -1)
    yield Sample("ties", (halves, True))


define_op(
    OpSpec(
        name="quantize_8bit",
        schema="(Tensor w, bool check_finite) -> (Tensor, Tensor)",
        check=_check_quantize,
        fake=_fake_quantize,
        reference=reference.quantize_8bit,
        samples=_samples_quantize,
        bench=("quantize",),
    )
)


def _check_dequantize(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> None:
    checks.statistics_8bit(codes, scb)
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected a floating dtype")


def _fake_dequantize(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def bundles_8bit(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """``(codes, scb)`` of random weights, for samples."""
    return reference.quantize_8bit(_weights(shape, torch.float32, seed) * 0.1, True)


def _samples_dequantize(dtype: torch.dtype) -> Iterator[Sample]:
    for i, shape in enumerate(_SHAPES):
        yield Sample("x".join(map(str, shape)), (*bundles_8bit(shape, i), dtype))


define_op(
    OpSpec(
        name="dequantize_8bit",
        schema="(Tensor codes, Tensor scb, ScalarType dtype) -> Tensor",
        check=_check_dequantize,
        fake=_fake_dequantize,
        reference=reference.dequantize_8bit,
        samples=_samples_dequantize,
        bench=("dequantize",),
    )
)
