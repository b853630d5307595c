"""What every op must have besides numbers: samples that bite, a true fake, torch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftkern import registry
from peftkern.testing import map_tensors, tensors_of

OPS = list(registry.specs())


def _op(name: str) -> Any:
    return getattr(torch.ops.peftkern, name)


def test_there_are_ops() -> None:
    assert len(OPS) >= 11


@pytest.mark.parametrize("name", OPS)
def test_samples_cover_the_hard_sizes(name: str) -> None:
    spec = registry.specs()[name]
    samples = list(spec.samples(spec.dtypes[0]))
    sizes = [size for sample in samples for t in tensors_of(sample.args) for size in t.shape]
    assert 0 in sizes, "no sample of size 0"
    assert 1 in sizes, "no sample of size 1"
    assert any(size % 2 and size > 1 for size in sizes), "no odd size"
    assert len({sample.name for sample in samples}) == len(samples), "sample names repeat"


@pytest.mark.parametrize("name", OPS)
def test_reference_is_the_last_resort(name: str) -> None:
    for device in ("cpu", "cuda", "mps"):
        assert registry.implementations(name, device)[-1].backend == "reference"


@pytest.mark.parametrize("name", OPS)
def test_fake_tells_the_truth(name: str) -> None:
    spec = registry.specs()[name]
    for dtype in spec.dtypes:
        for sample in spec.samples(dtype):
            real = tensors_of(_op(name)(*sample.args))
            on_meta = map_tensors(lambda t: t.to("meta"), sample.args)
            fake = tensors_of(_op(name)(*on_meta))
            for got, want in zip(fake, real, strict=True):
                assert (got.shape, got.dtype, got.stride()) == (
                    want.shape,
                    want.dtype,
                    want.stride(),
                ), sample.name


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    spec = registry.specs()[name]
    samples = list(spec.samples(spec.dtypes[0]))
    for sample in samples:
        torch.library.opcheck(_op(name).default, sample.args, test_utils=("test_schema",))
        torch.library.opcheck(_op(name).default, sample.args, test_utils=("test_faketensor",))
    torch.library.opcheck(_op(name).default, samples[0].args)


@pytest.mark.parametrize("name", OPS)
def test_compiles_as_one_node(name: str) -> None:
    spec = registry.specs()[name]
    sample = next(iter(spec.samples(spec.dtypes[0])))
    torch.compiler.reset()
    compiled = torch.compile(_op(name), fullgraph=True, backend="aot_eager", dynamic=True)
    for got, want in zip(
        tensors_of(compiled(*sample.args)), tensors_of(_op(name)(*sample.args)), strict=True
    ):
        assert torch.equal(got, want)


def test_a_direct_call_leaves_no_gradient_behind() -> None:
    x = torch.randn(3, 7, requires_grad=True)
    y = torch.ops.peftkern.philox_dropout(x, 0.5, torch.tensor([1]))
    assert y.grad_fn is None or not isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)


def test_an_op_is_declared_once() -> None:
    spec = next(iter(registry.specs().values()))
    with pytest.raises(ValueError, match="declared twice"):
        registry.define_op(spec)
    with pytest.raises(ValueError, match="not declared"):
        registry.implementation("no_such_op", device="cpu", backend="native")
    with pytest.raises(ValueError, match="not known"):
        registry.implementation(spec.name, device="cpu", backend="abacus")


def test_forcing_a_backend() -> None:
    import peftkern as pk

    packed = torch.ops.peftkern.quantize_4bit
    w = torch.randn(4, 64)
    with pk.use_backend("reference"):
        assert registry.forced_backend() == "reference"
        packed(w, "nf4", 64, True)
    assert registry.forced_backend() == "auto"
    with pytest.raises(ValueError, match="expected one of"):
        pk.use_backend("abacus")


def test_a_forced_backend_never_falls_back() -> None:
    x = torch.randn(2, 64, dtype=torch.float64)
    q = torch.ops.peftkern.quantize_8bit(torch.randn(8, 64), True)
    rows = dict(registry.explain("linear_8bit"))
    if rows.get("native", "absent") is not None:
        pytest.skip(f"native backend: {rows.get('native', 'absent')}")
    import peftkern as pk

    assert torch.ops.peftkern.linear_8bit(x, *q, None).dtype == torch.float64
    with pk.use_backend("native"), pytest.raises(RuntimeError, match=r"forced but .*float64"):
        torch.ops.peftkern.linear_8bit(x, *q, None)
