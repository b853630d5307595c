"""Plain torch truth of attention with a trainable prefix. Never optimised.

Prefix tuning: Li and Liang 2021 (arXiv 2101.00190). Softmax and its gradient by the row's
log-sum-exp: Dao et al. 2022 (arXiv 2205.14135). With ``K = [prefix_k; k]``, ``V = [prefix_v; v]``
and ``m`` the dropout mask over the kept share::

    S = scale q Kᵀ + mask      lse = log sum exp S      P = exp(S - lse)      out = (m P) V
    dP = m (dout Vᵀ)           dS = P (dP - sum(dout out))
    dq = scale dS K            dK = scale dSᵀ q         dV = (m P)ᵀ dout
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.dropout.reference import keep_mask


def heads_inside(x: Tensor) -> Tensor:
    """x [B, H, L, D] as the view of a contiguous [B, L, H, D]: what projections read and write."""
    batch, heads, length, depth = x.shape
    out = x.new_empty((batch, length, heads, depth)).transpose(1, 2)
    return out.copy_(x)


def joined(prefix: Tensor, x: Tensor, heads: int, wide: torch.dtype) -> Tensor:
    """Prefix and sequence as one [B, Hq, P + Lk, D], each head repeated for its group."""
    prefix = prefix.expand(x.shape[0], *prefix.shape[-3:])
    whole = torch.cat([prefix.to(wide), x.to(wide)], dim=2)
    return whole.repeat_interleave(heads // x.shape[1], dim=1)


def masked_logits(logits: Tensor, attn_mask: Tensor | None, is_causal: bool, own: int) -> Tensor:
    """Logits with the columns behind the prefix masked; ``own`` is how many these are."""
    queries = logits.shape[-2]
    before, self_part = logits.split([logits.shape[-1] - own, own], dim=-1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        self_part = self_part.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        self_part = self_part + attn_mask.to(logits.dtype)
    if is_causal:
        ones = torch.ones(queries, own, dtype=torch.bool, device=logits.device)
        self_part = self_part.masked_fill(~ones.tril(own - queries), -torch.inf)
    return torch.cat([before, self_part], dim=-1)


def kept_share(
    shape: torch.Size, p: float, seed: Tensor | None, wide: torch.dtype
) -> Tensor | None:
    """The dropout mask over probabilities, times ``1 / (1 - p)``; ``None`` without dropout."""
    if seed is None or p == 0.0:
        return None
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32, device=seed.device).to(wide)
    return keep_mask(shape, p, seed).to(wide) * scale


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
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; a row that sees nothing gives zeros and -inf."""
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    keys, values = (joined(p, x, q.shape[1], wide) for p, x in ((prefix_k, k), (prefix_v, v)))
    logits = (q.to(wide) @ keys.transpose(2, 3)) * scale
    logits = masked_logits(logits, attn_mask, is_causal, k.shape[2])
    lse = torch.logsumexp(logits, dim=-1)
    blind = lse == -torch.inf
    shares = torch.exp(logits - lse.masked_fill(blind, 0.0)[..., None])
    kept = kept_share(shares.shape, dropout_p, seed, wide)
    out = (shares if kept is None else shares * kept) @ values
    return heads_inside(out if compute else out.to(q.dtype)), lse


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
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv, dprefix_k, dprefix_v)``; what is not needed comes back empty."""
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    keys, values = (joined(p, x, q.shape[1], wide) for p, x in ((prefix_k, k), (prefix_v, v)))
    logits = (q.to(wide) @ keys.transpose(2, 3)) * scale
    logits = masked_logits(logits, attn_mask, is_causal, k.shape[2])
    shares = torch.exp(logits - lse.to(wide).masked_fill(lse == -torch.inf, 0.0)[..., None])
    dshares = dout.to(wide) @ values.transpose(2, 3)
    kept = kept_share(shares.shape, dropout_p, seed, wide)
    if kept is not None:
        dshares = dshares * kept
    delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    dlogits = shares * (dshares - delta) * scale
    dvalues = (shares if kept is None else shares * kept).transpose(2, 3) @ dout.to(wide)
    dkeys = dlogits.transpose(2, 3) @ q.to(wide)
    groups = (*k.shape[:2], q.shape[1] // k.shape[1], *keys.shape[2:])
    dkeys, dvalues = (g.view(groups).sum(2) for g in (dkeys, dvalues))
    results: list[Tensor] = [q.new_empty(0), k.new_empty(0), v.new_empty(0)]
    length = prefix_k.shape[-2]
    if need_dqkv:
        own = [dlogits @ keys, dkeys[:, :, length:], dvalues[:, :, length:]]
        results = [heads_inside(g if compute else g.to(q.dtype)) for g in own]
    for prefix, whole in ((prefix_k, dkeys), (prefix_v, dvalues)):
        if not need_dprefix:
            results.append(prefix.new_empty(0))
            continue
        gradient = whole[:, :, :length]
        gradient = gradient.sum(0) if prefix.dim() == 3 else gradient
        gradient = gradient if compute else gradient.to(prefix.dtype)
        results.append(gradient.clone(memory_format=torch.contiguous_format))
    return results[0], results[1], results[2], results[3], results[4]
