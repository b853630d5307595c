"""Gated activations: one pass over memory forward, one backward."""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.activations import activate, slope
from peftkern.triton_kernels.device import round_to, to_fp32


@triton.jit
def _gated_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    numel,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """h = act(gate) up, rounded once."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    gate = to_fp32(tl.load(gate_ptr + offs, mask=mask, other=0.0), INTERPRET)
    up = to_fp32(tl.load(up_ptr + offs, mask=mask, other=0.0), INTERPRET)
    h = activate(gate, ACT) * up
    tl.store(out_ptr + offs, round_to(h, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def _gated_backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    numel,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dgate = dh up act'(gate), dup = dh act(gate), and h again."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    dh = to_fp32(tl.load(dh_ptr + offs, mask=mask, other=0.0), INTERPRET)
    gate = to_fp32(tl.load(gate_ptr + offs, mask=mask, other=0.0), INTERPRET)
    up = to_fp32(tl.load(up_ptr + offs, mask=mask, other=0.0), INTERPRET)
    a = activate(gate, ACT)
    dgate = dh * up * slope(gate, ACT)
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    tl.store(dgate_ptr + offs, round_to(dgate, DTYPE, INTERPRET), mask=mask)
    tl.store(dup_ptr + offs, round_to(dh * a, DTYPE, INTERPRET), mask=mask)
    tl.store(h_ptr + offs, round_to(a * up, DTYPE, INTERPRET), mask=mask)
