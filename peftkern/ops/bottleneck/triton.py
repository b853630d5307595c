"""The bottleneck adapter on an NVIDIA GPU: by whole rows, by cuBLAS' thin products, or by passes.

The three ways compute the same; :func:`peftkern.tuning.bottleneck.bottleneck_way` says which serves
what.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.bottleneck import library, passes, rows
from peftkern.ops.bottleneck.launches import column_sum, finish
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import refusal
from peftkern.triton_kernels.matmul import Dropout
from peftkern.triton_kernels.passes import down_gradient
from peftkern.tuning.bottleneck import bottleneck_way


def _way(x: Tensor, n: int, down_w: Tensor, backward: bool, dropped: bool) -> str:
    (m, c), r = x.shape, down_w.shape[0]
    if 0 in (m, n, c):
        return "passes"
    products = library.refusal(x, down_w, backward and dropped) is None
    return bottleneck_way(m, c, n, r, down_w.dtype == torch.float32, backward, products)


def _forward_refusal(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
) -> str | None:
    return refusal(x, x.dtype, down_w.dtype)


@implementation("bottleneck_adapter", device="cuda", backend="triton", can_use=_forward_refusal)
def bottleneck_adapter(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """One launch from x to y where that is fastest; else the bottleneck, then y."""
    ways = {"rows": rows, "library": library, "passes": passes}
    way = ways[_way(x, up_w.shape[0], down_w, False, dropout_p > 0)]
    weights = (down_w, down_b, up_w, up_b, scale)
    return way.forward(x, *weights, residual, activation, Dropout.of(dropout_p, seed), keep)


def _backward_refusal(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
) -> str | None:
    return refusal(x, x.dtype, down_w.dtype)


@implementation(
    "bottleneck_adapter_backward", device="cuda", backend="triton", can_use=_backward_refusal
)
def bottleneck_adapter_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    add_dy: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz, dx, then the gradients of the weights."""
    empty = down_w.new_empty(0)
    if not (need_dx or need_dw):
        return x.new_empty(0), empty, empty, empty, empty, empty
    way = _way(x, up_w.shape[0], down_w, True, dropout_p > 0)
    if way == "library":
        weights = (down_w, down_b, up_w, up_b, scale)
        mask = (dropout_p, seed)
        return library.backward(dy, x, z, *weights, activation, *mask, add_dy, need_dx, need_dw)
    dropout = Dropout.of(dropout_p, seed)
    given = (dy, x, z, down_w, down_b, up_w, scale, activation, dropout, add_dy, need_dx)
    h, dz, dx = rows.backward(*given, need_dw) if way == "rows" else passes.backward(*given)
    if not need_dw:
        return dx, empty, empty, empty, empty, empty
    ddown_w = down_gradient(dz, x, down_w, Dropout.of(0.0, None))
    ddown_b = empty if down_b is None else column_sum(dz, down_b)
    p_parts, q_parts = passes.up_gradient(dy, h, up_w, dropout)
    return dx, ddown_w, ddown_b, *finish(p_parts, q_parts, up_w, up_b, scale)
