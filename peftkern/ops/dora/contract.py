"""Contracts of DoRA: the linear, its gradients, and the norms of the adapted rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.dora import reference
from peftkern.ops.dropout.reference import keep_mask, philox_dropout
from peftkern.ops.lora import contract as lora
from peftkern.ops.lora.reference import base_weight
from peftkern.registry import OpSpec, Sample, define_op

# (M, N, K, r, format, blocksize, nested, bias, dropout, fp32 adapters, the scale is trained)
_CASES = (
    (1, 64, 128, 8, "dense", 0, False, True, 0.0, True, True),
    (7, 33, 50, 5, "dense", 0, False, False, 0.25, False, True),
    (40, 48, 96, 16, "dense_t", 0, False, True, 0.0, True, False),
    (2, 64, 128, 8, "nf4", 64, True, False, 0.0, True, True),
    (9, 31, 96, 4, "nf4", 64, False, True, 0.5, False, True),
    (33, 40, 130, 16, "fp4", 32, True, False, 0.1, True, False),
    (3, 24, 64, 8, "int8", 0, False, True, 0.0, False, True),
    (150, 17, 70, 1, "int8", 0, False, False, 0.3, True, True),
    (0, 8, 64, 4, "nf4", 64, False, True, 0.0, True, True),
    (4, 0, 64, 4, "dense", 0, False, False, 0.0, True, True),
    (4, 8, 0, 4, "int8", 0, False, True, 0.0, True, True),
    (1, 1, 1, 1, "dense", 0, False, True, 0.0, False, True),
    (33, 40, 96, 20, "nf4", 64, False, True, 0.2, True, True),
    (6, 17, 64, 40, "dense", 0, False, False, 0.0, False, True),
)


def _name(case: tuple[int, int, int, int, str, int, bool, bool, float, bool, bool]) -> str:
    m, n, k, r, format, _, nested, bias, p, master, trained = case
    marks = [f"m{m}", f"n{n}", f"k{k}", f"r{r}"]
    marks += ["nested"] * nested + ["bias"] * bias + [f"p{p}"] * (p > 0) + ["fp32ab"] * master
    return "-".join([format, *marks, *(["u"] * trained)])


def _check_scale(x: Tensor, column_scale: Tensor, out_features: int) -> None:
    checks.dtype_in("column_scale", column_scale, (torch.promote_types(x.dtype, torch.float32),))
    checks.shape_is("column_scale", column_scale, (out_features,))
    checks.contiguous("column_scale", column_scale)
    checks.same_device("x", x, column_scale=column_scale)


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
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_u: bool,
) -> None:
    statistics = (absmax, nested_absmax, nested_offset)
    lora.check_base(x, weight, *statistics, format, blocksize, out_features)
    lora.check_adapter(x, lora_A, lora_B, out_features)
    _check_scale(x, column_scale, out_features)
    checks.bias_like(x, bias, out_features)
    checks.dropout_arguments(x, dropout_p, seed)


def _fake_forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out_features, lora_A, need_u = rest[5], rest[7], rest[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty((x.shape[0], out_features))
    s = x.new_empty((x.shape[0], lora_A.shape[0]), dtype=wide)
    return y, s, torch.empty_like(y) if need_u else x.new_empty(0)


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    wide = torch.promote_types(dtype, torch.float32)
    for i, case in enumerate(_CASES):
        m, n, k, r, format, blocksize, nested, has_bias, p, master, trained = case
        base = lora.base_sample(format, n, k, blocksize, nested, dtype, i)
        adapter = wide if master else dtype
        a = lora.randn((r, k), adapter, i + 2) * 0.1
        b = lora.randn((n, r), adapter, i + 3)
        bias = lora.randn((n,), dtype, i + 1) if has_bias else None
        scale = 1.0 + 0.3 * lora.randn((n,), wide, i + 4)
        seed = torch.tensor([i * 977 - 5]) if p else None
        x = lora.randn((m, k), dtype, i)
        args = (x, *base, n, bias, a, b, scale, 0.5 + i, p, seed, trained)
        yield Sample(_name(case), args)


def _baseline_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which HF PEFT computes, each result rounded."""
    *base, bias, lora_A, lora_B, column_scale, scaling, p, seed, need_u = args
    weight, absmax, nested_absmax, nested_offset, format, blocksize, out_features = base
    shape = [out_features, x.shape[1]]
    statistics = (absmax, nested_absmax, nested_offset)
    linear = torch.nn.functional.linear
    w = base_weight(weight, *statistics, format, blocksize, shape, x.dtype)
    dropped = x if seed is None else philox_dropout(x, p, seed)
    s = linear(dropped.to(lora_A.dtype), lora_A)
    low_rank = (linear(s, lora_B) * scaling).to(x.dtype)
    v = linear(dropped, w)
    c = column_scale.to(x.dtype)
    y = linear(x, w, bias) + (c - 1) * v + c * low_rank
    u = v + low_rank if need_u else x.new_empty(0)
    return y, s.to(torch.promote_types(x.dtype, torch.float32)), u


