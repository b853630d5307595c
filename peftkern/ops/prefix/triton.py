"""Attention with a trainable prefix on an NVIDIA GPU.

Where torch's own fused attention takes the sequence's part (16-bit, no mask, no dropout), it does,
and one Triton pass adds the prefix's share: see ``shared.py``. The rest, masks among it, is served
by one Triton kernel over prefix and sequence.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from peftkern.ops.prefix import library, shared
from peftkern.ops.prefix.shared import heads_inside, prefix_stride, strides
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal
from peftkern.triton_kernels.matmul import Dropout
from peftkern.triton_kernels.passes import add_parts
from peftkern.tuning.configs import RankConfig, attention_config

_LARGEST_HEAD = 256


def _refusal(q: Tensor, prefix: Tensor) -> str | None:
    if q.shape[3] > _LARGEST_HEAD:
        return f"a head of {q.shape[3]}, the kernels take up to {_LARGEST_HEAD}"
    return refusal(q, q.dtype, prefix.dtype)


def _mask_arguments(
    attn_mask: Tensor | None,
) -> tuple[Tensor | None, tuple[int, int, int, int], int]:
    """Pointer, strides (0 along what is broadcast) and kind of the mask."""
    if attn_mask is None:
        return None, (0, 0, 0, 0), 0
    sizes, steps = attn_mask.shape, attn_mask.stride()
    b, h, m, n = (0 if size == 1 else step for size, step in zip(sizes, steps, strict=True))
    if attn_mask.dtype == torch.bool:
        return attn_mask.view(torch.uint8), (b, h, m, n), 1
    return attn_mask, (b, h, m, n), 2


def _constants(q: Tensor, k: Tensor, prefix: Tensor, dropout: Dropout) -> dict[str, object]:
    """What all kernels are compiled for."""
    length = prefix.shape[-2]
    return {
        "DROPOUT": dropout.seed is not None,
        "QUADS": length % 4 == 0 and k.shape[2] % 4 == 0,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "native",
        "INTERPRET": interpreting(),
    }


def _config(q: Tensor, masked: bool, backward: bool) -> RankConfig:
    """The heuristic's tiles; with a mask fewer queries, whose addresses would spill."""
    config = attention_config(q.shape[3], q.dtype == torch.float32, backward)
    if not masked:
        return config
    if backward and q.shape[3] <= 64:
        return replace(config, block_m=16, num_warps=4)
    return replace(config, block_m=max(16, config.block_m // 2))


def _tiles(config: RankConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_c,
        "BLOCK_D": config.block_r,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _forward_refusal(
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
) -> str | None:
    return _refusal(q, prefix_k)


@implementation("prefix_attention", device="cuda", backend="triton", can_use=_forward_refusal)
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
    """The prefix is read as it is stored and never joined to the keys."""
    way = library.choose(q, k, v, attn_mask, is_causal, scale, dropout_p)
    if way is not None:
        return shared.forward(way, q, k, v, prefix_k, prefix_v, is_causal, float(scale))
    return one_pass(q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale, dropout_p, seed)


def one_pass(
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
    """One launch over the prefix's tiles and those of the sequence."""
    from peftkern.triton_kernels import prefix

    batch, heads, queries, depth = q.shape
    # A few rows: tiles of fp32 masters would take twice the shared memory all along.
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    out = heads_inside(q)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    dropout = Dropout.of(dropout_p, seed)
    mask, mask_steps, kind = _mask_arguments(attn_mask)
    config = _config(q, attn_mask is not None, False)
    launch(
        prefix._prefix_forward_kernel,
        batch * heads * -(-queries // config.block_m),
        q,
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        mask,
        dropout.seed,
        out,
        lse,
        heads,
        k.shape[1],
        queries,
        k.shape[2],
        prefix_k.shape[-2],
        depth,
        *strides(q),
        *strides(k),
        *strides(v),
        prefix_stride(prefix_k),
        *mask_steps,
        float(scale),
        dropout.threshold,
        dropout.scale,
        ATTN=kind,
        CAUSAL=is_causal,
        **_constants(q, k, prefix_k, dropout),
        **_tiles(config),
    )
    return out, lse


def _backward_refusal(
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
) -> str | None:
    return _refusal(q, prefix_k)


@implementation(
    "prefix_attention_backward", device="cuda", backend="triton", can_use=_backward_refusal
)
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
    """The prefix's gradients are made in parts that are added in order."""
    way = library.choose(q, k, v, attn_mask, is_causal, scale, dropout_p)
    if way is not None:
        whole = (dout, q, k, v, prefix_k, prefix_v, out, lse, is_causal, float(scale))
        return shared.backward(way, *whole, need_dqkv, need_dprefix)
    return one_pass_backward(
        dout,
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        out,
        lse,
        attn_mask,
        is_causal,
        scale,
        dropout_p,
        seed,
        need_dqkv,
        need_dprefix,
    )


def one_pass_backward(
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
    """dq by rows of queries, dk and dv by rows of keys, the prefix's like those of other keys."""
    from peftkern.triton_kernels import prefix

    batch, heads, queries, depth = q.shape
    kv_heads, keys, length = k.shape[1], k.shape[2], prefix_k.shape[-2]
    dropout = Dropout.of(dropout_p, seed)
    mask, mask_steps, kind = _mask_arguments(attn_mask)
    config = _config(q, attn_mask is not None, True)
    constants = {**_constants(q, k, prefix_k, dropout), **_tiles(config)}
    delta = torch.empty_like(lse)
    launch(
        prefix._prefix_delta_kernel,
        batch * heads * -(-queries // 64),
        q,
        dout,
        out,
        delta,
        heads,
        queries,
        depth,
        *strides(dout),
        *strides(out),
        BLOCK_M=64,
        BLOCK_D=config.block_r,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    masters = prefix_k, prefix_v
    prefix_k, prefix_v = (p.to(q.dtype) for p in masters)
    sizes = (heads, kv_heads, queries, keys, length, depth)
    numbers = (float(scale), dropout.threshold, dropout.scale)
    dq, dk, dv = (t.new_empty(0) for t in (q, k, v))
    if need_dqkv:
        dq, dk, dv = (heads_inside(t) for t in (q, k, v))
        launch(
            prefix._prefix_dq_kernel,
            batch * heads * -(-queries // config.block_m),
            q,
            dout,
            q,
            k,
            v,
            prefix_k,
            prefix_v,
            lse,
            delta,
            mask,
            dropout.seed,
            dq,
            *sizes,
            *strides(dout),
            *strides(q),
            *strides(k),
            *strides(v),
            prefix_stride(prefix_k),
            *mask_steps,
            *numbers,
            ATTN=kind,
            CAUSAL=is_causal,
            **constants,
        )
        launch(
            prefix._prefix_dkv_kernel,
            batch * kv_heads * -(-keys // config.block_c),
            q,
            dout,
            q,
            k,
            v,
            lse,
            delta,
            mask if mask is not None else q,
            dropout.seed,
            dk,
            dv,
            batch,
            *sizes,
            *strides(dout),
            *strides(q),
            *strides(k),
            *strides(v),
            *mask_steps,
            *numbers,
            PREFIX=False,
            ATTN=kind,
            CAUSAL=is_causal,
            **constants,
        )
    if not need_dprefix:
        return dq, dk, dv, masters[0].new_empty(0), masters[1].new_empty(0)
    group = heads // kv_heads
    shape = (group, batch, kv_heads, length, depth)
    parts = [lse.new_empty(shape) for _ in range(2)]
    one = (prefix_stride(prefix_k), length * depth, depth)
    launch(
        prefix._prefix_dkv_kernel,
        group * batch * kv_heads * -(-length // config.block_c),
        q,
        dout,
        q,
        prefix_k,
        prefix_v,
        lse,
        delta,
        q,
        dropout.seed,
        *parts,
        batch,
        *sizes,
        *strides(dout),
        *strides(q),
        *one,
        *one,
        0,
        0,
        0,
        0,
        *numbers,
        PREFIX=True,
        ATTN=0,
        CAUSAL=False,
        **constants,
    )
    count = group if prefix_k.dim() == 4 else group * batch
    made = [
        add_parts(part.view(count, like.numel()), torch.empty_like(like), 1.0)
        for part, like in zip(parts, masters, strict=True)
    ]
    return dq, dk, dv, made[0], made[1]
