"""Contract of counter-based dropout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.dropout import reference
from peftkern.registry import OpSpec, Sample, define_op


def _check(x: Tensor, p: float, seed: Tensor) -> None:
    checks.dtype_in("x", x, checks.FLOATS)
    checks.contiguous("x", x)
    checks.dropout_arguments(x, p, seed)


def _fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)
    for i, shape in enumerate(((0, 5), (1, 1), (3, 7), (16, 129), (5, 1000))):
        x = torch.randn(shape, generator=generator).to(dtype)
        seed = torch.tensor([(-1) ** i * (i * 2**40 + i)], dtype=torch.int64)
        p = (0.1, 0.5, 0.25, 0.9, 1e-3)[i]
        yield Sample(f"{'x'.join(map(str, shape))}-p{p}", (x, p, seed))


define_op(
    OpSpec(
        name="philox_dropout",
        schema="(Tensor x, float p, Tensor seed) -> Tensor",
        check=_check,
        fake=_fake,
        reference=reference.philox_dropout,
        samples=_samples,
    )
)
