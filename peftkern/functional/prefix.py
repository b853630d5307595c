"""Attention with trainable keys and values in front of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.arguments import flag, real, require_float, require_tensor
from peftkern.functional.arguments import (
    autocast_dtype,
    autocasts,
    needs_grad,
    seed_for,
)
from peftkern.ops.prefix.autograd import PrefixAttention
from peftkern.ops.prompt.autograd import PromptEmbedding


def _rows(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In the compute dtype; only a last dimension with gaps costs a copy."""
    value = value.to(dtype)
    return value if value.stride(-1) == 1 or value.shape[-1] < 2 else value.contiguous()


def _prefix(name: str, prefix: Tensor, q: Tensor) -> Tensor:
    require_float(name, prefix)
    wide = torch.promote_types(q.dtype, torch.float32)
    if prefix.dtype not in (q.dtype, wide):
        if not autocasts(q):
            raise TypeError(f"{name}: got dtype {prefix.dtype}, expected {q.dtype} or {wide}")
        prefix = prefix.to(wide)
    return prefix.contiguous()


def _mask(attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
    if attn_mask is None:
        return None
    require_tensor("attn_mask", attn_mask)
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("attn_mask: requires a gradient, which this function does not give it")
    if attn_mask.dim() > 4:
        raise ValueError(f"attn_mask: got shape {tuple(attn_mask.shape)}, expected [B, H, Lq, Lk]")
    attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    wide = torch.promote_types(q.dtype, torch.float32)
    if attn_mask.dtype.is_floating_point and attn_mask.dtype not in (q.dtype, wide):
        attn_mask = attn_mask.to(wide)
    return attn_mask


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention over ``[prefix; sequence]`` without joining them: ``softmax(s q Kᵀ + mask) V``.

    Every query sees the whole prefix; the mask and causality rule the sequence alone. Nothing is
    concatenated or repeated: grouped queries read their shared head, a prefix shared by the batch
    is read as it is, and its gradient is summed over the batch in a fixed order. Saves the inputs,
    the output and one number for each row. Source: prefix tuning (arXiv 2101.00190).

    Args:
        q: [B, Hq, Lq, D], float32, bfloat16, float16 or float64; the transpose of a projection's
            [B, Lq, Hq, D] is read where it lies.
        k: [B, Hkv, Lk, D] of q's dtype, Hkv a divisor of Hq.
        v: like k.
        prefix_k: [Hkv, P, D], or [B, Hkv, P, D] with one prefix for each row; q's dtype or float32.
        prefix_v: like prefix_k.
        attn_mask: bool (True is visible) or float (added to the logits), broadcastable to
            [B, Hq, Lq, Lk].
        is_causal: the queries are the last Lq positions of the Lk, and see none behind their own.
        scale: factor of the logits; default ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight, prefix included.
        training: ``False`` switches dropout off.
        seed: int64 [1] that fixes the dropout mask; default: drawn from torch's CPU generator.

    Returns:
        [B, Hq, Lq, D] of q's dtype (under autocast: of the autocast dtype), the transposed view of
        a contiguous [B, Lq, Hq, D]. A row that sees nothing is zero.

    Raises:
        TypeError: an argument is not a tensor of a fitting dtype.
        ValueError: shapes or devices do not fit, or ``attn_mask`` requires a gradient.

    Example:
        >>> import torch, peftkern as pk
        >>> q, k, v = (torch.randn(2, heads, 5, 16) for heads in (4, 2, 2))
        >>> prefix_k, prefix_v = torch.randn(2, 2, 3, 16)
        >>> pk.functional.prefix_attention(q, k, v, prefix_k, prefix_v, is_causal=True).shape
        torch.Size([2, 4, 5, 16])
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        require_float(name, value)
        if value.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [B, H, L, D]")
    dtype = autocast_dtype(q)
    if dtype != q.dtype:
        k, v = k.to(dtype), v.to(dtype)
    q, k, v = _rows(q, dtype), _rows(k, k.dtype), _rows(v, v.dtype)
    prefix_k, prefix_v = _prefix("prefix_k", prefix_k, q), _prefix("prefix_v", prefix_v, q)
    p = real("dropout_p", dropout_p) if training else 0.0
    arguments = (
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        _mask(attn_mask, q),
        flag("is_causal", is_causal),
        q.shape[-1] ** -0.5 if scale is None else real("scale", scale),
        p,
        seed_for(q, p, seed),
    )
    if needs_grad(q, k, v, prefix_k, prefix_v):
        return PrefixAttention.apply(*arguments)
    out, _ = torch.ops.peftkern.prefix_attention(*arguments)
    return out


def prompt_embedding(ids: Tensor, table: Tensor, prompt: Tensor) -> Tensor:
    """Embeddings of tokens from a frozen table, with a trained prompt in front of each row.

    What ``soft_prompt(embedding(ids, table), prompt)`` gives, without the embeddings in between.
    Source: prompt tuning (arXiv 2104.08691).

    Args:
        ids: int64 [B, L], rows of the table.
        table: frozen embeddings [V, H], any floating dtype.
        prompt: [P, H], or [B, P, H] with one prompt for each row; of the table's dtype or float32.

    Returns:
        [B, P + L, H] of the table's dtype. Differentiable in the prompt, whose gradient is summed
        over the batch in a fixed order.

    Raises:
        TypeError: an argument is not a tensor of a fitting dtype.
        ValueError: shapes or devices do not fit, an id is out of range (on a GPU its row is NaN),
            or the table requires a gradient.

    Example:
        >>> import torch, peftkern as pk
        >>> ids, table = torch.tensor([[0, 2], [1, 1]]), torch.randn(3, 8)
        >>> pk.functional.prompt_embedding(ids, table, torch.zeros(4, 8)).shape
        torch.Size([2, 6, 8])
    """
    require_float("table", table)
    require_float("prompt", prompt)
    require_tensor("ids", ids)
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError("table: requires a gradient; use soft_prompt with trained embeddings")
    if prompt.dtype not in (table.dtype, torch.promote_types(table.dtype, torch.float32)):
        prompt = prompt.to(table.dtype)
    arguments = (ids.contiguous(), table.contiguous(), prompt.contiguous())
    if needs_grad(prompt):
        return PromptEmbedding.apply(*arguments)
    return torch.ops.peftkern.prompt_embedding(*arguments)


def soft_prompt(input_embeds: Tensor, prompt: Tensor) -> Tensor:
    """A trainable prompt in front of each row's embeddings.

    One copy of the embeddings, which a longer sequence needs; the prompt's gradient is summed over
    the batch. Source: prompt tuning (arXiv 2104.08691).

    Args:
        input_embeds: [B, L, H], any floating dtype.
        prompt: [P, H], or [B, P, H] with one prompt for each row; cast to ``input_embeds``'s dtype.

    Returns:
        [B, P + L, H] of ``input_embeds``'s dtype.

    Raises:
        TypeError: an argument is not a float tensor.
        ValueError: shapes do not fit.

    Example:
        >>> import torch, peftkern as pk
        >>> pk.functional.soft_prompt(torch.zeros(2, 5, 8), torch.ones(3, 8)).shape
        torch.Size([2, 8, 8])
    """
    require_float("input_embeds", input_embeds)
    require_float("prompt", prompt)
    if input_embeds.dim() != 3:
        raise ValueError(f"input_embeds: got shape {tuple(input_embeds.shape)}, expected [B, L, H]")
    batch, _, width = input_embeds.shape
    shape = tuple(prompt.shape)
    if len(shape) not in (2, 3) or shape[-1] != width or shape[:-2] not in ((), (batch,)):
        raise ValueError(
            f"prompt: got shape {shape}, expected [P, {width}] or [{batch}, P, {width}]"
        )
    if prompt.device != input_embeds.device:
        raise ValueError(
            f"prompt: is on {prompt.device}, expected {input_embeds.device} like input_embeds"
        )
    prompt = prompt.to(input_embeds.dtype).expand(batch, -1, -1)
    return torch.cat([prompt, input_embeds], dim=1)
