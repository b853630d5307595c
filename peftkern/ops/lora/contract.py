"""Contracts of the linear with a low-rank term."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.dropout.reference import keep_mask, philox_dropout
from peftkern.ops.lora import reference
from peftkern.ops.quant4.contract import bundles_4bit
from peftkern.ops.quant8.contract import bundles_8bit
from peftkern.registry import OpSpec, Sample, define_op

# (M, N, K, r, format, blocksize, nested, bias, dropout, fp32 adapters)
_CASES = (
    (1, 64, 128, 8, "dense", 0, False, True, 0.0, True),
    (7, 33, 50, 5, "dense", 0, False, False, 0.25, False),
    (40, 48, 96, 16, "dense_t", 0, False, True, 0.0, True),
    (2, 64, 128, 8, "nf4", 64, True, False, 0.0, True),
    (9, 31, 96, 4, "nf4", 64, False, True, 0.5, False),
    (33, 40, 130, 16, "fp4", 32, True, False, 0.1, True),
    (3, 24, 64, 8, "int8", 0, False, True, 0.0, False),
    (65, 17, 70, 1, "int8", 0, False, False, 0.3, True),
    (0, 8, 64, 4, "nf4", 64, False, True, 0.0, True),
    (4, 0, 64, 4, "dense", 0, False, False, 0.0, True),
    (4, 8, 0, 4, "int8", 0, False, True, 0.0, True),
    (1, 1, 1, 1, "dense", 0, False, True, 0.0, False),
)


def randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_base(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
) -> None:
    """The activations and a frozen base [out_features, in] that fits them."""
    checks.float_matrix("x", x)
    if weight.device != x.device or (absmax is not None and absmax.device != x.device):
        checks.same_device("x", x, base=weight, absmax=absmax)
    in_features = x.shape[1]
    if format not in checks.BASE_FORMATS:
        raise ValueError(f"format: got {format!r}, expected one of {checks.BASE_FORMATS}")
    if format == "dense":
        checks.dtype_in("base", weight, (x.dtype,))
        checks.shape_is("base", weight, (out_features, in_features))
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            raise ValueError(
                f"base: got strides {weight.stride()}, expected row-major or its transpose"
            )
        return
    if absmax is None:
        raise ValueError(f"absmax: got None, expected the statistics of a {format} base")
    if format == "int8":
        checks.statistics_8bit(weight, absmax)
        checks.shape_is("base", weight, (out_features, in_features))
        return
    checks.quant_type_4bit(format, blocksize)
    numel = out_features * in_features
    checks.statistics_4bit(weight, absmax, nested_absmax, nested_offset, blocksize, numel)


def check_adapter(x: Tensor, lora_A: Tensor, lora_B: Tensor, out_features: int) -> None:
    """A pair of adapter matrices that fits the activations."""
    allowed = (x.dtype, checks.WIDE[x.dtype])
    checks.dtype_in("lora_A", lora_A, allowed)
    if lora_B.dtype != lora_A.dtype:
        checks.dtype_in("lora_B", lora_B, allowed)
        raise TypeError(f"lora_B: got {lora_B.dtype}, expected {lora_A.dtype} like lora_A")
    checks.ndim("lora_A", lora_A, 2)
    rank = lora_A.shape[0]
    checks.shape_is("lora_A", lora_A, (rank, x.shape[1]))
    checks.shape_is("lora_B", lora_B, (out_features, rank))
    if not (lora_A.is_contiguous() and lora_B.is_contiguous()):
        checks.contiguous("lora_A", lora_A)
        checks.contiguous("lora_B", lora_B)
    device = x.device
    if lora_A.device != device or lora_B.device != device:
        checks.same_device("x", x, lora_A=lora_A, lora_B=lora_B)


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
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    statistics = (absmax, nested_absmax, nested_offset)
    check_base(x, weight, *statistics, format, blocksize, out_features)
    check_adapter(x, lora_A, lora_B, out_features)
    checks.bias_like(x, bias, out_features)
    checks.dropout_arguments(x, dropout_p, seed)


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
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty((x.shape[0], out_features))
    return y, x.new_empty((x.shape[0], lora_A.shape[0]), dtype=wide)


def base_sample(
    format: str, n: int, k: int, blocksize: int, nested: bool, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, int]:
    """A random base in a storage format ("dense_t": dense, stored transposed)."""
    if format == "int8":
        codes, scb = bundles_8bit((n, k), seed)
        return codes, scb, None, None, "int8", 0
    if format in ("nf4", "fp4"):
        return *bundles_4bit((n, k), format, blocksize, nested, seed), format, blocksize
    if format == "dense_t":
        return (randn((k, n), dtype, seed) * 0.1).t(), None, None, None, "dense", 0
    return randn((n, k), dtype, seed) * 0.1, None, None, None, "dense", 0


def _name(case: tuple[int, int, int, int, str, int, bool, bool, float, bool]) -> str:
    m, n, k, r, format, _, nested, bias, p, master = case
    marks = [f"m{m}", f"n{n}", f"k{k}", f"r{r}"]
    marks += ["nested"] * nested + ["bias"] * bias + [f"p{p}"] * (p > 0) + ["fp32ab"] * master
    return "-".join([format, *marks])


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, case in enumerate(_CASES):
        m, n, k, r, format, blocksize, nested, has_bias, p, master = case
        base = base_sample(format, n, k, blocksize, nested, dtype, i)
        adapter = torch.promote_types(dtype, torch.float32) if master else dtype
        a, b = randn((r, k), adapter, i + 2) * 0.1, randn((n, r), adapter, i + 3)
        bias = randn((n,), dtype, i + 1) if has_bias else None
        seed = torch.tensor([i * 977 - 5]) if p else None
        x = randn((m, k), dtype, i)
        yield Sample(_name(case), (x, *base, n, bias, a, b, 0.5 + i, p, seed))


def baseline_forward(
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
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The forward pass op by op in eager torch."""
    statistics = (absmax, nested_absmax, nested_offset)
    shape = [out_features, x.shape[1]]
    w = reference.base_weight(weight, *statistics, format, blocksize, shape, x.dtype)
    dropped = x if seed is None else philox_dropout(x, dropout_p, seed)
    s = torch.nn.functional.linear(dropped.to(lora_A.dtype), lora_A)
    low_rank = torch.nn.functional.linear(s, lora_B) * scaling
    return (torch.nn.functional.linear(x, w, bias) + low_rank).to(x.dtype), s.float()


