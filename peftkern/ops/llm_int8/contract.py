"""Contract of LLM.int8()."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.llm_int8 import reference
from peftkern.ops.quant8.contract import bundles_8bit
from peftkern.registry import OpSpec, Sample, define_op

# Above this an exact sum of products of 8-bit codes may leave 32 bits.
MOST_FEATURES = 131072
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
# (M, N, K, bias, threshold, columns with large values)
_CASES = (
    (1, 64, 128, False, 0.0, 0),
    (1, 40, 4224, True, 6.0, 3),
    (3, 33, 192, True, 6.0, 2),
    (8, 48, 256, True, 0.0, 0),
    (9, 17, 191, True, 6.0, 5),
    (2, 13, 31, True, 2.0, 1),
    (37, 50, 130, False, 6.0, 1),
    (70, 67, 65, True, 6.0, 40),
    (130, 70, 96, False, 0.0, 0),
    (0, 8, 64, True, 6.0, 0),
    (4, 0, 64, False, 6.0, 1),
    (4, 8, 0, True, 6.0, 0),
    (1, 1, 1, True, 0.0, 0),
)


def usable_threshold(threshold: float) -> None:
    """Raise ``ValueError`` unless fp32 holds it and it is not negative."""
    if threshold == 0.0 or _LEAST <= threshold <= _MOST:
        return
    raise ValueError(
        f"threshold: got {threshold}, expected 0 or a number between {_LEAST:.3g} and {_MOST:.3g}"
    )


def _check(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float) -> None:
    checks.float_matrix("x", x)
    checks.statistics_8bit(codes, scb)
    if codes.shape[1] != x.shape[1]:
        raise ValueError(
            f"codes: got {codes.shape[1]} input features, expected {x.shape[1]} like x"
        )
    if codes.shape[1] > MOST_FEATURES:
        raise ValueError(
            f"codes: got {codes.shape[1]} input features, expected at most {MOST_FEATURES}, so "
            "that sums fit 32 bits; use linear_8bit without a threshold"
        )
    usable_threshold(threshold)
    checks.same_device("x", x, codes=codes)
    checks.bias_like(x, bias, codes.shape[0])


def _fake(x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (m, n, k, has_bias, threshold, large) in enumerate(_CASES):
        make = torch.Generator().manual_seed(i)
        x = torch.randn((m, k), generator=make).to(dtype).clamp(-5.5, 5.5)
        if threshold == 2.0:
            x = x.clamp(-1.5, 1.5)
        if m:
            for c in torch.randperm(k, generator=make)[:large].tolist():
                x[c % m, c] = 20.0 + c % 7
        bias = torch.randn(n, generator=make).to(dtype) if has_bias else None
        name = f"m{m}-n{n}-k{k}-t{threshold:g}{'-bias' if has_bias else ''}"
        yield Sample(name, (x, *bundles_8bit((n, k), i), bias, threshold))
    tiny = torch.randn(3, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    tiny[0] *= 1e-38 if dtype not in (torch.float16,) else 1e-7
    tiny[1] = 0.0
    yield Sample("zeros-tiny", (tiny, *bundles_8bit((5, 64), 1), None, 0.0))


def _baseline(
    x: Tensor, codes: Tensor, scb: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    # What a matmul of x's dtype makes of the same rounded numbers.
    rounded, absmax, columns = reference.round_rows(x, threshold)
    step = (absmax / 127.0)[:, None]
    dense = (rounded.float() * step).masked_fill(columns, 0.0) + x.float().masked_fill(
        ~columns, 0.0
    )
    weight = codes.float() * (scb / 127.0)[:, None]
    return torch.nn.functional.linear(dense.to(x.dtype), weight.to(x.dtype), bias)


define_op(
    OpSpec(
        name="llm_int8",
        schema="(Tensor x, Tensor codes, Tensor scb, Tensor? bias, float threshold) -> Tensor",
        check=_check,
        fake=_fake,
        reference=reference.llm_int8,
        samples=_samples,
        tolerance="error_rule",
        baseline=_baseline,
        bench=("llm_int8",),
    )
)
