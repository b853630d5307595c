"""A linear with a different low-rank term for each row, by Triton on an NVIDIA GPU.

See ``gathered.py`` for how the adapters become one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.bases import Base
from peftkern.ops.multi_lora.gathered import Adapters, Group, gathered, hand_out
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import constant, launch, refusal
from peftkern.triton_kernels.matmul import Dropout, LowRank, finish, matmul
from peftkern.triton_kernels.passes import adapter_gradient, down_gradient, shrink

_BLOCK_M, _BLOCK_R = 32, 32
_ONE_PASS_RANK = 16


def _grid(m: int) -> int:
    return -(-m // _BLOCK_M)


def _spread(s: Tensor, ids: Tensor, adapters: Adapters) -> Tensor:
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
    adapters = gathered(lora_A, lora_B, scalings, dropout_p)
    m, widest = x.shape[0], max(adapters.ranks, default=0)
    if not adapters.groups:
        return matmul(x, base, bias=bias), x.new_zeros((m, widest), dtype=torch.float32)
    parts = [shrink(x, group.a, Dropout.of(group.p, seed)) for group in adapters.groups]
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
    adapters = gathered(lora_A, lora_B, scalings, dropout_p)
    terms: list[tuple[Group, Tensor]] = []
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
                da = down_gradient(own, x, group.a, Dropout.of(group.p, seed))
                hand_out(group, adapters, da, db, das, dbs)
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
        lows = [LowRank(own, group.a.t(), 1.0, Dropout.of(group.p, seed)) for group, own in terms]
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


def _route(ds: Tensor, ids: Tensor, adapters: Adapters) -> Tensor:
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
