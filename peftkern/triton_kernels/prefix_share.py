"""The prefix's share of attention, joined to the sequence's share that a library has computed.

The forward goes on with the online softmax where the library stopped: its output, its row's
log-sum-exp and a total of one. The backward adds to the library's dq in place and makes the prefix
gradients in the same pass, in parts by head and range of queries that are added in order.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.device import round_to, to_fp32
from peftkern.triton_kernels.low_rank import dot
from peftkern.triton_kernels.prefix import _rows


@triton.jit
def _share_forward_kernel(
    q_ptr,
    pk_ptr,
    pv_ptr,
    own_ptr,
    own_lse_ptr,
    out_ptr,
    lse_ptr,
    Hq,
    Hkv,
    Lq,
    P,
    D,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_ob,
    stride_oh,
    stride_om,
    stride_pb,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out and lse of the whole row; ``out`` [B, Lq, Hq, D] may lie over ``own``."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    tiles = tl.cdiv(Lq, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    offs_m = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, offs_d = offs_m < Lq, tl.arange(0, BLOCK_D)
    prefix = b * stride_pb + h // (Hq // Hkv) * P * D
    q = _rows(
        q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qm, Lq, D, BLOCK_D, DTYPE, INTERPRET
    )
    own = _rows(
        own_ptr + b * stride_ob + h * stride_oh, offs_m, stride_om, Lq, D, BLOCK_D, DTYPE, INTERPRET
    )
    rows_lse = head.to(tl.int64) * Lq + offs_m
    acc = to_fp32(own, INTERPRET)
    top = tl.load(own_lse_ptr + rows_lse, mask=mask_m, other=0.0)
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    for n_0 in range(0, P, BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        k = _rows(pk_ptr + prefix, offs_n, D, P, D, BLOCK_D, DTYPE, INTERPRET)
        v = _rows(pv_ptr + prefix, offs_n, D, P, D, BLOCK_D, DTYPE, INTERPRET)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        s = dot(q, tl.trans(k), s, "native", INTERPRET) * scale
        s = tl.where((offs_n < P)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp(s - new[:, None])
        fade = tl.exp(top - new)
        total = total * fade + tl.sum(p, axis=1)
        acc = dot(round_to(p, DTYPE, INTERPRET), v, acc * fade[:, None], "native", INTERPRET)
        top = new
    tl.store(lse_ptr + rows_lse, top + tl.log(total), mask=mask_m)
    rows = ((b * Lq + offs_m) * Hq + h) * D
    tl.store(
        out_ptr + rows[:, None] + offs_d[None, :],
        round_to(acc / total[:, None], DTYPE, INTERPRET),
        mask=mask_m[:, None] & (offs_d < D)[None, :],
    )


@triton.jit
def _share_backward_kernel(
    dout_ptr,
    q_ptr,
    pk_ptr,
    pv_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    dk_parts_ptr,
    dv_parts_ptr,
    B,
    Hq,
    Hkv,
    Lq,
    P,
    D,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_ob,
    stride_oh,
    stride_om,
    stride_pb,
    scale,
    NEED_DQ: tl.constexpr,
    NEED_DP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One head and range of queries: dq += the prefix's share, and parts of dpk and dpv.

    dq is [B, Lq, Hq, D]; parts are [range, head of the group, b, kv head, P, D]. Beyond one tile of
    the prefix the queries are walked again for each.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    pid = tl.program_id(0)
    part, head = pid // (B * Hq), pid % (B * Hq)
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    group = Hq // Hkv
    hkv = h // group
    prefix = b * stride_pb + hkv * P * D
    dout_ptr += b * stride_gb + h * stride_gh
    q_ptr += b * stride_qb + h * stride_qh
    out_ptr += b * stride_ob + h * stride_oh
    if NEED_DQ:
        dq_ptr += (b * Lq * Hq + h) * D
    lse_ptr += head.to(tl.int64) * Lq
    offs_d = tl.arange(0, BLOCK_D)
    place = ((part.to(tl.int64) * group + h % group) * B + b) * Hkv + hkv
    steps = tl.cdiv(tl.cdiv(Lq, BLOCK_M), SPLIT)
    begin = part * steps * BLOCK_M
    for n_0 in range(0, P, BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        k = _rows(pk_ptr + prefix, offs_n, D, P, D, BLOCK_D, DTYPE, INTERPRET)
        v = _rows(pv_ptr + prefix, offs_n, D, P, D, BLOCK_D, DTYPE, INTERPRET)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for m_0 in range(begin, tl.minimum(begin + steps * BLOCK_M, Lq), BLOCK_M):
            offs_m = m_0 + tl.arange(0, BLOCK_M)
            mask_m = offs_m < Lq
            q = _rows(q_ptr, offs_m, stride_qm, Lq, D, BLOCK_D, DTYPE, INTERPRET)
            dout = _rows(dout_ptr, offs_m, stride_gm, Lq, D, BLOCK_D, DTYPE, INTERPRET)
            out = _rows(out_ptr, offs_m, stride_om, Lq, D, BLOCK_D, DTYPE, INTERPRET)
            delta = tl.sum(to_fp32(dout, INTERPRET) * to_fp32(out, INTERPRET), axis=1)
            lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)
            # Everything [keys, queries]: probabilities are then first operands in registers.
            s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            s = dot(k, tl.trans(q), s, "native", INTERPRET) * scale
            visible = (offs_n < P)[:, None] & mask_m[None, :]
            p = tl.exp(tl.where(visible, s - lse[None, :], float("-inf")))
            dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            dp = dot(v, tl.trans(dout), dp, "native", INTERPRET)
            ds = round_to(p * (dp - delta[None, :]) * scale, DTYPE, INTERPRET)
            if NEED_DP:
                dv = dot(round_to(p, DTYPE, INTERPRET), dout, dv, "native", INTERPRET)
                dk = dot(ds, q, dk, "native", INTERPRET)
            if NEED_DQ:
                mask = mask_m[:, None] & (offs_d < D)[None, :]
                rows = dq_ptr + offs_m.to(tl.int64)[:, None] * Hq * D + offs_d[None, :]
                dq = to_fp32(tl.load(rows, mask=mask, other=0.0), INTERPRET)
                dq = dot(tl.trans(ds), k, dq, "native", INTERPRET)
                tl.store(rows, round_to(dq, DTYPE, INTERPRET), mask=mask)
        if NEED_DP:
            mask = (offs_n < P)[:, None] & (offs_d < D)[None, :]
            offsets = (place * P + offs_n)[:, None] * D + offs_d[None, :]
            tl.store(dk_parts_ptr + offsets, dk, mask=mask)
            tl.store(dv_parts_ptr + offsets, dv, mask=mask)
        tl.debug_barrier()  # dq is read back in the next turn
