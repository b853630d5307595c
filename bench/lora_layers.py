"""Contenders for layers of several LoRA projections: ours, and the eager composition of HF PEFT.

The eager layers do what PEFT's layers do, op by op in torch: the base, two small matmuls and an
add for each projection; an index copy for each adapter of a mixed batch; the dense norm of
``W + sBA`` for DoRA. A quantized base is dequantized where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import peftkern as pk

from .cases import weight_bytes
from .measure import Contender
from .peers import Built, clones, peftkern_base

F = pk.functional
linear = torch.nn.functional.linear
Layer = Callable[[Tensor], Any]


def _dense(base: Any, dtype: torch.dtype) -> Tensor:
    return base if isinstance(base, Tensor) else base.dequantize(dtype)


def _lora(x: Tensor, base: Any, a: Tensor, b: Tensor) -> Tensor:
    low_rank = linear(linear(x.to(a.dtype), a), b)
    return linear(x, _dense(base, x.dtype)) + low_rank.to(x.dtype)


def _adapter(n: int, k: int, r: int) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(r, k) / k**0.5, torch.randn(n, r)
    return a.requires_grad_(), b.requires_grad_()


def _steps(
    layers: dict[str, Sequence[tuple[Layer, Sequence[Tensor]]]],
    k: int,
    dtype: torch.dtype,
    size: int,
) -> Built:
    """Forward, then backward to the input and everything that is trained."""

    def contender(name: str, copies: Sequence[tuple[Layer, Sequence[Tensor]]]) -> Contender:
        def prepare(rows: int) -> Callable[[int], object]:
            x = torch.randn(rows, k).to(dtype).requires_grad_()
            with torch.no_grad():
                ys = copies[0][0](x)
            ys = [ys] if isinstance(ys, Tensor) else list(ys)
            dys = [torch.randn_like(y) for y in ys]

            def step(i: int) -> object:
                layer, trained = copies[i]
                return torch.autograd.grad(layer(x), [x, *trained], dys)

            return step

        return Contender(name, prepare, len(copies), size)

    return [contender(name, copies) for name, copies in layers.items()], {}


def group(
    fmt: str, r: int, m: int, k: int, sizes: Sequence[int], dtype: torch.dtype, size: int
) -> Built:
    """q, k and v over one input."""
    ws = [peftkern_base(fmt, (torch.randn(n, k) / k**0.5).to(dtype)) for n in sizes]
    weight = sum(weight_bytes(fmt, k, n, dtype.itemsize) for n in sizes)
    pairs = [_adapter(n, k, r) for n in sizes]
    flat = [t for pair in pairs for t in pair]
    ours: list[tuple[Layer, Sequence[Tensor]]] = []
    eager: list[tuple[Layer, Sequence[Tensor]]] = []
    for bases in clones(ws, weight):
        members = [(base, *pair) for base, pair in zip(bases, pairs, strict=True)]
        ours.append((lambda x, g=members: F.lora_linear_group(x, g), flat))
        eager.append((lambda x, g=members: tuple(_lora(x, *member) for member in g), flat))
    return _steps({"peftkern": ours, "eager": eager}, k, dtype, size)


def mlp(fmt: str, r: int, m: int, k: int, f: int, dtype: torch.dtype, size: int) -> Built:
    """A SwiGLU feed-forward layer."""
    shapes = ((f, k), (f, k), (k, f))
    ws = [peftkern_base(fmt, (torch.randn(n, d) / d**0.5).to(dtype)) for n, d in shapes]
    weight = sum(weight_bytes(fmt, d, n, dtype.itemsize) for n, d in shapes)
    pairs = [_adapter(n, d, r) for n, d in shapes]
    flat = [t for pair in pairs for t in pair]

    def plain(x: Tensor, g: Sequence[Any]) -> Tensor:
        h = torch.nn.functional.silu(_lora(x, *g[0])) * _lora(x, *g[1])
        return _lora(h, *g[2])

    ours: list[tuple[Layer, Sequence[Tensor]]] = []
    eager: list[tuple[Layer, Sequence[Tensor]]] = []
    for bases in clones(ws, weight):
        members = [(base, *pair) for base, pair in zip(bases, pairs, strict=True)]
        ours.append((lambda x, g=members: F.lora_mlp(x, *g), flat))
        eager.append((lambda x, g=members: plain(x, g), flat))
    return _steps({"peftkern": ours, "eager": eager}, k, dtype, size)


def multi(
    fmt: str, r: int, count: int, m: int, k: int, n: int, dtype: torch.dtype, size: int
) -> Built:
    """``count`` adapters mixed over the rows of a batch."""
    w = peftkern_base(fmt, (torch.randn(n, k) / k**0.5).to(dtype))
    pairs = [_adapter(n, k, r) for _ in range(count)]
    flat = [t for pair in pairs for t in pair]
    adapters = [(*pair, 1.0) for pair in pairs]

    def plain(x: Tensor, base: Any) -> Tensor:
        ids = torch.arange(x.shape[0]) % count
        y = linear(x, _dense(base, x.dtype))
        for i, (a, b) in enumerate(pairs):
            rows = (ids == i).nonzero().squeeze(1)
            part = linear(linear(x[rows].to(a.dtype), a), b).to(y.dtype)
            y = y.index_add(0, rows, part)
        return y

    ours: list[tuple[Layer, Sequence[Tensor]]] = []
    eager: list[tuple[Layer, Sequence[Tensor]]] = []
    for base in clones(w, weight_bytes(fmt, k, n, dtype.itemsize)):
        ours.append(
            (
                lambda x, q=base: F.multi_lora_linear(
                    x, q, adapters, torch.arange(x.shape[0]) % count
                ),
                flat,
            )
        )
        eager.append((lambda x, q=base: plain(x, q), flat))
    return _steps({"peftkern": ours, "eager": eager}, k, dtype, size)


def dora(fmt: str, r: int, m: int, k: int, n: int, dtype: torch.dtype, size: int) -> Built:
    """DoRA without dropout; both sides compute the norm in each step."""
    w = peftkern_base(fmt, (torch.randn(n, k) / k**0.5).to(dtype))
    a, b = _adapter(n, k, r)
    magnitude = torch.rand(n).add_(0.5).requires_grad_()
    trained = (a, b, magnitude)

    def plain(x: Tensor, base: Any) -> Tensor:
        weight = _dense(base, x.dtype)
        norm = torch.linalg.norm(weight + (b @ a).detach().to(x.dtype), dim=1)
        c = (magnitude / norm).to(x.dtype)
        y = linear(x, weight)
        low_rank = linear(linear(x.to(a.dtype), a), b).to(x.dtype)
        return y + (c - 1) * y + c * low_rank

    ours: list[tuple[Layer, Sequence[Tensor]]] = []
    eager: list[tuple[Layer, Sequence[Tensor]]] = []
    for base in clones(w, weight_bytes(fmt, k, n, dtype.itemsize)):
        kept = F.weight_norm_sq(base)
        ours.append(
            (
                lambda x, q=base, s=kept: F.dora_linear(
                    x, q, a, b, magnitude, 1.0, weight_norm=F.dora_weight_norm(q, a, b, 1.0, s)
                ),
                trained,
            )
        )
        eager.append((lambda x, q=base: plain(x, q), trained))
    return _steps({"peftkern": ours, "eager": eager}, k, dtype, size)