define_op(
    OpSpec(
        name="dora_linear",
        schema="(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, "
        "Tensor? nested_offset, str format, int blocksize, SymInt out_features, Tensor? bias, "
        "Tensor lora_A, Tensor lora_B, Tensor column_scale, float scaling, float dropout_p, "
        "Tensor? seed, bool need_u) -> (Tensor, Tensor, Tensor)",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.dora_linear,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=_baseline_forward,
        bench=("dora",),
    )
)


def _check_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
    need_dscale: bool,
) -> None:
    checks.float_matrix("dy", dy)
    checks.dtype_in("dy", dy, (x.dtype,))
    out_features = dy.shape[1]
    statistics = (absmax, nested_absmax, nested_offset)
    lora.check_base(x, weight, *statistics, format, blocksize, out_features)
    lora.check_adapter(x, lora_A, lora_B, out_features)
    _check_scale(x, column_scale, out_features)
    checks.shape_is("dy", dy, (x.shape[0], out_features))
    checks.dtype_in("s", s, (torch.promote_types(x.dtype, torch.float32),))
    checks.contiguous("s", s)
    checks.shape_is("s", s, (x.shape[0], lora_A.shape[0]))
    checks.same_device("x", x, dy=dy, s=s, u=u)
    if need_dscale:
        checks.dtype_in("u", u, (x.dtype,))
        checks.contiguous("u", u)
        checks.shape_is("u", u, tuple(dy.shape))
    checks.dropout_arguments(x, dropout_p, seed)


