"""Tiles of the bottleneck adapter, and which of its ways serves which shape.

What bounds a launch by rows is less the memory than the L2, which hands the weights to every
program. Bytes over rates of one H100 (SXM) choose; see ``model.py`` for what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftkern.tuning.configs import _WANTED_PROGRAMS, RankConfig, _rank_block
from peftkern.tuning.model import _BYTES_PER_PS

# By whole rows, measured on an H100: 4096 rows of 4096 at rank 64 take 108, 120 and 150 us in
# programs of 32, 64 and 128 rows.
_L2_BYTES_PER_PS = 2.2
_SM_BYTES_PER_PS = 0.025  # from the L2 into one multiprocessor
_SMS = 132
_LAUNCHES_PS = 6e6  # what the passes cost more in launches
_LAUNCH_PS = 2e6
_THIN_LAUNCH_PS, _THIN_BYTES_PER_PS = 5e6, 2.4  # of cuBLAS' products with a thin matrix
_LARGEST_RANK = {False: 128, True: 64}  # whose bottleneck a program keeps; True: fp32 weights


@dataclass(frozen=True)
class BottleneckConfig(RankConfig):
    """Tiles of the kernels by whole rows; ``block_c`` columns of x a step.

    Args:
        block_n: output features a step.
    """

    block_n: int = 64


def _power(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def _by_rows(m: int, c: int, n: int, rank: int, block_m: int, backward: bool) -> float:
    """Picoseconds of a launch in which a program takes ``block_m`` whole rows."""
    programs = -(-m // block_m)
    rows = 2.0 * block_m * (c + 2 * n if not backward else 2 * c + 2 * n)
    own = rows + 2.0 * rank * (c + n + (c if backward else 0))
    waves = -(-programs // _SMS)
    return max(programs * own / _L2_BYTES_PER_PS, waves * own / _SM_BYTES_PER_PS)


def _by_library(m: int, c: int, n: int, rank: int, fp32: bool) -> float:
    """Picoseconds of cuBLAS' thin product and the pass behind it, forward.

    Measured on one H200 at 4096 rows of 4096: the product takes 19 us, a copy of x 20 us.
    """
    ranks = rank * (3 if fp32 else 1)
    product = _THIN_LAUNCH_PS + 2.0 * (m * c + ranks * c) / _THIN_BYTES_PER_PS
    return product + _LAUNCH_PS + 4.0 * m * n / _BYTES_PER_PS


def _by_passes(m: int, c: int, n: int, rank: int, backward: bool) -> float:
    """Picoseconds of the passes: x, dy and the residual each once more, and launches."""
    moved = 2.0 * m * (c + 2 * n if not backward else 2 * c + 2 * n)
    return moved / _BYTES_PER_PS + 2.0 * rank * (c + n) / _BYTES_PER_PS + _LAUNCHES_PS


def _sizes(rank: int, fp32: bool, backward: bool) -> tuple[int, ...]:
    """Rows of a program that do not spill on 8.0."""
    if fp32:
        return (16, 32)
    return (16, 32, 64) if backward and rank > 64 else (16, 32, 64, 128)


def rows_config(m: int, c: int, n: int, rank: int, fp32: bool, backward: bool) -> BottleneckConfig:
    """Tiles of the launch by whole rows.

    Args:
        m: rows.
        c: input features.
        n: output features.
        rank: of the bottleneck, at most 128 (64 with fp32 weights).
        fp32: whether the weights are fp32, whose products are split in three.
        backward: for the launch from x and dy to dx.
    """
    sizes = _sizes(rank, fp32, backward)
    block_m = min(sizes, key=lambda size: _by_rows(m, c, n, rank, size, backward))
    block_r = _power(rank)
    wide = not fp32 and block_m <= 64 and block_r <= 64 and not backward
    many = block_m == 128 or block_m * block_r >= 64 * 128
    warps = 8 if many or (fp32 and backward) else 4  # four of the last spill on 9.0
    # Tensor cores truncate what they add to a running sum: those that stay fp32 are kept short.
    block_c = 32 if fp32 else 128 if wide else 64
    return BottleneckConfig(block_m, block_c, block_r, 1, warps, 3, 64)


def bottleneck_way(
    m: int, c: int, n: int, rank: int, fp32: bool, backward: bool, products: bool
) -> str:
    """Which way serves: ``"rows"``, ``"library"`` or ``"passes"``.

    Args:
        m: rows, at least one, as of the features.
        c: input features.
        n: output features.
        rank: of the bottleneck.
        fp32: whether the weights are fp32.
        backward: from dy to dx and the gradients of the weights.
        products: whether cuBLAS' thin products can take the operands.
    """
    other = "library" if products else "passes"
    if rank > _LARGEST_RANK[fp32] or (backward and products):
        return other  # cuBLAS makes the gradients of the weights in a third of the time
    sizes = _sizes(rank, fp32, backward)
    rows = min(_by_rows(m, c, n, rank, size, backward) for size in sizes)
    if products:
        return "rows" if rows < _by_library(m, c, n, rank, fp32) else other
    return "rows" if rows < _by_passes(m, c, n, rank, backward) else other


def expand_config(m: int, n: int, rank: int, fp32: bool) -> RankConfig:
    """Tiles of the pass from a bottleneck to output features: large where they are many."""
    if -(-m // 64) * -(-n // 128) >= 2 * _SMS and not fp32:  # two programs a multiprocessor
        return RankConfig(64, 128, min(_power(rank), 64), 1, 8, 3)
    block_m = 16 if m <= 16 else 32
    return RankConfig(block_m, 64 if fp32 else 128, 16 if rank <= 16 else 32, 1, 4, 2)


def hidden_gradient_config(m: int, features: int, rank: int, fp32: bool) -> RankConfig:
    """Tiles of ``dh = (scale g) U``: rows of dy times ranks, the features in parts."""
    block_r = _rank_block(rank)
    block_m = 16 if m <= 16 else 32
    programs = -(-m // block_m) * -(-rank // block_r)
    split = max(1, min(-(-_WANTED_PROGRAMS // max(programs, 1)), features // 256))
    return RankConfig(block_m, 64, min(block_r, 32) if fp32 else block_r, split, 4, 2)


def up_gradient_config(m: int, features: int, rank: int, fp32: bool) -> RankConfig:
    """Tiles of ``gᵀ h``: columns of dy times ranks, all of them where they fit; rows in parts."""
    block_r = min(_power(rank), 32 if fp32 else 128)
    block_m = 32 if fp32 else 64
    programs = -(-features // 64) * -(-rank // block_r)
    split = max(1, min(-(-_WANTED_PROGRAMS // max(programs, 1)), -(-m // (4 * block_m))))
    return RankConfig(block_m, 64, block_r, split, 4, 2)
