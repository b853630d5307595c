"""The bottleneck adapter with cuBLAS' thin products and passes of ours between them.

cuBLAS reads x or dy once for all ranks at close to the speed of a copy. fp32 weights under bf16
activations go in as three bf16 parts, more rows or columns of the same product, which accumulates
in fp32: nothing is lost. One pass makes y (dx) from the bottleneck (its gradient) and the residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.bottleneck.launches import expand, finish, hidden
from peftkern.triton_kernels.launch import interpreting, launch
from peftkern.triton_kernels.matmul import Dropout
from peftkern.triton_kernels.passes import add_parts

_ONES = 8  # columns behind h, the first of ones; eight keep rows aligned


def refusal(x: Tensor, weight: Tensor, masked: bool) -> str | None:
    """Why the products cannot take these weights and, ``masked``, a dropped-out dy."""
    if x.dtype == torch.float32:
        return "fp32 activations"
    if weight.dtype not in (x.dtype, torch.float32):
        return f"{weight.dtype} weights under {x.dtype} activations"
    if weight.dtype != x.dtype and x.dtype != torch.bfloat16:
        return "fp32 weights under fp16 activations: parts of theirs run out of exponents"
    if weight.dtype != x.dtype and masked:
        return "fp32 weights and dropout: what is kept of dy, scaled, is no 16-bit matrix"
    return None


def _count(x: Tensor, weight: Tensor) -> int:
    return 1 if weight.dtype == x.dtype else 3


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 from 16-bit operands."""
    if a.device.type == "cpu":  # the interpreter's
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def split(weight: Tensor, x: Tensor, across: bool) -> Tensor:
    """The weight [R, C] as parts [P R, C] of x's dtype; across: [C, R] as [C, P R]."""
    from peftkern.triton_kernels import parts

    count = _count(x, weight)
    if count == 1:
        return weight
    rows, cols = weight.shape
    out = x.new_empty((rows, count * cols) if across else (count * rows, cols))
    launch(
        parts._split_kernel,
        -(-weight.numel() // 1024),
        weight,
        weight,
        out,
        rows,
        cols,
        cols if across else rows * cols,
        out.stride(0),
        PARTS=count,
        BLOCK=1024,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return out


def bottleneck(x: Tensor, down_w: Tensor, down_b: Tensor | None, activation: str) -> Tensor:
    """z [M, R] of the weights' dtype."""
    if _count(x, down_w) == 1:
        return torch.nn.functional.linear(x, down_w, down_b)
    parts = product(x, split(down_w, x, False).t()).view(x.shape[0], 3, -1).transpose(0, 1)
    return hidden(parts, down_b, activation, torch.float32, None)[0]


def forward(
    x: Tensor,
    down_w: Tensor,
    down_b: Tensor | None,
    up_w: Tensor,
    up_b: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dropout: Dropout,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """z by a product, then y."""
    z = bottleneck(x, down_w, down_b, activation)
    weights = (None, up_w, up_b, scale)
    y = expand(x, z[None], *weights, residual, activation, dropout, up_w.stride())
    return y, z if keep else down_w.new_empty(0)


def backward(
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
    """Three thin products; h and dz between them, dx and what is small in passes of ours."""
    (m, n), r, count = dy.shape, down_w.shape[0], _count(x, down_w)
    z = bottleneck(x, down_w, down_b, activation) if z is None else z
    dropped = seed is not None and dropout_p > 0
    g = torch.ops.peftkern.philox_dropout(dy, dropout_p, seed) if dropped else dy
    scaled = up_w if scale is None else up_w * (scale if scale.numel() == 1 else scale[:, None])
    up = split(scaled, x, True)
    h, dz = _turn(g @ up if count == 1 else product(g, up), z, x, activation, need_dw)
    dx = x.new_empty(0)
    if need_dx:
        parts = dz.view(m, count, r).transpose(0, 1)
        rest = (None, dy if add_dy else None, "identity", Dropout.of(0.0, None))
        dx = expand(x, parts, None, down_w, None, *rest, (1, down_w.shape[1]))
    empty = down_w.new_empty(0)
    if not need_dw:
        return dx, empty, empty, empty, empty, empty
    if count == 1:
        ddown_w = dz.t() @ x
    else:
        ddown_w = add_parts(product(dz.t(), x).view(count, -1), torch.empty_like(down_w), 1.0)
    ddown_b = empty
    if down_b is not None:
        sums = dz.sum(0, dtype=torch.float32)
        ddown_b = sums.view(count, r).sum(0).to(down_b.dtype)
    wide = product(g.t(), h)
    p_parts = wide[:, : count * r].view(n, count, r).transpose(0, 1)
    q_parts = wide[:, count * r].view(1, n)
    return dx, ddown_w, ddown_b, *finish(p_parts, q_parts, up_w, up_b, scale)


def _turn(dh: Tensor, z: Tensor, x: Tensor, activation: str, need_h: bool) -> tuple[Tensor, Tensor]:
    """h [M, P R + 8] and dz [M, P R] as the products take them."""
    from peftkern.triton_kernels import bottleneck as kernels

    (m, r), count = z.shape, dh.shape[1] // z.shape[1]
    h = x.new_empty((m, count * r + _ONES) if need_h else (0,))
    dz = x.new_empty((m, count * r))
    launch(
        kernels._turn_kernel,
        -(-m * (r + _ONES) // 1024),
        dh,
        dh,
        z,
        h,
        dz,
        m,
        r,
        r + _ONES,
        ACT=activation,
        PARTS=count,
        NEED_H=need_h,
        BLOCK=1024,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return h, dz