def _fake_backward(
    dy: Tensor, x: Tensor, s: Tensor, u: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lora_A, lora_B, column_scale = rest[5:8]
    need_dx, need_dab, need_dscale = rest[-3:]
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    da = torch.empty_like(lora_A) if need_dab else lora_A.new_empty(0)
    db = torch.empty_like(lora_B) if need_dab else lora_B.new_empty(0)
    dscale = torch.empty_like(column_scale) if need_dscale else column_scale.new_empty(0)
    return dx, da, db, dscale


def _samples_backward(dtype: torch.dtype) -> Iterator[Sample]:
    wide = torch.promote_types(dtype, torch.float32)
    for i, sample in enumerate(_samples_forward(dtype)):
        x, *base, n, _, a, b, scale, scaling, p, seed, _trained = sample.args
        m = x.shape[0]
        dy, u = lora.randn((m, n), dtype, i + 9), lora.randn((m, n), dtype, i + 7)
        s = lora.randn((m, a.shape[0]), wide, i + 8)
        needs = ((True,) * 3, (True, False, False), (False, True, False), (False, False, True))
        args = (dy, x, s, u, *base, a, b, scale, scaling, p, seed)
        yield Sample(sample.name, (*args, *needs[i % 4]))
        if i % 4:
            yield Sample(sample.name + "-all", (*args, True, True, True))


def _baseline_backward(
    dy: Tensor, x: Tensor, s: Tensor, u: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *base, a, b, scale, scaling, p, seed, need_dx, need_dab, need_dscale = args
    c = scale.to(x.dtype)
    adapter: tuple[Any, ...] = (a, b, scaling, p, seed, need_dx, need_dab)
    dx, da, db = lora.baseline_backward(dy * c, x, s, *base, *adapter)
    if need_dx and seed is not None:
        weight, absmax, nested_absmax, nested_offset, format, blocksize = base
        shape = [dy.shape[1], x.shape[1]]
        statistics = (absmax, nested_absmax, nested_offset)
        w = base_weight(weight, *statistics, format, blocksize, shape, x.dtype)
        keep = keep_mask(x.shape, p, seed)
        low_rank = ((dy * c).to(a.dtype) @ b * scaling @ a).to(x.dtype)
        masked = (dy * (c - 1)) @ w + low_rank
        dx = dy @ w + torch.where(keep, masked / (1 - p), 0.0).to(x.dtype)
    dscale = (dy * u).sum(0).to(scale.dtype) if need_dscale else scale.new_empty(0)
    return dx, da, db, dscale


define_op(
    OpSpec(
        name="dora_linear_backward",
        schema="(Tensor dy, Tensor x, Tensor s, Tensor u, Tensor weight, Tensor? absmax, "
        "Tensor? nested_absmax, Tensor? nested_offset, str format, int blocksize, Tensor lora_A, "
        "Tensor lora_B, Tensor column_scale, float scaling, float dropout_p, Tensor? seed, "
        "bool need_dx, bool need_dab, bool need_dscale) -> (Tensor, Tensor, Tensor, Tensor)",
        check=_check_backward,
        fake=_fake_backward,
        reference=reference.dora_linear_backward,
        samples=_samples_backward,
        tolerance="error_rule",
        baseline=_baseline_backward,
        factor=2.0,
        bench=("dora",),
    )
)


def _check_norm_sq(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    in_features: int,
) -> None:
    dtype = weight.dtype if format == "dense" else torch.float32
    row = weight.new_empty((0, in_features), dtype=dtype)
    statistics = (absmax, nested_absmax, nested_offset)
    lora.check_base(row, weight, *statistics, format, blocksize, out_features)


def _fake_norm_sq(weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty((rest[5],), dtype=torch.float64)


def _norm_cases(dtype: torch.dtype) -> Iterator[tuple[Sample, Tensor, Tensor, float]]:
    for sample in _samples_forward(dtype):
        x, *base, n, _, a, b, _, scaling, _, _, _ = sample.args
        yield Sample(sample.name, (*base, n, x.shape[1])), a, b, scaling


def _samples_norm_sq(dtype: torch.dtype) -> Iterator[Sample]:
    for sample, _, _, _ in _norm_cases(dtype):
        yield sample


def _baseline_norm_sq(*args: Any) -> Tensor:
    base: tuple[Any, ...] = (*args[:6], list(args[6:]))
    w = reference.stored_weight(*base)
    return w.float().square().sum(1).double()


define_op(
    OpSpec(
        name="weight_norm_sq",
        schema="(Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, "
        "str format, int blocksize, SymInt out_features, SymInt in_features) -> Tensor",
        check=_check_norm_sq,
        fake=_fake_norm_sq,
        reference=reference.weight_norm_sq,
        samples=_samples_norm_sq,
        tolerance="error_rule",
        baseline=_baseline_norm_sq,
    )
)


def _check_norm(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    norm_sq: Tensor,
) -> None:
    checks.float_matrix("lora_A", lora_A)
    rank, in_features = lora_A.shape
    statistics = (absmax, nested_absmax, nested_offset)
    _check_norm_sq(weight, *statistics, format, blocksize, out_features, in_features)
    checks.dtype_in("lora_B", lora_B, (lora_A.dtype,))
    checks.contiguous("lora_B", lora_B)
    checks.shape_is("lora_B", lora_B, (out_features, rank))
    checks.dtype_in("norm_sq", norm_sq, (torch.float64,))
    checks.contiguous("norm_sq", norm_sq)
    checks.shape_is("norm_sq", norm_sq, (out_features,))
    checks.same_device("base", weight, lora_A=lora_A, lora_B=lora_B, norm_sq=norm_sq)


def _fake_norm(weight: Tensor, *rest: Any) -> Tensor:
    wide = torch.promote_types(rest[6].dtype, torch.float32)
    return weight.new_empty((rest[5],), dtype=wide)


def _samples_norm(dtype: torch.dtype) -> Iterator[Sample]:
    for sample, a, b, scaling in _norm_cases(dtype):
        *base, n, _ = sample.args
        norm_sq = reference.weight_norm_sq(*sample.args)
        yield Sample(sample.name, (*base, n, a, b, scaling, norm_sq))


def _baseline_norm(*args: Any) -> Tensor:
    """The dense formula in fp32."""
    a, b, scaling = args[7:10]
    base: tuple[Any, ...] = (*args[:6], [args[6], a.shape[1]])
    w = reference.stored_weight(*base).float()
    return torch.linalg.vector_norm(w + scaling * (b.float() @ a.float()), dim=1)


define_op(
    OpSpec(
        name="dora_weight_norm",
        schema="(Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, "
        "str format, int blocksize, SymInt out_features, Tensor lora_A, Tensor lora_B, "
        "float scaling, Tensor norm_sq) -> Tensor",
        check=_check_norm,
        fake=_fake_norm,
        reference=reference.dora_weight_norm,
        samples=_samples_norm,
        tolerance="error_rule",
        baseline=_baseline_norm,
        bench=("dora",),
    )
)
