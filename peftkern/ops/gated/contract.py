"""Contracts of gated activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.gated import reference
from peftkern.ops.lora.contract import randn
from peftkern.registry import OpSpec, Sample, define_op

_SHAPES = ((1, 1), (3, 7), (5, 64), (2, 129), (0, 8), (4, 0), (17, 1030))


def check_activation(activation: str) -> None:
    """Raise ``ValueError`` for an unknown activation."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {reference.ACTIVATIONS}")


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    checks.float_matrix("gate", gate)
    checks.float_matrix("up", up)
    checks.dtype_in("up", up, (gate.dtype,))
    checks.shape_is("up", up, tuple(gate.shape))
    checks.same_device("gate", gate, up=up)
    check_activation(activation)


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for i, activation in enumerate(reference.ACTIVATIONS):
        for j, shape in enumerate(_SHAPES):
            gate = randn(shape, dtype, 7 * i + j) * (1.0 + 2.0 * j)
            yield Sample(
                f"{activation}-{shape[0]}x{shape[1]}", (gate, randn(shape, dtype, j), activation)
            )
        # From underflow to saturation on both sides.
        ramp = torch.linspace(-120, 120, 481).view(13, 37).to(dtype)
        yield Sample(f"{activation}-ramp", (ramp, torch.ones_like(ramp), activation))


def _baseline(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return reference.activate(gate, activation) * up


define_op(
    OpSpec(
        name="gated_activation",
        schema="(Tensor gate, Tensor up, str activation) -> Tensor",
        check=_check,
        fake=_fake,
        reference=reference.gated_activation,
        samples=_samples,
        tolerance="error_rule",
        baseline=_baseline,
        bench=("lora_mlp",),
    )
)


def _check_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    _check(gate, up, activation)
    checks.float_matrix("dh", dh)
    checks.dtype_in("dh", dh, (gate.dtype,))
    checks.shape_is("dh", dh, tuple(gate.shape))
    checks.same_device("gate", gate, dh=dh)


def _fake_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)


def _samples_backward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, sample in enumerate(_samples(dtype)):
        gate, up, activation = sample.args
        dh = randn(tuple(gate.shape), dtype, i + 50)
        yield Sample(sample.name, (dh, gate, up, activation))


def _baseline_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    aten = torch.ops.aten
    a = reference.activate(gate, activation)
    da = dh * up
    if activation == "silu":
        dgate = aten.silu_backward(da, gate)
    elif activation == "relu":
        dgate = aten.threshold_backward(da, gate, 0)
    else:
        kind = "tanh" if activation == "gelu_tanh" else "none"
        dgate = aten.gelu_backward(da, gate, approximate=kind)
    return dgate, dh * a, a * up


define_op(
    OpSpec(
        name="gated_activation_backward",
        schema="(Tensor dh, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor, Tensor)",
        check=_check_backward,
        fake=_fake_backward,
        reference=reference.gated_activation_backward,
        samples=_samples_backward,
        tolerance="error_rule",
        baseline=_baseline_backward,
        factor=2.0,
        bench=("lora_mlp",),
    )
)
