"""The optimizer pass on CUDA devices: csrc/cuda/optimizer.cu and optimizer_control.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peftkern import cuda_native
from peftkern.native import DTYPES
from peftkern.ops.optimizer.reference import BLOCK, COLUMNS
from peftkern.registry import implementation

RULES = {"adamw": 0, "lion": 1, "momentum": 2}
GROUP_WORDS = 7  # of a group's settings: six fp64 numbers and the seed of random rounding
CHUNK = 8 * BLOCK  # elements that a warp takes; kChunk in csrc
_COLUMNS = 10  # of the table of segments
_PER_MULTIPROCESSOR = 2  # blocks of threads, of which each keeps a copy of the code table


class Call(ctypes.Structure):
    """What a launcher is told: ``pk::Call`` of csrc/cuda/optimizer.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("new_grads", "new_groups")),
        *((name, ctypes.c_int64) for name in ("group_words", "rows", "slots")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("grads", "groups", "parameters", "steps", "hyper", "rounding", "skipped"),
                *("last", "totals", "flag", "segments", "owners"),
            )
        ),
        *((name, ctypes.c_int64) for name in ("chunks", "state")),
        *((name, ctypes.c_void_p) for name in ("sums", "norm")),
        ("limit", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("rule", "coded", "blocks", "clip")),
    )


@dataclass(frozen=True)
class Segment:
    """A run of elements of one parameter, and the addresses of its state.

    Args:
        param: address of the whole parameter.
        states: addresses of ``state1, state2, absmax1, absmax2``, absolute or relative to a
            bucket's; 0 for what is absent. ``absmax1`` 0 means fp32 state.
        start: first element, a multiple of 256 for 8-bit state.
        numel: elements.
        row: of the parameter, in gradients and hyperparameters.
        dtypes: of the parameter and of its gradient.
    """

    param: int
    states: tuple[int, int, int, int]
    start: int
    numel: int
    row: int
    dtypes: tuple[torch.dtype, torch.dtype]


class Table:
    """Segments and which of them every chunk belongs to, on the device.

    Args:
        segments: what a pass covers, in its order.
        device: where it runs.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        chunks = np.array([-(-s.numel // CHUNK) for s in segments], dtype=np.int64)
        firsts = np.concatenate([[0], np.cumsum(chunks)]).astype(np.int64)
        rows = np.zeros((len(segments), _COLUMNS), dtype=np.int64)
        for i, s in enumerate(segments):
            kinds = DTYPES[s.dtypes[0]] | DTYPES[s.dtypes[1]] << 32
            rows[i] = (s.param, *s.states, s.start, s.numel, firsts[i], s.row, kinds)
        owners = np.repeat(np.arange(len(segments), dtype=np.int32), chunks)
        self.segments = torch.from_numpy(rows).to(device)
        self.owners = torch.from_numpy(owners).to(device)
        self.chunks = int(firsts[-1])
        self.coded = any(s.states[2] for s in segments)

    def fill(self, call: Call) -> None:
        """Put it into a call."""
        call.segments, call.owners = self.segments.data_ptr(), self.owners.data_ptr()
        call.chunks, call.coded = self.chunks, self.coded

    def tensors(self) -> list[Tensor]:
        """What kernels reach through it."""
        return [self.segments, self.owners]


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


def segments_of(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
) -> list[Segment]:
    """One segment a parameter, as the op's lists give them."""
    result = []
    for i, p in enumerate(params):
        eight = state1[i].dtype == torch.uint8
        states = (
            state1[i].data_ptr(),
            state2[i].data_ptr() if state2 else 0,
            absmax1[i].data_ptr() if eight else 0,
            absmax2[i].data_ptr() if eight and state2 else 0,
        )
        result.append(Segment(p.data_ptr(), states, 0, p.numel(), i, (p.dtype, grads[i].dtype)))
    return result


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


assert COLUMNS == 11  # of `hyper`: pk::Update in csrc/common/optimizer.h
