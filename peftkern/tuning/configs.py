"""Tile shapes of the matmul kernels: frozen dataclasses and the heuristics that choose them.

The heuristics look at shapes only, so that a result does not depend on the GPU it was made on, and
know no GPU by name: any from compute capability 8.0 on is served.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftkern.tuning.model import STORED_BYTES

_WANTED_PROGRAMS = 256  # about two for each multiprocessor of the largest GPUs


@dataclass(frozen=True)
class LinearConfig:
    """Tiles of ``out[M, O] = x[M, C] W``.

    Args:
        block_m: rows of x a program.
        block_o: output features a program.
        block_c: contracted features a step.
        group: 4-bit bases: consecutive weights of a tile that share one statistic.
        split: into how many parts, summed later in fixed order, the contracted length is cut.
        num_warps: warps a program.
        num_stages: loads in flight.
    """

    block_m: int
    block_o: int
    block_c: int
    group: int
    split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RankConfig:
    """Tiles of the passes that contract with a thin matrix.

    Args:
        block_m: rows of the activation a step.
        block_c: columns of the activation a step or program.
        block_r: ranks a program.
        split: into how many parts, summed later in fixed order, the long axis is cut.
        num_warps: warps a program.
        num_stages: loads in flight.
    """

    block_m: int
    block_c: int
    block_r: int
    split: int
    num_warps: int
    num_stages: int


def _divisor(length: int, largest: int) -> int:
    """The largest power of two up to ``largest`` that divides ``length``."""
    while length % largest:
        largest //= 2
    return largest


def linear_config(
    m: int, rows: int, cols: int, format: str, blocksize: int, transposed: bool
) -> LinearConfig | None:
    """Tiles for a base stored as [rows, cols]; ``None`` where the fused kernel cannot serve it.

    Args:
        m: rows of the activation.
        rows: out_features of the stored base.
        cols: in_features of the stored base.
        format: ``"dense"``, ``"nf4"``, ``"fp4"`` or ``"int8"``.
        blocksize: of a 4-bit base, else 0.
        transposed: False for ``x Wᵀ``, True for ``dy W``.

    A tile of a 4-bit base must not reach over the end of a row, and 32 weights at least must share
    a statistic: ``cols`` has to be a multiple of 32.
    """
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    block_o, block_c = (64 if m <= 64 else 128), 64
    group = 0
    if format in ("nf4", "fp4"):
        run = _divisor(cols, 64)
        if run < 32:
            return None
        if transposed:
            block_o = _divisor(cols, block_o)
        else:
            block_c = run
        group = min(run, blocksize)
    outputs, contracted = (cols, rows) if transposed else (rows, cols)
    tiles = -(-outputs // block_o) * -(-m // block_m)
    split = 1
    # Parts of a long contraction fill a GPU that has too few tiles. Each keeps 8 steps at least,
    # and all of them (fp32, written and read) stay below half of the stored weights' bytes.
    if m <= 64:
        steps = -(-contracted // block_c)
        most = contracted * STORED_BYTES[format] / (16 * block_m)
        while tiles * split < _WANTED_PROGRAMS and steps // (2 * split) >= 8 and 2 * split <= most:
            split *= 2
    warps = 8 if block_m * block_o >= 128 * 64 else 4
    return LinearConfig(block_m, block_o, block_c, group, split, warps, 3)


def fits(config: LinearConfig, rows: int, cols: int, format: str, transposed: bool) -> bool:
    """Whether the fused kernel can use these tiles on a base [rows, cols].

    Tiles are powers of two, at least what ``tl.dot`` takes; a tile of a 4-bit base ends with a row
    at the latest and consists of whole groups.
    """
    blocks = (config.block_m, config.block_o, config.block_c, config.num_warps, config.split)
    if any(b < 1 or b & (b - 1) for b in blocks) or min(blocks[:3]) < 16 or config.num_stages < 1:
        return False
    if format not in ("nf4", "fp4"):
        return True
    along = config.block_o if transposed else config.block_c
    group = config.group
    return cols % along == 0 and group >= 32 and group & (group - 1) == 0 and along % group == 0


def _rank_block(rank: int) -> int:
    """A power of two from 16 (the least ``tl.dot`` takes) to 64 that holds ``rank`` or a part."""
    return 16 if rank <= 16 else 32 if rank <= 32 else 64


def shrink_config(m: int, contracted: int, rank: int) -> RankConfig:
    """Tiles of ``S = x Aᵀ``: rows of x times ranks, the contracted length in parts."""
    block_r = _rank_block(rank)
    # 64 ranks spill where fp32 operands are split, unless more warps share the tile.
    block_m = 16 if m <= 16 else 32 if m <= 32 or block_r == 64 else 64
    warps = 8 if block_r == 64 and block_m > 16 else 4
    split = max(1, min(16, contracted // 256)) if m <= 64 else max(1, min(8, contracted // 1024))
    return RankConfig(block_m, 64, block_r, split, warps, 3)


def adapter_gradient_config(m: int, features: int, rank: int) -> RankConfig:
    """Tiles of the pass over dY: columns of dY times ranks, the rows in parts.

    A program keeps B and dB for ``block_c`` columns in registers and leaves a part of dS for them:
    wider tiles would keep those parts smaller against dY, but spill (see the ahead-of-time report).
    """
    block_r = _rank_block(rank)
    block_c = {16: 128, 32: 64, 64: 32}[block_r]
    columns = -(-features // block_c)
    split = max(1, min(-(-_WANTED_PROGRAMS // max(columns, 1)), -(-m // 128)))
    return RankConfig(32, block_c, block_r, split, 4, 2)


def down_gradient_config(m: int, features: int, rank: int) -> RankConfig:
    """Tiles of ``dA = dSᵀ x``: ranks times columns of x, the rows in parts."""
    block_r = _rank_block(rank)
    block_c = 64 if block_r == 64 else 128
    columns = -(-features // block_c)
    split = max(1, min(-(-_WANTED_PROGRAMS // max(columns, 1)), -(-m // 256)))
    return RankConfig(32, block_c, block_r, split, 4, 3)


def attention_config(depth: int, fp32: bool, backward: bool) -> RankConfig:
    """Tiles of the attention kernels: queries a step, keys a step, and the padded head."""
    block_d = max(16, 1 << (depth - 1).bit_length())
    if fp32:  # products split in three, of short sums
        tiles = (16, 16) if block_d > 128 else (16, 32) if backward and block_d > 64 else (32, 32)
        return RankConfig(*tiles, block_d, 1, 8 if backward or block_d > 64 else 4, 1)
    if backward:
        tiles = (64, 32) if block_d <= 128 else (32, 32)
    else:
        tiles = (128, 64) if block_d <= 128 else (64, 32)
    return RankConfig(*tiles, block_d, 1, 8, 2)  # 4 warps spill under a mask


def norm_config(rows: int, cols: int, rank: int, format: str) -> RankConfig:
    """Tiles of ``W Aᵀ`` for DoRA's norms: rows and columns of the stored base times ranks.

    A tile of a 4-bit base must not reach over the end of a row.
    """
    # Wider tiles of fp32 weights, whose products are split in three, spill on 8.0.
    block_m, block_r = (64, 16) if rank <= 16 else (32, 32)
    block_c = _divisor(cols, 64) if format in ("nf4", "fp4") else 64
    programs = -(-rows // block_m) * -(-rank // block_r)
    split = max(1, min(-(-_WANTED_PROGRAMS // max(programs, 1)), cols // 512))
    return RankConfig(block_m, block_c, block_r, split, 4, 2)


def column_config(m: int, fp32: bool) -> RankConfig:
    """Tiles of the pass that adds a low-rank term to a finished product and scales its columns."""
    return RankConfig(16 if m <= 16 else 32, 64 if fp32 else 128, 16, 1, 4, 1)


def dora_gradient_config(m: int, features: int, rank: int, fp32: bool) -> RankConfig:
    """Tiles of DoRA's pass over dY: those of LoRA's, with room for the columns' scales."""
    config = adapter_gradient_config(m, features, rank)
    if fp32 and config.block_c > 64:  # products split in three
        return replace(config, block_c=64)
    return config


def share_config(
    depth: int, heads: int, queries: int, backward: bool, gradients: bool = True
) -> RankConfig:
    """Tiles of the prefix's share of attention: queries a step, prefix rows a step, padded head.

    Args:
        depth: of a head.
        heads: batch times heads: programs of the backward, each cut into ``split`` of queries.
        queries: of each head.
        backward: of the pass over dout.
        gradients: those of the prefix stay in registers beside the tiles.
    """
    block_d = max(16, 1 << (depth - 1).bit_length())
    if not backward:
        return RankConfig(64, 32, block_d, 1, 8 if block_d > 128 else 4, 1)
    split = max(1, min(-(-_WANTED_PROGRAMS // max(heads, 1)), -(-queries // 256)))
    tiles = (32, 64) if block_d <= 128 else (16, 32)
    few = block_d <= (64 if gradients else 128)
    return RankConfig(*tiles, block_d, split, 4 if few else 8, 1)
