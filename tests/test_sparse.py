"""The linear with trainable entries: gradients, autocast, checkpointing, compile, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftkern as pk
from peftkern.quant import quantize
from peftkern.testing import assert_error_rule, assert_same_bits

F = pk.functional
FORMATS = ["dense", "nf4", "fp4", "int8"]
EVERY_DEVICE = True
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _base(format: str, n: int, k: int, dtype: torch.dtype) -> tuple[object, Tensor]:
    w = torch.randn(n, k).to(dtype) * 0.1
    if format == "dense":
        return w, w
    q = quantize(w, format)
    return q, q.dequantize(dtype)


def _positions(numel: int, entries: int) -> Tensor:
    return torch.randperm(numel)[:entries].sort().values


def _gradients(run: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 70), (1, 70), (0, 64), (161, 96)], ids=str)
def test_gradients(format: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    n, k = 45, shape[-1]
    base, dense = _base(format, n, k, dtype)
    x, bias = torch.randn(shape).to(dtype), torch.randn(n).to(dtype)
    indices = _positions(n * k, 301)
    values = torch.randn(301)  # an fp32 master
    dy = torch.randn(*shape[:-1], n).to(dtype)

    def ours(x: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        return F.sparse_delta_linear(x, base, indices, values, bias)

    def eager(x: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        w = dense.to(x.dtype).flatten().index_add(0, indices, values.to(x.dtype)).view(n, k)
        return torch.nn.functional.linear(x, w, bias)

    inputs = [x, bias, values]
    got = _gradients(ours, inputs, dy)
    truth = _gradients(eager, [t.double() for t in inputs], dy.double())
    plain = _gradients(eager, inputs, dy)
    for name, g, t, e in zip(["y", "x", "bias", "values"], got, truth, plain, strict=True):
        assert_error_rule(g, t, e, 1.5 if name == "y" else 2.0, f"{name} {format} {dtype}")


def test_gradients_of_a_sum_arrive_with_stride_0() -> None:
    x, w, at = torch.randn(5, 64), torch.randn(16, 64), torch.tensor([0, 65, 1023])
    values = torch.zeros(3, requires_grad=True)
    F.sparse_delta_linear(x, w, at, values).sum().backward()
    torch.testing.assert_close(values.grad, x.sum(0)[at % 64])


def test_gradients_second_order_are_refused() -> None:
    x, w = torch.randn(5, 64, requires_grad=True), torch.randn(16, 64)
    values = torch.zeros(2, requires_grad=True)
    y = F.sparse_delta_linear(x, w, torch.tensor([1, 2]), values)
    (g,) = torch.autograd.grad(y.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        g.sum().backward()


def test_no_dense_gradient_and_no_dense_weight_are_made() -> None:
    n = k = 512
    q = pk.quantize_4bit(torch.randn(n, k))
    x, at = torch.randn(3, k, requires_grad=True), _positions(n * k, 100)
    values = torch.zeros(100, requires_grad=True)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept = max(kept, tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = F.sparse_delta_linear(x, q, at, values)
    assert kept <= max(q.weight.nbytes, x.nbytes)
    y.sum().backward()
    assert values.grad is not None
    assert values.grad.shape == (100,)


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_autocast_and_reentrant_checkpointing_change_nothing_else(format: str) -> None:
    base, _ = _base(format, 16, 64, torch.float32)
    x, at = torch.randn(7, 64), _positions(16 * 64, 40)
    results = []
    for mode in (None, True, False):
        leaf = x.clone().requires_grad_()
        values = torch.linspace(-1, 1, 40).requires_grad_()

        def run(z: Tensor, v: Tensor = values) -> Tensor:
            with torch.autocast(torch.get_default_device().type, torch.bfloat16):
                return F.sparse_delta_linear(z, base, at, v)

        y = run(leaf) if mode is None else checkpoint(run, leaf, use_reentrant=mode)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert values.grad is not None
        assert values.grad.dtype == torch.float32
        results.append((y.detach(), leaf.grad, values.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_compiles_whole(format: str) -> None:
    base, _ = _base(format, 16, 64, torch.float32)
    at, values = _positions(16 * 64, 33), torch.randn(33, requires_grad=True)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x: Tensor) -> Tensor:
        return F.sparse_delta_linear(x, base, at, values).square()

    for rows in (3, 5):
        x = torch.randn(rows, 64, requires_grad=True)
        y, z = run(x), F.sparse_delta_linear(x, base, at, values).square()
        assert_same_bits(y, z)
        for a, b in zip(
            torch.autograd.grad(y.sum(), (x, values)),
            torch.autograd.grad(z.sum(), (x, values)),
            strict=True,
        ):
            assert_same_bits(a, b)


def test_errors_name_the_argument() -> None:
    x, w, v = torch.randn(3, 64), torch.randn(8, 64), torch.zeros(2)
    at = torch.tensor([1, 2])
    cases = [
        (ValueError, r"x: got shape", lambda: F.sparse_delta_linear(x[:, 1:], w, at, v)),
        (TypeError, r"indices: got list", lambda: F.sparse_delta_linear(x, w, [1], v)),
        (TypeError, r"indices: got dtype", lambda: F.sparse_delta_linear(x, w, at.int(), v)),
        (ValueError, r"values: got shape", lambda: F.sparse_delta_linear(x, w, at, v[1:])),
        (TypeError, r"values: got dtype", lambda: F.sparse_delta_linear(x, w, at, v.half())),
        (ValueError, r"indices: .*sorted", lambda: F.sparse_delta_linear(x, w, at.flip(0), v)),
        (ValueError, r"indices: .*512\)", lambda: F.sparse_delta_linear(x, w, at + 510, v)),
        (ValueError, r"indices: .*got -1", lambda: F.sparse_delta_linear(x, w, at - 2, v)),
        (
            ValueError,
            r"indices: .*sorted",
            lambda: torch.ops.peftkern.sampled_gradient(x, x, at.flip(0)),
        ),
    ]
    for backend in ("auto", "reference"):
        with pk.use_backend(backend):
            for kind, message, call in cases:
                with pytest.raises(kind, match=message):
                    call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_term_beside_torch_s_own_product(dtype: torch.dtype, monkeypatch: object) -> None:
    """Where torch multiplies with the base (fp32, and bf16 on CPUs that have it)."""
    from peftkern.ops.sparse_delta import cpu

    if dict(pk.registry.explain("sparse_delta_linear"))["native"] is not None:
        pytest.skip("no native kernels here")
    n, k, m = 67, 83, 139
    w, x, dy = (torch.randn(s).to(dtype) for s in ((n, k), (m, k), (m, n)))
    at = _positions(n * k, 700)
    values = torch.randn(700)
    dense = w.double().flatten().index_add(0, at, values.double()).view(n, k)
    for by_torch in (True, False):
        monkeypatch.setattr(cpu, "base_by_torch", lambda _, by=by_torch: by)  # type: ignore[attr-defined]
        for weight in (w, w.t().contiguous().t()):
            bundle = (weight, None, None, None, "dense", 0)
            y = cpu.sparse_delta_linear(x, *bundle, n, None, at, values)
            dx = cpu.sparse_delta_dx(dy, *bundle, k, at, values)
            plain = dense.to(dtype)
            assert_error_rule(y, x.double() @ dense.T, x @ plain.T, 1.5, "y")
            assert_error_rule(dx, dy.double() @ dense, dy @ plain, 2.0, "dx")
