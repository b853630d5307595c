"""Native optimizer pass on the CPU."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from peftkern import native
from peftkern.registry import implementation

_RULES = {"adamw": 0, "lion": 1, "momentum": 2}


def _refusal_of(lists: tuple[list[Tensor], ...]) -> str | None:
    for values in lists:
        for value in values:
            if not value.is_cpu:
                return f"a tensor is on {value.device}"
            if value.data_ptr() % value.element_size():
                return f"a {value.dtype} tensor starts at an address that is no multiple of it"
    return None


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
    return native.refusal(hyper, rounding) or _refusal_of(
        (params, grads, state1, state2, absmax1, absmax2)
    )


@implementation("optimizer_step", device="cpu", backend="native", can_use=_step_refusal)
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
    """One pass over a table of chunks: decode, update and encode while a block is in the cache."""
    count = len(params)
    skipped = torch.zeros(count, dtype=torch.int64)
    table = array("q")
    two, codes = rule == "adamw", native.DTYPES
    for i, p in enumerate(params):
        s1, eight = state1[i], state1[i].dtype == torch.uint8
        g = grads[i]
        table.extend(
            (
                p.data_ptr(),
                g.data_ptr(),
                s1.data_ptr(),
                state2[i].data_ptr() if two else 0,
                absmax1[i].data_ptr() if eight else 0,
                absmax2[i].data_ptr() if eight and two else 0,
                p.numel(),
                codes[p.dtype],
                codes[g.dtype],
                0,
            )
        )
    native.kernels().optimizer_step(
        table.buffer_info()[0],
        count,
        _RULES[rule],
        hyper.data_ptr(),
        rounding.data_ptr() if rounding is not None else 0,
        skipped.data_ptr(),
        torch.get_num_threads(),
    )
    return skipped


def _norm_refusal(anchor: Tensor, grads: list[Tensor]) -> str | None:
    return native.refusal(anchor) or _refusal_of((grads,))


@implementation("optimizer_grad_norm", device="cpu", backend="native", can_use=_norm_refusal)
def optimizer_grad_norm(anchor: Tensor, grads: list[Tensor]) -> Tensor:
    """fp64 sums of fixed chunks, added in their order."""
    table = array("q")
    for g in grads:
        table.extend((0, g.data_ptr(), 0, 0, 0, 0, g.numel(), 0, native.DTYPES[g.dtype], 0))
    address, threads = table.buffer_info()[0], torch.get_num_threads()
    return torch.tensor([native.kernels().gradient_norm(address, len(grads), threads)])
