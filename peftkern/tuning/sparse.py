"""Which kernel serves trainable entries, and in which tiles: one readable place.

The rules compare bytes and operations on one H100 (SXM), in picoseconds; see ``model.py`` for the
constants they share. All sizes are known on the host: nothing looks at the positions.

| what | CUDA C++ | Triton |
|---|---|---|
| entries joined to the weight | all | where there is no CUDA library |
| a term of their own | up to ``CUDA_TERM_ROWS`` rows: no transpose, no list of bounds | more rows |
| sampled gradient by rows | all: fewer registers, more loads in flight | without the library |
| sampled gradient by tiles | | all: tensor cores |
"""

from __future__ import annotations

from dataclasses import dataclass

from peftkern.tuning.configs import _WANTED_PROGRAMS, RankConfig
from peftkern.tuning.model import _BYTES_PER_PS, _FLOP_PER_PS, _FUSED_SHARE

_L2_BYTES_PER_PS = 5.0  # what gathers of whole rows reach where they find them in the L2
CUDA_TERM_ROWS = 8
_FUSED_ROWS = 64  # up to here a quantized base is multiplied without dequantizing it


def own_term_wins(m: int, rows: int, cols: int, entries: int, quantized: bool) -> bool:
    """Whether ``x Dᵀ`` is added to the finished product, instead of joining D to the weight.

    Its own term: x transposed, for each entry 12 bytes of list and one column of x from the L2, y
    read and written. Joined: the weight copied (a quantized one of many rows is written out dense
    in any case), and for each entry 12 bytes of list and a sector of the weight both ways.
    """
    if quantized and m > _FUSED_ROWS:
        return False
    own = 4.0 * m * (rows + cols) / _BYTES_PER_PS
    own += entries * (12.0 + 2.0 * max(m, 16)) / _L2_BYTES_PER_PS
    joined = (4.0 * rows * cols + 76.0 * entries) / _BYTES_PER_PS
    return own < joined


def rows_win(m: int, rows: int, cols: int, entries: int, fp32: bool) -> bool:
    """Whether the sampled gradient is made of dot products of gathered rows, not from tiles.

    Rows: dy and x transposed, then a row of x an entry from the L2 (rows of dy repeat). Tiles: the
    products of the whole ``dyᵀ x`` at a Triton loop's share of the rate (fp32 ones are split in
    three at half of it), each result once into the L2.
    """
    size = 4.0 if fp32 else 2.0
    gathered = 2.0 * size * m * (rows + cols) / _BYTES_PER_PS
    gathered += entries * size * m / _L2_BYTES_PER_PS
    flop = 2.0 * m * rows * cols * (6.0 if fp32 else 1.0)
    tiles = flop / (_FLOP_PER_PS * _FUSED_SHARE) + 4.0 * rows * cols / _L2_BYTES_PER_PS
    return gathered < tiles


@dataclass(frozen=True)
class TilesConfig(RankConfig):
    """Tiles of ``dyᵀ x``: ``block_m`` rows a step, ``block_r`` x ``block_c`` results a tile.

    Args:
        programs: at most so many run, each with scratch for one tile.
    """

    programs: int = 264


def term_config(m: int) -> RankConfig:
    """Tiles of ``y += x Dᵀ``: rows of x, entries a step (block_c), rows of D (block_r)."""
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    return RankConfig(block_m, 64 if block_m == 64 else 128, 16 if m <= 64 else 32, 1, 4, 2)


def rows_config(m: int, entries: int) -> RankConfig:
    """Tiles of gathered dot products: elements of the rows a step, entries a program (block_c)."""
    block_m = 64 if m <= 64 else 256
    programs = -(-entries // 16)
    split = max(1, min(-(-4 * _WANTED_PROGRAMS // programs), m // (4 * block_m)))
    return RankConfig(block_m, 16, 0, split, 4, 2)


def tiles_config(m: int, rows: int, cols: int, fp32: bool) -> TilesConfig:
    """Tiles of the sampled gradient that tensor cores make."""
    side, block_m, warps, stages = (64, 32, 4, 2) if fp32 else (128, 64, 8, 3)
    items = -(-rows // side) * -(-cols // side)
    split = max(1, min(-(-_WANTED_PROGRAMS // max(items, 1)), m // 512))
    return TilesConfig(block_m, side, side, split, warps, stages)
