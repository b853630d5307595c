"""The optimizer pass on CUDA devices: csrc/cuda/optimizer.cu and optimizer_control.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.ops.optimizer.table import RULES, Call, Segment, Table, segments_of
from peftkern.registry import implementation

_PER_MULTIPROCESSOR = 2  # blocks of threads, of which each keeps a copy of the code table


def thread_blocks(device: torch.device) -> int:
    """How many blocks of threads run at a time."""
    if device.type != "cuda":  # the SIMT executor: one after the other
        return 2
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return int(_PER_MULTIPROCESSOR * count)


def run(name: str, device: torch.device, call: Call, reaches: Iterable[Tensor]) -> None:
    """Launch ``pk_cuda_<name>`` with a call."""
    cuda_native.launch(name, device, ctypes.addressof(call), reaches=reaches)


def _refusal_of(lists: Iterable[Sequence[Tensor]]) -> str | None:
    for values in lists:
        for value in values:
            if value.data_ptr() % value.element_size():
                return f"a {value.dtype} tensor starts at an address that is no multiple of it"
    return cuda_native.refusal()


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
    return _refusal_of((params, grads, state1, state2, absmax1, absmax2))


@implementation("optimizer_step", device="cuda", backend="cuda", can_use=_step_refusal)
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
    """One launch over all tensors; a step that repeats is better bound (bound.py)."""
    device = hyper.device
    skipped = torch.zeros(len(params), dtype=torch.int64, device=device)
    table = Table(segments_of(params, grads, state1, state2, absmax1, absmax2), device)
    addresses = torch.tensor([g.data_ptr() for g in grads], dtype=torch.int64, device=device)
    call = Call(
        rows=len(params),
        grads=addresses.data_ptr(),
        hyper=hyper.data_ptr(),
        rounding=0 if rounding is None else rounding.data_ptr(),
        skipped=skipped.data_ptr(),
        rule=RULES[rule],
        blocks=thread_blocks(device),
    )
    table.fill(call)
    own = [hyper, addresses, skipped, *table.tensors()]
    own += [] if rounding is None else [rounding]
    run(
        "optimizer_step",
        device,
        call,
        [*own, *params, *grads, *state1, *state2, *absmax1, *absmax2],
    )
    return skipped


def _norm_refusal(anchor: Tensor, grads: list[Tensor]) -> str | None:
    return _refusal_of((grads,))


@implementation("optimizer_grad_norm", device="cuda", backend="cuda", can_use=_norm_refusal)
def optimizer_grad_norm(anchor: Tensor, grads: list[Tensor]) -> Tensor:
    """fp64 sums of fixed chunks, added in a fixed order; nothing waits for the host."""
    device = anchor.device
    segments = [
        Segment(0, (0, 0, 0, 0), 0, g.numel(), i, (g.dtype, g.dtype)) for i, g in enumerate(grads)
    ]
    table = Table(segments, device)
    addresses = torch.tensor([g.data_ptr() for g in grads], dtype=torch.int64, device=device)
    sums = torch.empty(table.chunks, dtype=torch.float64, device=device)
    norm = anchor.new_empty((1,))
    call = Call(grads=addresses.data_ptr(), sums=sums.data_ptr(), norm=norm.data_ptr())
    call.blocks = thread_blocks(device)
    table.fill(call)
    run("optimizer_norm", device, call, [addresses, sums, norm, *table.tensors(), *grads])
    return norm
