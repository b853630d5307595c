"""Functions shared by the kernels: code tables, statistics, roundings, random masks.

``INTERPRET`` is a compile-time switch. The interpreter of Triton 3.6 has no inline assembly,
truncates when it makes a bf16 and multiplies bf16 bit patterns in ``tl.dot``; under the switch the
same values are made by other means, so that tests without a GPU see what a GPU computes.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import math
import struct

import triton
import triton.language as tl

from peftkern.codebooks import INT8_STEP, NF4, table_4bit


def _decode_asm(table: list[float]) -> str:
    """PTX that turns 4 bytes (8 codes) into 8 exact fp32 values without touching memory.

    One ``prmt`` looks up 4 codes in 8 bytes. Each of the 4 byte planes of the fp32 table takes two
    look-ups (entries 0-7, 8-15) and a merge by the codes' top bits; 8 more transpose 4 planes into
    4 words: 5 ``prmt`` a value. A byte's high nibble is its first element.
    """
    words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in table]

    def plane(byte: int, first: int) -> str:
        entries = [(words[first + i] >> (8 * byte)) & 0xFF for i in range(4)]
        return "0x" + "".join(f"{entry:02x}" for entry in reversed(entries))

    lines = [
        "{",
        ".reg .b32 s, m, a, b, p0, p1, p2, p3, t0, t1, u0, u1;",
        "and.b32 s, $8, 0x77777777;",
        "shr.u32 m, $8, 1;",
        "and.b32 m, m, 0x44444444;",
        "or.b32 m, m, 0x32103210;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;"]
        for byte in range(4):
            lines += [
                f"prmt.b32 a, {plane(byte, 0)}, {plane(byte, 4)}, s;",
                f"prmt.b32 b, {plane(byte, 8)}, {plane(byte, 12)}, s;",
                f"prmt.b32 p{byte}, a, b, m;",
            ]
        # $0..$3 are the first elements of the four bytes, $4..$7 the second.
        low, high = 2 * half, 2 * half + 1
        lines += [
            "prmt.b32 t0, p0, p1, 0x5140;",
            "prmt.b32 t1, p0, p1, 0x7362;",
            "prmt.b32 u0, p2, p3, 0x5140;",
            "prmt.b32 u1, p2, p3, 0x7362;",
            f"prmt.b32 ${4 + low}, t0, u0, 0x5410;",
            f"prmt.b32 ${low}, t0, u0, 0x7632;",
            f"prmt.b32 ${4 + high}, t1, u1, 0x5410;",
            f"prmt.b32 ${high}, t1, u1, 0x7632;",
        ]
    return "\n".join([*lines, "}"])


_NF4_ASM: tl.constexpr = tl.constexpr(_decode_asm(list(NF4)))
_FP4_ASM: tl.constexpr = tl.constexpr(_decode_asm(table_4bit("fp4").tolist()))
_DECODE_CONSTRAINTS: tl.constexpr = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r")
_NF4_VALUES: tl.constexpr = tl.constexpr(tuple(NF4))
_FP4_VALUES: tl.constexpr = tl.constexpr(tuple(table_4bit("fp4").tolist()))
_INT8_STEP: tl.constexpr = tl.constexpr(INT8_STEP)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950216293335)  # rounded to fp32
_LOG2_E_REST: tl.constexpr = tl.constexpr(math.log2(math.e) - 1.4426950216293335)
_LN_2: tl.constexpr = tl.constexpr(math.log(2.0))


@triton.jit
def to_fp32(x, INTERPRET: tl.constexpr):
    """Exact."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 to ``DTYPE``, to nearest, ties to even."""
    if INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        top = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
        top = tl.where(x == x, top, 0x7FC0)
        return top.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def exp(x):
    """e to the x in fp32 to about an ulp: ``tl.exp`` loses what rounding x log2(e) loses."""
    high = x * _LOG2_E
    low = tl.fma(x, _LOG2_E, -high) + x * _LOG2_E_REST
    value = tl.exp2(high)
    better = tl.fma(value, low * _LN_2, value)
    return tl.where((better == better) & (value < float("inf")), better, value)


@triton.jit
def operand(x, INTERPRET: tl.constexpr):
    """What ``tl.dot`` may be given: the same values."""
    if INTERPRET:
        return to_fp32(x, INTERPRET)
    else:
        return x


@triton.jit
def _select(codes, QUANT: tl.constexpr):
    values = tl.zeros(codes.shape, tl.float32)
    if QUANT == "nf4":
        for i in tl.static_range(16):
            values = tl.where(codes == i, _NF4_VALUES[i], values)
    else:
        for i in tl.static_range(8):
            values = tl.where((codes & 7) == i, _FP4_VALUES[i], values)
        values *= tl.where(codes >= 8, -1.0, 1.0)  # code 8 is -0
    return values


