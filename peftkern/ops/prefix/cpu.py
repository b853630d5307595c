"""Native attention with a trainable prefix on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation

_BOOL, _FLOAT = 1, 2


def _view(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of [B, H, L, D]; a prefix shared by the batch has no batch stride."""
    batch = x.stride(0) if x.dim() == 4 else 0
    return x.data_ptr(), batch, x.stride(-3), x.stride(-2)


def _mask(attn_mask: Tensor | None) -> tuple[int, int, int, int, int, int, int] | None:
    if attn_mask is None:
        return None
    strides = [0 if n == 1 else s for n, s in zip(attn_mask.shape, attn_mask.stride(), strict=True)]
    address = attn_mask.data_ptr()
    b, h, row, col = strides
    if attn_mask.dtype == torch.bool:
        return _BOOL, 0, address, b, h, row, col
    return _FLOAT, native.DTYPES[attn_mask.dtype], address, b, h, row, col


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    """What problem() in csrc/bind_prefix.cpp takes, but the lse and the threads."""
    batch, heads, queries, depth = q.shape
    keys, length = k.shape[2], prefix_k.shape[-2]
    return (
        tuple(_view(t) for t in (q, k, v, prefix_k, prefix_v)),
        (native.DTYPES[q.dtype], native.DTYPES[prefix_k.dtype]),
        (batch, heads, k.shape[1], queries, keys, length, depth),
        _mask(attn_mask),
        is_causal,
        scale,
        native.dropout_parameters(dropout_p, seed, length + keys),
    )


def _refusal(*args: Any) -> str | None:
    return native.refusal(*(arg for arg in args if isinstance(arg, Tensor)))


def _like(x: Tensor) -> Tensor:
    batch, heads, length, depth = x.shape
    return torch.empty((batch, length, heads, depth), dtype=x.dtype).transpose(1, 2)


@implementation("prefix_attention", device="cpu", backend="native", can_use=_refusal)
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One pass over the prefix's tiles and then the sequence's, with a running softmax."""
    out = _like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    bundle = (q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale, dropout_p, seed)
    native.kernels().prefix_attention(
        *_problem(*bundle), out.data_ptr(), lse.data_ptr(), torch.get_num_threads()
    )
    return out, lse


@implementation("prefix_attention_backward", device="cpu", backend="native", can_use=_refusal)
def prefix_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dqkv: bool,
    need_dprefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every tile once; the prefix's sums over the batch are added up in the batch's order."""
    dq, dk, dv = (_like(t) if need_dqkv else torch.empty(0, dtype=t.dtype) for t in (q, k, v))
    partial_shape = (q.shape[0], k.shape[1], prefix_k.shape[-2], q.shape[3])
    partial = [
        torch.empty(partial_shape if need_dprefix else 0, dtype=torch.float32) for _ in range(2)
    ]
    bundle = (q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale, dropout_p, seed)
    native.kernels().prefix_attention_backward(
        _view(dout),
        _view(out),
        *_problem(*bundle),
        lse.data_ptr(),
        (need_dqkv, need_dprefix),
        *(g.data_ptr() for g in (dq, dk, dv, *partial)),
        torch.get_num_threads(),
    )
    if need_dprefix and prefix_k.dim() == 3:
        partial = [_ordered_sum(g) for g in partial]
    dprefix_k, dprefix_v = (g.to(prefix_k.dtype) for g in partial)
    return dq, dk, dv, dprefix_k, dprefix_v


def _ordered_sum(rows: Tensor) -> Tensor:
    """The sum over the first dimension, one row after the other: the same for any threads."""
    total = torch.zeros(rows.shape[1:], dtype=rows.dtype)
    for row in rows:
        total += row
    return total
