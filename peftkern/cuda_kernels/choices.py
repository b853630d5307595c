"""Which kernel takes a product on an NVIDIA GPU: every threshold, and what stands behind it.

A base W [rows, cols] is multiplied as ``x Wᵀ`` or, across, as ``dy W``. Ways:

==========  =====================================  ============================================
way         kernel                                 takes
==========  =====================================  ============================================
few         csrc/cuda/linear4_few.cu               4 bits, blocks of 64 or more, 16-bit x
mma         csrc/cuda/linear4_mma.cu               4 bits, 16-bit x, up to 64 rows
wgmma       csrc/cuda/linear_wgmma.cu              4 bits (blocks of 64 or more), INT8, dense;
                                                   16-bit x, Hopper
rows        csrc/cuda/linear_rows.cu               4 bits and INT8, any dtype and shape, few rows
library     dequantized in one launch, cuBLAS      everything
==========  =====================================  ============================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch

HALVES = (torch.bfloat16, torch.float16)

# Rows of x that a kernel is written for.
FEW_ROWS = 16
MMA_ROWS = 64

# Rows up to which each way is the fastest: measured on an H100 at 4096x4096 (us of few, mma, wgmma,
# library; 14336x4096 and 4096x14336 order them alike).
#   NF4   M=8 10.0, 11.0, -, 25.7     M=16 12.4, 12.1, -, 26.0    M=32 -, 14.9, 17.3, 24.7
#         M=64 -, 25.8, 17.3, 25.1    M=256 -, -, 30.1, 33.3      M=512 -, -, 44.5, 39.1
#   INT8  M=128 -, -, 21.9, 31.1      M=256 -, -, 31.4, 35.2      M=512 -, -, 45.6, 42.1
FEW_BEST = 8
MMA_BEST = 32
WGMMA_BEST = {"nf4": 256, "fp4": 256, "int8": 256}
# fp32, or shapes that the tensor-core kernels cannot take: every four rows of x cost another 9
# (4 bits) or 8 (INT8) instructions a weight, dequantizing 6 and a pass over 2 to 4 bytes: even at
# about 16 and 8 rows. A model; these shapes have not been measured.
ROWS_4BIT = 16
ROWS_8BIT = 8


class Device(NamedTuple):
    """What decides on a GPU.

    Args:
        hopper: compute capability 9.0, whose products are asynchronous (wgmma).
        shared: bytes of shared memory that a block may have.
    """

    hopper: bool
    shared: int


class Product(NamedTuple):
    """One product, as far as the choice needs it.

    Args:
        m: rows of x.
        rows: out_features of the base.
        cols: in_features of the base.
        format: of the base.
        blocksize: of a 4-bit base, else 0.
        across: False for ``x Wᵀ``, True for ``dy W``.
        dtype: of x.
        aligned: x, the base and the result start on 16 bytes.
    """

    m: int
    rows: int
    cols: int
    format: str
    blocksize: int
    across: bool
    dtype: torch.dtype
    aligned: bool


def few_refusal(p: Product, device: Device) -> str | None:
    """Why linear4_few.cu cannot take the product; ``None`` if it can."""
    if p.across or p.format not in ("nf4", "fp4") or p.dtype not in HALVES:
        return "it takes x Wᵀ with 4-bit weights and 16-bit activations"
    if not 1 <= p.m <= FEW_ROWS:
        return f"{p.m} rows, it takes 1 to {FEW_ROWS}"
    if p.cols % 64 or p.cols == 0 or p.blocksize < 64 or not p.aligned:
        return "it takes depths of whole 64s, blocks of 64 or more, addresses of whole 16 bytes"
    if device.shared < 192 * 1024:
        return "it needs 192 KB of shared memory"
    return None


def mma_refusal(p: Product, device: Device) -> str | None:
    """Why linear4_mma.cu cannot take the product; ``None`` if it can."""
    if p.across or p.format not in ("nf4", "fp4"):
        return "it takes x Wᵀ with 4-bit weights"
    if p.dtype not in HALVES:
        return "tensor cores have no float32"
    if not 1 <= p.m <= MMA_ROWS:
        return f"{p.m} rows, it takes 1 to {MMA_ROWS}"
    if p.cols % 32 or not 0 < p.cols < 2**31:
        return f"{p.cols} input features, it takes a positive multiple of 32"
    if not p.aligned:
        return "x or the weight does not start on a 16-byte boundary"
    if device.shared < 132 * 1024 and p.m > 16:
        return "it needs 132 KB of shared memory"
    return None


def wgmma_refusal(p: Product, device: Device) -> str | None:
    """Why linear_wgmma.cu cannot take the product; ``None`` if it can."""
    if not device.hopper:
        return "it needs a Hopper GPU"
    if p.dtype not in HALVES or p.m < 1:
        return "it takes 16-bit activations, one row at least"
    outputs, depth = (p.cols, p.rows) if p.across else (p.rows, p.cols)
    if outputs % 8 or depth % 8 or 0 in (outputs, depth) or not p.aligned:
        return "it takes sizes that are whole 8s and addresses of whole 16 bytes"
    if p.format in ("nf4", "fp4") and (p.cols % 64 or p.blocksize < 64):
        return "it takes rows of whole 64s and blocks of 64 or more"
    if p.format == "int8" and p.cols % 16:
        return "it takes rows of whole 16s"
    return None


def way(p: Product, device: Device) -> str:
    """The fastest kernel that takes the product."""
    if 0 in (p.m, p.rows, p.cols):
        return "library"
    if p.m <= FEW_BEST and few_refusal(p, device) is None:
        return "few"
    hopper = p.m <= WGMMA_BEST.get(p.format, 0) and wgmma_refusal(p, device) is None
    if (p.m <= MMA_BEST or not hopper) and mma_refusal(p, device) is None:
        return "mma"
    if hopper:
        return "wgmma"
    if not p.across:
        if p.format in ("nf4", "fp4") and p.m <= ROWS_4BIT:
            return "rows"
        if p.format == "int8" and p.m <= ROWS_8BIT:
            return "rows"
    return "library"
