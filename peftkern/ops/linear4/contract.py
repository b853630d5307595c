"""Contracts of the matmul with a 4-bit weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.linear4 import reference
from peftkern.ops.quant4.contract import bundles_4bit
from peftkern.ops.quant4.reference import dequantize_4bit
from peftkern.registry import OpSpec, Sample, define_op

# (M, N, K, blocksize, quant_type, nested, bias): zero sizes, one, primes, tails, blocks that cross
# rows, and M on both sides of every kernel's range.
_CASES = (
    (1, 64, 128, 64, "nf4", False, False),
    (3, 32, 64, 32, "fp4", True, True),
    (8, 48, 256, 128, "nf4", True, False),
    (9, 17, 192, 64, "nf4", False, True),
    (2, 13, 31, 64, "nf4", False, True),
    (5, 7, 96, 64, "nf4", True, False),
    (37, 50, 130, 64, "fp4", False, True),
    (70, 33, 64, 4096, "nf4", False, False),
    (0, 8, 64, 64, "nf4", False, True),
    (4, 0, 64, 64, "nf4", False, False),
    (4, 8, 0, 64, "nf4", False, True),
    (1, 1, 1, 64, "nf4", False, True),
)


def _name(case: tuple[int, int, int, int, str, bool, bool]) -> str:
    m, n, k, blocksize, kind, nested, bias = case
    marks = ("-nested" if nested else "") + ("-bias" if bias else "")
    return f"{kind}-m{m}-n{n}-k{k}-b{blocksize}{marks}"


def _randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> None:
    checks.float_matrix("x", x)
    checks.quant_type_4bit(quant_type, blocksize)
    numel = out_features * x.shape[1]
    checks.statistics_4bit(packed, absmax, nested_absmax, nested_offset, blocksize, numel)
    checks.same_device("x", x, packed=packed)
    checks.bias_like(x, bias, out_features)


def _fake_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, case in enumerate(_CASES):
        m, n, k, blocksize, kind, nested, has_bias = case
        base = bundles_4bit((n, k), kind, blocksize, nested, i)
        bias = _randn((n,), dtype, i + 1) if has_bias else None
        yield Sample(_name(case), (_randn((m, k), dtype, i), *base, kind, blocksize, n, bias))


def _baseline_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    statistics = (absmax, nested_absmax, nested_offset)
    shape = [out_features, x.shape[1]]
    w = dequantize_4bit(packed, *statistics, quant_type, blocksize, shape, x.dtype)
    return torch.nn.functional.linear(x, w, bias)


define_op(
    OpSpec(
        name="linear_4bit",
        schema="(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
        "Tensor? nested_offset, str quant_type, int blocksize, SymInt out_features, Tensor? bias)"
        " -> Tensor",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.linear_4bit,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=_baseline_forward,
        bench=("linear",),
    )
)


def _check_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> None:
    checks.float_matrix("dy", dy)
    checks.quant_type_4bit(quant_type, blocksize)
    numel = in_features * dy.shape[1]
    checks.statistics_4bit(packed, absmax, nested_absmax, nested_offset, blocksize, numel)
    checks.same_device("dy", dy, packed=packed)


def _fake_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> Tensor:
    return dy.new_empty((dy.shape[0], in_features))


def _samples_dx(dtype: torch.dtype) -> Iterator[Sample]:
    for i, case in enumerate(_CASES):
        m, n, k, blocksize, kind, nested, _ = case
        base = bundles_4bit((n, k), kind, blocksize, nested, i)
        yield Sample(_name(case), (_randn((m, n), dtype, i), *base, kind, blocksize, k))


def _baseline_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> Tensor:
    statistics = (absmax, nested_absmax, nested_offset)
    shape = [dy.shape[1], in_features]
    w = dequantize_4bit(packed, *statistics, quant_type, blocksize, shape, dy.dtype)
    return dy @ w


define_op(
    OpSpec(
        name="linear_4bit_dx",
        schema="(Tensor dy, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
        "Tensor? nested_offset, str quant_type, int blocksize, SymInt in_features) -> Tensor",
        check=_check_dx,
        fake=_fake_dx,
        reference=reference.linear_4bit_dx,
        samples=_samples_dx,
        tolerance="error_rule",
        baseline=_baseline_dx,
        factor=2.0,
        bench=("linear",),
    )
)
