"""Bottleneck adapters, attention behind a prefix, and sparse deltas, against eager torch.

``eager`` composes torch's ops as AdapterHub (bottleneck) and HF PEFT (prefix) do; a sparse delta's
eager peer adds a scattered dense update to the weight. ``plain`` does without the method: what it
costs at the least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import peftkern as pk

from .cases import DTYPES, Cell
from .measure import Contender
from .peers import Built, clones

F = pk.functional
tnf = torch.nn.functional

_RANK = 64
_BOTTLENECKS = {
    "quick": ((1, 1024), (512, 1024)),
    "standard": ((1, 4096), (8, 4096), (512, 4096), (512, 768)),
    "full": tuple((m, h) for h in (768, 4096) for m in (1, 8, 32, 512, 2048)),
}


class _Attention(NamedTuple):
    """A shape: rows of the batch, heads of queries and of keys, tokens, head width, prefix."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    prefix: int
    causal: bool


_BERT = _Attention(4, 12, 12, 128, 32, 20, False)
_LLAMA = _Attention(1, 8, 2, 512, 128, 32, True)
_LONG = _Attention(1, 8, 8, 1024, 64, 64, True)
_SHORT = _Attention(2, 12, 12, 64, 32, 10, False)
_ATTENTIONS = {
    "quick": (_LLAMA,),
    "standard": (_BERT, _LLAMA, _LONG),
    "full": (_BERT, _LLAMA, _LONG, _SHORT),
}
_SPARSE = {"quick": ((32, 1024),), "standard": ((32, 2048), (512, 2048)), "full": ((32, 4096),)}
_DENSITY = 0.01


def cells(level: str, dtype: str) -> list[Cell]:
    """Every cell of this file at a level ("quick", "standard", "full")."""
    found = [
        _bottleneck(way, m, h, dtype) for m, h in _BOTTLENECKS[level] for way in ("fwd", "step")
    ]
    found += [_prefix(shape, dtype) for shape in _ATTENTIONS[level]]
    return found + [_sparse(m, k, dtype) for m, k in _SPARSE[level]]


def _bottleneck(way: str, m: int, h: int, dtype: str) -> Cell:
    size = DTYPES[dtype].itemsize
    weights, rows = 2 * _RANK * h * size, m * h * size
    # x in and y out; a step reads x and dy and writes dx too, and makes both gradients.
    traffic = weights + 2 * rows if way == "fwd" else 3 * weights + 5 * rows
    flops = 4 * m * h * _RANK * (1 if way == "fwd" else 4)
    name = f"bottleneck_{way}-m{m}-{h}-r{_RANK}-{dtype}"
    build = partial(_build_bottleneck, way, h, DTYPES[dtype], traffic, weights)
    return Cell(name, "bottleneck", m, ("peftkern", "eager"), traffic, flops, build)


def _build_bottleneck(way: str, h: int, dtype: torch.dtype, traffic: int, weights: int) -> Built:
    down = torch.randn(_RANK, h) / h**0.5
    up = torch.randn(h, _RANK) / _RANK**0.5
    tensors = [t.to(dtype) for t in (down, torch.randn(_RANK), up, torch.randn(h))]
    if way == "step":
        tensors = [t.requires_grad_() for t in tensors]

    def eager(x: Tensor, dw: Tensor, db: Tensor, uw: Tensor, ub: Tensor) -> Tensor:
        return x + tnf.linear(tnf.gelu(tnf.linear(x, dw, db)), uw, ub) * 0.5

    def ours(x: Tensor, *t: Tensor) -> Tensor:
        return F.bottleneck_adapter(x, *t, activation="gelu", scaling=0.5, residual=x)

    copies = [
        [t.detach().requires_grad_(t.requires_grad) for t in c] for c in clones(tensors, weights)
    ]

    def contender(name: str, layer: Callable[..., Tensor]) -> Contender:
        def prepare(rows: int) -> Callable[[int], object]:
            x = torch.randn(rows, h).to(dtype)
            if way == "fwd":
                return lambda i: layer(x, *copies[i])
            x.requires_grad_()
            dy = torch.randn_like(x)
            return lambda i: torch.autograd.grad(layer(x, *copies[i]), [x, *copies[i]], dy)

        return Contender(name, prepare, len(copies), traffic)

    return [contender("peftkern", ours), contender("eager", eager)], {}


