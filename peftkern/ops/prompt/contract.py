"""Contracts of embeddings with a trained prompt in front, and of the prompt's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.lora.contract import randn
from peftkern.ops.prompt import reference
from peftkern.registry import OpSpec, Sample, define_op

# (B, L, P, H, V, a prompt for each row, fp32 prompt)
_CASES = (
    (2, 5, 3, 64, 17, False, True),
    (3, 7, 4, 50, 11, False, False),
    (2, 4, 20, 129, 30, True, True),
    (40, 1, 2, 8, 5, False, True),
    (1, 300, 1, 16, 400, False, False),
    (2, 0, 3, 24, 4, False, True),
    (0, 5, 3, 24, 4, False, True),
    (2, 3, 0, 24, 4, False, True),
    (1, 1, 1, 1, 1, True, False),
)


def _check(ids: Tensor, table: Tensor, prompt: Tensor) -> None:
    checks.dtype_in("ids", ids, (torch.int64,))
    checks.ndim("ids", ids, 2)
    checks.contiguous("ids", ids)
    checks.float_matrix("table", table)
    wide = torch.promote_types(table.dtype, torch.float32)
    checks.dtype_in("prompt", prompt, (table.dtype, wide))
    checks.contiguous("prompt", prompt)
    checks.same_device("ids", ids, table=table, prompt=prompt)
    if prompt.dim() == 3:
        checks.shape_is("prompt", prompt, (ids.shape[0], prompt.shape[1], table.shape[1]))
        return
    checks.ndim("prompt", prompt, 2)
    checks.shape_is("prompt", prompt, (prompt.shape[0], table.shape[1]))


def _fake(ids: Tensor, table: Tensor, prompt: Tensor) -> Tensor:
    batch, length = ids.shape
    return table.new_empty((batch, prompt.shape[-2] + length, table.shape[1]))


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (b, length, p, h, v, per_row, master) in enumerate(_CASES):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(v, (b, length), generator=generator)
        kind = torch.promote_types(dtype, torch.float32) if master else dtype
        prompt = randn((b, p, h) if per_row else (p, h), kind, i + 3)
        name = f"b{b}-l{length}-p{p}-h{h}" + "-rows" * per_row + "-fp32p" * master
        yield Sample(name, (ids, randn((v, h), dtype, i), prompt))


define_op(
    OpSpec(
        name="prompt_embedding",
        schema="(Tensor ids, Tensor table, Tensor prompt) -> Tensor",
        check=_check,
        fake=_fake,
        reference=reference.prompt_embedding,
        samples=_samples,
    )
)


def _check_gradient(dy: Tensor, length: int, per_row: bool) -> None:
    checks.dtype_in("dy", dy, checks.FLOATS)
    checks.ndim("dy", dy, 3)
    checks.contiguous("dy", dy)
    if not 0 <= length <= dy.shape[1]:
        raise ValueError(f"length: got {length}, expected 0 to the {dy.shape[1]} positions of dy")


def _fake_gradient(dy: Tensor, length: int, per_row: bool) -> Tensor:
    wide = torch.promote_types(dy.dtype, torch.float32)
    shape = (dy.shape[0], length, dy.shape[2]) if per_row else (length, dy.shape[2])
    return dy.new_empty(shape, dtype=wide)


def _samples_gradient(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (b, length, p, h, _, per_row, _) in enumerate(_CASES):
        name = f"b{b}-l{length}-p{p}-h{h}" + "-rows" * per_row
        yield Sample(name, (randn((b, p + length, h), dtype, i), p, per_row))


def _baseline_gradient(dy: Tensor, length: int, per_row: bool) -> Tensor:
    return reference.prompt_gradient(dy, length, per_row)


define_op(
    OpSpec(
        name="prompt_gradient",
        schema="(Tensor dy, SymInt length, bool per_row) -> Tensor",
        check=_check_gradient,
        fake=_fake_gradient,
        reference=reference.prompt_gradient,
        samples=_samples_gradient,
        tolerance="error_rule",
        baseline=_baseline_gradient,
        factor=2.0,
    )
)
