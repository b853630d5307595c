"""Contracts of the linear with a different low-rank term for each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.lora import contract as lora
from peftkern.ops.multi_lora import reference
from peftkern.registry import OpSpec, Sample, define_op

# (name, M, N, K, format, blocksize, nested, bias, fp32 adapters, (rank, dropout) of each adapter)
_CASES: tuple[
    tuple[str, int, int, int, str, int, bool, bool, bool, tuple[tuple[int, float], ...]], ...
] = (
    ("ranks", 40, 48, 96, "dense", 0, False, True, True, ((8, 0.0), (3, 0.0), (16, 0.0))),
    ("dropout", 21, 31, 70, "nf4", 64, True, False, False, ((4, 0.5), (5, 0.0), (2, 0.25))),
    ("few-rows", 7, 33, 128, "nf4", 64, True, True, True, ((8, 0.0), (4, 0.0))),
    ("few-rows-fp4", 5, 24, 130, "fp4", 32, False, False, True, ((2, 0.0), (4, 0.1))),
    ("transposed", 11, 17, 64, "dense_t", 0, False, True, False, ((4, 0.0), (4, 0.0))),
    (
        "many-rows",
        157,
        24,
        65,
        "int8",
        0,
        False,
        False,
        True,
        tuple((r, 0.1 * (r == 3)) for r in range(6)),
    ),
    ("unused", 3, 8, 64, "int8", 0, False, True, False, tuple((4, 0.0) for _ in range(7))),
    ("none", 4, 8, 64, "nf4", 64, False, True, True, ()),
    ("no-rows", 0, 8, 64, "dense", 0, False, True, True, ((4, 0.0), (2, 0.0))),
    ("no-columns", 4, 0, 64, "dense", 0, False, False, True, ((4, 0.0),)),
    ("no-depth", 4, 8, 0, "int8", 0, False, True, True, ((4, 0.0),)),
    ("one", 1, 1, 1, "dense", 0, False, True, False, ((1, 0.0),)),
    ("whole-eights", 70, 64, 128, "nf4", 64, True, True, True, ((8, 0.0), (3, 0.5), (16, 0.0))),
    ("whole-eights-many", 300, 72, 64, "dense", 0, False, False, False, ((9, 0.0), (4, 0.0))),
    # A column of S is then contiguous in memory, whichever rows belong to the adapter.
    ("rank-one", 19, 32, 48, "nf4", 64, False, False, True, ((1, 0.0),)),
)


def _check_adapters(
    x: Tensor,
    out_features: int,
    adapter_ids: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> None:
    checks.dtype_in("adapter_ids", adapter_ids, (torch.int64,))
    checks.shape_is("adapter_ids", adapter_ids, (x.shape[0],))
    checks.contiguous("adapter_ids", adapter_ids)
    checks.same_device("x", x, adapter_ids=adapter_ids)
    lists: dict[str, list[Any]] = {"lora_B": lora_B, "scalings": scalings, "dropout_p": dropout_p}
    for name, values in lists.items():
        if len(values) != len(lora_A):
            raise ValueError(
                f"{name}: got {len(values)} entries, expected {len(lora_A)} as in lora_A"
            )
    for a, b, p in zip(lora_A, lora_B, dropout_p, strict=True):
        lora.check_adapter(x, a, b, out_features)
        checks.dropout_arguments(x, p, seed)


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
    adapter_ids: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> None:
    statistics = (absmax, nested_absmax, nested_offset)
    lora.check_base(x, weight, *statistics, format, blocksize, out_features)
    checks.bias_like(x, bias, out_features)
    adapters = (lora_A, lora_B, scalings, dropout_p)
    _check_adapters(x, out_features, adapter_ids, *adapters, seed)


def _fake_forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out_features, lora_A = rest[5], rest[8]
    wide = torch.promote_types(x.dtype, torch.float32)
    rank = max((a.shape[0] for a in lora_A), default=0)
    m = x.shape[0]
    return x.new_empty((m, out_features)), x.new_empty((m, rank), dtype=wide)


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, case in enumerate(_CASES):
        name, m, n, k, format, blocksize, nested, has_bias, master, adapters = case
        base = lora.base_sample(format, n, k, blocksize, nested, dtype, i)
        kind = torch.promote_types(dtype, torch.float32) if master else dtype
        a = [lora.randn((r, k), kind, 20 * i + j) * 0.1 for j, (r, _) in enumerate(adapters)]
        b = [lora.randn((n, r), kind, 20 * i + j + 9) for j, (r, _) in enumerate(adapters)]
        scalings = [0.5 + j for j in range(len(adapters))]
        p = [p for _, p in adapters]
        bias = lora.randn((n,), dtype, i + 1) if has_bias else None
        seed = torch.tensor([i * 977 - 5]) if any(p) else None
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(-1, len(adapters), (m,), generator=generator)
        x = lora.randn((m, k), dtype, i)
        yield Sample(name, (x, *base, n, bias, ids, a, b, scalings, p, seed))


def _baseline_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    base: tuple[Any, ...] = args[:8]
    ids, lora_A, lora_B, scalings, dropout_p, seed = args[8:]
    wide = torch.promote_types(x.dtype, torch.float32)
    empty: tuple[Any, ...] = (
        x.new_empty((0, x.shape[1])),
        x.new_empty((base[6], 0)),
        1.0,
        0.0,
        None,
    )
    y, _ = lora.baseline_forward(x, *base, *empty)
    s = x.new_zeros((x.shape[0], max((a.shape[0] for a in lora_A), default=0)), dtype=wide)
    for i, p in enumerate(dropout_p):
        adapter: tuple[Any, ...] = (lora_A[i], lora_B[i], scalings[i], p, seed if p else None)
        own, part = lora.baseline_forward(x, *base, *adapter)
        rows = ids == i
        y[rows] = own[rows]
        s[rows, : part.shape[1]] = part[rows]
    return y, s


define_op(
    OpSpec(
        name="multi_lora_linear",
        schema="(Tensor x, Tensor weight, Tensor? absmax, Tensor? nested_absmax, "
        "Tensor? nested_offset, str format, int blocksize, SymInt out_features, Tensor? bias, "
        "Tensor adapter_ids, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, "
        "float[] dropout_p, Tensor? seed) -> (Tensor, Tensor)",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.multi_lora_linear,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=_baseline_forward,
        bench=("multi_lora",),
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
    adapter_ids: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> None:
    checks.float_matrix("dy", dy)
    checks.dtype_in("dy", dy, (x.dtype,))
    out_features = dy.shape[1]
    statistics = (absmax, nested_absmax, nested_offset)
    lora.check_base(x, weight, *statistics, format, blocksize, out_features)
    checks.shape_is("dy", dy, (x.shape[0], out_features))
    adapters = (lora_A, lora_B, scalings, dropout_p)
    _check_adapters(x, out_features, adapter_ids, *adapters, seed)
    checks.dtype_in("s", s, (torch.promote_types(x.dtype, torch.float32),))
    checks.contiguous("s", s)
    checks.shape_is("s", s, (x.shape[0], max((a.shape[0] for a in lora_A), default=0)))
    checks.same_device("x", x, dy=dy, s=s)


def _fake_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    lora_A, lora_B, need_dx, need_dab = rest[6], rest[7], rest[-2], rest[-1]
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    das = [torch.empty_like(a) if need_dab else a.new_empty(0) for a in lora_A]
    dbs = [torch.empty_like(b) if need_dab else b.new_empty(0) for b in lora_B]
    return dx, das, dbs


def _samples_backward(dtype: torch.dtype) -> Iterator[Sample]:
    wide = torch.promote_types(dtype, torch.float32)
    for i, sample in enumerate(_samples_forward(dtype)):
        x, *base, n, _, ids, a, b, scalings, p, seed = sample.args
        m = x.shape[0]
        dy = lora.randn((m, n), dtype, i + 9)
        s = lora.randn((m, max((t.shape[0] for t in a), default=0)), wide, i + 8)
        needs = ((True, True), (True, False), (False, True))[i % 3]
        args = (dy, x, s, *base, ids, a, b, scalings, p, seed)
        yield Sample(sample.name, (*args, *needs))
        if needs != (True, True):
            yield Sample(sample.name + "-all", (*args, True, True))


def _baseline_backward(
    dy: Tensor, x: Tensor, s: Tensor, *args: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    ids, lora_A, lora_B, scalings, dropout_p, seed, need_dx, need_dab = args[6:]
    empty = (x.new_empty((0, x.shape[1])), x.new_empty((dy.shape[1], 0)), 1.0, 0.0, None)
    rest: tuple[Any, ...] = (*args[:6], *empty, need_dx, need_dab)
    dx, _, _ = lora.baseline_backward(dy, x, s[:, :0], *rest)
    das, dbs = [], []
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = ids == i
        mine = torch.where(rows[:, None], dy, 0)
        adapter = (a, b, scalings[i], dropout_p[i], seed if dropout_p[i] else None)
        rest = (*args[:6], *adapter, need_dx, need_dab)
        own, da, db = lora.baseline_backward(mine, x, s[:, : a.shape[0]].contiguous(), *rest)
        if need_dx:
            dx[rows] = own[rows]
        das.append(da)
        dbs.append(db)
    return dx, das, dbs


define_op(
    OpSpec(
        name="multi_lora_linear_backward",
        schema="(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor? absmax, "
        "Tensor? nested_absmax, Tensor? nested_offset, str format, int blocksize, "
        "Tensor adapter_ids, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, "
        "float[] dropout_p, Tensor? seed, bool need_dx, bool need_dab)"
        " -> (Tensor, Tensor[], Tensor[])",
        check=_check_backward,
        fake=_fake_backward,
        reference=reference.multi_lora_linear_backward,
        samples=_samples_backward,
        tolerance="error_rule",
        baseline=_baseline_backward,
        factor=2.0,
        bench=("multi_lora",),
    )
)
