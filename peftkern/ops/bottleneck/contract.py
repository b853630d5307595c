"""Contracts of the bottleneck adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.bottleneck import reference
from peftkern.ops.dropout.reference import keep_mask, philox_dropout
from peftkern.registry import OpSpec, Sample, define_op

# (M, N, K, r, activation, biases, scale entries, residual, dropout, fp32 adapters)
_CASES = (
    (1, 64, 64, 8, "relu", "du", 0, "other", 0.0, True),
    (7, 50, 50, 5, "gelu", "du", 50, "x", 0.25, False),
    (40, 96, 96, 6, "silu", "du", 0, "other", 0.0, False),
    (2, 33, 70, 3, "gelu_tanh", "", 1, "other", 0.5, True),
    (9, 128, 128, 1, "tanh", "d", 128, "", 0.0, True),
    (33, 130, 130, 17, "sigmoid", "u", 1, "x", 0.1, False),
    (65, 72, 72, 36, "leaky_relu", "du", 72, "x", 0.0, True),
    (147, 31, 45, 70, "identity", "du", 0, "other", 0.3, True),
    (8, 260, 260, 16, "gelu", "du", 0, "x", 0.0, False),
    (0, 8, 64, 4, "relu", "du", 8, "other", 0.5, True),
    (4, 0, 64, 4, "relu", "du", 0, "", 0.0, True),
    (4, 8, 0, 4, "gelu", "du", 1, "other", 0.0, True),
    (1, 1, 1, 1, "silu", "du", 1, "x", 0.0, False),
)
_NEEDS = ((True, True), (True, False), (False, True))


def _randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check_adapter(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    checks.float_matrix("x", x)
    wide = torch.promote_types(x.dtype, torch.float32)
    checks.dtype_in("down_w", down_w, (x.dtype, wide))
    checks.ndim("down_w", down_w, 2)
    checks.ndim("up_w", up_w, 2)
    rank, width = down_w.shape[0], up_w.shape[0]
    if rank < 1:
        raise ValueError("down_w: got 0 rows, expected a bottleneck of at least 1")
    checks.shape_is("down_w", down_w, (rank, x.shape[1]))
    checks.shape_is("up_w", up_w, (width, rank))
    if down_b is not None:
        checks.shape_is("down_b", down_b, (rank,))
    if up_b is not None:
        checks.shape_is("up_b", up_b, (width,))
    if scale is not None and tuple(scale.shape) not in ((1,), (width,)):
        raise ValueError(f"scale: got shape {tuple(scale.shape)}, expected (1,) or ({width},)")
    rest = {"down_w": down_w, "down_b": down_b, "up_w": up_w, "up_b": up_b, "scale": scale}
    for name, value in rest.items():
        if value is None:
            continue
        if value.dtype != down_w.dtype:
            raise TypeError(f"{name}: got {value.dtype}, expected {down_w.dtype} like down_w")
        checks.contiguous(name, value)
    checks.same_device("x", x, **rest)
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, expected one of {known}")
    checks.dropout_arguments(x, dropout_p, seed)


def _check_forward(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
) -> None:
    weights = (down_w, down_b, up_w, up_b, scale)
    _check_adapter(x, *weights, activation, dropout_p, seed)
    if residual is not None:
        checks.dtype_in("residual", residual, (x.dtype,))
        checks.shape_is("residual", residual, (x.shape[0], up_w.shape[0]))
        checks.contiguous("residual", residual)
        checks.same_device("x", x, residual=residual)


def _fake_forward(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    m, rank = x.shape[0], down_w.shape[0]
    z = down_w.new_empty((m, rank) if keep else (0,))
    return x.new_empty((m, up_w.shape[0])), z


def _name(case: tuple[Any, ...]) -> str:
    m, n, k, r, activation, biases, scales, residual, p, master = case
    marks = [f"m{m}", f"n{n}", f"k{k}", f"r{r}", f"b{biases}", f"s{scales}"]
    marks += [f"res-{residual}"] * bool(residual) + [f"p{p}"] * (p > 0) + ["fp32w"] * master
    return "-".join([activation, *marks])


def _adapter_sample(case: tuple[Any, ...], dtype: torch.dtype, i: int) -> tuple[Any, ...]:
    m, n, k, r, _, biases, scales, _, _, master = case
    kind = torch.promote_types(dtype, torch.float32) if master else dtype
    x = _randn((m, k), dtype, i)
    down_w = _randn((r, k), kind, i + 1) * (1.5 / max(k, 1) ** 0.5)
    down_b = _randn((r,), kind, i + 2) * 0.5 if "d" in biases else None
    up_w = _randn((n, r), kind, i + 3) * (1 / r**0.5)
    up_b = _randn((n,), kind, i + 4) if "u" in biases else None
    scale = _randn((scales,), kind, i + 5) if scales else None
    if scales == 1 and n > 1:
        # Its gradient is one sum over everything; without cancellation 2 ulp of it mean something.
        up_w, up_b = up_w.abs(), None if up_b is None else up_b.abs()
    return x, down_w, down_b, up_w, up_b, scale


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, case in enumerate(_CASES):
        m, n, _, _, activation, _, _, residual, p, _ = case
        adapter = _adapter_sample(case, dtype, i)
        other = _randn((m, n), dtype, i + 6) if residual else None
        # opcheck wants arguments that are distinct tensors; the kernels compare addresses.
        other = adapter[0].clone() if residual == "x" else other
        seed = torch.tensor([i * 977 - 5]) if p else None
        args = (*adapter, other, activation, p, seed)
        yield Sample(_name(case), (*args, False))
        if i % 2:
            yield Sample(_name(case) + "-kept", (*args, True))


def _eager(activation: str, z: Tensor) -> Tensor:
    functions = {
        "identity": lambda z: z,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "leaky_relu": torch.nn.functional.leaky_relu,
    }
    return functions[activation](z)


def _baseline_forward(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    linear = torch.nn.functional.linear
    z = linear(x.to(down_w.dtype), down_w, down_b)
    y = linear(_eager(activation, z), up_w, up_b)
    y = y if scale is None else y * scale
    y = y if seed is None else philox_dropout(y, dropout_p, seed)
    y = y if residual is None else y + residual
    return y.to(x.dtype), z if keep else z.new_empty(0)


define_op(
    OpSpec(
        name="bottleneck_adapter",
        schema="(Tensor x, Tensor down_w, Tensor? down_b, Tensor up_w, Tensor? up_b, "
        "Tensor? scale, Tensor? residual, str activation, float dropout_p, Tensor? seed, bool keep)"
        " -> (Tensor y, Tensor z)",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.bottleneck_adapter,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=_baseline_forward,
        bench=("bottleneck",),
    )
)


def _check_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
) -> None:
    weights = (down_w, down_b, up_w, up_b, scale)
    _check_adapter(x, *weights, activation, dropout_p, seed)
    checks.float_matrix("dy", dy)
    checks.dtype_in("dy", dy, (x.dtype,))
    checks.shape_is("dy", dy, (x.shape[0], up_w.shape[0]))
    checks.same_device("x", x, dy=dy)
    if z is not None:
        checks.dtype_in("z", z, (down_w.dtype,))
        checks.shape_is("z", z, (x.shape[0], down_w.shape[0]))
        checks.contiguous("z", z)
        checks.same_device("x", x, z=z)
    if add_dy and up_w.shape[0] != x.shape[1]:
        raise ValueError(f"add_dy: dy {tuple(dy.shape)} does not fit x {tuple(x.shape)}")


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = [torch.empty_like(x) if need_dx else x.new_empty(0)]
    for weight in (down_w, down_b, up_w, up_b, scale):
        if weight is None or not need_dw:
            results.append(down_w.new_empty(0))
        else:
            results.append(torch.empty_like(weight))
    return tuple(results)  # type: ignore[return-value]


def _samples_backward(dtype: torch.dtype) -> Iterator[Sample]:
    plain = [s for s in _samples_forward(dtype) if not s.args[-1]]
    for i, (case, sample) in enumerate(zip(_CASES, plain, strict=True)):
        *adapter, _, activation, p, seed, _ = sample.args
        dy = _randn((case[0], case[1]), dtype, i + 9)
        dy = dy.abs() if case[6] == 1 else dy
        forward = (*sample.args[:-1], True)
        _, z = reference.bottleneck_adapter(*forward)
        kept = z if i % 2 else None
        args = (dy, adapter[0], kept, *adapter[1:], activation, p, seed, case[7] == "x")
        needs = _NEEDS[i % 3]
        yield Sample(sample.name, (*args, *needs))
        if needs != (True, True):
            yield Sample(sample.name + "-all", (*args, True, True))


def _baseline_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:
    """What autograd does through the eager modules, op by op at the adapter's dtype."""
    linear, kind = torch.nn.functional.linear, down_w.dtype
    with torch.enable_grad():
        z = linear(x.to(kind), down_w, down_b) if z is None else z.clone()
        z.requires_grad_()
        h = _eager(activation, z)
        up = linear(h.detach(), up_w, up_b)
        g = dy.to(kind)
        if seed is not None:
            keep = keep_mask(dy.shape, dropout_p, seed)
            g = torch.where(keep, g / (1 - dropout_p), 0.0)
        scaled = g if scale is None else g * scale
        (dz,) = torch.autograd.grad(h, z, scaled @ up_w)
    results = [x.new_empty(0)]
    if need_dx:
        results = [(dz @ down_w).to(x.dtype) + (dy if add_dy else 0)]
    ds = g * up
    ds = ds.sum().view(1) if scale is not None and scale.numel() == 1 else ds.sum(0)
    gradients = (dz.T @ x.to(kind), dz.sum(0), scaled.T @ h, scaled.sum(0), ds)
    for value, weight in zip(gradients, (down_w, down_b, up_w, up_b, scale), strict=True):
        absent = weight is None or not need_dw
        results.append(down_w.new_empty(0) if absent else value.detach())
    return tuple(results)


define_op(
    OpSpec(
        name="bottleneck_adapter_backward",
        schema="(Tensor dy, Tensor x, Tensor? z, Tensor down_w, Tensor? down_b, Tensor up_w, "
        "Tensor? up_b, Tensor? scale, str activation, float dropout_p, Tensor? seed, bool add_dy, "
        "bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        check=_check_backward,
        fake=_fake_backward,
        reference=reference.bottleneck_adapter_backward,
        samples=_samples_backward,
        tolerance="error_rule",
        baseline=_baseline_backward,
        factor=2.0,
        bench=("bottleneck",),
    )
)
