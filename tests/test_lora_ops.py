"""Groups, feed-forward layers, mixed adapters and DoRA: gradients, and what they must equal."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern import native, registry
from peftkern.ops.dropout.reference import philox_dropout
from peftkern.quant import quantize
from peftkern.testing import assert_error_rule, assert_same_bits, tensors_of

F = pk.functional
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["dense", "nf4", "fp4", "int8"]
linear = torch.nn.functional.linear


def _base(format: str, n: int, k: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The base as the function takes it, and as a dense matrix of the activation's dtype."""
    w = torch.randn(n, k).to(dtype) * 0.1
    if format == "dense":
        return w, w
    q = quantize(w, format)
    return q, q.dequantize(dtype)


def _dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``dropout(x)`` by our mask, differentiable in any dtype."""
    if p == 0.0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return (rows * philox_dropout(torch.ones_like(rows), p, seed)).view(x.shape)


def _term(x: Tensor, a: Tensor, b: Tensor, s: float, p: float, seed: Tensor) -> Tensor:
    """The low-rank term op by op."""
    return s * linear(linear(_dropped(x, p, seed).to(a.dtype), a), b).to(x.dtype)


def _gradients(run: Callable[..., Any], inputs: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    ys = run(*leaves)
    ys = [ys] if isinstance(ys, Tensor) else list(ys)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]


def _hold(
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: list[Tensor],
    dys: list[Tensor],
    outputs: int,
    name: str,
) -> None:
    """Forward and every gradient against fp64 through plain torch, by the error rule."""
    got = _gradients(ours, inputs, dys)
    truth = _gradients(eager, [t.double() for t in inputs], [dy.double() for dy in dys])
    plain = _gradients(eager, inputs, dys)
    for i, (g, t, e) in enumerate(zip(got, truth, plain, strict=True)):
        assert_error_rule(g, t, e, 1.5 if i < outputs else 2.0, f"{name}, result {i}")


def _close(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Within a few roundings of the largest value: sums in another order."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    actual, expected = actual.detach(), expected.detach()
    bound = 16 * torch.finfo(actual.dtype).eps * expected.abs().max()
    error = (actual.double() - expected.double()).abs().max()
    assert error <= bound, f"{name}: {error.item():.3e} > {bound.item():.3e}"


def _same(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Bit for bit from one set of kernels; the reference sums as torch's BLAS pleases."""
    check = assert_same_bits if native.available() else _close
    check(actual.detach(), expected.detach(), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 64), (41, 130), (0, 64)], ids=str)
def test_group(dtype: torch.dtype, p: float, shape: tuple[int, ...]) -> None:
    """Members of different formats, sizes and ranks; one has no bias, one no adapter."""
    k, sizes, seeds = shape[-1], (45, 24, 24), [torch.tensor([i + 7]) for i in range(3)]
    bases, weights = zip(
        *(_base(f, n, k, dtype) for f, n in zip(("nf4", "dense", "int8"), sizes, strict=True)),
        strict=True,
    )
    x, bias = torch.randn(shape).to(dtype), torch.randn(45).to(dtype)
    a0, b0 = torch.randn(6, k) * 0.2, torch.randn(45, 6)
    a1, b1 = torch.randn(3, k) * 0.2, torch.randn(24, 3)
    dys = [torch.randn(*shape[:-1], n).to(dtype) for n in sizes]

    def ours(x: Tensor, bias: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor) -> Any:
        return F.lora_linear_group(
            x,
            [
                (bases[0], a0, b0, 1.5, bias, p, seeds[0]),
                F.LoRAProjection(bases[1], a1, b1, 0.5, None, p / 2, seeds[1]),
                (bases[2],),
            ],
        )

    def eager(x: Tensor, bias: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor) -> Any:
        w = [weight.to(x.dtype) for weight in weights]
        q = linear(x, w[0], bias) + _term(x, a0, b0, 1.5, p, seeds[0])
        return q, linear(x, w[1]) + _term(x, a1, b1, 0.5, p / 2, seeds[1]), linear(x, w[2])

    _hold(ours, eager, [x, bias, a0, b0, a1, b1], dys, 3, f"group {dtype} {p}")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [5, 40])
