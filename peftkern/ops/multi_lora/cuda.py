"""A linear with a different low-rank term for each row, by the CUDA passes of LoRA.

See ``gathered.py`` for how the adapters become one; which rows see which columns is decided by
small elementwise operations of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.cuda_kernels import products, thin
from peftkern.cuda_kernels.products import LowRank, product
from peftkern.cuda_kernels.thin import Dropout
from peftkern.ops.bases import Base
from peftkern.ops.dropout.cuda import philox_dropout
from peftkern.ops.multi_lora.gathered import Adapters, Group, gathered, hand_out
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import constant


def _why_not(x: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], *activations: Tensor) -> Any:
    why = cuda_native.refusal(x, *lora_A, *lora_B)
    if why is not None:
        return why
    if len({t.dtype for t in (*lora_A, *lora_B)}) > 1:
        return "adapters of several dtypes"
    ranked = [t for pair in zip(lora_A, lora_B, strict=True) for t in pair if pair[0].shape[0]]
    if not ranked or 0 in x.shape:
        return "nothing to multiply"
    for activation in (x, *activations):
        why = thin.refusal(activation, activation.shape[1], *ranked)
        if why is not None:
            return why
    return None


def _own(wide: Tensor, ids: Tensor, adapters: Adapters) -> Tensor:
    """Columns times their scaling where they belong to the row's adapter, else zero."""
    mine = ids[:, None] == adapters.owner(wide.device)
    return torch.where(mine, wide * adapters.factor(wide.device), 0.0)


def _spread(s: Tensor, ids: Tensor, adapters: Adapters) -> Tensor:
    """S times the scaling, each row in the columns of its adapter: fp32 [M, R]."""
    return _own(s[:, adapters.place(s.device)], ids, adapters)


def _compact(wide: Tensor, ids: Tensor, adapters: Adapters) -> Tensor:
    """[M, widest]: of each row the columns of its adapter, then zeros."""
    device, count = wide.device, len(adapters.ranks)
    column = torch.arange(max(adapters.ranks), device=device)
    known = ids.clamp(0, count - 1)
    first = constant(adapters.columns, torch.int64, device)[known]
    ranks = constant(adapters.ranks, torch.int64, device)[known]
    inside = (column < ranks[:, None]) & ((ids >= 0) & (ids < count))[:, None]
    at = (first[:, None] + column).clamp_(max=adapters.total - 1)
    return torch.where(inside, wide.gather(1, at), 0.0)


def _parts(value: Tensor, low_last: bool, whole: bool) -> Tensor:
    """fp32 [M, R] as bf16 columns whose products add up: u and v of csrc/cuda/shrink.cu.

    ``low_last``: (high, high, low), else (high, low, high); ``whole``: (high, low).
    """
    high = value.bfloat16()
    low = torch.where(value.isfinite(), value - high.float(), 0.0).bfloat16()
    if whole:
        made = [high, low]
    else:
        made = [high, high, low] if low_last else [high, low, high]
    columns = sum(part.shape[1] for part in made)
    if rest := -columns % 8:
        made.append(high.new_zeros(high.shape[0], rest))
    return torch.cat(made, dim=1)


def _term(low: Tensor, up: Tensor, across: bool, way: str) -> LowRank:
    """``low upᵀ`` (across: ``low up``) as the way takes it; low carries the scaling."""
    if not products.needs_parts(way):
        return LowRank(low, up, 1.0)
    whole = up.dtype == torch.bfloat16
    thin_up = up.t() if across else up
    if whole:
        v = torch.cat([thin_up, thin_up], dim=1)
        if rest := -v.shape[1] % 8:
            v = torch.nn.functional.pad(v, (0, rest))
    else:
        v = _parts(thin_up, False, False)
    v = v.t().contiguous() if across else v.contiguous()
    return LowRank(low, up, 1.0, _parts(low, True, whole), v)


def _forward_refusal(x: Tensor, *args: Any) -> str | None:
    lora_A, lora_B = args[9], args[10]
    why = _why_not(x, lora_A, lora_B)
    if why is None and args[6] % 8:
        why = f"{args[6]} outputs, the passes take whole 8s"
    return why


@implementation("multi_lora_linear", device="cuda", backend="cuda", can_use=_forward_refusal)
def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    adapter_ids: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S of all adapters in one pass, routed by the ids; an id without an adapter is the base's."""
    statistics = (absmax, nested_absmax, nested_offset)
    base = Base(weight, *statistics, format, blocksize, out_features, x.shape[1])
    adapters = gathered(lora_A, lora_B, scalings, dropout_p)
    wide = x.new_empty((x.shape[0], adapters.total), dtype=torch.float32)
    for group in adapters.groups:
        columns = wide[:, group.first : group.first + group.a.shape[0]]
        thin.shrink(x, group.a, dropout=Dropout(group.p, seed), out=columns)
    s = _compact(wide, adapter_ids, adapters)
    b = torch.cat([group.b for group in adapters.groups], dim=1)
    way = products.way_of(x, base, False)
    term = _term(_own(wide, adapter_ids, adapters), b, False, way)
    return product(x, base, False, bias, term, way=way), s


def _backward_refusal(dy: Tensor, x: Tensor, *args: Any) -> str | None:
    lora_A, lora_B = args[8], args[9]
    return _why_not(x, lora_A, lora_B, dy)


@implementation(
    "multi_lora_linear_backward", device="cuda", backend="cuda", can_use=_backward_refusal
)
def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    adapter_ids: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    need_dx: bool,
    need_dab: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dS and dB of all adapters over dy, dx with their terms in the sum, dA over x."""
    dx = x.new_empty(0)
    das = [a.new_empty(0) for a in lora_A]
    dbs = [b.new_empty(0) for b in lora_B]
    if not (need_dx or need_dab):
        return dx, das, dbs
    adapters = gathered(lora_A, lora_B, scalings, dropout_p)
    b = torch.cat([group.b for group in adapters.groups], dim=1)
    ds = _own(thin.shrink(dy, b, transposed=True)[0], adapter_ids, adapters)
    if need_dab:
        das, dbs = ([torch.zeros_like(t) for t in pair] for pair in (lora_A, lora_B))
        db = thin.outer(dy, _spread(s, adapter_ids, adapters), b, transposed=True)
        for group in adapters.groups:
            da = thin.outer(x, _columns(ds, group), group.a, dropout=Dropout(group.p, seed))
            hand_out(group, adapters, da, db, das, dbs)
    if need_dx:
        statistics = (absmax, nested_absmax, nested_offset)
        base = Base(weight, *statistics, format, blocksize, dy.shape[1], x.shape[1])
        dx = _input_gradient(dy, base, ds, adapters, seed)
    return dx, das, dbs


def _columns(wide: Tensor, group: Group) -> Tensor:
    return wide[:, group.first : group.first + group.a.shape[0]]


def _input_gradient(
    dy: Tensor, base: Base, ds: Tensor, adapters: Adapters, seed: Tensor | None
) -> Tensor:
    """``dy W`` and every group's ``mask(dS A)``; the term of one without a mask joins the sum."""
    onto: Tensor | None = None
    term: LowRank | None = None
    way = products.way_of(dy, base, True)
    for group in adapters.groups:
        own = _term(_columns(ds, group), group.a, True, way)
        if group.p == 0.0 or seed is None:
            term = own
            continue
        masked = philox_dropout(products.low_rank(dy, True, own), group.p, seed)
        onto = masked if onto is None else onto.add_(masked)
    return product(dy, base, True, term=term, onto=onto, way=way)
