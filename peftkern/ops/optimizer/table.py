"""What a pass goes over, laid out for kernels: ``StateSegment`` and ``StepCall`` of csrc/common."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peftkern.native import DTYPES
from peftkern.ops.optimizer.reference import BLOCK, COLUMNS

assert COLUMNS == 11  # of `hyper`: pk::Update in csrc/common/optimizer.h

RULES = {"adamw": 0, "lion": 1, "momentum": 2}
GROUP_WORDS = 7  # of a group's settings: six fp64 numbers and the seed of random rounding
CHUNK = 8 * BLOCK  # elements that a warp takes; kChunk in csrc
_COLUMNS = 10  # of the table of segments


class Call(ctypes.Structure):
    """What a launcher is told: ``pk::StepCall`` of csrc/common/optimizer_call.h."""

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
