"""Contracts of attention with a trainable prefix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.ops import checks
from peftkern.ops.prefix import reference
from peftkern.registry import OpSpec, Sample, define_op

# (B, Hq, Hkv, Lq, Lk, D, P, mask, causal, dropout, fp32 prefix, prefix per row)
_CASES = (
    (2, 4, 2, 37, 37, 64, 5, "none", True, 0.0, True, False),
    (1, 2, 2, 1, 70, 16, 20, "none", False, 0.0, False, False),
    (3, 6, 2, 9, 9, 24, 3, "bool-row", True, 0.0, True, False),
    (2, 3, 3, 130, 67, 32, 33, "bool-head", False, 0.0, False, False),
    (2, 4, 4, 13, 21, 40, 1, "float-head", True, 0.0, True, True),
    (2, 2, 1, 20, 20, 8, 7, "float-row", False, 0.25, False, False),
    (1, 4, 1, 67, 150, 80, 130, "none", True, 0.5, True, False),
    (2, 2, 2, 5, 6, 7, 0, "bool-blind", False, 0.0, True, False),
    (2, 2, 1, 6, 0, 16, 4, "none", False, 0.0, True, False),
    (2, 2, 1, 0, 6, 16, 4, "none", False, 0.0, True, False),
    (0, 2, 1, 4, 4, 16, 4, "none", True, 0.0, True, False),
    (1, 1, 1, 1, 1, 1, 1, "none", True, 0.0, False, True),
    (2, 4, 2, 70, 70, 64, 69, "none", True, 0.0, True, False),
    (2, 2, 1, 40, 23, 128, 33, "none", False, 0.0, False, True),
    (1, 2, 2, 33, 33, 8, 0, "none", True, 0.0, True, False),
)


def _randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _heads(name: str, value: Tensor, q: Tensor, shape: tuple[int, ...]) -> None:
    checks.dtype_in(name, value, (q.dtype,))
    checks.shape_is(name, value, shape)
    checks.same_device("q", q, **{name: value})
    _rows_contiguous(name, value)


def _rows_contiguous(name: str, value: Tensor) -> None:
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(
            f"{name}: got strides {value.stride()}, expected a last dimension without gaps"
        )


def _check_prefix(name: str, prefix: Tensor, q: Tensor, k: Tensor) -> None:
    wide = torch.promote_types(q.dtype, torch.float32)
    checks.dtype_in(name, prefix, (q.dtype, wide))
    checks.same_device("q", q, **{name: prefix})
    checks.contiguous(name, prefix)
    batch, heads, _, depth = k.shape
    if prefix.dim() == 4:
        checks.shape_is(name, prefix, (batch, heads, prefix.shape[2], depth))
        return
    checks.ndim(name, prefix, 3)
    checks.shape_is(name, prefix, (heads, prefix.shape[1], depth))


def _check_mask(q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    queries, keys = q.shape[2], k.shape[2]
    if is_causal and queries > keys:
        raise ValueError(
            f"is_causal: got {queries} queries and {keys} keys, expected at least as many keys: "
            "the last query stands at the last key"
        )
    if attn_mask is None:
        return
    checks.same_device("q", q, attn_mask=attn_mask)
    wide = torch.promote_types(q.dtype, torch.float32)
    checks.dtype_in("attn_mask", attn_mask, (torch.bool, q.dtype, wide))
    checks.ndim("attn_mask", attn_mask, 4)
    full = (*q.shape[:3], keys)
    if any(size not in (1, want) for size, want in zip(attn_mask.shape, full, strict=True)):
        raise ValueError(
            f"attn_mask: got shape {tuple(attn_mask.shape)}, expected one that broadcasts to "
            f"{full}; the prefix is always visible and has no columns in it"
        )


def _check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    checks.dtype_in("q", q, checks.FLOATS)
    checks.ndim("q", q, 4)
    checks.ndim("k", k, 4)
    batch, heads, _, depth = q.shape
    _rows_contiguous("q", q)
    _heads("k", k, q, (batch, k.shape[1], k.shape[2], depth))
    _heads("v", v, q, tuple(k.shape))
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} heads, expected a divisor of the {heads} of q")
    _check_prefix("prefix_k", prefix_k, q, k)
    _check_prefix("prefix_v", prefix_v, q, k)
    checks.shape_is("prefix_v", prefix_v, tuple(prefix_k.shape))
    checks.dtype_in("prefix_v", prefix_v, (prefix_k.dtype,))
    _check_mask(q, k, attn_mask, is_causal)
    checks.dropout_arguments(q, dropout_p, seed)


def _like_heads(x: Tensor) -> Tensor:
    batch, heads, length, depth = x.shape
    return x.new_empty((batch, length, heads, depth)).transpose(1, 2)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return _like_heads(q), q.new_empty(q.shape[:3], dtype=wide)


def _mask(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor | None:
    """Masks as models make them: padding by row, a bias by head, rows that see nothing."""
    batch, heads, queries, keys = shape
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(keys)
    if kind == "bool-row":  # the left half of every other row is padding
        mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
        mask[::2, ..., : keys // 2] = False
        return mask
    if kind == "bool-head":
        return torch.rand(1, heads, queries, keys, generator=generator) > 0.3
    if kind == "bool-blind":
        mask = torch.rand(batch, heads, queries, keys, generator=generator) > 0.5
        mask[0, :, queries // 2] = False
        return mask
    if kind == "float-head":  # a position bias, one head's stored as the model computes it
        return torch.randn(1, queries, keys, heads, generator=generator).permute(0, 3, 1, 2)
    mask = torch.zeros(batch, 1, queries, keys, dtype=dtype)
    mask[0, ..., keys // 3 :] = torch.finfo(dtype).min
    return mask


_Case = tuple[int, int, int, int, int, int, int, str, bool, float, bool, bool]


def _name(case: _Case) -> str:
    b, hq, hkv, lq, lk, d, p, mask, causal, dropout, master, per_row = case
    marks = [f"b{b}", f"h{hq}:{hkv}", f"q{lq}", f"k{lk}", f"d{d}", f"p{p}", mask]
    marks += ["causal"] * causal + [f"drop{dropout}"] * (dropout > 0)
    return "-".join(marks + ["fp32p"] * master + ["rows"] * per_row)


def _samples_forward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, case in enumerate(_CASES):
        b, hq, hkv, lq, lk, d, p, kind, causal, dropout, master, per_row = case
        # As projections leave them: [B, L, H, D], seen through a transpose; every third plain.
        shapes = ((b, lq, hq, d), (b, lk, hkv, d), (b, lk, hkv, d))
        q, k, v = (_randn(s, dtype, i + j).transpose(1, 2) for j, s in enumerate(shapes))
        if i % 3 == 2:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        wide = torch.promote_types(dtype, torch.float32) if master else dtype
        shape = (b, hkv, p, d) if per_row else (hkv, p, d)
        prefix_k, prefix_v = _randn(shape, wide, i + 5), _randn(shape, wide, i + 6)
        mask = _mask(kind, (b, hq, lq, lk), dtype)
        seed = torch.tensor([i * 991 - 7]) if dropout else None
        args = (q, k, v, prefix_k, prefix_v, mask, causal, d**-0.5, dropout, seed)
        yield Sample(_name(case), args)


def _baseline_shares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, keys and values of eager attention over concatenated keys, in q's dtype."""
    keys, values = (
        reference.joined(p, x, q.shape[1], q.dtype) for p, x in ((prefix_k, k), (prefix_v, v))
    )
    logits = torch.matmul(q, keys.transpose(2, 3)) * scale
    return reference.masked_logits(logits, attn_mask, is_causal, k.shape[2]), keys, values