define_op(
    OpSpec(
        name="lora_linear",
        schema="(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, "
        "Tensor? nested_offset, str format, int blocksize, SymInt out_features, Tensor? bias, "
        "Tensor lora_A, Tensor lora_B, float scaling, float dropout_p, Tensor? seed)"
        " -> (Tensor, Tensor)",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.lora_linear,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=baseline_forward,
        bench=("lora",),
    )
)


def _check_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> None:
    checks.float_matrix("dy", dy)
    checks.dtype_in("dy", dy, (x.dtype,))
    out_features = dy.shape[1]
    statistics = (absmax, nested_absmax, nested_offset)
    check_base(x, weight, *statistics, format, blocksize, out_features)
    check_adapter(x, lora_A, lora_B, out_features)
    checks.shape_is("dy", dy, (x.shape[0], out_features))
    checks.dtype_in("s", s, (checks.WIDE[x.dtype],))
    checks.contiguous("s", s)
    checks.shape_is("s", s, (x.shape[0], lora_A.shape[0]))
    if dy.device != x.device or s.device != x.device:
        checks.same_device("x", x, dy=dy, s=s)
    checks.dropout_arguments(x, dropout_p, seed)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    da = torch.empty_like(lora_A) if need_dab else lora_A.new_empty(0)
    db = torch.empty_like(lora_B) if need_dab else lora_B.new_empty(0)
    return dx, da, db


def _samples_backward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, sample in enumerate(_samples_forward(dtype)):
        x, *base, n, _, a, b, scaling, p, seed = sample.args
        dy = randn((x.shape[0], n), dtype, i + 9)
        s = randn((x.shape[0], a.shape[0]), torch.promote_types(dtype, torch.float32), i + 8)
        needs = ((True, True), (True, False), (False, True))[i % 3]
        args = (dy, x, s, *base, a, b, scaling, p, seed, *needs)
        yield Sample(sample.name, args)
        if needs != (True, True):
            yield Sample(sample.name + "-all", (*args[:-2], True, True))


def baseline_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass op by op in eager torch."""
    kind = lora_A.dtype
    ds = dy.to(kind) @ lora_B * scaling
    dx, da, db = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if need_dx:
        statistics = (absmax, nested_absmax, nested_offset)
        shape = [dy.shape[1], x.shape[1]]
        w = reference.base_weight(weight, *statistics, format, blocksize, shape, x.dtype)
        low_rank = ds @ lora_A
        if seed is not None:
            keep = keep_mask(x.shape, dropout_p, seed)
            low_rank = torch.where(keep, low_rank / (1 - dropout_p), 0.0)
        dx = (dy @ w + low_rank).to(x.dtype)
    if need_dab:
        dropped = x if seed is None else philox_dropout(x, dropout_p, seed)
        da = ds.T @ dropped.to(kind)
        db = (dy.to(kind).T @ s.to(kind)) * scaling
    return dx, da, db


define_op(
    OpSpec(
        name="lora_linear_backward",
        schema="(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor? absmax, "
        "Tensor? nested_absmax, Tensor? nested_offset, str format, int blocksize, Tensor lora_A, "
        "Tensor lora_B, float scaling, float dropout_p, Tensor? seed, bool need_dx, bool need_dab)"
        " -> (Tensor, Tensor, Tensor)",
        check=_check_backward,
        fake=_fake_backward,
        reference=reference.lora_linear_backward,
        samples=_samples_backward,
        tolerance="error_rule",
        baseline=baseline_backward,
        factor=2.0,
        bench=("lora",),
    )
)
