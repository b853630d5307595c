"""A linear with a different low-rank term for each row, by Triton on an NVIDIA GPU.

All adapters are multiplied as one wide one; rows are zero in the columns of the others. Nothing is
sorted and the host never learns the ids: the call can be captured in a CUDA graph. The price is
the sum of all ranks instead of one in the thin products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import constant, launch, refusal
from peftkern.triton_kernels.matmul import Dropout, LowRank, finish, matmul
from peftkern.triton_kernels.passes import adapter_gradient, down_gradient, shrink

_BLOCK_M, _BLOCK_R = 32, 32
_ONE_PASS_RANK = 16


@dataclass(frozen=True)
class _Group:
    """Adapters with the same dropout probability, side by side."""

    members: list[int]
    a: Tensor
    b: Tensor
    dropout: Dropout
    first: int


@dataclass(frozen=True)
class _Adapters:
    """All adapters as one, in the order of their groups; ``columns`` holds each one's first."""

    groups: list[_Group]
    ranks: list[int]
    columns: list[int]
    scalings: list[float]

    @property
    def total(self) -> int:
        return sum(self.ranks)

    @property
    def order(self) -> list[int]:
        return [i for group in self.groups for i in group.members]

    def owner(self, device: torch.device) -> Tensor:
        return constant([i for i in self.order for _ in range(self.ranks[i])], torch.int64, device)

    def place(self, device: torch.device) -> Tensor:
        places = [j for i in self.order for j in range(self.ranks[i])]
        return constant(places, torch.int64, device)

    def factor(self, device: torch.device) -> Tensor:
        values = [self.scalings[i] for i in self.order for _ in range(self.ranks[i])]
        return constant(values, torch.float32, device)


