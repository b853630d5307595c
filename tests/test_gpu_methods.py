"""What only an NVIDIA GPU can show of the methods' kernels: torch's attention, many rows, paths."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from conftest import nothing_waits
from torch import Tensor

import peftkern as pk
from peftkern.testing import assert_error_rule, assert_same_bits

F = pk.functional
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch sees no NVIDIA GPU", allow_module_level=True)

BF16, FP32 = torch.bfloat16, torch.float32


def _randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, causal: bool
) -> Tensor:
    """Eager attention over concatenated keys, in q's dtype."""
    rows = q.shape[0]
    keys, values = (
        torch.cat([p.to(q.dtype).expand(rows, -1, -1, -1), x], 2).repeat_interleave(
            q.shape[1] // k.shape[1], 1
        )
        for p, x in ((prefix_k, k), (prefix_v, v))
    )
    logits = q @ keys.transpose(2, 3) * q.shape[3] ** -0.5
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device="cuda")
        logits = logits.masked_fill(~seen.tril(keys.shape[2] - q.shape[2]), -torch.inf)
    wide = torch.promote_types(q.dtype, FP32)
    return torch.softmax(logits, -1, dtype=wide).to(q.dtype) @ values


@pytest.mark.parametrize("way", ["chosen", "flash", "cudnn", "one pass"])
@pytest.mark.parametrize(
    ("heads", "kv", "length", "p", "d", "causal"),
    [(8, 2, 300, 64, 128, True), (4, 4, 257, 100, 64, True), (4, 1, 128, 7, 64, False)],
    ids=str,
)
def test_prefix_attention_by_every_way(
    way: str, heads: int, kv: int, length: int, p: int, d: int, causal: bool
) -> None:
    from peftkern.ops.prefix import library

    torch.manual_seed(3)
    q = _randn(2, length, heads, d).transpose(1, 2)
    k, v = (_randn(2, length, kv, d).transpose(1, 2) for _ in range(2))
    prefix_k, prefix_v = _randn(kv, p, d, dtype=FP32), _randn(kv, p, d, dtype=FP32)
    dout = _randn(2, length, heads, d).transpose(1, 2)
    leaves = (q, k, v, prefix_k, prefix_v)

    def run(function: object, dtype: torch.dtype | None) -> list[Tensor]:
        own = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in leaves]
        y = function(*own)  # type: ignore[operator]
        return [y.detach(), *torch.autograd.grad(y, own, dout.to(y.dtype))]

    def ours(*own: Tensor) -> Tensor:
        return F.prefix_attention(*own, is_causal=causal)

    if way == "chosen":
        got = run(ours, None)
    else:
        given = None if way == "one pass" else way
        with mock.patch.object(library, "choose", return_value=given):
            got = run(ours, None)
    truth = run(lambda *own: _attention(*own, causal), torch.float64)
    plain = run(lambda *own: _attention(*own, causal), None)
    names = ("y", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
    for name, g, t, e in zip(names, got, truth, plain, strict=True):
        assert_error_rule(g, t, e, 1.5 if name == "y" else 2.0, f"{name} by {way}")


def test_prefix_gradients_repeat_where_torchs_attention_does() -> None:
    q = _randn(4, 512, 8, 64).transpose(1, 2).requires_grad_()
    k, v = (_randn(4, 512, 2, 64).transpose(1, 2).requires_grad_() for _ in range(2))
    prefix = [_randn(2, 32, 64, dtype=FP32).requires_grad_() for _ in range(2)]
    dout = torch.randn_like(q)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        both = []
        for _ in range(2):
            y = F.prefix_attention(q, k, v, *prefix, is_causal=True)
            both.append(torch.autograd.grad(y, [q, k, v, *prefix], dout))
    finally:
        torch.use_deterministic_algorithms(before)
    for first, second in zip(*both, strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(4096, 512, 768), (70, 1000, 300)], ids=str)
