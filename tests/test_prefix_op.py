"""Attention with a prefix against fp64 autograd and against torch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern.testing import assert_error_rule, assert_same_bits

F = pk.functional
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _heads(b: int, h: int, length: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As a projection leaves it: [B, L, H, D] seen through a transpose."""
    return torch.randn(b, length, h, d).to(dtype).transpose(1, 2)


def _joined(prefix: Tensor, x: Tensor, heads: int) -> Tensor:
    prefix = prefix.expand(x.shape[0], *prefix.shape[-3:]).to(x.dtype)
    return torch.cat([prefix, x], dim=2).repeat_interleave(heads // x.shape[1], dim=1)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    visible: Tensor | None = None,
) -> Tensor:
    """The formula over joined keys; ``visible`` [..., Lq, Lk] is about the sequence alone."""
    keys, values = _joined(prefix_k, k, q.shape[1]), _joined(prefix_v, v, q.shape[1])
    logits = q @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
    if visible is not None:
        ones = torch.ones(prefix_k.shape[-2], dtype=torch.bool).expand(*visible.shape[:-1], -1)
        logits = logits.masked_fill(~torch.cat([ones, visible], dim=-1), -torch.inf)
    return torch.softmax(logits, -1) @ values


def gradients(run: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize(("hq", "hkv"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_prefix_attention(
    dtype: torch.dtype, master: bool, hq: int, hkv: int, causal: bool
) -> None:
    b, length, d, p = 2, 75, 40, 13
    q, k, v = (_heads(b, h, length, d, dtype) for h in (hq, hkv, hkv))
    kind = torch.float32 if master else dtype
    prefix = [torch.randn(hkv, p, d).to(kind) for _ in range(2)]
    padding = torch.ones(b, 1, 1, length, dtype=torch.bool)
    padding[0, ..., :20] = False
    visible = padding.expand(b, 1, length, length)
    if causal:
        visible = visible & torch.ones(length, length, dtype=torch.bool).tril()

    def ours(*t: Tensor) -> Tensor:
        return F.prefix_attention(*t, attn_mask=padding, is_causal=causal)

    def plain(*t: Tensor) -> Tensor:
        return eager(*t, visible=visible)

    inputs, dy = [q, k, v, *prefix], _heads(b, hq, length, d, dtype)
    got = gradients(ours, inputs, dy)
    truth = gradients(plain, [t.double() for t in inputs], dy.double())
    eagerly = gradients(plain, inputs, dy)
    names = ("out", "q", "k", "v", "prefix_k", "prefix_v")
    for name, g, t, e in zip(names, got, truth, eagerly, strict=True):
        assert_error_rule(g, t, e, 1.5 if name == "out" else 2.0, name)


def test_gradients_that_arrive_with_gaps() -> None:
    """Every second column of a wider tensor, a transpose, one number for all (sum() sends that)."""
    q, k, v = (_heads(2, 4, 9, 16, torch.float32) for _ in range(3))
    inputs = [q, k, v, torch.randn(4, 3, 16), torch.randn(4, 3, 16)]
    every_second, transposed = torch.randn(2, 4, 9, 32)[..., ::2], torch.randn(2, 4, 16, 9).mT
    for dy in (every_second, transposed, torch.tensor(0.5).expand(2, 4, 9, 16)):
        want = gradients(F.prefix_attention, inputs, dy.contiguous())
        for got, expected in zip(gradients(F.prefix_attention, inputs, dy), want, strict=True):
            assert torch.equal(got, expected)


def test_gradcheck_in_double_of_prefix_attention() -> None:
    shapes = ((1, 4, 3, 3), (1, 2, 4, 3), (1, 2, 4, 3), (2, 2, 3), (2, 2, 3))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    bias = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    seed = torch.tensor([3])
    assert torch.autograd.gradcheck(
        lambda *t: F.prefix_attention(*t, bias, True, 0.3, 0.4, seed=seed), inputs
    )


@pytest.mark.parametrize("causal", [False, True])
def test_is_torch_attention_over_joined_keys(causal: bool) -> None:
    q, k, v = (_heads(2, 4, 33, 64) for _ in range(3))
    prefix_k, prefix_v = torch.randn(2, 4, 9, 64)
    got = F.prefix_attention(q, k, v, prefix_k, prefix_v, is_causal=causal)
    visible = torch.ones(33, 33, dtype=torch.bool)
    mask = torch.cat(
        [torch.ones(33, 9, dtype=torch.bool), visible.tril() if causal else visible], 1
    )
    keys, values = _joined(prefix_k, k, 4), _joined(prefix_v, v, 4)
    want = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    torch.testing.assert_close(got, want)
    assert got.transpose(1, 2).is_contiguous()


def test_later_queries_see_as_if_all_ran() -> None:
    """Decoding: the queries are the last positions of the keys."""
    q, k, v = (_heads(2, 2, 20, 16) for _ in range(3))
    prefix = torch.randn(2, 2, 4, 16)
    whole = F.prefix_attention(q, k, v, *prefix, is_causal=True)
    tail = F.prefix_attention(q[:, :, 13:], k, v, *prefix, is_causal=True)
    torch.testing.assert_close(tail, whole[:, :, 13:])


def _variants(x: Tensor) -> dict[str, Tensor]:
    gaps = torch.randn(*x.shape[:-1], 2 * x.shape[-1])
    gaps[..., ::2] = x
    flat = torch.zeros(x.numel() + 3)
    flat[3:] = x.reshape(-1)
    return {"gaps": gaps[..., ::2], "offset": flat[3:].view(x.shape), "plain": x.contiguous()}


@pytest.mark.parametrize("layout", ["gaps", "offset", "plain"])
def test_layouts_of_prefix_attention(layout: str) -> None:
    q, k, v = _heads(2, 4, 9, 8), _heads(2, 2, 9, 8), _heads(2, 2, 9, 8)
    prefix = torch.randn(2, 2, 3, 8)
    want = F.prefix_attention(q, k, v, *prefix)
    assert_same_bits(F.prefix_attention(*(_variants(t)[layout] for t in (q, k, v)), *prefix), want)


def test_expanded_gradient_and_heads() -> None:
    q, k, v = (_heads(2, 2, 7, 8) for _ in range(3))
    k = k[:, :1].expand(2, 2, 7, 8)
    prefix = torch.randn(2, 2, 3, 8)
    inputs = [q, k, v, *prefix]
    dense = gradients(F.prefix_attention, inputs, torch.ones_like(q))
    leaves = [t.clone().requires_grad_() for t in inputs]
    F.prefix_attention(*leaves).sum().backward()
    for leaf, want in zip(leaves, dense[1:], strict=True):
        assert leaf.grad is not None
        assert_same_bits(leaf.grad, want)


def test_projections_are_not_copied() -> None:
    """Saved for backward: the very storage of q, k and v, the output, and a number a row."""
    q, k, v = (_heads(2, h, 64, 32).requires_grad_() for h in (4, 2, 2))
    prefix = [torch.randn(2, 8, 32, requires_grad=True) for _ in range(2)]
    held = {t.data_ptr() for t in (q, k, v, *prefix)}
    extra: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in held:
            extra.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.prefix_attention(q, k, v, *prefix, is_causal=True)
    assert sum(t.nbytes for t in extra) == q.nbytes + 2 * 4 * 64 * 4


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    q, k = _heads(1, 1, 4, 8), _heads(1, 1, 500, 8)
    ones = torch.ones(1, 1, 500, 8)
    prefix = torch.randn(1, 20, 8), torch.ones(1, 20, 8)
    torch.manual_seed(0)
    first = F.prefix_attention(q, k, ones, *prefix, dropout_p=0.2)
    again = F.prefix_attention(q, k, ones, *prefix, dropout_p=0.2)
    assert not torch.equal(first, again)
    torch.manual_seed(0)
    assert_same_bits(F.prefix_attention(q, k, ones, *prefix, dropout_p=0.2), first)
    torch.testing.assert_close(first.mean(), torch.tensor(1.0), atol=0.15, rtol=0)
    off = F.prefix_attention(q, k, ones, *prefix, dropout_p=0.2, training=False)
    torch.testing.assert_close(off, torch.ones_like(off))


def test_rows_that_see_nothing_are_zero() -> None:
    q, k, v = (_heads(1, 2, 3, 8) for _ in range(3))
    empty = torch.zeros(2, 2, 0, 8)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    inputs = [q, k, v, *empty]
    got = gradients(lambda *t: F.prefix_attention(*t, attn_mask=mask), inputs, torch.ones_like(q))
    assert torch.equal(got[0][:, :, 1], torch.zeros(1, 2, 8))
    assert torch.equal(got[1][:, :, 1], torch.zeros(1, 2, 8))
    assert all(g.isfinite().all() for g in got)


def test_autocast_of_prefix_attention() -> None:
    q, k, v = (_heads(2, 2, 5, 16).requires_grad_() for _ in range(3))
    prefix = [torch.randn(2, 3, 16, requires_grad=True) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        out = F.prefix_attention(q, k, v, *prefix)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (q, k, v, *prefix))


def test_compiles_whole_with_a_prefix() -> None:
    prefix = [torch.randn(2, 3, 16, requires_grad=True) for _ in range(2)]
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.prefix_attention(q, k, v, *prefix, is_causal=True, dropout_p=0.25)
        return out.transpose(1, 2).flatten(2).square()

    for length in (5, 9):
        inputs = [_heads(2, h, length, 16).requires_grad_() for h in (4, 2, 2)]
        results = []
        for function in (run, run._torchdynamo_orig_callable):
            torch.manual_seed(1)
            y = function(*inputs)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), [*inputs, *prefix])])
        for got, want in zip(*results, strict=True):
            assert_same_bits(got, want)