def _baseline_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    bundle = (q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale)
    logits, _, values = _baseline_shares(*bundle)
    shares = torch.softmax(logits, dim=-1, dtype=wide).nan_to_num(0.0).to(q.dtype)
    kept = reference.kept_share(shares.shape, dropout_p, seed, q.dtype)
    out = torch.matmul(shares if kept is None else shares * kept, values)
    return reference.heads_inside(out), torch.logsumexp(logits.to(wide), dim=-1)


define_op(
    OpSpec(
        name="prefix_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
        "Tensor? attn_mask, bool is_causal, float scale, float dropout_p, Tensor? seed)"
        " -> (Tensor out, Tensor lse)",
        check=_check_forward,
        fake=_fake_forward,
        reference=reference.prefix_attention,
        samples=_samples_forward,
        tolerance="error_rule",
        baseline=_baseline_forward,
        bench=("prefix",),
    )
)


def _check_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dqkv: bool,
    need_dprefix: bool,
) -> None:
    bundle = (q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale, dropout_p, seed)
    _check_forward(*bundle)
    _heads("dout", dout, q, tuple(q.shape))
    _heads("out", out, q, tuple(q.shape))
    checks.dtype_in("lse", lse, (torch.promote_types(q.dtype, torch.float32),))
    checks.shape_is("lse", lse, tuple(q.shape[:3]))
    checks.contiguous("lse", lse)
    checks.same_device("q", q, lse=lse)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dqkv: bool,
    need_dprefix: bool,
) -> tuple[Tensor, ...]:
    own = tuple(_like_heads(t) if need_dqkv else t.new_empty(0) for t in (q, k, v))
    shape = prefix_k.shape if need_dprefix else (0,)
    return (*own, prefix_k.new_empty(shape), prefix_v.new_empty(shape))