def _prefix(shape: _Attention, dtype: str) -> Cell:
    size, b = DTYPES[dtype].itemsize, shape.batch
    queries = b * shape.heads * shape.length * shape.width
    keys = b * shape.kv_heads * shape.length * shape.width
    pairs = shape.length * (shape.length + 1) // 2 if shape.causal else shape.length**2
    pairs += shape.prefix * shape.length
    flops = 14 * b * shape.heads * pairs * shape.width  # two products forward, five backward
    # q, k, v in and out; then these, dout and out in, dq, dk, dv out.
    traffic = size * (6 * queries + 6 * keys)
    kind = "causal" if shape.causal else "full"
    name = (
        f"prefix_{kind}-b{b}-h{shape.heads}x{shape.kv_heads}-l{shape.length}-d{shape.width}"
        f"-p{shape.prefix}-{dtype}"
    )
    build = partial(_build_prefix, shape, DTYPES[dtype], traffic)
    who = ("peftkern", "eager", "plain")
    return Cell(name, "prefix", b * shape.length, who, traffic, flops, build)


def _build_prefix(shape: _Attention, dtype: torch.dtype, traffic: int) -> Built:
    b, length, width, p = shape.batch, shape.length, shape.width, shape.prefix
    grouped = shape.heads != shape.kv_heads

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes).to(dtype).requires_grad_()

    q = draw(b, shape.heads, length, width)
    k, v = (draw(b, shape.kv_heads, length, width) for _ in range(2))
    pk_, pv = (draw(shape.kv_heads, p, width) for _ in range(2))
    dy = torch.randn(b, shape.heads, length, width).to(dtype)
    mask = None
    if shape.causal:
        triangle = torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.cat((torch.ones(length, p, dtype=torch.bool), triangle), dim=1)

    def ours() -> Tensor:
        return F.prefix_attention(q, k, v, pk_, pv, is_causal=shape.causal)

    def eager() -> Tensor:
        keys = torch.cat((pk_.expand(b, -1, -1, -1), k), dim=2)
        values = torch.cat((pv.expand(b, -1, -1, -1), v), dim=2)
        return tnf.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=grouped)

    def plain() -> Tensor:
        return tnf.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped)

    def contender(name: str, run: Callable[[], Tensor], trained: Sequence[Tensor]) -> Contender:
        def prepare(rows: int) -> Callable[[int], object]:
            return lambda i: torch.autograd.grad(run(), trained, dy)

        return Contender(name, prepare, 1, traffic)

    every = [q, k, v, pk_, pv]
    rows: list[tuple[str, Any, list[Tensor]]] = [
        ("peftkern", ours, every), ("eager", eager, every), ("plain", plain, every[:3])
    ]  # fmt: skip
    return [contender(*row) for row in rows], {}


def _sparse(m: int, k: int, dtype: str) -> Cell:
    size = DTYPES[dtype].itemsize
    entries = int(_DENSITY * k * k)
    # The weight for y and for dx; x for y and dvalues, dy twice, y and dx; entries in and out.
    traffic = 2 * k * k * size + 6 * m * k * size + 3 * 12 * entries
    flops = 2 * m * (2 * k * k + 3 * entries)
    name = f"sparse_delta-m{m}-{k}x{k}-{dtype}"
    build = partial(_build_sparse, k, entries, DTYPES[dtype], traffic)
    return Cell(name, "sparse_delta", m, ("peftkern", "eager"), traffic, flops, build)


def _build_sparse(k: int, entries: int, dtype: torch.dtype, traffic: int) -> Built:
    indices = torch.randperm(k * k)[:entries].sort().values
    values = torch.randn(entries).requires_grad_()
    weights = clones((torch.randn(k, k) / k**0.5).to(dtype), k * k * dtype.itemsize)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return F.sparse_delta_linear(x, w, indices, values)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return tnf.linear(x, w.flatten().index_add(0, indices, values.to(w.dtype)).view_as(w))

    def contender(name: str, layer: Callable[[Tensor, Tensor], Tensor]) -> Contender:
        def prepare(rows: int) -> Callable[[int], object]:
            x = torch.randn(rows, k).to(dtype).requires_grad_()
            dy = torch.randn_like(x)
            return lambda i: torch.autograd.grad(layer(x, weights[i]), [x, values], dy)

        return Contender(name, prepare, len(weights), traffic)

    return [contender("peftkern", ours), contender("eager", eager)], {}


def test_adapters(compare: Callable[..., None], cell: Cell, caches: str, contender: str) -> None:
    """One row: a contender's time."""
    compare(cell, caches, contender)
