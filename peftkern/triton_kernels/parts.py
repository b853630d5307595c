"""fp32 matrices as bf16 parts that add up to them: exact operands for 16-bit products.

Three parts hold 24 bits: with them a library's bf16 product that accumulates in fp32 is as exact as
one of fp32 operands, and the parts are more rows or columns of it.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.device import round_to, to_fp32


@triton.jit
def store_parts(pointers, value, mask, stride_part, PARTS: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 ``value`` as PARTS values of the pointers' dtype, ``stride_part`` elements apart."""
    for part in tl.static_range(PARTS):
        high = round_to(value, pointers.dtype.element_ty, INTERPRET)
        tl.store(pointers + part * stride_part, high, mask=mask)
        rest = value - to_fp32(high, INTERPRET)
        value = tl.where(rest == rest, rest, 0.0)  # Inf - Inf: the first part says it all


@triton.jit
def _split_kernel(
    x_ptr,
    out_ptr,
    rows,
    cols,
    stride_part,
    stride_row,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[part, row, col] by its strides, from fp32 x [rows, cols]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tl.cast(rows, tl.int64) * cols
    value = to_fp32(tl.load(x_ptr + offs, mask=mask, other=0.0), INTERPRET)
    pointers = out_ptr + offs // cols * stride_row + offs % cols
    store_parts(pointers, value, mask, stride_part, PARTS, INTERPRET)