def test_group_is_its_members(format: str, rows: int) -> None:
    """Each output has the bits of lora_linear, and so have the gradients of a group of one."""
    x = torch.randn(rows, 96).bfloat16()
    members = []
    for i, n in enumerate((64, 32, 32)):
        base, _ = _base(format, n, 96, torch.bfloat16)
        adapter = (torch.randn(8, 96), torch.randn(n, 8), 0.5)
        members.append((base, *adapter, torch.randn(n).bfloat16(), 0.1 * i, torch.tensor([i])))
    for y, (base, a, b, s, bias, p, seed) in zip(
        F.lora_linear_group(x, members), members, strict=True
    ):
        _same(y, F.lora_linear(x, base, a, b, s, bias, p, True, seed))
    base, a, b, s, _, p, seed = members[1]
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    dy = torch.randn(rows, 32).bfloat16()
    (alone,) = F.lora_linear_group(leaves[0], [(base, *leaves[1:], s, None, p, seed)])
    plain = F.lora_linear(leaves[0], base, *leaves[1:], s, None, p, True, seed)
    for got, want in zip(
        torch.autograd.grad(alone, leaves, dy), torch.autograd.grad(plain, leaves, dy), strict=True
    ):
        _same(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activation(dtype: torch.dtype, activation: str) -> None:
    gate, up, dh = (torch.randn(3, 5, 33).to(dtype) * 2 for _ in range(3))

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        functional = torch.nn.functional
        if activation.startswith("gelu"):
            kind = "tanh" if activation == "gelu_tanh" else "none"
            return functional.gelu(gate, approximate=kind) * up
        return getattr(functional, activation)(gate) * up

    _hold(
        lambda gate, up: F.gated_activation(gate, up, activation),
        eager,
        [gate, up],
        [dh],
        1,
        f"{activation} {dtype}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_lora_mlp(dtype: torch.dtype, p: float, activation: str) -> None:
    k, f, r = 64, 96, 4
    bases, weights = zip(
        _base("nf4", f, k, dtype),
        _base("int8", f, k, dtype),
        _base("dense", k, f, dtype),
        strict=True,
    )
    sizes = ((f, k), (f, k), (k, f))
    seeds = [torch.tensor([i + 40]) for i in range(3)]
    x, bias, dy = (t.to(dtype) for t in (torch.randn(2, 9, k), torch.randn(k), torch.randn(18, k)))
    adapters = [t for n, m in sizes for t in (torch.randn(r, m) * 0.2, torch.randn(n, r) * 0.2)]

    def ours(x: Tensor, bias: Tensor, *ab: Tensor) -> Tensor:
        members = [
            (bases[i], ab[2 * i], ab[2 * i + 1], 0.5, bias if i == 2 else None, p, seeds[i])
            for i in range(3)
        ]
        return F.lora_mlp(x, *members, activation=activation)

    def eager(x: Tensor, bias: Tensor, *ab: Tensor) -> Tensor:
        w = [weight.to(x.dtype) for weight in weights]
        gate = linear(x, w[0]) + _term(x, ab[0], ab[1], 0.5, p, seeds[0])
        up = linear(x, w[1]) + _term(x, ab[2], ab[3], 0.5, p, seeds[1])
        if activation == "silu":
            h = torch.nn.functional.silu(gate) * up
        else:
            h = torch.nn.functional.gelu(gate, approximate="tanh") * up
        return linear(h, w[2], bias) + _term(h, ab[4], ab[5], 0.5, p, seeds[2])

    _hold(ours, eager, [x, bias, *adapters], [dy.view(2, 9, k)], 1, f"mlp {dtype} {p}")


def test_lora_mlp_saves_no_activation_but_gate_and_up() -> None:
    k, f, m = 64, 256, 32
    gate, up, down = (_base("nf4", n, d, torch.bfloat16)[0] for n, d in ((f, k), (f, k), (k, f)))
    x = torch.randn(m, k).bfloat16().requires_grad_()
    trained: list[Tensor] = []
    members = []
    for q, n, d in ((gate, f, k), (up, f, k), (down, k, f)):
        pair = torch.randn(4, d, requires_grad=True), torch.randn(n, 4, requires_grad=True)
        trained += [*pair, *q.tensors()]
        members.append((q, *pair, 1.0))
    held, extra = {t.data_ptr() for t in trained}, 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal extra
        if tensor.data_ptr() not in held:
            extra += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.lora_mlp(x, *members)
    assert extra == x.nbytes + 2 * m * f * 2 + m * 3 * 4 * 4  # x, gate, up and S


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [6, 50])
def test_multi_lora_equals_separate_steps(format: str, dtype: torch.dtype, rows: int) -> None:
    """Eight adapters in one batch: outputs and gradients are those of eight steps of their own."""
    n, k, count, p = 33, 64, 8, 0.25
    base, _ = _base(format, n, k, dtype)
    x, dy = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
    bias, seed = torch.randn(n).to(dtype), torch.tensor([11])
    ranks = [1 + i % 4 for i in range(count)]
    adapters = [(torch.randn(r, k) * 0.3, torch.randn(n, r), 0.5 + i) for i, r in enumerate(ranks)]
    leaves = [t.requires_grad_() for a, b, _ in adapters for t in (a, b)]
    ids = torch.randint(-1, count, (rows,))
    x.requires_grad_()
    y = F.multi_lora_linear(x, base, adapters, ids, bias, p, True, seed)
    grads = torch.autograd.grad(y, [x, *leaves], dy)
    plain = F.lora_linear(x, base, torch.zeros(1, k), torch.zeros(n, 1), 1.0, bias)
    for m in (ids == -1).nonzero().flatten().tolist():
        _same(y[m], plain[m])
    for i, (a, b, s) in enumerate(adapters):
        mine = ids == i
        whole = F.lora_linear(x, base, a, b, s, bias, p, True, seed)
        _same(y[mine], whole[mine], f"rows of adapter {i}")
        masked = torch.where(mine[:, None], dy, 0)
        dx, da, db = torch.autograd.grad(whole, [x, a, b], masked)
        _same(grads[0][mine], dx[mine], "dx")
        _close(grads[1 + 2 * i], da, "dA")
        _close(grads[2 + 2 * i], db, "dB")


def test_multi_lora_ids() -> None:
    """One id for each row, or for each sequence; anything that has no adapter is refused."""
    x, w = torch.randn(3, 4, 64), torch.randn(8, 64)
    adapters = [(torch.randn(2, 64), torch.randn(8, 2), 1.0) for _ in range(2)]
    ids = torch.tensor([1, -1, 0])
    whole = F.multi_lora_linear(x, w, adapters, ids)
    assert_same_bits(F.multi_lora_linear(x, w, adapters, ids.repeat_interleave(4)), whole)
    assert_same_bits(F.multi_lora_linear(x, w, adapters, ids[:, None].expand(3, 4)), whole)
    assert torch.equal(F.multi_lora_linear(x, w, [], torch.full((3,), -1)), linear(x, w))
    for bad in (2, -2):
        with pytest.raises(ValueError, match=r"adapter_ids: got values from"):
            F.multi_lora_linear(x, w, adapters, torch.tensor([0, 1, bad]))
    with pytest.raises(ValueError, match=r"adapter_ids: got shape \(2,\)"):
        F.multi_lora_linear(x, w, adapters, ids[:2])
    with pytest.raises(TypeError, match=r"adapter_ids: got dtype torch.int32"):
        F.multi_lora_linear(x, w, adapters, ids.int())
    with pytest.raises(ValueError, match=r"dropout_p: got 3 numbers"):
        F.multi_lora_linear(x, w, adapters, ids, dropout_p=[0.1, 0.1, 0.1])


def _dora_eager(
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    m: Tensor,
    s: float,
    p: float,
    seed: Tensor,
) -> Tensor:
    """HF PEFT's order of operations."""
    norm = torch.linalg.norm(w.to(a.dtype) + s * (b @ a), dim=1).detach()
    c = (m / norm).to(x.dtype)
    dropped = _dropped(x, p, seed)
    return linear(x, w, bias) + (c - 1) * linear(dropped, w) + c * _term(x, a, b, s, p, seed)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 70), (33, 96), (0, 64)], ids=str)
