"""Native DoRA on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import native
from peftkern.ops.dropout.cpu import philox_dropout
from peftkern.ops.lora.cpu import base_by_torch, native_base
from peftkern.registry import implementation


def _refusal(*args: Any) -> str | None:
    return native.refusal(*args)


def _norm_refusal(*args: Any) -> str | None:
    return native.refusal(*args[:-1])  # the last is fp64 in every case


@implementation("dora_linear", device="cpu", backend="native", can_use=_refusal)
def dora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_u: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Low-rank term, scale and bias end the base product; under dropout it goes on with the rest.

    The rest is ``(x - dropout(x)) Wᵀ``, added to the sums that were scaled.
    """
    m, k = x.shape
    rank = lora_A.shape[0]
    s = torch.empty((m, rank), dtype=torch.float32)
    y = torch.empty((m, out_features), dtype=x.dtype)
    u = torch.empty((m, out_features) if need_u else 0, dtype=x.dtype)
    base: native.NativeWeight | None = None
    add: Tensor | None = None
    dropped = x
    if format == "dense" and base_by_torch(x.dtype):
        if seed is not None and dropout_p > 0:
            dropped = philox_dropout(x, dropout_p, seed)
        add = torch.nn.functional.linear(dropped, weight)
    else:
        statistics = (absmax, nested_absmax, nested_offset)
        stored = (weight, *statistics, format, blocksize)
        base = native_base(*stored, (out_features, k), x.dtype)
    native.kernels().dora_forward(
        x.data_ptr(),
        native.DTYPES[x.dtype],
        m,
        k,
        out_features,
        base,
        0 if add is None else add.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        lora_A.data_ptr(),
        lora_B.data_ptr(),
        native.DTYPES[lora_A.dtype],
        rank,
        column_scale.data_ptr(),
        scaling,
        native.dropout_parameters(dropout_p, seed, k),
        s.data_ptr(),
        u.data_ptr() if need_u else 0,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if dropped is not x:
        y += torch.nn.functional.linear(x - dropped, weight)
    return y, s, u


@implementation("dora_linear_backward", device="cpu", backend="native", can_use=_refusal)
def dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    column_scale: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
    need_dscale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy is scaled while it is read; under dropout dx is one product of three terms."""
    m, k = x.shape
    n = dy.shape[1]
    rank = lora_A.shape[0]
    active = seed is not None and dropout_p > 0
    by_torch = need_dx and format == "dense" and base_by_torch(x.dtype)
    less = column_scale - 1
    base: native.NativeWeight | None = None
    add: Tensor | None = None
    dx = torch.empty((m, k) if need_dx else 0, dtype=x.dtype)
    if by_torch:
        add = torch.matmul((dy * (less if active else column_scale)).to(x.dtype), weight)
    elif need_dx:
        statistics = (absmax, nested_absmax, nested_offset)
        stored = (weight, *statistics, format, blocksize)
        base = native_base(*stored, (n, k), x.dtype)
    da = torch.empty(lora_A.shape if need_dab else 0, dtype=lora_A.dtype)
    db = torch.empty(lora_B.shape if need_dab else 0, dtype=lora_B.dtype)
    ds = torch.empty((m, rank), dtype=torch.float32)
    dscale = torch.empty(n if need_dscale else 0, dtype=torch.float32)
    kernels = native.kernels()
    if need_dx or need_dab:
        kernels.dora_backward(
            dy.data_ptr(),
            x.data_ptr(),
            s.data_ptr(),
            native.DTYPES[x.dtype],
            m,
            k,
            n,
            base,
            0 if add is None else add.data_ptr(),
            lora_A.data_ptr(),
            lora_B.data_ptr(),
            native.DTYPES[lora_A.dtype],
            rank,
            column_scale.data_ptr(),
            less.data_ptr(),
            scaling,
            native.dropout_parameters(dropout_p, seed, k),
            ds.data_ptr(),
            dx.data_ptr() if need_dx else 0,
            da.data_ptr() if need_dab else 0,
            db.data_ptr() if need_dab else 0,
            torch.get_num_threads(),
        )
    if by_torch and seed is not None and dropout_p > 0:
        dx = philox_dropout(dx, dropout_p, seed).add_(torch.matmul(dy, weight))
    if need_dscale:
        dtype = native.DTYPES[x.dtype]
        threads = torch.get_num_threads()
        kernels.column_dots(dy.data_ptr(), u.data_ptr(), dtype, m, n, dscale.data_ptr(), threads)
    return dx, da, db, dscale


def _stored_base(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: tuple[int, int],
) -> native.NativeWeight:
    """The base in its own precision: a quantized one decodes to fp32."""
    dtype = weight.dtype if format == "dense" else torch.float32
    statistics = (absmax, nested_absmax, nested_offset)
    return native_base(weight, *statistics, format, blocksize, shape, dtype)


@implementation("weight_norm_sq", device="cpu", backend="native", can_use=_refusal)
def weight_norm_sq(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """One pass over the stored weight; no dense copy."""
    statistics = (absmax, nested_absmax, nested_offset)
    shape = (out_features, in_features)
    base = _stored_base(weight, *statistics, format, blocksize, shape)
    out = torch.empty(out_features, dtype=torch.float64)
    native.kernels().row_squares(base, out.data_ptr(), torch.get_num_threads())
    return out


@implementation("dora_weight_norm", device="cpu", backend="native", can_use=_norm_refusal)
def dora_weight_norm(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    norm_sq: Tensor,
) -> Tensor:
    """A Wᵀ as one product with the stored weight; the three terms are summed in fp64."""
    rank, k = lora_A.shape
    statistics = (absmax, nested_absmax, nested_offset)
    base = _stored_base(weight, *statistics, format, blocksize, (out_features, k))
    a, b = lora_A.float(), lora_B.float()
    cross = torch.empty((rank, out_features), dtype=torch.float32)
    gram = torch.empty((rank, rank), dtype=torch.float64)
    norm = torch.empty(out_features, dtype=torch.float32)
    native.kernels().dora_norm(
        base,
        out_features,
        k,
        a.data_ptr(),
        b.data_ptr(),
        rank,
        scaling,
        norm_sq.data_ptr(),
        cross.data_ptr(),
        gram.data_ptr(),
        norm.data_ptr(),
        torch.get_num_threads(),
    )
    return norm
