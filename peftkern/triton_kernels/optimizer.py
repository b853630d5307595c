"""Kernels of the optimizers: one program updates a chunk of 8 blocks of 256 elements.

Which chunk belongs to what is in the table of csrc/common/optimizer_call.h (``StateSegment``),
whose addresses become pointers here. Every product and sum is rounded by itself, without FMA.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.ops.optimizer import lookup
from peftkern.triton_kernels.device import round_to

_UNSIGNED: tl.constexpr = tl.constexpr(lookup.UNSIGNED)
_VALUES1: tl.constexpr = tl.constexpr(lookup.VALUES1)
_VALUES2: tl.constexpr = tl.constexpr(lookup.VALUES2)
_SMALLEST: tl.constexpr = tl.constexpr(lookup.SMALLEST)
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)
_LIFT: tl.constexpr = tl.constexpr(2.0**64)
_INFINITE: tl.constexpr = tl.constexpr(0x7F800000)
_COLUMNS: tl.constexpr = tl.constexpr(10)  # of a segment
_HYPER: tl.constexpr = tl.constexpr(11)


@triton.jit
def _load(address, dtype, offsets, mask):
    """fp32 values of fp32 (0), bf16 (1) or fp16 (2) elements."""
    if dtype == 0:
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif dtype == 1:
        bits = tl.load(address.to(tl.pointer_type(tl.uint16)) + offsets, mask=mask, other=0)
        values = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        half = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0)
        values = half.to(tl.float32)
    return values


@triton.jit
def _store_bf16(address, values, offsets, mask, INTERPRET: tl.constexpr):
    rounded = round_to(values, tl.bfloat16, INTERPRET).to(tl.uint16, bitcast=True)
    tl.store(address.to(tl.pointer_type(tl.uint16)) + offsets, rounded, mask=mask)


@triton.jit
def _store_random(address, values, offsets, mask, rounding_ptr, first, INTERPRET: tl.constexpr):
    """bf16, up or down at random by Philox words of the element's index."""
    index = offsets + first + tl.load(rounding_ptr + 3)
    quad = index >> 2
    low = (quad & 0xFFFFFFFF).to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    step = zero + tl.load(rounding_ptr + 1).to(tl.uint32)
    tensor = zero + tl.load(rounding_ptr + 2).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(rounding_ptr), low, high, step, tensor)
    word = index & 3
    words = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    bits = values.to(tl.uint32, bitcast=True)
    up = ((bits + (words.to(tl.uint32) >> 16)) >> 16).to(tl.uint16)
    nearest = round_to(values, tl.bfloat16, INTERPRET).to(tl.uint16, bitcast=True)
    finite = (bits & 0x7FFFFFFF) < _INFINITE
    chosen = tl.where(finite, up, nearest)
    tl.store(address.to(tl.pointer_type(tl.uint16)) + offsets, chosen, mask=mask)


@triton.jit
def _decode(codes, values_ptr, absmax):
    return tl.load(values_ptr + codes.to(tl.int32)).to(tl.float32, bitcast=True) * absmax[:, None]