def test_dora(format: str, dtype: torch.dtype, p: float, shape: tuple[int, ...]) -> None:
    n, k, r = 45, shape[-1], 6
    base, dense = _base(format, n, k, dtype)
    x, bias = torch.randn(shape).to(dtype), torch.randn(n).to(dtype)
    a, b, m = torch.randn(r, k) * 0.2, torch.randn(n, r) * 0.2, 1 + torch.rand(n)
    dy, seed = torch.randn(*shape[:-1], n).to(dtype), torch.tensor([77])

    def ours(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        return F.dora_linear(x, base, a, b, m, 1.5, bias, p, seed=seed)

    def eager(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        return _dora_eager(x, dense.to(x.dtype), bias, a, b, m, 1.5, p, seed)

    if format != "dense":  # the norm is that of the stored weight, whatever x's dtype
        norm = F.dora_weight_norm(base, a, b, 1.5)
        exact = base.dequantize(torch.float64) + 1.5 * (b.double() @ a.double())
        torch.testing.assert_close(norm.double(), exact.norm(dim=1), rtol=2e-6, atol=0)
    _hold(ours, eager, [x, bias, a, b, m], [dy], 1, f"dora {format} {dtype} {p}")


@pytest.mark.parametrize("format", FORMATS)
def test_dora_norm_under_cancellation(format: str) -> None:
    """s B A nearly cancels W: the error stays that of rounding W and B A, never NaN."""
    k, n, r = 300, 21, 8
    b, a = torch.randn(n, r), torch.randn(r, k)
    base, dense = _base(format, n, k, torch.float32)
    if format == "dense":
        base = dense = (b.double() @ a.double()).float()
    for shift in (0.0, 1e-3):
        adapter = torch.linalg.lstsq(b, dense).solution + shift * torch.randn(r, k)
        w = base.dequantize(torch.float64) if format != "dense" else base.double()
        exact = (w - b.double() @ adapter.double()).norm(dim=1)
        norm = F.dora_weight_norm(base, adapter, b, -1.0)
        assert norm.isfinite().all()
        scale = w.norm(dim=1)
        assert ((norm.double().square() - exact.square()).abs() <= 1e-6 * scale.square()).all()
    zero = F.dora_weight_norm(torch.zeros(4, 8), torch.randn(2, 8), torch.zeros(4, 2), 1.0)
    assert torch.equal(zero, torch.zeros(4))


def test_dora_norm_can_be_kept() -> None:
    w, a, b = torch.randn(24, 64), torch.randn(4, 64), torch.randn(24, 4)
    m, x = torch.rand(24), torch.randn(3, 64)
    kept = F.weight_norm_sq(w)
    assert kept.dtype == torch.float64
    norm = F.dora_weight_norm(w, a, b, 0.5, kept)
    assert_same_bits(norm, F.dora_weight_norm(w, a, b, 0.5))
    again = F.dora_linear(x, w, a, b, m, 0.5, weight_norm=norm)
    assert_same_bits(again, F.dora_linear(x, w, a, b, m, 0.5))
    column_major = w.t().contiguous().t()
    torch.testing.assert_close(F.dora_weight_norm(column_major, a, b, 0.5), norm)


def _functions() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each function as a closure over its trained tensors, x first."""
    q, w = quantize(torch.randn(24, 64), "nf4"), torch.randn(24, 64)
    a, b, m = torch.randn(4, 64), torch.randn(24, 4), torch.rand(24)
    down, up_a, up_b = torch.randn(64, 24), torch.randn(4, 24), torch.randn(64, 4)
    ids = torch.tensor([0, 1, -1, 1, 0, 0, 1])

    def group(x: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        first, second = F.lora_linear_group(x, [(q, a, b, 1.0, None, 0.5), (w, 2 * a, 2 * b)])
        return first * second

    def multi(x: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        rows = ids[: x.shape[0]]
        return F.multi_lora_linear(x, q, [(a, b, 1.0), (a[:2], b[:, :2], 0.5)], rows, None, 0.5)

    def mlp(x: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        return F.lora_mlp(x, (q, a, b), (w, 2 * a, 2 * b), (down, up_a, up_b, 1.0, None, 0.5))

    def dora(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        return F.dora_linear(x, q, a, b, m, 0.5, None, 0.5)

    def gated(x: Tensor, a: Tensor, *rest: Tensor) -> Tensor:
        return F.gated_activation(x, a[:1].expand(x.shape), "gelu")

    return {
        "lora_linear_group": (group, [a, b]),
        "multi_lora_linear": (multi, [a, b]),
        "lora_mlp": (mlp, [a, b]),
        "dora_linear": (dora, [a, b, m]),
        "gated_activation": (gated, [a]),
    }


NAMES = ["lora_linear_group", "multi_lora_linear", "lora_mlp", "dora_linear", "gated_activation"]


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name: str) -> None:
    run, trained = _functions()[name]
    for t in trained:
        t.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 64, requires_grad=True)
        torch.manual_seed(0)
        y = compiled(x, *trained)
        got = torch.autograd.grad(y.square().sum(), [x, *trained])
        torch.manual_seed(0)
        z = run(x, *trained)
        want = torch.autograd.grad(z.square().sum(), [x, *trained])
        for g, w in zip((y, *got), (z, *want), strict=True):
            assert_same_bits(g.detach(), w.detach())


@pytest.mark.parametrize("name", NAMES)
def test_second_order_is_refused(name: str) -> None:
    run, trained = _functions()[name]
    x = torch.randn(3, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(run(x, *trained).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"second-order gradients through {name}"):
        dx.sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(name: str, reentrant: bool) -> None:
    run, trained = _functions()[name]
    for t in trained:
        t.requires_grad_()
    results = []
    for wrapped in (False, True):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(3)
        if wrapped:
            y = torch.utils.checkpoint.checkpoint(run, x, *trained, use_reentrant=reentrant)
        else:
            y = run(x, *trained)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(t.grad.clone() for t in trained)])
        for t in trained:
            t.grad = None
    for plain, again in zip(*results, strict=True):
        assert_same_bits(again, plain)


@pytest.mark.parametrize("name", NAMES)
def test_expanded_gradient(name: str) -> None:
    """``y.sum().backward()`` sends a gradient with stride 0."""
    run, trained = _functions()[name]
    x = torch.randn(6, 64, requires_grad=True)
    torch.manual_seed(5)
    y = run(x, *trained)
    (want,) = torch.autograd.grad(y, x, torch.ones(6, y.shape[1]))
    torch.manual_seed(5)
    (got,) = torch.autograd.grad(run(x, *trained).sum(), x)
    assert_same_bits(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_that_of_linear(name: str) -> None:
    if name == "gated_activation":
        pytest.skip("keeps the dtype of its arguments")
    run, trained = _functions()[name]
    for t in trained:
        t.requires_grad_()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x, *trained)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for leaf in (x, *trained):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32


def test_gradcheck_in_double() -> None:
    kind = torch.float64
    w, x = torch.randn(5, 12, dtype=kind), torch.randn(4, 12, dtype=kind)
    a, b = torch.randn(2, 12, dtype=kind), torch.randn(5, 2, dtype=kind)
    m, down = torch.rand(5, dtype=kind), torch.randn(3, 5, dtype=kind)
    seed, ids = torch.tensor([5]), torch.tensor([0, -1, 1, 0])
    norm = F.dora_weight_norm(w, a, b, 0.7)
    leaves = [t.requires_grad_() for t in (x, a, b, m)]

    def everything(x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        member = (w, a, b, 0.7, None, 0.4, seed)
        return (
            *F.lora_linear_group(x, [member, (w[:4], a[:1], b[:4, :1])]),
            F.lora_mlp(x, member, (w, a, b), (down,), activation="gelu"),
            F.multi_lora_linear(x, w, [(a, b, 0.7), (a, b, 0.1)], ids, None, 0.4, True, seed),
            F.dora_linear(x, w, a, b, m, 0.7, None, 0.4, True, seed, norm),
            F.dora_linear(x, w, a, b, m, 0.7, weight_norm=norm),
        )

    assert torch.autograd.gradcheck(everything, leaves)


def test_errors_name_the_argument() -> None:
    x, w = torch.randn(3, 64), torch.randn(8, 64)
    a, b = torch.randn(2, 64), torch.randn(8, 2)
    group, mlp, dora = F.lora_linear_group, F.lora_mlp, F.dora_linear
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, r"projections: got none", lambda: group(x, [])),
        (TypeError, r"projections\[1\]: got Tensor", lambda: group(x, [(w,), w])),
        (ValueError, r"projections\[0\]: expected both", lambda: group(x, [(w, a)])),
        (
            ValueError,
            r"projections\[1\]: got a base with 63",
            lambda: group(x, [(w,), (w[:, 1:],)]),
        ),
        (TypeError, r"projections\[0\].lora_A: got", lambda: group(x, [(w, a.half(), b)])),
        (ValueError, r"activation: got 'swish'", lambda: mlp(x, (w,), (w,), (w.t(),), "swish")),
        (ValueError, r"up: got a base with 7", lambda: mlp(x, (w,), (w[1:],), (w.t(),))),
        (ValueError, r"down: got a base with 64", lambda: mlp(x, (w,), (w,), (w,))),
        (ValueError, r"up: got shape", lambda: F.gated_activation(x, x[1:])),
        (ValueError, r"magnitude: got shape \(7,\)", lambda: dora(x, w, a, b, torch.ones(7), 1.0)),
        (TypeError, r"adapters\[0\]: expected", lambda: F.multi_lora_linear(x, w, [a], _ids(3))),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def _ids(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


@pytest.mark.skipif(not native.available(), reason=str(native.reason()))
def test_16_bit_bases_that_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of processors that multiply bf16, on any processor."""
    families = ("lora_group", "multi_lora", "dora")
    for family in families:
        module = importlib.import_module(f"peftkern.ops.{family}.cpu")
        monkeypatch.setattr(module, "base_by_torch", lambda dtype: True)
    for op in ("lora_linear_group", "multi_lora_linear", "dora_linear"):
        for name in (op, f"{op}_backward"):
            spec = registry.specs()[name]
            (row,) = [r for r in registry.implementations(name) if r.backend == "native"]
            for sample in spec.samples(torch.bfloat16):
                truth = tensors_of(spec.reference(*sample.args, compute=torch.float64))
                plain = tensors_of(spec.baseline(*sample.args)) if spec.baseline else []
                got = tensors_of(row.fn(*sample.args))
                for g, t, e in zip(got, truth, plain, strict=True):
                    assert_error_rule(g, t, e, spec.factor, f"{name} {sample.name}")
