"""Attention with a trainable prefix: its keys and values are extra tiles that every query sees.

Online softmax and its gradient by the row's log-sum-exp (Dao et al. 2022, arXiv 2205.14135). Every
sum is made by one program in fixed order; prefix gradients are parts by batch row and head of a
group, added in fixed order by ``_sum_kernel``.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton looks annotations of kernel arguments up as values, so only constexprs carry one.
from __future__ import annotations

import triton
import triton.language as tl

from peftkern.triton_kernels.device import exp, keep_tile, round_to, to_fp32
from peftkern.triton_kernels.low_rank import dot


@triton.jit
def _rows(
    ptr,
    offs,
    stride,
    length,
    D,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Rows ``offs`` of a [length, D] by its row stride, in DTYPE; zero outside."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs < length)[:, None] & (offs_d < D)[None, :]
    tile = tl.load(
        ptr + offs.to(tl.int64)[:, None] * stride + offs_d[None, :], mask=mask, other=0.0
    )
    if tile.dtype != DTYPE:
        return round_to(to_fp32(tile, INTERPRET), DTYPE, INTERPRET)
    else:
        return tile


@triton.jit
def _visible(
    s,
    offs_m,
    offs_n,
    Lq,
    Lk,
    mask_ptr,
    stride_mm,
    stride_mn,
    ATTN: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Logits of the sequence's own keys with the mask applied; ATTN: 0 none, 1 bool, 2 added."""
    inside = (offs_m < Lq)[:, None] & (offs_n < Lk)[None, :]
    if ATTN > 0:
        offsets = (
            offs_m.to(tl.int64)[:, None] * stride_mm + offs_n.to(tl.int64)[None, :] * stride_mn
        )
        given = tl.load(mask_ptr + offsets, mask=inside, other=0)
        if ATTN == 1:
            inside = inside & (given != 0)
        else:
            s += to_fp32(given, INTERPRET)
    if CAUSAL:  # the last query stands at the last key
        inside = inside & (offs_n[None, :] <= offs_m[:, None] + (Lk - Lq))
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _halves(x):
    """The even and the odd columns of x [M, D]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _joined_halves(a, b, acc, LEVELS: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a b^T in 2 to the LEVELS products, each rounded when it is added."""
    a_0, a_1 = _halves(a)
    b_0, b_1 = _halves(b)
    if LEVELS > 1:
        acc = _joined_halves(a_0, b_0, acc, LEVELS - 1, INTERPRET)
        return _joined_halves(a_1, b_1, acc, LEVELS - 1, INTERPRET)
    else:
        acc = dot(a_0, tl.trans(b_0), acc, "tf32x3", INTERPRET)
        return dot(a_1, tl.trans(b_1), acc, "tf32x3", INTERPRET)


