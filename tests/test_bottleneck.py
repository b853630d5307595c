"""The bottleneck function: gradients of every tensor against fp64 autograd through plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftkern as pk
from peftkern.functional.bottleneck import activation_name
from peftkern.ops.bottleneck.reference import ACTIVATIONS
from peftkern.ops.dropout.reference import keep_mask
from peftkern.testing import assert_error_rule, assert_same_bits

F = pk.functional
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["y", "x", "down_w", "down_b", "up_w", "up_b", "scale", "residual"]
EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": torch.nn.functional.leaky_relu,
}


def _eager(
    activation: str,
    p: float,
    seed: Tensor,
    x: Tensor,
    dw: Tensor,
    db: Tensor,
    uw: Tensor,
    ub: Tensor,
    s: Tensor,
    r: Tensor,
) -> Tensor:
    linear = torch.nn.functional.linear
    y = linear(EAGER[activation](linear(x.to(dw.dtype), dw, db)), uw, ub) * s
    if p:
        rows = torch.Size([y.numel() // max(y.shape[-1], 1), y.shape[-1]])
        y = torch.where(keep_mask(rows, p, seed).view(y.shape), y / (1 - p), 0.0)
    return (y + r).to(x.dtype)


def _tensors(
    shape: tuple[int, ...], r: int, dtype: torch.dtype, channels: bool = True
) -> list[Tensor]:
    """x, D, b_d, U, b_u, scale, residual; weights are fp32 masters."""
    n = shape[-1]
    return [
        torch.randn(shape).to(dtype),
        torch.randn(r, n) / n**0.5,
        torch.randn(r),
        torch.randn(n, r) / r**0.5,
        torch.randn(n),
        torch.randn(n if channels else 1),
        torch.randn(shape).to(dtype),
    ]


def _ours(activation: str, p: float = 0.0, seed: Tensor | None = None) -> Callable[..., Tensor]:
    def run(x: Tensor, *rest: Tensor) -> Tensor:
        *weights, scale, residual = rest
        return F.bottleneck_adapter(x, *weights, activation, scale, residual, p, seed=seed)

    return run


def _gradients(run: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_every_tensor(activation: str, dtype: torch.dtype, p: float) -> None:
    seed = torch.tensor([77])
    # Not single rows: with most units of a relu off, one cancelled sum would be all that is judged.
    for shape in ((2, 3, 70), (7, 33), (33, 96), (0, 64)):
        inputs = _tensors(shape, 9, dtype)
        dy = torch.randn(shape).to(dtype)
        got = _gradients(_ours(activation, p, seed), inputs, dy)

        def eager(*t: Tensor) -> Tensor:
            return _eager(activation, p, seed, *t)

        truth = _gradients(eager, [t.double() for t in inputs], dy.double())
        plain = _gradients(eager, inputs, dy)
        for name, g, t, e in zip(NAMES, got, truth, plain, strict=True):
            assert_error_rule(g, t, e, 1.5 if name == "y" else 2.0, f"{name} {shape}")


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_in_double(activation: str) -> None:
    inputs = [t.double().requires_grad_() for t in _tensors((3, 12), 4, torch.float64)]
    assert torch.autograd.gradcheck(_ours(activation, 0.4, torch.tensor([5])), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_where_the_residual_is_x(dtype: torch.dtype) -> None:
    x, *weights, scale, _ = _tensors((2, 7, 40), 6, dtype, channels=False)
    dy = torch.randn(x.shape).to(dtype)

    def ours(x: Tensor, *t: Tensor) -> Tensor:
        return F.bottleneck_adapter(x, *t[:4], "gelu", t[4], residual=x)

    def eager(x: Tensor, *t: Tensor) -> Tensor:
        return _eager("gelu", 0.0, torch.tensor([0]), x, *t, x)

    inputs = [x, *weights, scale]
    got = _gradients(ours, inputs, dy)
    truth = _gradients(eager, [t.double() for t in inputs], dy.double())
    plain = _gradients(eager, inputs, dy)
    for name, g, t, e in zip(NAMES[:6], got[:6], truth[:6], plain[:6], strict=True):
        assert_error_rule(g, t, e, 1.5 if name == "y" else 2.0, name)
    # One sum over all elements: held to what rounding may do to its terms.
    terms = 4 * torch.finfo(torch.float32).eps * 14 * 40
    assert abs(float(got[6] - truth[6])) <= terms


def test_gradients_of_chosen_tensors_only() -> None:
    inputs = _tensors((5, 24), 4, torch.float32)
    every = _gradients(_ours("silu"), inputs, torch.ones(5, 24))
    for chosen in range(7):
        leaves = [t.clone().requires_grad_(i == chosen) for i, t in enumerate(inputs)]
        _ours("silu")(*leaves).sum().backward()
        for i, leaf in enumerate(leaves):
            if i != chosen:
                assert leaf.grad is None
            else:
                assert leaf.grad is not None
                assert_same_bits(leaf.grad, every[1 + i], NAMES[1 + i])


def test_gradients_without_biases_and_scaling() -> None:
    x = torch.randn(6, 20, requires_grad=True)
    d, u = torch.randn(3, 20, requires_grad=True), torch.randn(20, 3, requires_grad=True)
    F.bottleneck_adapter(x, d, None, u, None, "tanh", 4.0).square().sum().backward()
    got = [t.grad.clone() for t in (x, d, u)]
    for t in (x, d, u):
        t.grad = None
    (4.0 * (torch.tanh(x @ d.T) @ u.T)).square().sum().backward()
    for g, t in zip(got, (x, d, u), strict=True):
        torch.testing.assert_close(g, t.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_layouts(layout: str) -> None:
    x, *weights, scale, _ = _tensors((5, 32), 4, torch.float32)
    wide = torch.randn(5, 64)
    wide[:, ::2] = x
    views = {"strided": wide[:, ::2], "transposed": x.t().contiguous().t()}
    view = views.get(layout, x[:1].expand(5, 32))
    want = _ours("relu")(view.clone(memory_format=torch.contiguous_format), *weights, scale, view)
    assert_same_bits(_ours("relu")(view, *weights, scale, view.clone()), want)
    turned = [w.t().contiguous().t() if w.dim() == 2 else w for w in weights]
    assert_same_bits(_ours("relu")(view, *turned, scale, view), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant: bool) -> None:
    leaves = [t.requires_grad_() for t in _tensors((5, 32), 4, torch.float32)]
    results = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        run = _ours("silu", 0.5)
        y = checkpoint(run, *leaves, use_reentrant=reentrant) if wrapped else run(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad.clone() for t in leaves)])
        for t in leaves:
            t.grad = None
    for plain, again in zip(*results, strict=True):
        assert_same_bits(again, plain)


def test_saves_only_x() -> None:
    x, *weights, scale, residual = _tensors((64, 128), 16, torch.bfloat16)
    x.requires_grad_()
    held = {t.data_ptr() for t in (*weights, scale)}
    leaves = [w.requires_grad_() for w in (*weights, scale)]
    extra = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal extra
        if tensor.data_ptr() not in held:
            extra += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _ours("gelu", 0.1)(x, *leaves, residual)
    assert extra <= x.nbytes + 8  # x and the seed


def test_autocast() -> None:
    leaves = [t.requires_grad_() for t in _tensors((3, 64), 8, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y = _ours("gelu")(*leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)
    x, *weights, residual = [t.detach() for t in leaves]
    assert_same_bits(y.detach(), _ours("gelu")(x.bfloat16(), *weights, residual.bfloat16()))


def test_compiles_whole() -> None:
    x, *leaves = [t.requires_grad_() for t in _tensors((3, 32), 4, torch.float32)]
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x: Tensor) -> Tensor:
        *weights, scale, _ = leaves
        return F.bottleneck_adapter(x, *weights, "swish", scale, x, 0.25).square()

    for rows in (3, 5):
        x = torch.randn(rows, 32, requires_grad=True)
        results = []
        for function in (run, run._torchdynamo_orig_callable):
            torch.manual_seed(0)
            y = function(x)
            y.sum().backward()
            results.append((y.detach(), x.grad))
            x.grad = None
        assert_same_bits(results[0][0], results[1][0])
        assert_same_bits(results[0][1], results[1][1])


def test_second_order_is_refused() -> None:
    x, *rest = _tensors((3, 16), 2, torch.float32)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(_ours("relu")(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients through bottleneck_adapter"):
        dx.sum().backward()


def test_names_of_activations() -> None:
    for ours in ACTIVATIONS:
        assert activation_name(ours) == ours
    pairs = {"swish": "silu", "GELU_new": "gelu_tanh", "leakyrelu": "leaky_relu"}
    assert {name: activation_name(name) for name in pairs} == pairs


def test_errors_name_the_argument() -> None:
    x, d, db, u, ub, s, r = _tensors((3, 16), 2, torch.float32)
    run = F.bottleneck_adapter
    cases = [
        (ValueError, r"x: got shape \(3, 15\)", lambda: run(x[:, 1:], d, db, u, ub)),
        (ValueError, r"down_w: got shape", lambda: run(x, d[0], db, u, ub)),
        (ValueError, r"down_w: got 0 rows", lambda: run(x, d[:0], None, u[:, :0], ub)),
        (ValueError, r"down_b: got shape", lambda: run(x, d, ub, u, ub)),
        (ValueError, r"up_w: got shape", lambda: run(x, d, db, u[:, 1:], ub)),
        (TypeError, r"up_w: got dtype torch.float64", lambda: run(x, d, db, u.double(), ub)),
        (TypeError, r"x: got dtype torch.int64", lambda: run(x.long(), d, db, u, ub)),
        (ValueError, r"scale: got shape", lambda: run(x, d, db, u, ub, scaling=s[1:])),
        (ValueError, r"residual: got shape", lambda: run(x, d, db, u, ub, residual=r[1:])),
        (TypeError, r"residual: got dtype", lambda: run(x, d, db, u, ub, residual=r.half())),
        (ValueError, r"dropout_p: got 1.0", lambda: run(x, d, db, u, ub, dropout_p=1.0)),
        (ValueError, r"activation: got 'softmax'", lambda: run(x, d, db, u, ub, "softmax")),
        (TypeError, r"activation: expected a name", lambda: run(x, d, db, u, ub, None)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
