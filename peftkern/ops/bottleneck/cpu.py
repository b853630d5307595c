"""Native bottleneck adapter on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation

# The numbers of enum Activation in csrc/cpu/kernels.h.
_ACTIVATIONS = {
    "identity": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "tanh": 5,
    "sigmoid": 6,
    "leaky_relu": 7,
}
_FEW_ROWS = 8
# Rows whose bottleneck is in memory at a time, so that it stays in cache and scratch is bounded.
_BLOCK_FLOATS = 1 << 17


def _refusal(*args: Any) -> str | None:
    return native.refusal(*(arg for arg in args if isinstance(arg, Tensor)))


def _forward_refusal(*args: Any) -> str | None:
    if args[-1]:
        return "the native kernel does not write the bottleneck out"
    return _refusal(*args)


def _backward_refusal(dy: Tensor, x: Tensor, z: Tensor | None, *rest: Any) -> str | None:
    if z is not None:
        return "the native kernel computes the bottleneck again"
    return _refusal(dy, x, *rest)


def _address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def _adapter(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    """make_bottleneck() in csrc/bind_bottleneck.cpp."""
    n, rank = up_w.shape
    return (
        x.data_ptr(),
        native.DTYPES[x.dtype],
        *x.shape,
        n,
        rank,
        down_w.data_ptr(),
        _address(down_b),
        up_w.data_ptr(),
        _address(up_b),
        _address(scale),
        0 if scale is None else scale.numel(),
        native.DTYPES[down_w.dtype],
        _ACTIVATIONS[activation],
        native.dropout_parameters(dropout_p, seed, n),
    )


@implementation("bottleneck_adapter", device="cpu", backend="native", can_use=_forward_refusal)
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
    """A tile of rows goes through both products while its bottleneck is in cache."""
    m, (n, rank) = x.shape[0], up_w.shape
    y = torch.empty((m, n), dtype=x.dtype)
    work = torch.empty(m * (rank + n), dtype=torch.float32) if m <= _FEW_ROWS else None
    weights = (down_w, down_b, up_w, up_b, scale)
    native.kernels().bottleneck_forward(
        _adapter(x, *weights, activation, dropout_p, seed),
        _address(residual),
        y.data_ptr(),
        _address(work),
        torch.get_num_threads(),
    )
    return y, down_w.new_empty(0)


@implementation(
    "bottleneck_adapter_backward", device="cpu", backend="native", can_use=_backward_refusal
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
    """The bottleneck again, block of rows by block of rows; one product a gradient."""
    (m, k), (n, rank) = x.shape, up_w.shape
    kind = down_w.dtype

    def floats(count: int) -> Tensor:  # never empty: a null address means that it is not wanted
        return torch.empty(max(1, count), dtype=torch.float32)

    def result(like: Tensor | None) -> Tensor:
        return torch.empty(0 if like is None or not need_dw else like.shape, dtype=kind)

    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype)
    d_up_w, d_up_b, d_scale = result(up_w), result(up_b), result(scale)
    block = max(64, _BLOCK_FLOATS // rank // 64 * 64)
    work = floats(min(m, block) * 4 * rank)
    scaled = None if scale is None else floats(n * rank)
    down_sum = floats(rank * k) if need_dw else None
    down_b_sum = torch.zeros(rank, dtype=torch.float32) if need_dw else None
    up_sum = floats(rank * n) if need_dw else None
    up_b_sum = torch.zeros(max(1, n), dtype=torch.float32) if need_dw else None
    native.kernels().bottleneck_backward(
        _adapter(x, down_w, down_b, up_w, up_b, scale, activation, dropout_p, seed),
        dy.data_ptr(),
        add_dy,
        dx.data_ptr(),
        _address(down_sum),
        _address(down_b_sum),
        _address(up_sum),
        _address(up_b_sum),
        _address(scaled),
        d_up_w.data_ptr(),
        d_up_b.data_ptr(),
        d_scale.data_ptr(),
        work.data_ptr(),
        block,
        torch.get_num_threads(),
    )
    empty = down_w.new_empty(0)
    if down_sum is None or down_b_sum is None:
        return dx, empty, empty.clone(), d_up_w, d_up_b, d_scale
    d_down_b = empty if down_b is None else down_b_sum.to(kind)
    d_down_w = down_sum[: rank * k].view(rank, k).to(kind)
    return dx, d_down_w, d_down_b, d_up_w, d_up_b, d_scale
