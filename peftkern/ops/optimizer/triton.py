"""The optimizer pass by Triton, where the CUDA library is not built."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.ops.optimizer.lookup import lookup_table
from peftkern.ops.optimizer.reference import BLOCK
from peftkern.ops.optimizer.table import CHUNK, Segment, Table, segments_of
from peftkern.registry import implementation
from peftkern.triton_kernels.launch import interpreting, launch, refusal

_LOOKUPS: dict[torch.device, Tensor] = {}


def _lookup(device: torch.device) -> Tensor:
    """The code table on a device, copied there once."""
    if device.type == "meta":
        return lookup_table().to(device)
    if device not in _LOOKUPS:
        _LOOKUPS[device] = lookup_table().to(device)
    return _LOOKUPS[device]


def _addresses(grads: list[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([g.data_ptr() for g in grads], dtype=torch.int64).to(device)


def _step_refusal(
    hyper: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    rule: str,
    rounding: Tensor | None,
) -> str | None:
    return refusal(hyper)


@implementation("optimizer_step", device="cuda", backend="triton", can_use=_step_refusal)
def optimizer_step(
    hyper: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    rule: str,
    rounding: Tensor | None,
) -> Tensor:
    """One launch over all tensors; a program for 8 blocks of 256 elements."""
    from peftkern.triton_kernels import optimizer

    device = hyper.device
    skipped = torch.zeros(len(params), dtype=torch.int64, device=device)
    table = Table(segments_of(params, grads, state1, state2, absmax1, absmax2), device)
    launch(
        optimizer._step_kernel,
        table.chunks,
        hyper,
        table.segments,
        table.owners,
        _addresses(grads, device),
        hyper,
        skipped if rounding is None else rounding,
        skipped,
        _lookup(device),
        RULE=rule,
        RANDOM=rounding is not None,
        BLOCKS=CHUNK // BLOCK,
        BLOCK=BLOCK,
        INTERPRET=interpreting(),
        num_warps=8,
        enable_fp_fusion=False,
    )
    return skipped


def _norm_refusal(anchor: Tensor, grads: list[Tensor]) -> str | None:
    return refusal(anchor)


@implementation("optimizer_grad_norm", device="cuda", backend="triton", can_use=_norm_refusal)
def optimizer_grad_norm(anchor: Tensor, grads: list[Tensor]) -> Tensor:
    """fp64 sums of fixed chunks, added by torch; nothing waits for the host."""
    from peftkern.triton_kernels import optimizer

    device = anchor.device
    segments = [
        Segment(0, (0, 0, 0, 0), 0, g.numel(), i, (g.dtype, g.dtype)) for i, g in enumerate(grads)
    ]
    table = Table(segments, device)
    sums = torch.zeros(table.chunks, dtype=torch.float64, device=device)
    launch(
        optimizer._squares_kernel,
        table.chunks,
        anchor,
        table.segments,
        table.owners,
        _addresses(grads, device),
        sums,
        CHUNK=CHUNK,
        num_warps=4,
    )
    return sums.sum().sqrt().float().view(1)
