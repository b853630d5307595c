"""What the tests, and yours, hold results against: bit equality and the error rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of an op's arguments or results, those inside lists and tuples too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same arguments with ``function`` applied to every tensor, inside lists too."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def bits(value: Tensor) -> Tensor:
    """The raw bits as integers; every NaN counts as the same NaN."""
    if value.dtype.is_floating_point:
        value = torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
    return value.contiguous().view(_SAME_WIDTH[value.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Equal shape, dtype, device and bits (signed zeros told apart, NaN equal to NaN).

    Raises:
        AssertionError: naming the first place that differs and how many do.
    """
    _assert_same_kind(actual, expected, name)
    different = (bits(actual) != bits(expected)).nonzero()
    if different.numel():
        place = tuple(different[0].tolist())
        raise AssertionError(
            f"{name}: {len(different)} of {actual.numel()} values differ; first at {place}: "
            f"got {actual[place].item()!r}, expected {expected[place].item()!r}"
        )


def assert_error_rule(
    actual: Tensor, truth: Tensor, baseline: Tensor, factor: float, name: str = "result"
) -> None:
    """The worst error is at most ``factor`` times that of eager torch, plus 2 ulp of the largest.

    Args:
        actual: what a kernel returned.
        truth: the same from the reference in float64, unrounded.
        baseline: the same maths in eager torch at the kernel's dtype.
        factor: 1.5 for forward results, 2 for gradients.
        name: for the message.

    Raises:
        AssertionError: the rule is broken, or values are not finite where the truth is.
    """
    _assert_same_kind(actual, baseline, name)
    if actual.numel() == 0:
        return
    finite = truth.isfinite()
    if not torch.equal(actual.isnan(), truth.isnan()):
        raise AssertionError(f"{name}: NaN in other places than in the truth")
    if not finite.any():
        return
    wide, plain, exact = actual.double()[finite], baseline.double()[finite], truth.double()[finite]
    error, allowed = (wide - exact).abs().max(), (plain - exact).abs().max()
    slack = 2 * torch.finfo(actual.dtype).eps * exact.abs().max()
    if not error <= factor * allowed + slack:
        raise AssertionError(
            f"{name}: worst error {error.item():.3e}, allowed {factor} x {allowed.item():.3e} "
            f"(eager torch) + {slack.item():.3e} (2 ulp)"
        )


def _assert_same_kind(actual: Tensor, expected: Tensor, name: str) -> None:
    for what in ("shape", "dtype", "device"):
        got, want = getattr(actual, what), getattr(expected, what)
        if got != want:
            raise AssertionError(f"{name}: got {what} {got}, expected {want}")