def test_second_order_through_prefix_attention_is_refused() -> None:
    q, k, v = (_heads(1, 1, 3, 8).requires_grad_() for _ in range(3))
    y = F.prefix_attention(q, k, v, *torch.randn(2, 1, 2, 8))
    (dq,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients through prefix_attention"):
        dq.sum().backward()


def test_errors_of_prefix_attention_name_the_argument() -> None:
    q, k, v = _heads(2, 4, 5, 8), _heads(2, 2, 5, 8), _heads(2, 2, 5, 8)
    p, trained = torch.randn(2, 3, 8), torch.ones(5, 5, requires_grad=True)
    three, short_k, short_v = _heads(2, 3, 5, 8), k[:, :, 1:], v[:, :, 1:]
    run: Any = F.prefix_attention
    cases = [
        (TypeError, r"q: got int", lambda: run(1, k, v, p, p)),
        (ValueError, r"q: got shape \(4, 5, 8\)", lambda: run(q[0], k, v, p, p)),
        (ValueError, r"k: got 3 heads", lambda: run(q, three, three, p, p)),
        (ValueError, r"v: got shape", lambda: run(q, k, v[:, :, 1:], p, p)),
        (TypeError, r"k: got dtype torch.float16", lambda: run(q, k.half(), v, p, p)),
        (ValueError, r"prefix_k: got shape", lambda: run(q, k, v, p[1:], p)),
        (ValueError, r"prefix_v: got shape", lambda: run(q, k, v, p, p[:, 1:])),
        (TypeError, r"prefix_v: got dtype", lambda: run(q, k, v, p, p.half())),
        (ValueError, r"attn_mask: got shape", lambda: run(q, k, v, p, p, torch.ones(5, 8) > 0)),
        (TypeError, r"attn_mask: got dtype", lambda: run(q, k, v, p, p, torch.ones(5, 5).long())),
        (
            ValueError,
            r"is_causal: got 5 queries",
            lambda: run(q, short_k, short_v, p, p, None, True),
        ),
        (ValueError, r"dropout_p: got 1.0", lambda: run(q, k, v, p, p, dropout_p=1.0)),
        (ValueError, r"attn_mask: requires", lambda: run(q, k, v, p, p, trained)),
        (ValueError, r"prompt: got shape \(3, 7\)", lambda: F.soft_prompt(q[0], p[0, :, 1:])),
        (TypeError, r"prompt: got list", lambda: F.soft_prompt(q[0], [1])),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_soft_prompt(dtype: torch.dtype) -> None:
    embeds, prompt = torch.randn(3, 5, 8).to(dtype), torch.randn(4, 8)
    dy = torch.randn(3, 9, 8).to(dtype)
    out, dx, dp = gradients(F.soft_prompt, [embeds, prompt], dy)
    assert out.dtype == dtype
    assert torch.equal(out[1, :4], prompt.to(dtype))
    assert torch.equal(out[:, 4:], embeds)
    assert torch.equal(dx, dy[:, 4:])
    torch.testing.assert_close(dp, dy[:, :4].float().sum(0), atol=2e-2, rtol=2e-2)
    each = F.soft_prompt(embeds, prompt.expand(3, 4, 8))
    assert torch.equal(each, out)