@triton.jit
def decode_4bit(packed, QUANT: tl.constexpr, INTERPRET: tl.constexpr):
    """(first, second) fp32 code value of each byte; exact table entries."""
    if INTERPRET:
        first, second = _select(packed >> 4, QUANT), _select(packed & 15, QUANT)
    else:
        ASM: tl.constexpr = _NF4_ASM if QUANT == "nf4" else _FP4_ASM
        first, second = tl.inline_asm_elementwise(
            ASM,
            _DECODE_CONSTRAINTS,
            [packed],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )
        first, second = first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def load_absmax(
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    blocks,
    mask,
    NESTED: tl.constexpr,
):
    """fp32 statistics of 4-bit blocks; nested ones by a rounded multiply, then a rounded add.

    Kernels that call this are compiled without FMA contraction.
    """
    if NESTED:
        codes = tl.load(absmax_ptr + blocks, mask=mask, other=0)
        values = tl.load(map_ptr + codes.to(tl.int32))
        scales = tl.load(nested_ptr + (blocks >> 8), mask=mask, other=0.0)
        return values * scales + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + blocks, mask=mask, other=0.0)


@triton.jit
def weight_tile(
    weight_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    map_ptr,
    row_0,
    col_0,
    rows,
    cols,
    stride_row,
    stride_col,
    FORMAT: tl.constexpr,
    NESTED: tl.constexpr,
    LOG_BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A tile [BLOCK_ROW, BLOCK_COL] of the base in ``DTYPE``, from its own storage; zero outside.

    4-bit bases need ``cols % BLOCK_COL == 0``, and runs of GROUP weights that share a statistic.
    """
    offs_row = row_0 + tl.arange(0, BLOCK_ROW)
    mask_row = offs_row < rows
    if FORMAT == "nf4" or FORMAT == "fp4":
        GROUPS: tl.constexpr = BLOCK_COL // GROUP
        flat = offs_row.to(tl.int64) * cols + col_0
        bytes_ = tl.arange(0, GROUPS)[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        mask = mask_row[:, None, None] & (bytes_ >= 0)[None, :, :]
        packed = tl.load(
            weight_ptr + (flat >> 1)[:, None, None] + bytes_[None, :, :], mask=mask, other=0
        )
        first, second = decode_4bit(packed, FORMAT, INTERPRET)
        blocks = (flat[:, None] + tl.arange(0, GROUPS)[None, :] * GROUP) >> LOG_BLOCKSIZE
        mask_block = mask_row[:, None] & (blocks >= 0)
        scale = load_absmax(
            absmax_ptr, nested_ptr, offset_ptr, map_ptr, blocks, mask_block, NESTED
        )[:, :, None]
        first = round_to(first * scale, DTYPE, INTERPRET)
        second = round_to(second * scale, DTYPE, INTERPRET)
        tile = tl.reshape(tl.join(first, second), [BLOCK_ROW, BLOCK_COL])
        if NESTED:  # the offset alone is not zero where the mask is off
            tile = tl.where(mask_row[:, None], tile, tl.zeros([1, 1], DTYPE))
        return tile
    else:
        offs_col = col_0 + tl.arange(0, BLOCK_COL)
        mask = mask_row[:, None] & (offs_col < cols)[None, :]
        offsets = (
            offs_row.to(tl.int64)[:, None] * stride_row
            + offs_col.to(tl.int64)[None, :] * stride_col
        )
        stored = tl.load(weight_ptr + offsets, mask=mask, other=0)
        if FORMAT == "int8":
            scb = tl.load(absmax_ptr + offs_row, mask=mask_row, other=0.0)
            return round_to((stored.to(tl.float32) * scb[:, None]) * _INT8_STEP, DTYPE, INTERPRET)
        else:
            return stored


@triton.jit
def keep_tile(
    row_0,
    col_0,
    cols,
    seed_ptr,
    threshold,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    QUADS: tl.constexpr,
):
    """True where element (row, col) of a matrix with ``cols`` columns survives dropout.

    Philox-4x32-10 by element index; ``QUADS`` (``cols % 4 == 0``) draws each block of 4 words once.
    """
    seed = tl.load(seed_ptr)
    rows = (row_0 + tl.arange(0, BLOCK_ROW)).to(tl.int64)[:, None] * cols
    limit = threshold.to(tl.uint32)
    if QUADS:
        index = rows + (col_0 + tl.arange(0, BLOCK_COL // 4) * 4)[None, :]
    else:
        index = rows + (col_0 + tl.arange(0, BLOCK_COL))[None, :]
    block = index >> 2
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    if QUADS:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_ROW, BLOCK_COL])
    else:
        word = index & 3
        words = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return words >= limit
