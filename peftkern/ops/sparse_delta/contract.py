"""Contracts of the linear with trainable entries and of their gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.lora.contract import base_sample, check_base
from peftkern.ops.lora.reference import base_weight
from peftkern.ops.sparse_delta import reference
from peftkern.registry import OpSpec, Sample, define_op

# (M, N, K, entries, format, blocksize, nested, bias, fp32 values)
_CASES = (
    (1, 64, 128, 90, "dense", 0, False, True, True),
    (7, 33, 50, 1, "dense", 0, False, False, False),
    (40, 48, 96, 500, "dense_t", 0, False, True, True),
    (150, 21, 70, 21 * 70, "dense", 0, False, False, True),
    (2, 64, 128, 77, "nf4", 64, True, False, True),
    (9, 31, 96, 300, "nf4", 64, False, True, False),
    (33, 40, 130, 52, "fp4", 32, True, False, True),
    (3, 24, 64, 0, "int8", 0, False, True, False),
    (65, 17, 70, 113, "int8", 0, False, False, True),
    (0, 8, 64, 13, "nf4", 64, False, True, True),
    (4, 0, 64, 0, "dense", 0, False, False, True),
    (4, 8, 0, 0, "int8", 0, False, True, True),
    (1, 1, 1, 1, "dense", 0, False, True, False),
    (5, 600, 300, 2000, "nf4", 64, False, False, True),
)


def _randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _positions(numel: int, entries: int, seed: int) -> Tensor:
    chosen = torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:entries]
    return chosen.sort().values


def _check_entries(like: Tensor, indices: Tensor, values: Tensor) -> None:
    _check_indices(like, indices)
    wide = torch.promote_types(like.dtype, torch.float32)
    checks.dtype_in("values", values, (like.dtype, wide))
    checks.shape_is("values", values, (indices.shape[0],))
    checks.contiguous("values", values)
    checks.same_device("indices", indices, values=values)


def _check_indices(like: Tensor, indices: Tensor) -> None:
    checks.dtype_in("indices", indices, (torch.int64,))
    checks.ndim("indices", indices, 1)
    checks.contiguous("indices", indices)
    checks.same_device("x", like, indices=indices)


def _check_forward(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
) -> None:
    statistics = (absmax, nested_absmax, nested_offset)
    check_base(x, weight, *statistics, format, blocksize, out_features)
    _check_entries(x, indices, values)
    checks.bias_like(x, bias, out_features)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (m, n, k, entries, format, blocksize, nested, has_bias, master) in enumerate(_CASES):
        base = base_sample(format, n, k, blocksize, nested, dtype, i)
        kind = torch.promote_types(dtype, torch.float32) if master else dtype
        indices, values = _positions(n * k, entries, i), _randn((entries,), kind, i + 2)
        bias = _randn((n,), dtype, i + 1) if has_bias else None
        name = f"{format}-m{m}-n{n}-k{k}-e{entries}"
        args = (_randn((m, k), dtype, i), *base, n, bias, indices, values)
        yield Sample(name + "-bias" * has_bias + "-fp32v" * master, args)


def _plain_weight(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: list[int],
    indices: Tensor,
    values: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    statistics = (absmax, nested_absmax, nested_offset)
    w = base_weight(weight, *statistics, format, blocksize, shape, dtype)
    return w.reshape(-1).index_add(0, indices, values.to(dtype)).view(shape)


def _baseline_forward(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor,
) -> Tensor:
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    w = _plain_weight(*base, [out_features, x.shape[1]], indices, values, x.dtype)
    return torch.nn.functional.linear(x, w, bias)


define_op(
    OpSpec(
        name="sparse_delta_linear",
        schema="(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, "
        "Tensor? nested_offset, str format, int blocksize, SymInt out_features, Tensor? bias, "
        "Tensor indices, Tensor values) -> Tensor",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.sparse_delta_linear,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=_baseline_forward,
        bench=("sparse_delta",),
    )
)


def _check_dx(
    dy: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
    indices: Tensor,
    values: Tensor,
) -> None:
    checks.float_matrix("dy", dy)
    statistics = (absmax, nested_absmax, nested_offset)
    like_x = dy.new_empty((0, in_features))
    check_base(like_x, weight, *statistics, format, blocksize, dy.shape[1])
    _check_entries(dy, indices, values)


def _fake_dx(
    dy: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
    indices: Tensor,
    values: Tensor,
) -> Tensor:
    return dy.new_empty((dy.shape[0], in_features))


def _samples_dx(dtype: torch.dtype) -> Iterator[Sample]:
    for i, sample in enumerate(_samples_forward(dtype)):
        x, *base, n, _, indices, values = sample.args
        dy = _randn((x.shape[0], n), dtype, i + 9)
        yield Sample(sample.name, (dy, *base, x.shape[1], indices, values))


def _baseline_dx(
    dy: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    in_features: int,
    indices: Tensor,
    values: Tensor,
) -> Tensor:
    base = (weight, absmax, nested_absmax, nested_offset, format, blocksize)
    return dy @ _plain_weight(*base, [dy.shape[1], in_features], indices, values, dy.dtype)


define_op(
    OpSpec(
        name="sparse_delta_dx",
        schema="(Tensor dy, Tensor weight, Tensor? absmax, Tensor? nested_absmax, "
        "Tensor? nested_offset, str format, int blocksize, SymInt in_features, Tensor indices, "
        "Tensor values) -> Tensor",
        check=_check_dx,
        fake=_fake_dx,
        reference=reference.sparse_delta_dx,
        samples=_samples_dx,
        tolerance="error_rule",
        baseline=_baseline_dx,
        factor=2.0,
        bench=("sparse_delta",),
    )
)


def _check_sampled(dy: Tensor, x: Tensor, indices: Tensor) -> None:
    checks.float_matrix("dy", dy)
    checks.float_matrix("x", x)
    checks.dtype_in("dy", dy, (x.dtype,))
    checks.shape_is("dy", dy, (x.shape[0], dy.shape[1]))
    checks.same_device("x", x, dy=dy)
    _check_indices(x, indices)


def _fake_sampled(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(indices.shape[0], dtype=wide)


def _samples_sampled(dtype: torch.dtype) -> Iterator[Sample]:
    for i, sample in enumerate(_samples_dx(dtype)):
        dy, *_, k, indices, _values = sample.args
        name = f"m{dy.shape[0]}-n{dy.shape[1]}-k{k}-e{indices.numel()}-{i}"
        yield Sample(name, (dy, _randn((dy.shape[0], k), dtype, i), indices))


def _baseline_sampled(dy: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (dy.T.to(wide) @ x.to(wide)).reshape(-1)[indices]


define_op(
    OpSpec(
        name="sampled_gradient",
        schema="(Tensor dy, Tensor x, Tensor indices) -> Tensor",
        check=_check_sampled,
        fake=_fake_sampled,
        reference=reference.sampled_gradient,
        samples=_samples_sampled,
        tolerance="error_rule",
        baseline=_baseline_sampled,
        factor=2.0,
        bench=("sparse_delta",),
    )
)
