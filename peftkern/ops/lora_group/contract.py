"""Contracts of linears with low-rank terms that share their input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.lora import contract as lora
from peftkern.ops.lora_group import reference
from peftkern.registry import OpSpec, Sample, define_op

# One member: (N, r, format, blocksize, nested, bias, dropout, fp32 adapters).
_Member = tuple[int, int, str, int, bool, bool, float, bool]
_CASES: tuple[tuple[str, int, int, tuple[_Member, ...]], ...] = (
    (
        "qkv-gqa",
        40,
        96,
        (
            (96, 16, "dense", 0, False, True, 0.0, True),
            (33, 16, "dense", 0, False, True, 0.0, True),
            (33, 8, "dense_t", 0, False, False, 0.0, True),
        ),
    ),
    (
        "masks-of-their-own",
        9,
        70,
        (
            (31, 4, "nf4", 64, True, False, 0.5, False),
            (31, 3, "nf4", 64, False, True, 0.25, True),
            (17, 5, "int8", 0, False, False, 0.0, True),
        ),
    ),
    (
        "one-plain",
        3,
        64,
        (
            (24, 8, "fp4", 32, True, True, 0.0, True),
            (24, 0, "fp4", 32, True, False, 0.0, True),
        ),
    ),
    ("alone", 150, 130, ((45, 6, "nf4", 64, True, True, 0.1, False),)),
    (
        "five",
        13,
        37,
        tuple((7 + i, 1 + i, "dense", 0, False, False, 0.1 * i, False) for i in range(5)),
    ),
    ("no-rows", 0, 64, ((8, 4, "nf4", 64, False, True, 0.0, True),) * 2),
    (
        "no-columns",
        4,
        64,
        (
            (0, 4, "dense", 0, False, False, 0.0, True),
            (5, 4, "dense", 0, False, False, 0.0, True),
        ),
    ),
    ("no-depth", 4, 0, ((8, 4, "int8", 0, False, True, 0.0, True),) * 2),
    ("ones", 1, 1, ((1, 1, "dense", 0, False, True, 0.0, False),) * 2),
)


def _check_lists(count: int, **lists: list[Any]) -> None:
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"{name}: got {len(values)} entries, expected {count} as in weights")


def _check_members(
    x: Tensor,
    weights: list[Tensor],
    absmax: list[Tensor | None],
    nested_absmax: list[Tensor | None],
    nested_offset: list[Tensor | None],
    formats: list[str],
    blocksizes: list[int],
    out_features: list[int],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seeds: list[Tensor | None],
) -> None:
    if not weights:
        raise ValueError("weights: got no projection, expected at least one")
    _check_lists(
        len(weights),
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        formats=formats,
        blocksizes=blocksizes,
        out_features=out_features,
        lora_A=lora_A,
        lora_B=lora_B,
        scalings=scalings,
        dropout_p=dropout_p,
        seeds=seeds,
    )
    for i, weight in enumerate(weights):
        statistics = (absmax[i], nested_absmax[i], nested_offset[i])
        lora.check_base(x, weight, *statistics, formats[i], blocksizes[i], out_features[i])
        lora.check_adapter(x, lora_A[i], lora_B[i], out_features[i])
        checks.dropout_arguments(x, dropout_p[i], seeds[i])


def _check_forward(
    x: Tensor,
    weights: list[Tensor],
    absmax: list[Tensor | None],
    nested_absmax: list[Tensor | None],
    nested_offset: list[Tensor | None],
    formats: list[str],
    blocksizes: list[int],
    out_features: list[int],
    biases: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seeds: list[Tensor | None],
) -> None:
    statistics = (absmax, nested_absmax, nested_offset)
    adapters: tuple[Any, ...] = (lora_A, lora_B, scalings, dropout_p, seeds)
    _check_members(x, weights, *statistics, formats, blocksizes, out_features, *adapters)
    _check_lists(len(weights), biases=biases)
    for bias, n in zip(biases, out_features, strict=True):
        checks.bias_like(x, bias, n)


def _fake_forward(x: Tensor, weights: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor]:
    out_features, lora_A = rest[5], rest[7]
    wide = torch.promote_types(x.dtype, torch.float32)
    m = x.shape[0]
    ranks = sum(a.shape[0] for a in lora_A)
    return [x.new_empty((m, n)) for n in out_features], x.new_empty((m, ranks), dtype=wide)


def _members(
    k: int, members: tuple[_Member, ...], dtype: torch.dtype, seed: int
) -> tuple[list[Any], ...]:
    """The list arguments of the forward op."""
    columns: list[list[Any]] = []
    for i, (n, r, format, blocksize, nested, has_bias, p, master) in enumerate(members):
        at = seed + 10 * i
        adapter = torch.promote_types(dtype, torch.float32) if master else dtype
        base = lora.base_sample(format, n, k, blocksize, nested, dtype, at)
        a = lora.randn((r, k), adapter, at + 2) * 0.1
        b = lora.randn((n, r), adapter, at + 3)
        bias = lora.randn((n,), dtype, at + 1) if has_bias else None
        dropout = torch.tensor([at * 977 - 5]) if p else None
        columns.append([*base, n, bias, a, b, 0.5 + i, p, dropout])
    return tuple(list(values) for values in zip(*columns, strict=True))


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (name, m, k, members) in enumerate(_CASES):
        x = lora.randn((m, k), dtype, i)
        yield Sample(name, (x, *_members(k, members, dtype, 100 * i)))


def _baseline_forward(x: Tensor, *lists: Any) -> tuple[list[Tensor], Tensor]:
    results = [lora.baseline_forward(x, *member) for member in zip(*lists, strict=True)]
    return [y for y, _ in results], torch.cat([s for _, s in results], 1)


define_op(
    OpSpec(
        name="lora_linear_group",
        schema="(Tensor x, Tensor[] weights, Tensor?[] absmax, Tensor?[] nested_absmax, "
        "Tensor?[] nested_offset, str[] formats, int[] blocksizes, SymInt[] out_features, "
        "Tensor?[] biases, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, "
        "float[] dropout_p, Tensor?[] seeds) -> (Tensor[], Tensor)",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.lora_linear_group,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=_baseline_forward,
        bench=("lora_group",),
    )
)


def _check_backward(
    dys: list[Tensor],
    x: Tensor,
    s: Tensor,
    weights: list[Tensor],
    absmax: list[Tensor | None],
    nested_absmax: list[Tensor | None],
    nested_offset: list[Tensor | None],
    formats: list[str],
    blocksizes: list[int],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seeds: list[Tensor | None],
    need_dx: bool,
    need_dab: bool,
) -> None:
    checks.float_matrix("x", x)
    _check_lists(len(weights), dys=dys)
    for i, dy in enumerate(dys):
        name = f"dys[{i}]"
        checks.float_matrix(name, dy)
        if dy.dtype != x.dtype or dy.shape[0] != x.shape[0] or dy.device != x.device:
            checks.dtype_in(name, dy, (x.dtype,))
            checks.shape_is(name, dy, (x.shape[0], dy.shape[1]))
            checks.same_device("x", x, **{name: dy})
    out_features = [dy.shape[1] for dy in dys]
    statistics = (absmax, nested_absmax, nested_offset)
    adapters: tuple[Any, ...] = (lora_A, lora_B, scalings, dropout_p, seeds)
    _check_members(x, weights, *statistics, formats, blocksizes, out_features, *adapters)
    checks.dtype_in("s", s, (checks.WIDE[x.dtype],))
    checks.contiguous("s", s)
    checks.shape_is("s", s, (x.shape[0], sum(a.shape[0] for a in lora_A)))
    checks.same_device("x", x, s=s)


def _fake_backward(
    dys: list[Tensor], x: Tensor, s: Tensor, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    lora_A, lora_B, need_dx, need_dab = rest[5], rest[6], rest[10], rest[11]
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    das = [torch.empty_like(a) if need_dab else a.new_empty(0) for a in lora_A]
    dbs = [torch.empty_like(b) if need_dab else b.new_empty(0) for b in lora_B]
    return dx, das, dbs


def _samples_backward(dtype: torch.dtype) -> Iterator[Sample]:
    wide = torch.promote_types(dtype, torch.float32)
    for i, sample in enumerate(_samples_forward(dtype)):
        x, *base, out_features, _, lora_A, lora_B, scalings, p, seeds = sample.args
        m = x.shape[0]
        dys = [lora.randn((m, n), dtype, i + 9 + j) for j, n in enumerate(out_features)]
        s = lora.randn((m, sum(a.shape[0] for a in lora_A)), wide, i + 8)
        needs = ((True, True), (True, False), (False, True))[i % 3]
        args = (dys, x, s, *base, lora_A, lora_B, scalings, p, seeds)
        yield Sample(sample.name, (*args, *needs))
        if needs != (True, True):
            yield Sample(sample.name + "-all", (*args, True, True))


def _baseline_backward(
    dys: list[Tensor], x: Tensor, s: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    lists: Any = rest[:-2]
    needs = rest[-2:]
    need_dx = needs[0]
    columns = reference.columns_of(lists[6])
    total, das, dbs = torch.zeros_like(x) if need_dx else x.new_empty(0), [], []
    members: Any = zip(dys, columns, *lists, strict=True)
    for dy, part, *member in members:
        dx, da, db = lora.baseline_backward(dy, x, s[:, part], *member, *needs)
        if need_dx:
            total = total + dx
        das.append(da)
        dbs.append(db)
    return total, das, dbs


define_op(
    OpSpec(
        name="lora_linear_group_backward",
        schema="(Tensor[] dys, Tensor x, Tensor s, Tensor[] weights, Tensor?[] absmax, "
        "Tensor?[] nested_absmax, Tensor?[] nested_offset, str[] formats, int[] blocksizes, "
        "Tensor[] lora_A, Tensor[] lora_B, float[] scalings, float[] dropout_p, Tensor?[] seeds, "
        "bool need_dx, bool need_dab) -> (Tensor, Tensor[], Tensor[])",
        check=_check_backward,
        fake=_fake_backward,
        reference=reference.lora_linear_group_backward,
        samples=_samples_backward,
        tolerance="error_rule",
        baseline=_baseline_backward,
        factor=2.0,
        bench=("lora_group",),
    )
)
