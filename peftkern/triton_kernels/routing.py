"""Rows of several adapters beside each other: which columns of a wide S belong to a row.

All adapters' ranks stand side by side, R in total; ``owner[c]`` is the adapter of column c,
``place[c]`` its rank within it, ``factor[c]`` the adapter's scaling. Everywhere but in its own
adapter's columns a row is zero, so that ordinary products over all R columns give each row its own
adapter and each adapter its own rows, without sorting rows and without the host knowing the ids.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _compact_kernel(
    wide_ptr,
    ids_ptr,
    starts_ptr,
    ranks_ptr,
    s_ptr,
    M,
    R,
    WIDEST,
    COUNT,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s[m, j] = wide[m, start of m's adapter + j]; zero behind its rank, and without one."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=-1)
    routed = mask_m & (ids >= 0) & (ids < COUNT)
    ids = tl.where(routed, ids, 0)
    start = tl.load(starts_ptr + ids, mask=routed, other=0)
    rank = tl.load(ranks_ptr + ids, mask=routed, other=0)
    rows = offs_m.to(tl.int64)
    for j_0 in range(0, WIDEST, BLOCK_R):
        offs_j = j_0 + tl.arange(0, BLOCK_R)
        own = routed[:, None] & (offs_j[None, :] < rank[:, None])
        value = tl.load(
            wide_ptr + rows[:, None] * R + start[:, None] + offs_j[None, :], mask=own, other=0.0
        )
        inside = mask_m[:, None] & (offs_j < WIDEST)[None, :]
        tl.store(s_ptr + rows[:, None] * WIDEST + offs_j[None, :], value, mask=inside)


@triton.jit
def _spread_kernel(
    s_ptr,
    ids_ptr,
    owner_ptr,
    place_ptr,
    factor_ptr,
    wide_ptr,
    M,
    R,
    WIDEST,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """wide[m, c] = factor[c] s[m, place[c]] where c belongs to m's adapter, else 0."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=-1)
    rows = offs_m.to(tl.int64)
    for c_0 in range(0, R, BLOCK_R):
        offs_c = c_0 + tl.arange(0, BLOCK_R)
        mask_c = offs_c < R
        owner = tl.load(owner_ptr + offs_c, mask=mask_c, other=-2)
        place = tl.load(place_ptr + offs_c, mask=mask_c, other=0)
        factor = tl.load(factor_ptr + offs_c, mask=mask_c, other=0.0)
        own = mask_m[:, None] & (ids[:, None] == owner[None, :])
        value = tl.load(s_ptr + rows[:, None] * WIDEST + place[None, :], mask=own, other=0.0)
        inside = mask_m[:, None] & mask_c[None, :]
        tl.store(
            wide_ptr + rows[:, None] * R + offs_c[None, :], value * factor[None, :], mask=inside
        )


@triton.jit
def _route_kernel(
    wide_ptr,
    ids_ptr,
    owner_ptr,
    factor_ptr,
    out_ptr,
    M,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[m, c] = factor[c] wide[m, c] where c belongs to m's adapter, else 0."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    ids = tl.load(ids_ptr + offs_m, mask=mask_m, other=-1)
    rows = offs_m.to(tl.int64)
    for c_0 in range(0, R, BLOCK_R):
        offs_c = c_0 + tl.arange(0, BLOCK_R)
        mask_c = offs_c < R
        owner = tl.load(owner_ptr + offs_c, mask=mask_c, other=-2)
        factor = tl.load(factor_ptr + offs_c, mask=mask_c, other=0.0)
        own = mask_m[:, None] & (ids[:, None] == owner[None, :])
        offsets = rows[:, None] * R + offs_c[None, :]
        value = tl.load(wide_ptr + offsets, mask=own, other=0.0) * factor[None, :]
        tl.store(out_ptr + offsets, value, mask=mask_m[:, None] & mask_c[None, :])
