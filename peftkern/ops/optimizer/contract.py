"""Contracts of the multi-tensor optimizer pass."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.optimizer import reference
from peftkern.registry import OpSpec, Sample, define_op

RULES = ("adamw", "lion", "momentum")
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def power(base: float, n: int) -> float:
    """``base**n`` by squaring: fp64 products only, so that every backend finds the same bits."""
    result = 1.0
    while n > 0:
        if n & 1:
            result *= base
        base *= base
        n >>= 1
    return result


def hyper_row(
    rule: str,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> list[float]:
    """One row of ``hyper``: what an update needs besides tensors, worked out in fp64.

    Args:
        rule: ``"adamw"``, ``"lion"`` or ``"momentum"``.
        lr: learning rate.
        betas: decay rates of the moments; momentum uses the first.
        eps: added to the root of the second moment.
        weight_decay: decoupled for AdamW and Lion, added to the gradient for momentum.
        step: number of this step, from 1.
        grad_scale: factor on the gradient; negative to maximize.

    Returns:
        11 floats: grad_scale, decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size,
        1 / sqrt(1 - beta2^t), eps, weight_decay, first step.
    """
    beta1, beta2 = betas
    adam = rule == "adamw"
    return [
        grad_scale,
        1.0 if rule == "momentum" else 1.0 - lr * weight_decay,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr / (1.0 - power(beta1, step)) if adam else lr,
        1.0 / math.sqrt(1.0 - power(beta2, step)) if adam else 1.0,
        eps,
        weight_decay,
        1.0 if step == 1 else 0.0,
    ]


def _fits(row: tuple[Tensor, ...], two: bool) -> bool:
    """Whether nothing is wrong: what :func:`_check_tensor` finds, without finding words for it."""
    p, g, s1, s2, a1, a2 = row
    n, device, kind = p.numel(), p.device, s1.dtype
    eight = kind == torch.uint8
    blocks = -(-n // reference.BLOCK) if eight else 0
    return (
        p.dtype in PARAM_DTYPES
        and g.dtype in PARAM_DTYPES
        and (eight or kind == torch.float32)
        and g.numel() == n
        and s1.numel() == n
        and a1.numel() == blocks
        and not (eight and a1.dtype != torch.float32)
        and p.is_contiguous()
        and g.is_contiguous()
        and s1.is_contiguous()
        and a1.is_contiguous()
        and g.device == device
        and s1.device == device
        and a1.device == device
        and (
            not two
            or (
                s2.dtype == kind
                and s2.numel() == n
                and a2.numel() == blocks
                and not (eight and a2.dtype != torch.float32)
                and s2.is_contiguous()
                and a2.is_contiguous()
                and s2.device == device
                and a2.device == device
            )
        )
    )


def _check_tensor(i: int, row: tuple[Tensor, ...], two: bool) -> None:
    p, g, s1, s2, a1, a2 = row
    n = p.numel()
    checks.dtype_in(f"params[{i}]", p, PARAM_DTYPES)
    checks.dtype_in(f"grads[{i}]", g, PARAM_DTYPES)
    eight = s1.dtype == torch.uint8
    checks.dtype_in(f"state1[{i}]", s1, (torch.float32, torch.uint8))
    wanted = [("params", p, n), ("grads", g, n), ("state1", s1, n)]
    blocks = -(-n // reference.BLOCK) if eight else 0
    wanted += [("absmax1", a1, blocks)]
    if two:
        checks.dtype_in(f"state2[{i}]", s2, (s1.dtype,))
        wanted += [("state2", s2, n), ("absmax2", a2, blocks)]
    for name, value, numel in wanted:
        checks.contiguous(f"{name}[{i}]", value)
        if value.numel() != numel:
            raise ValueError(f"{name}[{i}]: got {value.numel()} elements, expected {numel}")
    for name, value in (("absmax1", a1), ("absmax2", a2)):
        if eight:
            checks.dtype_in(f"{name}[{i}]", value, (torch.float32,))


def _check_step(
    hyper: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    rule: str,
    rounding: Tensor | None,
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RULES)}")
    count = len(params)
    checks.dtype_in("hyper", hyper, (torch.float32,))
    checks.shape_is("hyper", hyper, (count, reference.COLUMNS))
    checks.contiguous("hyper", hyper)
    two = rule == "adamw"
    lists = [("grads", grads), ("state1", state1), ("absmax1", absmax1)]
    if two:
        lists += [("state2", state2), ("absmax2", absmax2)]
    elif state2 or absmax2:
        raise ValueError(f"state2 and absmax2: {rule} has one moment, expected empty lists")
    for name, values in lists:
        if len(values) != count:
            raise ValueError(f"{name}: got {len(values)} tensors, expected {count} as in params")
    if rounding is not None:
        checks.dtype_in("rounding", rounding, (torch.int64,))
        checks.shape_is("rounding", rounding, (count, 4))
        checks.contiguous("rounding", rounding)
    second = state2 if two else state1
    scale = absmax2 if two else absmax1
    rows = zip(params, grads, state1, second, absmax1, scale, strict=True)
    for i, row in enumerate(rows):
        if _fits(row, two):
            continue
        _check_tensor(i, row, two)
        for value in row:
            if value.device != row[0].device:
                raise ValueError(f"tensor {i}: on {value.device}, expected {row[0].device}")


def _fake_step(
    hyper: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    rule: str,
    rounding: Tensor | None,
) -> Tensor:
    return hyper.new_empty((len(params),), dtype=torch.int64)


def sample_tensors(
    sizes: tuple[int, ...], dtype: torch.dtype, rule: str, eight: bool, seed: int = 0
) -> tuple[list[Tensor], ...]:
    """Random params, grads, state1, state2, absmax1, absmax2 in the middle of a training run."""
    make = torch.Generator().manual_seed(seed)
    params, grads, state1, state2, absmax1, absmax2 = [], [], [], [], [], []
    for n in sizes:
        params.append(torch.randn(n, generator=make).to(dtype))
        grads.append((torch.randn(n, generator=make) * 0.01).to(dtype))
        m, v = torch.randn(n, generator=make) * 0.01, torch.rand(n, generator=make) * 1e-4
        (c1, s1) = reference.encode(m, True) if eight else (m, m.new_empty(0))
        (c2, s2) = reference.encode(v, False) if eight else (v, v.new_empty(0))
        state1.append(c1.contiguous())
        absmax1.append(s1)
        state2.append(c2.contiguous())
        absmax2.append(s2)
    if rule != "adamw":
        state2, absmax2 = [], []
    return params, grads, state1, state2, absmax1, absmax2


def _samples_step(dtype: torch.dtype) -> Iterator[Sample]:
    for i, rule in enumerate(RULES):
        for eight in (False, True):
            for sizes in ((), (1,), (0, 257, 5000)):
                row = hyper_row(
                    rule, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=3
                )
                hyper = torch.tensor([row] * len(sizes)).view(-1, reference.COLUMNS)
                lists = sample_tensors(sizes, dtype, rule, eight, i)
                if len(sizes) > 1:
                    lists[1][1][7] = float("nan")
                name = f"{rule}-{8 if eight else 32}bit-{len(sizes)}"
                rounding = None
                if i == 0 and dtype == torch.bfloat16:
                    rounding = torch.tensor([[77, 3, j, 0] for j in range(len(sizes))])
                    rounding = rounding.long().view(-1, 4)
                yield Sample(name, (hyper, *lists, rule, rounding))


define_op(
    OpSpec(
        name="optimizer_step",
        schema="(Tensor hyper, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, "
        "Tensor(c!)[] state2, Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, str rule, "
        "Tensor? rounding) -> Tensor",
        check=_check_step,
        fake=_fake_step,
        reference=reference.optimizer_step,
        samples=_samples_step,
        bench=("optimizer",),
    )
)


def _check_norm(anchor: Tensor, grads: list[Tensor]) -> None:
    checks.dtype_in("anchor", anchor, (torch.float32,))
    for i, grad in enumerate(grads):
        checks.dtype_in(f"grads[{i}]", grad, PARAM_DTYPES)
        checks.contiguous(f"grads[{i}]", grad)


def _fake_norm(anchor: Tensor, grads: list[Tensor]) -> Tensor:
    return anchor.new_empty((1,))


def _samples_norm(dtype: torch.dtype) -> Iterator[Sample]:
    make = torch.Generator().manual_seed(3)
    for sizes in ((), (1,), (2048,), (0, 3, 1000), (16384 * 2 + 5, 257)):
        grads = [torch.randn(n, generator=make).to(dtype) for n in sizes]
        yield Sample("-".join(map(str, sizes)) or "none", (torch.empty(len(sizes)), grads))


define_op(
    OpSpec(
        name="optimizer_grad_norm",
        schema="(Tensor anchor, Tensor[] grads) -> Tensor",
        check=_check_norm,
        fake=_fake_norm,
        reference=reference.optimizer_grad_norm,
        samples=_samples_norm,
        tolerance="error_rule",
        baseline=reference.grad_norm_baseline,
    )
)
