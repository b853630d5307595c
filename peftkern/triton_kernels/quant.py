"""Kernels of quantization, dequantization and dropout: one pass over memory each."""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.codebooks import INT8_STEP, ladder_4bit
from peftkern.triton_kernels.device import (
    decode_4bit,
    keep_tile,
    load_absmax,
    round_to,
    to_fp32,
)

_NF4_LADDER: tl.constexpr = tl.constexpr(tuple(ladder_4bit("nf4")[0].tolist()))
_FP4_LADDER: tl.constexpr = tl.constexpr(tuple(ladder_4bit("fp4")[0].tolist()))
_INT8_STEP: tl.constexpr = tl.constexpr(INT8_STEP)
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)
_LIFT: tl.constexpr = tl.constexpr(2.0**64)
# Adding and taking away 1.5 * 2^23 rounds a small fp32 to an integer, ties to even.
_TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    out_ptr,
    numel,
    QUANT: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[i] = table[code[i]] * absmax[i / BLOCKSIZE]; a program serves GROUPS whole blocks."""
    block_0 = tl.program_id(0).to(tl.int64) * GROUPS
    blocks = block_0 + tl.arange(0, GROUPS)
    HALF: tl.constexpr = BLOCKSIZE // 2
    within = tl.arange(0, GROUPS)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    left = numel - block_0 * BLOCKSIZE
    mask = within * 2 < left
    packed = tl.load(packed_ptr + block_0 * HALF + within, mask=mask, other=0)
    scale = load_absmax(
        absmax_ptr, nested_ptr, offset_ptr, map_ptr, blocks, blocks * BLOCKSIZE < numel, NESTED
    )[:, None]
    first, second = decode_4bit(packed, QUANT, INTERPRET)
    first = round_to(first * scale, out_ptr.dtype.element_ty, INTERPRET)
    second = round_to(second * scale, out_ptr.dtype.element_ty, INTERPRET)
    values = tl.reshape(tl.join(first, second), [GROUPS, BLOCKSIZE])
    offsets = tl.arange(0, GROUPS)[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + block_0 * BLOCKSIZE + offsets, values, mask=offsets < left)


@triton.jit
def _dequantize_absmax_kernel(
    codes_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    out_ptr,
    numel,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    values = load_absmax(codes_ptr, nested_ptr, offset_ptr, map_ptr, offs, mask, True)
    tl.store(out_ptr + offs, values, mask=mask)


@triton.jit
def _absmax_rows(x):
    """max |x| over the last axis of fp32 [rows, cols]; NaN if one is among them."""
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as integers NaN is above infinity
    return tl.max(magnitudes, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(x, absmax, TOP: tl.constexpr):
    """x * (1 / absmax * TOP), IEEE division; 0 where absmax is 0; a denormal absmax is lifted."""
    lift = tl.where(absmax < _SMALLEST_NORMAL, _LIFT, 1.0)
    # Reciprocal, then TOP, each rounded: what torch makes of TOP / absmax.
    factor = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax * lift) * TOP
    scaled = (x * lift[:, None]) * factor[:, None]
    return tl.where(absmax[:, None] == 0.0, 0.0, scaled)


@triton.jit
def _rungs(t, LADDER: tl.constexpr, COUNT: tl.constexpr):
    """How many thresholds lie strictly below t."""
    count = tl.zeros(t.shape, tl.int32)
    for i in tl.static_range(COUNT):
        count += (t > LADDER[i]).to(tl.int32)
    return count


@triton.jit
def _quantize_4bit_kernel(
    w_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    QUANT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """absmax and the nearest codes of GROUPS blocks; what lies beyond the end counts as 0."""
    block_0 = tl.program_id(0).to(tl.int64) * GROUPS
    blocks = block_0 + tl.arange(0, GROUPS)
    left = numel - block_0 * BLOCKSIZE
    offsets = tl.arange(0, GROUPS)[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(w_ptr + block_0 * BLOCKSIZE + offsets, mask=offsets < left, other=0.0)
    x = to_fp32(x, INTERPRET)
    absmax = _absmax_rows(x)
    tl.store(absmax_ptr + blocks, absmax, mask=blocks * BLOCKSIZE < numel)
    t = _scaled(x, absmax, 1.0)
    if QUANT == "nf4":
        codes = _rungs(t, _NF4_LADDER, 15)
    else:
        rung = _rungs(tl.abs(t), _FP4_LADDER, 7)
        # The rungs in growing order carry the codes 0 1 6 7 4 5 2 3.
        codes = (rung ^ ((rung & 2) << 1)) | ((t < 0).to(tl.int32) << 3)
    HALF: tl.constexpr = BLOCKSIZE // 2
    first, second = tl.split(tl.reshape(codes, [GROUPS, HALF, 2]))
    within = tl.arange(0, GROUPS)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    bytes_ = ((first << 4) | second).to(tl.uint8)
    tl.store(packed_ptr + block_0 * HALF + within, bytes_, mask=within * 2 < left)


@triton.jit
def _quantize_absmax_kernel(
    absmax_ptr,
    offset_ptr,
    thresholds_ptr,
    codes_ptr,
    nested_ptr,
    numel,
    BLOCK: tl.constexpr,
):
    """One block of 256 centred statistics as codes of the dynamic map, by binary search."""
    pid = tl.program_id(0).to(tl.int64)
    offs = (pid * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = offs < numel
    x = tl.load(absmax_ptr + offs, mask=mask, other=0.0) - tl.load(offset_ptr)
    x = tl.where(mask, x, 0.0)
    absmax = _absmax_rows(x)
    tl.store(nested_ptr + pid + tl.arange(0, 1), absmax)
    t = _scaled(x, absmax, 1.0)
    codes = tl.zeros(t.shape, tl.int32)
    for i in tl.static_range(8):
        middle = tl.load(thresholds_ptr + codes + ((128 >> i) - 1))
        codes += tl.where(t > middle, 128 >> i, 0)
    tl.store(codes_ptr + offs, codes.to(tl.uint8), mask=mask)


@triton.jit
def _quantize_8bit_kernel(
    w_ptr,
    codes_ptr,
    scb_ptr,
    cols,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One row: its absmax, then (from the cache) its codes."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([1, BLOCK], tl.int32)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)[None, :]
        x = to_fp32(tl.load(w_ptr + row * cols + offs, mask=offs < cols, other=0.0), INTERPRET)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scb = tl.max(largest, axis=1).to(tl.float32, bitcast=True)
    tl.store(scb_ptr + row + tl.arange(0, 1), scb)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)[None, :]
        x = to_fp32(tl.load(w_ptr + row * cols + offs, mask=offs < cols, other=0.0), INTERPRET)
        t = _scaled(x, scb, 127.0)
        t = tl.where(t == t, t, 0.0)
        t = tl.minimum(tl.maximum(t, -127.0), 127.0)
        codes = ((t + _TO_INTEGER) - _TO_INTEGER).to(tl.int8)
        tl.store(codes_ptr + row * cols + offs, codes, mask=offs < cols)


@triton.jit
def _dequantize_8bit_kernel(
    codes_ptr,
    scb_ptr,
    out_ptr,
    cols,
    col_tiles,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out = (code * scb) * (1 / 127), both products rounded; a program serves part of a row."""
    pid = tl.program_id(0)
    row = (pid // col_tiles).to(tl.int64)
    offs = (pid % col_tiles) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + row * cols + offs, mask=offs < cols, other=0)
    values = (codes.to(tl.float32) * tl.load(scb_ptr + row)) * _INT8_STEP
    values = round_to(values, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + row * cols + offs, values, mask=offs < cols)


@triton.jit
def _dropout_kernel(
    x_ptr,
    seed_ptr,
    out_ptr,
    numel,
    threshold,
    scale,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Survivors times ``scale``, the others zero; the mask is drawn from the element's index."""
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)[None, :]
    mask = offs < numel - start
    x = tl.load(x_ptr + start + offs, mask=mask, other=0.0)
    keep = keep_tile(pid, 0, BLOCK, seed_ptr, threshold, 1, BLOCK, True)
    value = round_to(to_fp32(x, INTERPRET) * scale, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(
        out_ptr + start + offs, tl.where(keep, value, tl.zeros([1, 1], value.dtype)), mask=mask
    )