def test_sampled_gradient_by_every_way(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    from peftkern.ops.sparse_delta import triton as ways

    torch.manual_seed(m)
    dy, x = _randn(m, n, dtype=dtype), _randn(m, k, dtype=dtype)
    for count in (1, 5000, n * k):
        at = torch.randperm(n * k, device="cuda")[:count].sort().values
        truth = (dy.double().t() @ x.double()).view(-1)[at]
        # Summed as eager torch does on the CPU: full fp32, whatever the GPU's settings.
        plain = (dy.float().cpu().t() @ x.float().cpu()).view(-1)[at.cpu()].cuda()
        for way in (ways.sampled_by_rows, ways.sampled_by_tiles):
            got = way(dy, x, at)
            assert_error_rule(got, truth, plain, 2.0, f"{way.__name__} {count} entries")
            assert_same_bits(way(dy, x, at), got)


@pytest.mark.parametrize("m", [1, 40, 700])
@pytest.mark.parametrize("fmt", ["dense", "nf4"])
def test_entries_joined_or_as_a_term(fmt: str, m: int) -> None:
    from peftkern.ops.sparse_delta import triton as ways

    torch.manual_seed(m)
    w = _randn(600, 512) / 512**0.5
    base = w if fmt == "dense" else pk.quantize_4bit(w, double_quant=True)
    dense = w if fmt == "dense" else base.dequantize(BF16)  # type: ignore[attr-defined]
    at = torch.randperm(600 * 512, device="cuda")[:9000].sort().values
    values, x = _randn(9000, dtype=FP32), _randn(m, 512)

    def eager(dtype: torch.dtype) -> Tensor:
        whole = dense.to(dtype).view(-1).index_add(0, at, values.to(dtype)).view(600, 512)
        return torch.nn.functional.linear(x.to(dtype), whole)

    for wins in (True, False):
        with mock.patch.object(ways, "own_term_wins", return_value=wins):
            got = F.sparse_delta_linear(x, base, at, values)
        assert_error_rule(got, eager(torch.float64), eager(BF16), 1.5, f"own term {wins}")


def test_positions_are_looked_at_once() -> None:
    x, w = _randn(8, 64), _randn(32, 64)
    good = torch.tensor([3, 70], device="cuda")
    values = torch.ones(2, device="cuda", requires_grad=True)
    F.sparse_delta_linear(x, w, good, values)
    torch.cuda.synchronize()
    with nothing_waits():
        F.sparse_delta_linear(x, w, good, values).sum().backward()
    with pytest.raises(ValueError, match="indices"):
        F.sparse_delta_linear(x, w, good.flip(0), values)
    with pytest.raises(ValueError, match="indices"):
        F.sparse_delta_linear(x, w, good + 2048, values)


@pytest.mark.parametrize("fmt", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_dora_training_shapes_against_double(fmt: str, p: float) -> None:
    torch.manual_seed(5)
    m, d = 2048, 1024
    w = _randn(d, d) / d**0.5
    base = w if fmt == "dense" else pk.quantize_4bit(w, double_quant=True)
    dense = w if fmt == "dense" else base.dequantize(BF16)  # type: ignore[attr-defined]
    x, dy = _randn(m, d), _randn(m, d)
    a, b = _randn(16, d, dtype=FP32) / d**0.5, _randn(d, 16, dtype=FP32)
    norm = F.dora_weight_norm(base, a, b, 0.5)
    stored = w if fmt == "dense" else base.dequantize(FP32)  # type: ignore[attr-defined]
    exact = (stored.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    magnitude, seed = norm * 1.1, torch.tensor([17], device="cuda")
    keep = F.dropout(torch.ones_like(x, dtype=FP32), p, seed=seed) if p else None

    def eager(x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        linear, c = torch.nn.functional.linear, (magnitude / norm.to(magnitude.dtype)).to(x.dtype)
        dropped = x if keep is None else (x * keep.to(x.dtype))
        low = linear(linear(dropped.to(a.dtype), a), b).to(x.dtype) * 0.5
        v = linear(dropped, dense.to(x.dtype))
        return linear(x, dense.to(x.dtype)) + (c - 1) * v + c * low

    def ours(x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        options = {"dropout_p": p, "seed": seed if p else None, "weight_norm": norm}
        return F.dora_linear(x, base, a, b, magnitude, 0.5, **options)  # type: ignore[arg-type]

    def run(function: object, dtype: torch.dtype | None) -> list[Tensor]:
        own = [(t if dtype is None else t.to(dtype)).clone().requires_grad_()
               for t in (x, a, b, magnitude)]  # fmt: skip
        y = function(*own)  # type: ignore[operator]
        return [y.detach(), *torch.autograd.grad(y, own, dy.to(y.dtype))]

    got, truth, plain = run(ours, None), run(eager, torch.float64), run(eager, None)
    for name, g, t, e in zip(("y", "x", "A", "B", "m"), got, truth, plain, strict=True):
        assert_error_rule(g, t, e, 1.5 if name == "y" else 2.0, f"{name} {fmt} p{p}")
