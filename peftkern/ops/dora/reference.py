"""Plain torch truth of DoRA (Liu et al. 2024, arXiv 2402.09353). Never optimised.

With ``c = magnitude / norm``, where ``norm`` is that of each row of ``W + s B A``, taken as a
constant (section 4.3 of the paper), with ``x̂ = dropout(x)`` and ``S = x̂ Aᵀ``::

    u = x̂ Wᵀ + s S Bᵀ        y = c u + b + (x - x̂) Wᵀ
    dS = s (c dy) B           dx = dy W + mask(((c - 1) dy) W + dS A)        dc = Σ_rows dy u

Without dropout the last term of y is zero and dx is ``(c dy) W + dS A``. With it, the base sees
the plain x once and the dropped x ``c - 1`` times, as in HF PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.dropout.reference import keep_mask, philox_dropout
from peftkern.ops.lora.reference import base_weight


def stored_weight(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: list[int],
) -> Tensor:
    """The base in fp64: a dense one as it is, a quantized one as decoded to fp32."""
    if format == "dense":
        return weight.double()
    statistics = (absmax, nested_absmax, nested_offset)
    kind = torch.float32
    w = base_weight(weight, *statistics, format, blocksize, shape, kind)
    return w.double()


def weight_norm_sq(
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    in_features: int,
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Sum of squares of each row of the base, fp64 [N]."""
    statistics = (absmax, nested_absmax, nested_offset)
    shape = [out_features, in_features]
    return stored_weight(weight, *statistics, format, blocksize, shape).square().sum(1)


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
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Row norms of ``W + s B A``: ``|w|² + 2 s (W Aᵀ)·B + s² (B A Aᵀ)·B``, never forming B A."""
    statistics = (absmax, nested_absmax, nested_offset)
    shape = [out_features, lora_A.shape[1]]
    w = stored_weight(weight, *statistics, format, blocksize, shape)
    a, b = lora_A.double(), lora_B.double()
    cross = ((w @ a.T) * b).sum(1)
    square = ((b @ (a @ a.T)) * b).sum(1)
    norm = (norm_sq + 2 * scaling * cross + scaling**2 * square).clamp_min(0).sqrt()
    return norm if compute else norm.to(torch.promote_types(lora_A.dtype, torch.float32))


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
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, S, u)``; u is what the gradient of the scale needs, empty if not asked for."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    statistics = (absmax, nested_absmax, nested_offset)
    shape = [out_features, x.shape[1]]
    w = base_weight(weight, *statistics, format, blocksize, shape, x.dtype).to(wide)
    dropped = x if seed is None or dropout_p == 0 else philox_dropout(x, dropout_p, seed)
    s = dropped.to(wide) @ lora_A.to(wide).T
    u = dropped.to(wide) @ w.T + scaling * (s @ lora_B.to(wide).T)
    y = column_scale.to(wide) * u
    if dropped is not x:
        y = y + (x.to(wide) - dropped.to(wide)) @ w.T
    y = y if bias is None else y + bias.to(wide)
    u = u if need_u else x.new_empty(0)
    return (y, s, u) if compute else (y.to(x.dtype), s, u.to(x.dtype))


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
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dA, dB, dc)``; what is not needed comes back as an empty tensor."""
    wide = compute or torch.promote_types(x.dtype, torch.float32)
    c = column_scale.to(wide)
    scaled = dy.to(wide) * c
    ds = scaling * (scaled @ lora_B.to(wide))
    dx, da, db = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    dscale = column_scale.new_empty(0)
    active = seed is not None and dropout_p > 0
    if need_dx:
        statistics = (absmax, nested_absmax, nested_offset)
        shape = [dy.shape[1], x.shape[1]]
        w = base_weight(weight, *statistics, format, blocksize, shape, x.dtype).to(wide)
        if active and seed is not None:
            scale = torch.tensor(1.0 / (1.0 - dropout_p), dtype=torch.float32, device=x.device)
            keep = keep_mask(x.shape, dropout_p, seed)
            masked = (dy.to(wide) * (c - 1)) @ w + ds @ lora_A.to(wide)
            dx = dy.to(wide) @ w + torch.where(keep, masked * scale.to(wide), 0.0)
        else:
            dx = scaled @ w + ds @ lora_A.to(wide)
        dx = dx if compute else dx.to(x.dtype)
    if need_dab:
        dropped = philox_dropout(x, dropout_p, seed) if active and seed is not None else x
        da = ds.T @ dropped.to(wide)
        db = scaling * (scaled.T @ s.to(wide))
        da = da if compute else da.to(lora_A.dtype)
        db = db if compute else db.to(lora_B.dtype)
    if need_dscale:
        dscale = (dy.to(wide) * u.to(wide)).sum(0)
    return dx, da, db, dscale
