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
from peftkern.testing import assert_error_rule, assert_same_bits, map_tensors, tensors_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _marks(device: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.gpu,) if device == "cuda" else ()


def _cells() -> Iterator[Any]:
    for device in DEVICES:
        for name, spec in registry.specs().items():
            for row in registry.implementations(name, device):
                for dtype in spec.dtypes:
                    short = str(dtype).removeprefix("torch.")
                    yield pytest.param(
                        device,
                        name,
                        row.backend,
                        dtype,
                        marks=_marks(device),
                        id=f"{device}-{name}-{row.backend}-{short}",
                    )


def _on(value: Any, device: str) -> Any:
    """The same value on a device, strides kept."""
    if isinstance(value, (list, tuple)):
        return type(value)(_on(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _shifted(value: torch.Tensor) -> torch.Tensor:
    """The same values one element further into a buffer: contiguous, but aligned to nothing."""
    if not value.is_contiguous():
        return value
    buffer = value.new_empty(value.numel() + 1)
    buffer[1:] = value.reshape(-1)
    return buffer[1:].view(value.shape)


def _run(name: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    return tensors_of(getattr(torch.ops.peftkern, name)(*args))


@pytest.mark.parametrize(("device", "name", "backend", "dtype"), list(_cells()))
def test_matches_reference(device: str, name: str, backend: str, dtype: torch.dtype) -> None:
    spec = registry.specs()[name]
    if (reason := dict(registry.explain(name, device))[backend]) is not None:
        pytest.skip(reason)
    ran, reasons = 0, []
    for sample in spec.samples(dtype):
        row = next(r for r in registry.implementations(name, device) if r.backend == backend)
        reason = row.refusal(tuple(_on(a, device) for a in sample.args))
        if reason is not None:
            reasons.append(reason)
            continue
        ran += 1
        for layout, args in (
            ("plain", _on(sample.args, device)),
            ("shifted", map_tensors(_shifted, _on(sample.args, device))),
        ):
            if row.refusal(args) is not None:
                continue  # needs aligned addresses
            # Bit-equal results are those of the same device and layout: a mean that torch itself
            # takes may differ in its last bit from one to the other.
            same = spec.tolerance == "exact" and backend != "reference"
            with pk.use_backend("reference"):
                expected = [t.cpu() for t in _run(name, args if same else sample.args)]
            with pk.use_backend(backend):
                actual = _run(name, args)
            assert len(actual) == len(expected)
            for i, (there, want) in enumerate(zip(actual, expected, strict=True)):
                where = f"{name}[{backend}] {sample.name} {layout} output {i}"
                assert (there.device.type, there.stride()) == (device, want.stride()), where
                got = there.cpu()
                if spec.tolerance == "exact":
                    if device != "cpu" and backend == "reference":
                        # torch's own kernels there fuse multiply-adds: near, not bit-equal.
                        if got.is_floating_point():
                            torch.testing.assert_close(got, want, equal_nan=True, msg=where)
                        continue
                    assert_same_bits(got, want, where)
                    continue
                truth = tensors_of(spec.reference(*sample.args, compute=torch.float64))[i]
                assert spec.baseline is not None
                plain = tensors_of(spec.baseline(*sample.args))[i]
                assert_error_rule(got, truth, plain, spec.factor, where)
    if not ran:  # only because of the dtype
        assert any(str(dtype) in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", list(registry.specs()))
@pytest.mark.parametrize("device", [pytest.param(d, marks=_marks(d)) for d in DEVICES])
def test_runs_twice_to_the_same_bits(name: str, device: str) -> None:
    spec = registry.specs()[name]
    for sample in spec.samples(spec.dtypes[0]):
        args = tuple(_on(a, device) for a in sample.args)
        first, second = _run(name, args), _run(name, args)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same_bits(a, b, f"{name} {sample.name} output {i}")


@pytest.mark.parametrize("name", list(registry.specs()))
def test_thread_count_changes_no_bit(name: str) -> None:
    spec = registry.specs()[name]
    row = registry.implementations(name)[0]
    if row.backend == "reference":
        pytest.skip("no kernel of ours serves this op here")
    for sample in spec.samples(spec.dtypes[-1]):
        if row.refusal(sample.args) is not None:
            continue  # torch's products serve it, and torch's rules hold
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(_run(name, sample.args))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert_same_bits(a, b, f"{name} {sample.name}")