def _samples_backward(dtype: torch.dtype) -> Iterator[Sample]:
    for i, sample in enumerate(_samples_forward(dtype)):
        q, k, v, prefix_k, prefix_v, *rest = sample.args
        dout = _randn((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), dtype, i + 9)
        out, lse = reference.prefix_attention(*sample.args)
        needs = ((True, True), (False, True), (True, False))[i % 3]
        saved = (dout.transpose(1, 2), q, k, v, prefix_k, prefix_v, out, lse)
        yield Sample(sample.name, (*saved, *rest, *needs))
        if needs != (True, True):
            yield Sample(sample.name + "-all", (*saved, *rest, True, True))


def _baseline_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dqkv: bool,
    need_dprefix: bool,
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    bundle = (q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale)
    logits, keys, values = _baseline_shares(*bundle)
    shares = torch.softmax(logits, dim=-1, dtype=wide).nan_to_num(0.0)
    dshares = torch.matmul(dout, values.transpose(2, 3)).to(wide)
    kept = reference.kept_share(shares.shape, dropout_p, seed, wide)
    dropped = shares if kept is None else shares * kept
    dshares = dshares if kept is None else dshares * kept
    delta = (shares * dshares).sum(-1, keepdim=True)
    dlogits = (shares * (dshares - delta)).to(q.dtype)
    dq = torch.matmul(dlogits, keys) * scale
    dkeys = torch.matmul(dlogits.transpose(2, 3), q) * scale
    dvalues = torch.matmul(dropped.to(q.dtype).transpose(2, 3), dout)
    groups = (*k.shape[:2], q.shape[1] // k.shape[1], *keys.shape[2:])
    dkeys, dvalues = (g.view(groups).sum(2) for g in (dkeys, dvalues))
    length = prefix_k.shape[-2]
    results: list[Tensor] = [q.new_empty(0), k.new_empty(0), v.new_empty(0)]
    if need_dqkv:
        own = (dq, dkeys[:, :, length:], dvalues[:, :, length:])
        results = [reference.heads_inside(g) for g in own]
    for prefix, whole in ((prefix_k, dkeys), (prefix_v, dvalues)):
        gradient = whole[:, :, :length] if need_dprefix else whole.new_empty(0)
        if need_dprefix and prefix.dim() == 3:
            gradient = gradient.sum(0)
        results.append(gradient.to(prefix.dtype).contiguous())
    return tuple(results)


define_op(
    OpSpec(
        name="prefix_attention_backward",
        schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, "
        "Tensor out, Tensor lse, Tensor? attn_mask, bool is_causal, float scale, "
        "float dropout_p, Tensor? seed, bool need_dqkv, bool need_dprefix)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        check=_check_backward,
        fake=_fake_backward,
        reference=reference.prefix_attention_backward,
        samples=_samples_backward,
        tolerance="error_rule",
        baseline=_baseline_backward,
        factor=2.0,
        bench=("prefix",),
    )
)
