"""Attention with a prefix in two parts: torch's for the sequence, one Triton pass for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.prefix import library
from peftkern.triton_kernels.launch import interpreting, launch
from peftkern.triton_kernels.passes import add_parts
from peftkern.tuning.configs import share_config


def heads_inside(x: Tensor) -> Tensor:
    """An empty [B, H, L, D] as the view of a contiguous [B, L, H, D]."""
    batch, heads, length, depth = x.shape
    return x.new_empty((batch, length, heads, depth)).transpose(1, 2)


def strides(value: Tensor) -> tuple[int, ...]:
    """Of batch, head and row."""
    return value.stride()[:3]


def prefix_stride(prefix: Tensor) -> int:
    """From one batch row's prefix to the next one's; 0 where they share it."""
    return prefix.stride(0) if prefix.dim() == 4 else 0


def _laid_out(x: Tensor) -> Tensor:
    """x itself where it is laid out as results are, else a copy that is."""
    like = heads_inside(x)
    return x if x.stride() == like.stride() else like.copy_(x)


def forward(
    way: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """torch's attention over the sequence, then the prefix's share on top of its output."""
    from peftkern.triton_kernels import prefix_share

    batch, heads, queries, depth = q.shape
    own, own_lse = library.WAYS[way].forward(q, k, v, is_causal, scale)
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    out = heads_inside(q)
    if own.stride() == out.stride():
        out = own
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    config = share_config(depth, 1, queries, False)
    launch(
        prefix_share._share_forward_kernel,
        batch * heads * -(-queries // config.block_m),
        q,
        q,
        prefix_k,
        prefix_v,
        own,
        own_lse.contiguous(),
        out,
        lse,
        heads,
        k.shape[1],
        queries,
        prefix_k.shape[-2],
        depth,
        *strides(q),
        *strides(own),
        prefix_stride(prefix_k),
        scale,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_c,
        BLOCK_D=config.block_r,
        INTERPRET=interpreting(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, lse


def backward(
    way: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    need_dqkv: bool,
    need_dprefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """torch's backward with the whole row's sums; one pass for the prefix and its share of dq."""
    from peftkern.triton_kernels import prefix_share

    batch, heads, queries, depth = q.shape
    kv_heads, length = k.shape[1], prefix_k.shape[-2]
    dq, dk, dv = (t.new_empty(0) for t in (q, k, v))
    dout, out = (t if library.aligned(t) else heads_inside(t).copy_(t) for t in (dout, out))
    if need_dqkv:
        dq, dk, dv = library.WAYS[way].backward(dout, q, k, v, out, lse, is_causal, scale)
        dq, dk, dv = _laid_out(dq), _laid_out(dk), _laid_out(dv)
    masters = prefix_k, prefix_v
    prefix_k, prefix_v = (p.to(q.dtype) for p in masters)
    config = share_config(depth, batch * heads, queries, True, need_dprefix)
    shape = (config.split, heads // kv_heads, batch, kv_heads, length, depth)
    parts = [lse.new_empty(shape if need_dprefix else (0,)) for _ in range(2)]
    if length and (need_dqkv or need_dprefix):
        launch(
            prefix_share._share_backward_kernel,
            batch * heads * config.split,
            q,
            dout,
            q,
            prefix_k,
            prefix_v,
            out,
            lse,
            dq if need_dqkv else None,
            *(parts if need_dprefix else (None, None)),
            batch,
            heads,
            kv_heads,
            queries,
            length,
            depth,
            *strides(dout),
            *strides(q),
            *strides(out),
            prefix_stride(prefix_k),
            scale,
            NEED_DQ=need_dqkv,
            NEED_DP=need_dprefix,
            SPLIT=config.split,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_c,
            BLOCK_D=config.block_r,
            INTERPRET=interpreting(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if not need_dprefix:
        return dq, dk, dv, masters[0].new_empty(0), masters[1].new_empty(0)
    made = [
        add_parts(part.view(-1, like.numel()), torch.empty_like(like), 1.0)
        if length
        else torch.empty_like(like)
        for part, like in zip(parts, masters, strict=True)
    ]
    return dq, dk, dv, made[0], made[1]
