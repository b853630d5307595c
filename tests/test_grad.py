"""Gradients of every differentiable function against fp64 autograd through plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftkern as pk
from peftkern.ops.dropout.reference import keep_mask
from peftkern.quant import quantize
from peftkern.testing import assert_error_rule, assert_same_bits

F = pk.functional
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["dense", "nf4", "fp4", "int8"]
EVERY_DEVICE = True


def _base(format: str, n: int, k: int, dtype: torch.dtype) -> tuple[object, Tensor]:
    """The base as the function takes it, and as a dense matrix of the activation's dtype."""
    w = torch.randn(n, k).to(dtype) * 0.1
    if format == "dense":
        return w, w
    q = quantize(w, format)
    return q, q.dequantize(dtype)


def _eager(
    x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: float, p: float, seed: Tensor
) -> Tensor:
    """The formula, op by op, in whatever dtype the arguments have."""
    keep = keep_mask(torch.Size([x.numel() // x.shape[-1], x.shape[-1]]), p, seed).view(x.shape)
    dropped = torch.where(keep, x / (1 - p), 0.0) if p else x
    low_rank = torch.nn.functional.linear(torch.nn.functional.linear(dropped.to(a.dtype), a), b)
    return (torch.nn.functional.linear(x, w, bias) + s * low_rank).to(x.dtype)


def _gradients(run: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 70), (1, 70), (13, 128), (0, 64), (33, 96)], ids=str)
def test_lora_linear(format: str, dtype: torch.dtype, p: float, shape: tuple[int, ...]) -> None:
    n, k, r = 45, shape[-1], 6
    base, dense = _base(format, n, k, dtype)
    x, bias = torch.randn(shape).to(dtype), torch.randn(n).to(dtype)
    a, b = torch.randn(r, k) * 0.2, torch.randn(n, r)  # fp32 masters
    dy, seed = torch.randn(*shape[:-1], n).to(dtype), torch.tensor([77])

    def ours(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.lora_linear(x, base, a, b, 1.5, bias, p, seed=seed)

    def eager(x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _eager(x, dense.to(x.dtype), bias, a, b, 1.5, p, seed)

    inputs = [x, bias, a, b]
    got = _gradients(ours, inputs, dy)
    truth = _gradients(eager, [t.double() for t in inputs], dy.double())
    plain = _gradients(eager, inputs, dy)
    for name, g, t, e in zip(["y", "x", "bias", "A", "B"], got, truth, plain, strict=True):
        # x̂ is rounded once to x.dtype; eager torch rounds it the same way.
        assert_error_rule(g, t, e, 1.5 if name == "y" else 2.0, f"{name} {format} {dtype}")


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_linear(format: str, dtype: torch.dtype) -> None:
    q, dense = _base(format, 37, 96, dtype)
    x, bias = torch.randn(2, 7, 96).to(dtype), torch.randn(37).to(dtype)
    dy = torch.randn(2, 7, 37).to(dtype)
    function = F.linear_8bit if format == "int8" else F.linear_4bit

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, dense.to(x.dtype), bias)

    got = _gradients(lambda x, bias: function(x, q, bias), [x, bias], dy)
    truth = _gradients(eager, [x.double(), bias.double()], dy.double())
    plain = _gradients(eager, [x, bias], dy)
    for name, g, t, e in zip(["y", "x", "bias"], got, truth, plain, strict=True):
        assert_error_rule(g, t, e, 1.5 if name == "y" else 2.0, f"{name} {format} {dtype}")


@pytest.mark.parametrize("format", FORMATS)
def test_gradcheck_in_double(format: str) -> None:
    base, _ = _base(format, 5, 12, torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([5])
    assert torch.autograd.gradcheck(
        lambda *t: F.lora_linear(t[0], base, t[2], t[3], 0.7, t[1], 0.4, seed=seed),
        (x, bias, a, b),
    )


def _layouts(x: Tensor) -> dict[str, Tensor]:
    rows, columns = x.shape
    wide = torch.randn(rows, 2 * columns)
    wide[:, ::2] = x
    flat = torch.zeros(x.numel() + 3)
    flat[3:] = x.reshape(-1)
    return {
        "strided": wide[:, ::2],
        "transposed": x.t().contiguous().t(),
        "offset": flat[3:].view(rows, columns),
        "expanded": x[:1].expand(rows, columns),
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", ["strided", "transposed", "offset", "expanded"])
def test_layouts_of_x(format: str, layout: str) -> None:
    base, _ = _base(format, 24, 64, torch.float32)
    a, b = torch.randn(4, 64), torch.randn(24, 4)
    x = _layouts(torch.randn(5, 64))[layout]
    expected = F.lora_linear(x.clone(memory_format=torch.contiguous_format), base, a, b, 1.0)
    torch.testing.assert_close(F.lora_linear(x, base, a, b, 1.0), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_expanded_gradient(format: str) -> None:
    """``y.sum().backward()`` sends a gradient with stride 0."""
    base, _ = _base(format, 24, 64, torch.float32)
    a, b = torch.randn(4, 64), torch.randn(24, 4)
    x = torch.randn(6, 64)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.lora_linear(x, base, a, b, 1.0)

    ones = torch.ones(6, 24)
    dense = _gradients(run, [x, a, b], ones)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    run(*leaves).sum().backward()
    for leaf, want in zip(leaves, dense[1:], strict=True):
        assert leaf.grad is not None
        assert_same_bits(leaf.grad, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant: bool) -> None:
    base, _ = _base("nf4", 32, 64, torch.float32)
    x = torch.randn(5, 64, requires_grad=True)
    a = torch.randn(4, 64, requires_grad=True)
    b = torch.randn(32, 4, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return F.lora_linear(x, base, a, b, 1.0, dropout_p=0.5)

    results = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        y = checkpoint(run, x, use_reentrant=reentrant) if wrapped else run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad.clone() for t in (x, a, b))])
        for t in (x, a, b):
            t.grad = None
    for plain, again in zip(*results, strict=True):
        assert_same_bits(again, plain)


def test_masks_are_independent_and_seeded() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(0)
    first, second = F.dropout(x, 0.5), F.dropout(x, 0.5)
    assert 0.4 < float((first != second).float().mean()) < 0.6
    torch.manual_seed(0)
    assert torch.equal(F.dropout(x, 0.5), first)
    assert F.dropout(x, 0.5, training=False) is x
    kept = float((F.dropout(torch.ones(1000, 1000), 0.1) != 0).float().mean())
    assert abs(kept - 0.9) < 0.002


def test_philox_known_answers() -> None:
    """The published vectors of the Random123 distribution."""
    from peftkern.ops.dropout.reference import philox_words

    words = philox_words(torch.tensor([0]), 4).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropped_nan_is_zero() -> None:
    x = torch.full((1, 1000), float("nan"))
    y = F.dropout(x, 0.5, seed=torch.tensor([1]))
    assert 400 < int((y == 0).sum()) < 600
    assert int(y.isnan().sum()) == 1000 - int((y == 0).sum())


def test_dropout_gradient_uses_the_same_mask() -> None:
    x = torch.randn(9, 33, requires_grad=True)
    y = F.dropout(x, 0.25)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y.detach() != 0)


@pytest.mark.parametrize("function", ["lora_linear", "linear_4bit", "linear_8bit"])
def test_second_order_is_refused(function: str) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    w = torch.randn(8, 64)
    if function == "lora_linear":
        a, b = torch.randn(2, 64, requires_grad=True), torch.randn(8, 2)
        y = F.lora_linear(x, w, a, b, 1.0)
    elif function == "linear_4bit":
        y = F.linear_4bit(x, pk.quantize_4bit(w))
    else:
        y = F.linear_8bit(x, pk.quantize_8bit(w))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"second-order gradients through {function}"):
        dx.sum().backward()


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_is_that_of_linear(format: str) -> None:
    base, _ = _base(format, 16, 64, torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = F.lora_linear(x, base, a, b, 1.0, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for leaf in (x, a, b, bias):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
    dense = base.dequantize(torch.bfloat16) if format != "dense" else base.bfloat16()
    with torch.no_grad():
        half = F.lora_linear(x.bfloat16(), dense, a, b, 1.0, bias.bfloat16())
    assert_error_rule(y.detach(), half.double(), half, 1.0)


@pytest.mark.parametrize("format", FORMATS)
def test_compiles_whole(format: str) -> None:
    base, _ = _base(format, 16, 64, torch.float32)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x: Tensor) -> Tensor:
        return F.lora_linear(x, base, a, b, 1.0, dropout_p=0.5).square()

    for rows in (3, 5):
        x = torch.randn(rows, 64, requires_grad=True)
        torch.manual_seed(0)
        y = run(x)
        y.sum().backward()
        grad, x.grad = x.grad, None
        torch.manual_seed(0)
        z = F.lora_linear(x, base, a, b, 1.0, dropout_p=0.5).square()
        z.sum().backward()
        assert_same_bits(y, z)
        assert_same_bits(grad, x.grad)


def test_saves_only_x_and_s() -> None:
    base, _ = _base("nf4", 128, 256, torch.bfloat16)
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    a, b = torch.randn(8, 256, requires_grad=True), torch.randn(128, 8, requires_grad=True)
    held = {a.data_ptr(), b.data_ptr(), *(t.data_ptr() for t in base.tensors())}
    extra = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal extra
        if tensor.data_ptr() not in held:
            extra += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.lora_linear(x, base, a, b, 1.0, dropout_p=0.1)
    assert extra <= x.nbytes + 64 * 8 * 4 + 8  # x, S and the seed


def test_errors_name_the_argument() -> None:
    x, w = torch.randn(3, 64), torch.randn(8, 64)
    a, b = torch.randn(2, 64), torch.randn(8, 2)
    q = pk.quantize_4bit(w)
    cases = [
        (ValueError, r"x: got shape \(3, 63\)", lambda: F.lora_linear(x[:, 1:], w, a, b, 1.0)),
        (ValueError, r"lora_A: got shape", lambda: F.lora_linear(x, w, a[:, 1:], b, 1.0)),
        (ValueError, r"lora_B: got shape", lambda: F.lora_linear(x, w, a, b[1:], 1.0)),
        (TypeError, r"base: got list", lambda: F.lora_linear(x, [1], a, b, 1.0)),
        (TypeError, r"base: got dtype", lambda: F.lora_linear(x, w.half(), a, b, 1.0)),
        (TypeError, r"lora_A: got dtype", lambda: F.lora_linear(x, w, a.half(), b, 1.0)),
        (TypeError, r"x: got dtype torch.int64", lambda: F.lora_linear(x.long(), w, a, b, 1.0)),
        (ValueError, r"bias: got shape", lambda: F.lora_linear(x, w, a, b, 1.0, torch.ones(7))),
        (ValueError, r"dropout_p: got 1.0", lambda: F.lora_linear(x, w, a, b, 1.0, None, 1.0)),
        (ValueError, r"base: requires a gradient", lambda: F.lora_linear(x, _leaf(w), a, b, 1.0)),
        (TypeError, r"q: got a nf4", lambda: F.linear_8bit(x, q)),
        (TypeError, r"q: got Tensor", lambda: F.linear_4bit(x, w)),
        (ValueError, r"lora_A: is on meta", lambda: F.lora_linear(x, w, a.to("meta"), b, 1.0)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def _leaf(w: Tensor) -> Tensor:
    return w.clone().requires_grad_()