@triton.jit
def _largest(values, mask):
    """The largest magnitude of each block; NaN counts as larger than infinity."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.where(mask, bits, 0), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _encode(values, absmax, lookup_ptr, SIGNED: tl.constexpr):
    """Nearest codes of values / absmax, found as ``lookup_key`` and ``lookup_place`` tell."""
    lift = tl.where(absmax < _SMALLEST_NORMAL, _LIFT, 1.0)
    inverse = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax * lift)
    inverse = tl.where(absmax == 0.0, 0.0, inverse)
    scaled = ((values * lift[:, None]) * inverse[:, None]).to(tl.int32, bitcast=True)
    if SIGNED:
        key = tl.maximum(scaled & 0x7FFFFFFF, _SMALLEST) ^ (scaled >> 31)
        place = (key >> 16) & 8191
    else:
        key = tl.maximum(scaled, _SMALLEST)
        place = _UNSIGNED + ((key >> 16) & 4095)
    return (((key + tl.load(lookup_ptr + place)) >> 16) & 0xFF).to(tl.uint8)


@triton.jit
def _step_kernel(
    segments_ptr,
    owners_ptr,
    grads_ptr,
    hyper_ptr,
    rounding_ptr,
    skipped_ptr,
    lookup_ptr,
    RULE: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    segment_ptr = segments_ptr + tl.load(owners_ptr + chunk).to(tl.int64) * _COLUMNS
    param, state1 = tl.load(segment_ptr), tl.load(segment_ptr + 1)
    state2, absmax1 = tl.load(segment_ptr + 2), tl.load(segment_ptr + 3)
    absmax2, start = tl.load(segment_ptr + 4), tl.load(segment_ptr + 5)
    numel, first = tl.load(segment_ptr + 6), tl.load(segment_ptr + 7)
    row, dtypes = tl.load(segment_ptr + 8), tl.load(segment_ptr + 9)
    param_dtype, grad_dtype = dtypes & 0xFF, dtypes >> 32
    grad = tl.load(grads_ptr + row)
    h = hyper_ptr + row * _HYPER

    block = (chunk - first) * BLOCKS + tl.arange(0, BLOCKS)
    within = tl.arange(0, BLOCK)[None, :]
    at = block[:, None] * BLOCK + within
    mask = at < numel
    there = block * BLOCK < numel
    g = _load(grad, grad_dtype, at + start, mask) * tl.load(h)
    square = (g * g).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    usable = tl.max(square, axis=1) < _INFINITE
    skipped = tl.sum((there & (usable == 0)).to(tl.int64), axis=0)
    if skipped > 0:
        tl.atomic_add(skipped_ptr + row, skipped)
    mask = mask & usable[:, None]
    there = there & usable
    g = tl.where(usable[:, None], g, 0.0)

    p = _load(param, param_dtype, at + start, mask)
    coded = absmax1 != 0
    scale1 = absmax1.to(tl.pointer_type(tl.float32)) + block
    scale2 = absmax2.to(tl.pointer_type(tl.float32)) + block
    v = tl.zeros([BLOCKS, BLOCK], tl.float32)
    if coded:
        codes = tl.load(state1.to(tl.pointer_type(tl.uint8)) + at, mask=mask, other=0)
        m = _decode(codes, lookup_ptr + _VALUES1, tl.load(scale1, mask=there, other=0.0))
        if RULE == "adamw":
            codes = tl.load(state2.to(tl.pointer_type(tl.uint8)) + at, mask=mask, other=0)
            v = _decode(codes, lookup_ptr + _VALUES2, tl.load(scale2, mask=there, other=0.0))
    else:
        m = tl.load(state1.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
        if RULE == "adamw":
            v = tl.load(state2.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)

    decay, beta1, rest1 = tl.load(h + 1), tl.load(h + 2), tl.load(h + 3)
    beta2, rest2, step_size = tl.load(h + 4), tl.load(h + 5), tl.load(h + 6)
    if RULE == "adamw":
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * g) * rest2
        root = tl.sqrt_rn(v) * tl.load(h + 7) + tl.load(h + 8)
        p = p * decay - step_size * tl.div_rn(m, root)
    elif RULE == "lion":
        direction = m * beta1 + g * rest1
        sign = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
        p = p * decay - step_size * sign
        m = m * beta2 + g * rest2
    else:
        change = g + tl.load(h + 9) * p
        m = tl.where(tl.load(h + 10) != 0.0, change, m * beta1 + change)
        p = p - step_size * m

    if param_dtype == 0:
        tl.store(param.to(tl.pointer_type(tl.float32)) + (at + start), p, mask=mask)
    elif param_dtype == 1:
        if RANDOM:
            _store_random(param, p, at + start, mask, rounding_ptr + 4 * row, 0, INTERPRET)
        else:
            _store_bf16(param, p, at + start, mask, INTERPRET)
    else:
        tl.store(param.to(tl.pointer_type(tl.float16)) + (at + start), p.to(tl.float16), mask=mask)
    if coded:
        largest = _largest(m, mask)
        tl.store(scale1, largest, mask=there)
        codes = _encode(m, largest, lookup_ptr, True)
        tl.store(state1.to(tl.pointer_type(tl.uint8)) + at, codes, mask=mask)
        if RULE == "adamw":
            largest = _largest(v, mask)
            tl.store(scale2, largest, mask=there)
            codes = _encode(v, largest, lookup_ptr, False)
            tl.store(state2.to(tl.pointer_type(tl.uint8)) + at, codes, mask=mask)
    else:
        tl.store(state1.to(tl.pointer_type(tl.float32)) + at, m, mask=mask)
        if RULE == "adamw":
            tl.store(state2.to(tl.pointer_type(tl.float32)) + at, v, mask=mask)


@triton.jit
def _squares_kernel(
    segments_ptr,
    owners_ptr,
    grads_ptr,
    sums_ptr,
    CHUNK: tl.constexpr,
):
    """fp64 sum of squares of each chunk, in a fixed order."""
    chunk = tl.program_id(0).to(tl.int64)
    segment_ptr = segments_ptr + tl.load(owners_ptr + chunk).to(tl.int64) * _COLUMNS
    start, numel = tl.load(segment_ptr + 5), tl.load(segment_ptr + 6)
    first, row = tl.load(segment_ptr + 7), tl.load(segment_ptr + 8)
    at = (chunk - first) * CHUNK + tl.arange(0, CHUNK)
    g = _load(tl.load(grads_ptr + row), tl.load(segment_ptr + 9) >> 32, at + start, at < numel)
    wide = g.to(tl.float64)
    tl.store(sums_ptr + chunk, tl.sum(wide * wide, axis=0))
