"""Contracts of the matmul with a row-wise INT8 weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.linear8 import reference
from peftkern.ops.quant8.contract import bundles_8bit
from peftkern.ops.quant8.reference import dequantize_8bit
from peftkern.registry import OpSpec, Sample, define_op

# (M, N, K, bias)
_CASES = (
    (1, 64, 128, False),
    (8, 48, 256, True),
    (9, 17, 192, True),
    (2, 13, 31, True),
    (37, 50, 130, False),
    (70, 33, 64, True),
    (0, 8, 64, True),
    (4, 0, 64, False),
    (4, 8, 0, True),
    (1, 1, 1, True),
)


def _randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check_forward(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> None:
    checks.float_matrix("x", x)
    checks.statistics_8bit(codes, scb)
    if codes.shape[1] != x.shape[1]:
        raise ValueError(
            f"codes: got {codes.shape[1]} input features, expected {x.shape[1]} like x"
        )
    checks.same_device("x", x, codes=codes)
    checks.bias_like(x, bias, codes.shape[0])


def _fake_forward(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (m, n, k, has_bias) in enumerate(_CASES):
        bias = _randn((n,), dtype, i + 1) if has_bias else None
        args = (_randn((m, k), dtype, i), *bundles_8bit((n, k), i), bias)
        yield Sample(f"m{m}-n{n}-k{k}{'-bias' if has_bias else ''}", args)


def _baseline_forward(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, dequantize_8bit(codes, scb, x.dtype), bias)


define_op(
    OpSpec(
        name="linear_8bit",
        schema="(Tensor x, Tensor codes, Tensor scb, Tensor? bias) -> Tensor",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.linear_8bit,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=_baseline_forward,
        bench=("linear",),
    )
)


def _check_dx(dy: Tensor, codes: Tensor, scb: Tensor) -> None:
    checks.float_matrix("dy", dy)
    checks.statistics_8bit(codes, scb)
    if codes.shape[0] != dy.shape[1]:
        raise ValueError(
            f"codes: got {codes.shape[0]} output features, expected {dy.shape[1]} like dy"
        )
    checks.same_device("dy", dy, codes=codes)


def _fake_dx(dy: Tensor, codes: Tensor, scb: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], codes.shape[1]))


def _samples_dx(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (m, n, k, _) in enumerate(_CASES):
        yield Sample(f"m{m}-n{n}-k{k}", (_randn((m, n), dtype, i), *bundles_8bit((n, k), i)))


def _baseline_dx(dy: Tensor, codes: Tensor, scb: Tensor) -> Tensor:
    return dy @ dequantize_8bit(codes, scb, dy.dtype)


define_op(
    OpSpec(
        name="linear_8bit_dx",
        schema="(Tensor dy, Tensor codes, Tensor scb) -> Tensor",
        check=_check_dx,
        fake=_fake_dx,
        reference=reference.linear_8bit_dx,
        samples=_samples_dx,
        tolerance="error_rule",
        baseline=_baseline_dx,
        factor=2.0,
        bench=("linear",),
    )
)