@triton.jit
def _against(a, b, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """a b^T. Tensor cores truncate what they add to a running sum: fp32 sums are kept short."""
    acc = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    if PRECISION == "tf32x3" and a.shape[1] > 32:
        LEVELS: tl.constexpr = 2 if a.shape[1] > 64 else 1
        return _joined_halves(a, b, acc, LEVELS, INTERPRET)
    else:
        return dot(a, tl.trans(b), acc, PRECISION, INTERPRET)


@triton.jit
def _exp(x, PRECISION: tl.constexpr):
    if PRECISION == "tf32x3":
        return exp(x)
    else:
        return tl.exp(x)


@triton.jit
def _shares(s, lse, PRECISION: tl.constexpr):
    """exp(s - lse); rows that see nothing give zeros."""
    safe = tl.where(lse == float("-inf"), 0.0, lse)
    return _exp(s - safe[:, None], PRECISION)


@triton.jit
def _kept(
    value,
    row_0,
    col_0,
    cols,
    seed_ptr,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the [B Hq Lq, P + Lk] probabilities, or of their gradient, under the mask."""
    if DROPOUT:
        keep = keep_tile(row_0, col_0, cols, seed_ptr, threshold, BLOCK_M, BLOCK_N, QUADS)
        return tl.where(keep, value * keep_scale, 0.0)
    else:
        return value


@triton.jit
def _attend(
    q,
    k,
    v,
    s,
    acc,
    top,
    total,
    row_0,
    col_0,
    cols,
    seed_ptr,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One step of the online softmax over the logits ``s`` of a tile of keys."""
    new = tl.maximum(top, tl.max(s, axis=1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = _exp(s - safe[:, None], PRECISION)
    fade = _exp(top - safe, PRECISION)
    total = total * fade + tl.sum(p, axis=1)
    p = _kept(
        p, row_0, col_0, cols, seed_ptr, threshold, keep_scale, DROPOUT, QUADS, BLOCK_M, BLOCK_N
    )
    p = round_to(p, v.dtype, INTERPRET)
    acc = dot(p, v, acc * fade[:, None], PRECISION, INTERPRET)
    return acc, new, total


@triton.jit
def _prefix_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    mask_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    Hq,
    Hkv,
    Lq,
    Lk,
    P,
    D,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pb,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    scale,
    threshold,
    keep_scale,
    ATTN: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BLOCK_M queries of one head: the prefix's tiles, then those of the sequence."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    tiles = tl.cdiv(Lq, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    hkv = h // (Hq // Hkv)
    m_0 = (pid % tiles) * BLOCK_M
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    q = _rows(
        q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qm, Lq, D, BLOCK_D, DTYPE, INTERPRET
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    row_0 = head * Lq + m_0
    prefix = b * stride_pb + hkv * P * D
    for n_0 in range(0, P, BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        k = _rows(pk_ptr + prefix, offs_n, D, P, D, BLOCK_D, DTYPE, INTERPRET)
        v = _rows(pv_ptr + prefix, offs_n, D, P, D, BLOCK_D, DTYPE, INTERPRET)
        s = _against(q, k, PRECISION, INTERPRET) * scale
        s = tl.where((offs_n < P)[None, :], s, float("-inf"))
        acc, top, total = _attend(
            q, k, v, s, acc, top, total, row_0, n_0, P + Lk, seed_ptr, threshold, keep_scale,
            DROPOUT, QUADS, PRECISION, BLOCK_M, BLOCK_N, INTERPRET,
        )  # fmt: skip
    k_ptr += b * stride_kb + hkv * stride_kh
    v_ptr += b * stride_vb + hkv * stride_vh
    if ATTN > 0:
        mask_ptr += b * stride_mb + h * stride_mh
    end = Lk
    if CAUSAL:
        end = tl.minimum(Lk, m_0 + BLOCK_M + (Lk - Lq))
    for n_0 in range(0, end, BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, offs_n, stride_kn, Lk, D, BLOCK_D, DTYPE, INTERPRET)
        v = _rows(v_ptr, offs_n, stride_vn, Lk, D, BLOCK_D, DTYPE, INTERPRET)
        s = _against(q, k, PRECISION, INTERPRET) * scale
        s = _visible(
            s, offs_m, offs_n, Lq, Lk, mask_ptr, stride_mm, stride_mn, ATTN, CAUSAL, INTERPRET
        )
        acc, top, total = _attend(
            q, k, v, s, acc, top, total, row_0, P + n_0, P + Lk, seed_ptr, threshold, keep_scale,
            DROPOUT, QUADS, PRECISION, BLOCK_M, BLOCK_N, INTERPRET,
        )  # fmt: skip
    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    lse = tl.where(blind, float("-inf"), top + tl.log(tl.where(blind, 1.0, total)))
    mask_m, offs_d = offs_m < Lq, tl.arange(0, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * Lq + offs_m, lse, mask=mask_m)
    rows = ((b * Lq + offs_m) * Hq + h) * D
    tl.store(
        out_ptr + rows[:, None] + offs_d[None, :],
        round_to(acc, DTYPE, INTERPRET),
        mask=mask_m[:, None] & (offs_d < D)[None, :],
    )


@triton.jit
def _prefix_delta_kernel(
    dout_ptr,
    out_ptr,
    delta_ptr,
    Hq,
    Lq,
    D,
    stride_db,
    stride_dh,
    stride_dm,
    stride_ob,
    stride_oh,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """delta [B Hq, Lq]: the sum of dout out over each row."""
    tiles = tl.cdiv(Lq, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    offs_m = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    dout = _rows(
        dout_ptr + b * stride_db + h * stride_dh,
        offs_m,
        stride_dm,
        Lq,
        D,
        BLOCK_D,
        DTYPE,
        INTERPRET,
    )
    out = _rows(
        out_ptr + b * stride_ob + h * stride_oh, offs_m, stride_om, Lq, D, BLOCK_D, DTYPE, INTERPRET
    )
    delta = tl.sum(to_fp32(dout, INTERPRET) * to_fp32(out, INTERPRET), axis=1)
    tl.store(delta_ptr + head.to(tl.int64) * Lq + offs_m, delta, mask=offs_m < Lq)


@triton.jit
def _logit_gradient(
    s,
    v,
    dout,
    lse,
    delta,
    row_0,
    col_0,
    cols,
    seed_ptr,
    scale,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """(probabilities, gradient of the unscaled logits) of a tile, both fp32."""
    p = _shares(s, lse, PRECISION)
    dp = _against(dout, v, PRECISION, INTERPRET)
    dp = _kept(
        dp, row_0, col_0, cols, seed_ptr, threshold, keep_scale, DROPOUT, QUADS, BLOCK_M, BLOCK_N
    )
    return p, p * (dp - delta[:, None]) * scale


@triton.jit
def _prefix_dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    lse_ptr,
    delta_ptr,
    mask_ptr,
    seed_ptr,
    dq_ptr,
    Hq,
    Hkv,
    Lq,
    Lk,
    P,
    D,
    stride_db,
    stride_dh,
    stride_dm,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pb,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    scale,
    threshold,
    keep_scale,
    ATTN: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dq of BLOCK_M queries of one head, over the same tiles as the forward."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    tiles = tl.cdiv(Lq, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    hkv = h // (Hq // Hkv)
    m_0 = (pid % tiles) * BLOCK_M
    offs_m = m_0 + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Lq
    q_ptr += b * stride_qb + h * stride_qh
    dout_ptr += b * stride_db + h * stride_dh
    q = _rows(q_ptr, offs_m, stride_qm, Lq, D, BLOCK_D, DTYPE, INTERPRET)
    dout = _rows(dout_ptr, offs_m, stride_dm, Lq, D, BLOCK_D, DTYPE, INTERPRET)
    lse = tl.load(lse_ptr + head.to(tl.int64) * Lq + offs_m, mask=mask_m, other=0.0)
    delta = tl.load(delta_ptr + head.to(tl.int64) * Lq + offs_m, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_0 = head * Lq + m_0
    prefix = b * stride_pb + hkv * P * D
    for n_0 in range(0, P, BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        k = _rows(pk_ptr + prefix, offs_n, D, P, D, BLOCK_D, DTYPE, INTERPRET)
        v = _rows(pv_ptr + prefix, offs_n, D, P, D, BLOCK_D, DTYPE, INTERPRET)
        s = _against(q, k, PRECISION, INTERPRET) * scale
        s = tl.where((offs_n < P)[None, :], s, float("-inf"))
        _, ds = _logit_gradient(
            s, v, dout, lse, delta, row_0, n_0, P + Lk, seed_ptr, scale, threshold, keep_scale,
            DROPOUT, QUADS, PRECISION, BLOCK_M, BLOCK_N, INTERPRET,
        )  # fmt: skip
        dq = dot(round_to(ds, DTYPE, INTERPRET), k, dq, PRECISION, INTERPRET)
    k_ptr += b * stride_kb + hkv * stride_kh
    v_ptr += b * stride_vb + hkv * stride_vh
    if ATTN > 0:
        mask_ptr += b * stride_mb + h * stride_mh
    end = Lk
    if CAUSAL:
        end = tl.minimum(Lk, m_0 + BLOCK_M + (Lk - Lq))
    for n_0 in range(0, end, BLOCK_N):
        offs_n = n_0 + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, offs_n, stride_kn, Lk, D, BLOCK_D, DTYPE, INTERPRET)
        v = _rows(v_ptr, offs_n, stride_vn, Lk, D, BLOCK_D, DTYPE, INTERPRET)
        s = _against(q, k, PRECISION, INTERPRET) * scale
        s = _visible(
            s, offs_m, offs_n, Lq, Lk, mask_ptr, stride_mm, stride_mn, ATTN, CAUSAL, INTERPRET
        )
        _, ds = _logit_gradient(
            s, v, dout, lse, delta, row_0, P + n_0, P + Lk, seed_ptr, scale, threshold, keep_scale,
            DROPOUT, QUADS, PRECISION, BLOCK_M, BLOCK_N, INTERPRET,
        )  # fmt: skip
        dq = dot(round_to(ds, DTYPE, INTERPRET), k, dq, PRECISION, INTERPRET)
    offs_d = tl.arange(0, BLOCK_D)
    rows = ((b * Lq + offs_m) * Hq + h) * D
    tl.store(
        dq_ptr + rows[:, None] + offs_d[None, :],
        round_to(dq, DTYPE, INTERPRET),
        mask=mask_m[:, None] & (offs_d < D)[None, :],
    )


@triton.jit
def _prefix_dkv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    mask_ptr,
    seed_ptr,
    dk_ptr,
    dv_ptr,
    B,
    Hq,
    Hkv,
    Lq,
    Lk,
    P,
    D,
    stride_db,
    stride_dh,
    stride_dm,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    scale,
    threshold,
    keep_scale,
    PREFIX: tl.constexpr,
    ATTN: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    QUADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one head, over the queries of the heads of its group.

    PREFIX: k and v are the prefix, each program serves one head of the group, and what is stored is
    a part [head of the group, b, kv head, P, D] in fp32.
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    length = P if PREFIX else Lk
    tiles = tl.cdiv(length, BLOCK_N)
    pid = tl.program_id(0)
    n_0 = (pid % tiles) * BLOCK_N
    head = pid // tiles
    group = Hq // Hkv
    first, last, column = 0, group, P + n_0
    if PREFIX:
        first = head // (B * Hkv)
        last = first + 1
        head = head % (B * Hkv)
        column = n_0
    b, hkv = (head // Hkv).to(tl.int64), (head % Hkv).to(tl.int64)
    offs_n, offs_d = n_0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_ptr += b * stride_kb + hkv * stride_kh
    v_ptr += b * stride_vb + hkv * stride_vh
    k = _rows(k_ptr, offs_n, stride_kn, length, D, BLOCK_D, DTYPE, INTERPRET)
    v = _rows(v_ptr, offs_n, stride_vn, length, D, BLOCK_D, DTYPE, INTERPRET)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = 0
    if CAUSAL and not PREFIX:  # the first query that sees the first of these keys
        begin = tl.maximum(0, (n_0 - (Lk - Lq)) // BLOCK_M * BLOCK_M)
    for member in range(first, last):
        h = hkv * group + member
        row_head = (b * Hq + h) * Lq
        for m_0 in range(begin, Lq, BLOCK_M):
            offs_m = m_0 + tl.arange(0, BLOCK_M)
            mask_m = offs_m < Lq
            q = _rows(
                q_ptr + b * stride_qb + h * stride_qh,
                offs_m, stride_qm, Lq, D, BLOCK_D, DTYPE, INTERPRET,
            )  # fmt: skip
            dout = _rows(
                dout_ptr + b * stride_db + h * stride_dh,
                offs_m, stride_dm, Lq, D, BLOCK_D, DTYPE, INTERPRET,
            )  # fmt: skip
            lse = tl.load(lse_ptr + row_head + offs_m, mask=mask_m, other=0.0)
            delta = tl.load(delta_ptr + row_head + offs_m, mask=mask_m, other=0.0)
            s = _against(q, k, PRECISION, INTERPRET) * scale
            if PREFIX:
                s = tl.where(mask_m[:, None] & (offs_n < P)[None, :], s, float("-inf"))
            else:
                s = _visible(
                    s, offs_m, offs_n, Lq, Lk, mask_ptr + b * stride_mb + h * stride_mh,
                    stride_mm, stride_mn, ATTN, CAUSAL, INTERPRET,
                )  # fmt: skip
            row_0 = row_head + m_0
            p, ds = _logit_gradient(
                s, v, dout, lse, delta, row_0, column, P + Lk, seed_ptr, scale, threshold,
                keep_scale, DROPOUT, QUADS, PRECISION, BLOCK_M, BLOCK_N, INTERPRET,
            )  # fmt: skip
            p = _kept(
                p, row_0, column, P + Lk, seed_ptr, threshold, keep_scale,
                DROPOUT, QUADS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            dv = dot(tl.trans(round_to(p, DTYPE, INTERPRET)), dout, dv, PRECISION, INTERPRET)
            dk = dot(tl.trans(round_to(ds, DTYPE, INTERPRET)), q, dk, PRECISION, INTERPRET)
    mask = (offs_n < length)[:, None] & (offs_d < D)[None, :]
    if PREFIX:
        rows = (((tl.cast(first, tl.int64) * B + b) * Hkv + hkv) * P + offs_n) * D
    else:
        rows = ((b * Lk + offs_n) * Hkv + hkv) * D
    offsets = rows[:, None] + offs_d[None, :]
    tl.store(dk_ptr + offsets, round_to(dk, dk_ptr.dtype.element_ty, INTERPRET), mask=mask)
    tl.store(dv_ptr + offsets, round_to(dv, dv_ptr.dtype.element_ty, INTERPRET), mask=mask)