def _gathered(
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> _Adapters:
    ranks = [a.shape[0] for a in lora_A]
    groups: list[_Group] = []
    columns, first = [0] * len(ranks), 0
    for p in dict.fromkeys(dropout_p):
        members = [i for i, own in enumerate(dropout_p) if own == p and ranks[i]]
        if not members:
            continue
        a = torch.cat([lora_A[i] for i in members])
        b = torch.cat([lora_B[i] for i in members], dim=1)
        groups.append(_Group(members, a, b, Dropout.of(p, seed), first))
        for i in members:
            columns[i] = first
            first += ranks[i]
    return _Adapters(groups, ranks, columns, scalings)


def _grid(m: int) -> int:
    return -(-m // _BLOCK_M)


def _spread(s: Tensor, ids: Tensor, adapters: _Adapters) -> Tensor:
    """S times the scaling, each row in the columns of its adapter: fp32 [M, R]."""
    from peftkern.triton_kernels import routing

    m, widest = s.shape
    wide = s.new_empty((m, adapters.total))
    device = s.device
    launch(
        routing._spread_kernel,
        _grid(m),
        s,
        s,
        ids,
        adapters.owner(device),
        adapters.place(device),
        adapters.factor(device),
        wide,
        m,
        adapters.total,
        widest,
        BLOCK_M=_BLOCK_M,
        BLOCK_R=_BLOCK_R,
        num_warps=4,
    )
    return wide


def _why_not(x: Tensor, lora_A: list[Tensor]) -> str | None:
    kinds = {a.dtype for a in lora_A}
    if len(kinds) > 1:
        return f"adapters of several dtypes ({', '.join(sorted(map(str, kinds)))})"
    return refusal(x, x.dtype, *kinds)


def _forward_refusal(
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
) -> str | None:
    return _why_not(x, lora_A)


@implementation("multi_lora_linear", device="cuda", backend="triton", can_use=_forward_refusal)
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
    from peftkern.triton_kernels import routing

    base = Base(
        weight,
        absmax,
        nested_absmax,
        nested_offset,
        format,
        blocksize,
        out_features,
        x.shape[1],
    )
    adapters = _gathered(lora_A, lora_B, scalings, dropout_p, seed)
    m, widest = x.shape[0], max(adapters.ranks, default=0)
    if not adapters.groups:
        return matmul(x, base, bias=bias), x.new_zeros((m, widest), dtype=torch.float32)
    parts = [shrink(x, group.a, group.dropout) for group in adapters.groups]
    wide = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    s = wide.new_empty((m, widest))
    launch(
        routing._compact_kernel,
        _grid(m),
        x,
        wide,
        adapter_ids,
        constant(adapters.columns, torch.int64, x.device),
        constant(adapters.ranks, torch.int64, x.device),
        s,
        m,
        adapters.total,
        widest,
        len(lora_A),
        BLOCK_M=_BLOCK_M,
        BLOCK_R=_BLOCK_R,
        num_warps=4,
    )
    b = torch.cat([group.b for group in adapters.groups], dim=1)
    term = LowRank(_spread(s, adapter_ids, adapters), b, 1.0, Dropout.of(0.0, None))
    return matmul(x, base, bias=bias, low_rank=term), s


def _backward_refusal(
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
) -> str | None:
    return _why_not(x, lora_A)


@implementation(
    "multi_lora_linear_backward", device="cuda", backend="triton", can_use=_backward_refusal
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
    """One pass over dy for all adapters' dS and dB; rows are zero in the columns of the others."""
    dx = x.new_empty(0)
    das = [a.new_empty(0) for a in lora_A]
    dbs = [b.new_empty(0) for b in lora_B]
    if not (need_dx or need_dab):
        return dx, das, dbs
    adapters = _gathered(lora_A, lora_B, scalings, dropout_p, seed)
    terms: list[tuple[_Group, Tensor]] = []
    if need_dab:
        das, dbs = ([torch.zeros_like(t) for t in pair] for pair in (lora_A, lora_B))
    if adapters.groups:
        wide = _spread(s, adapter_ids, adapters)
        b = torch.cat([group.b for group in adapters.groups], dim=1)
        ds, db = _gradients(dy, wide, b, need_dab)
        ds = _route(ds, adapter_ids, adapters)
        for group in adapters.groups:
            own = ds[:, group.first : group.first + group.a.shape[0]].contiguous()
            terms.append((group, own))
            if need_dab:
                da = down_gradient(own, x, group.a, group.dropout)
                _split(group, adapters, da, db, das, dbs)
    if need_dx:
        base = Base(
            weight,
            absmax,
            nested_absmax,
            nested_offset,
            format,
            blocksize,
            dy.shape[1],
            x.shape[1],
        )
        lows = [LowRank(own, group.a.t(), 1.0, group.dropout) for group, own in terms]
        dx = matmul(dy, base, transposed=True, low_rank=lows[0] if lows else None)
        for low in lows[1:]:
            finish(dx[None], dx, None, low)
    return dx, das, dbs


def _gradients(dy: Tensor, wide: Tensor, b: Tensor, need_db: bool) -> tuple[Tensor, Tensor]:
    """dS [M, R] and dB [N, R] of all adapters; wide ones by two passes over dy.

    One pass leaves a part of dS for each tile of dy: beyond rank 16 these are more than dy.
    """
    if b.shape[1] <= _ONE_PASS_RANK:
        return adapter_gradient(dy, wide, b, 1.0, need_db)
    nothing = Dropout.of(0.0, None)
    thin = b.t().contiguous()
    ds = shrink(dy, thin, nothing)
    return ds, down_gradient(wide, dy, thin, nothing).t() if need_db else b.new_empty(0)


def _route(ds: Tensor, ids: Tensor, adapters: _Adapters) -> Tensor:
    """dS times the scaling where a column belongs to the row's adapter, else zero."""
    from peftkern.triton_kernels import routing

    out = torch.empty_like(ds)
    m, total = ds.shape
    launch(
        routing._route_kernel,
        _grid(m),
        ds,
        ds,
        ids,
        adapters.owner(ds.device),
        adapters.factor(ds.device),
        out,
        m,
        total,
        BLOCK_M=_BLOCK_M,
        BLOCK_R=_BLOCK_R,
        num_warps=4,
    )
    return out


def _split(
    group: _Group,
    adapters: _Adapters,
    da: Tensor,
    db: Tensor,
    das: list[Tensor],
    dbs: list[Tensor],
) -> None:
    """Hand each adapter of a group its rows of dA and its columns of dB."""
    for i in group.members:
        start, rank = adapters.columns[i], adapters.ranks[i]
        within = start - group.first
        das[i] = da[within : within + rank].clone()
        dbs[i] = db[:, start : start + rank].contiguous()
