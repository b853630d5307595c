"""The automatic matrix: every op x implementation x sample x dtype x layout against its reference.

A new op, implementation or sample is tested by existing; nothing is listed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import peftkern as pk
from peftkern import registry
from peftkern.testing import assert_error_rule, assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _cells() -> Iterator[Any]:
    for name, spec in registry.specs().items():
        for row in registry.implementations(name, "cpu"):
            for dtype in spec.dtypes:
                short = str(dtype).removeprefix("torch.")
                yield pytest.param(name, row.backend, dtype, id=f"{name}-{row.backend}-{short}")


def _outputs(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _shifted(value: Any) -> Any:
    """The same values one element further into a buffer: contiguous, but aligned to nothing."""
    if not isinstance(value, torch.Tensor) or not value.is_contiguous():
        return value
    buffer = value.new_empty(value.numel() + 1)
    buffer[1:] = value.reshape(-1)
    return buffer[1:].view(value.shape)


def _run(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    return _outputs(getattr(torch.ops.peftkern, name)(*args))


@pytest.mark.parametrize(("name", "backend", "dtype"), list(_cells()))
def test_matches_reference(name: str, backend: str, dtype: torch.dtype) -> None:
    spec = registry.specs()[name]
    if (reason := dict(registry.explain(name))[backend]) is not None:
        pytest.skip(reason)
    ran = 0
    for sample in spec.samples(dtype):
        row = next(r for r in registry.implementations(name) if r.backend == backend)
        if row.refusal(sample.args) is not None:
            continue
        ran += 1
        with pk.use_backend("reference"):
            expected = _run(name, sample.args)
        for layout, args in (
            ("plain", sample.args),
            ("shifted", tuple(_shifted(a) for a in sample.args)),
        ):
            with pk.use_backend(backend):
                actual = _run(name, args)
            assert len(actual) == len(expected)
            for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
                where = f"{name}[{backend}] {sample.name} {layout} output {i}"
                assert got.stride() == want.stride(), where
                if spec.tolerance == "exact":
                    assert_same_bits(got, want, where)
                    continue
                truth = _outputs(spec.reference(*sample.args, compute=torch.float64))[i]
                assert spec.baseline is not None
                plain = _outputs(spec.baseline(*sample.args))[i]
                assert_error_rule(got, truth, plain, spec.factor, where)
    assert ran, f"{backend} refused every sample of {name} in {dtype}"


@pytest.mark.parametrize("name", list(registry.specs()))
def test_runs_twice_to_the_same_bits(name: str) -> None:
    spec = registry.specs()[name]
    for sample in spec.samples(spec.dtypes[0]):
        first, second = _run(name, sample.args), _run(name, sample.args)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same_bits(a, b, f"{name} {sample.name} output {i}")


@pytest.mark.parametrize("name", list(registry.specs()))
def test_thread_count_changes_no_bit(name: str) -> None:
    spec = registry.specs()[name]
    row = registry.implementations(name)[0]
    if row.backend == "reference":
        pytest.skip("no kernel of ours serves this op here")
    for sample in spec.samples(spec.dtypes[-1]):
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(_run(name, sample.args))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert_same_bits(a, b, f"{name} {sample.name}")
